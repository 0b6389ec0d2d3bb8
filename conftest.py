"Collects `nbs/**/*.ipynb` as tests, so that one `pytest` runs and counts tests and notebooks together."
import gc
import os
import shutil
import signal
import tempfile
from pathlib import Path

import pytest

root = Path(__file__).parent


def pytest_configure(config):
    "Tests and notebooks store what they compute in a home of their own, not in the user's."
    os.environ["MUSICLAB_HOME"] = config.musiclab_home = tempfile.mkdtemp(prefix="musiclab-home-")

def pytest_unconfigure(config):
    shutil.rmtree(config.musiclab_home, ignore_errors=True)


def pytest_collection_finish(session):
    """What the imports have made, some millions of objects, stays to the end: the garbage collector need not walk through it again and again.
    It does at each `free()` otherwise, which takes longer than many a test."""
    gc.collect()
    gc.freeze()


def global_state() -> dict:
    "What a notebook must leave as it found it: the notebooks of one worker share a process."
    import torch
    return {
        "working directory": os.getcwd(),
        "signal handlers": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
        "torch settings": [torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(),
                           torch.are_deterministic_algorithms_enabled()],
    }


class NotebookFailed(Exception):
    pass


class Notebook(pytest.Item):
    "One notebook, run cell by cell with nbdev's own runner (what `nbdev-test` does)."

    def runtest(self):
        from nbdev.config import get_config
        from nbdev.test import test_nb
        before = global_state()
        interrupt = signal.getsignal(signal.SIGINT)
        try:
            passed, _ = test_nb(self.path, skip_flags=get_config(root).tst_flags.split(), basepath=root, showerr=True,
                                force_flags=os.environ.get("NB_FLAGS", "").split())
        finally: signal.signal(signal.SIGINT, interrupt)
        if not passed: raise NotebookFailed(f"{self.path.relative_to(root)}: see the traceback of its cell in the captured output")
        changed = [name for name, now in global_state().items() if now != before[name]]
        if changed: raise NotebookFailed(f"{self.path.relative_to(root)} leaves changed: {', '.join(changed)}")

    def repr_failure(self, error):
        return str(error.value) if isinstance(error.value, NotebookFailed) else super().repr_failure(error)

    def reportinfo(self): return self.path, None, f"notebook {self.path.relative_to(root)}"


class NotebookFile(pytest.File):
    def collect(self): yield Notebook.from_parent(self, name=self.path.stem)


def pytest_collect_file(file_path, parent):
    if file_path.suffix == ".ipynb" and root / "nbs" in file_path.parents and not file_path.name.startswith("_"):
        return NotebookFile.from_parent(parent, path=file_path)
