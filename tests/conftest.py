"What tests share: the music and the parity cases where they are, and a way to run without root's rights."
import ctypes
import multiprocessing
import os
import pickle
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def music() -> Path:
    "The folder of real music, `$MUSICLAB_TEST_DATA`."
    folder = os.environ.get("MUSICLAB_TEST_DATA")
    if not folder: pytest.skip("real music is needed: set MUSICLAB_TEST_DATA to its folder")
    return Path(folder)


@pytest.fixture(scope="session")
def parity() -> Path:
    "The reference cases: all of them in `$MUSICLAB_PARITY`, else the choice that this repository carries."
    return Path(os.environ.get("MUSICLAB_PARITY") or Path(__file__).parent / "parity" / "cases")


def drop_root() -> None:
    "Give up every capability: root then meets file permissions like anyone else (and still owns its own files)."
    version_3, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    if os.geteuid() == 0 and ctypes.CDLL(None, use_errno=True).capset(version_3, none): raise OSError(ctypes.get_errno(), "capset")


def in_child(pipe, fn, args) -> None:
    try:
        drop_root()
        answer = True, fn(*args)
    except BaseException as error: answer = False, error
    try: data = pickle.dumps(answer)
    except Exception: data = pickle.dumps((answer[0], repr(answer[1]) if answer[0] else RuntimeError(repr(answer[1]))))
    pipe.send_bytes(data)


@pytest.fixture(scope="session")
def as_nobody():
    "`as_nobody(fn, *args)` runs `fn` in a child process without root's rights; gives back what it returns, raises what it raises."
    def call(fn, *args):
        fork = multiprocessing.get_context("fork")
        ours, theirs = fork.Pipe(duplex=False)
        child = fork.Process(target=in_child, args=(theirs, fn, args))
        child.start()
        theirs.close()
        if not ours.poll(60):
            child.kill()
            raise TimeoutError("the child process gave no answer in 60 s")
        try: fine, value = pickle.loads(ours.recv_bytes())
        except EOFError: raise RuntimeError(f"the child process died with exit code {child.exitcode}") from None
        finally: child.join()
        if not fine: raise value
        return value
    return call
