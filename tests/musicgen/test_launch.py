"Doctor and launch against clones that are made for it: every accident has its message, and nothing is left running."
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from musiclab import data
from musiclab.core import MusiclabError
from musiclab.log import read_log
from musiclab.musicgen.audiocraft import prepare
from musiclab.musicgen.clone import environment, examine
from musiclab.musicgen.launch import as_typed, launch
from musiclab.musicgen.overrides import Craft
from tests.fake_audiocraft import STUBBORN, train, write_clone
from tests.small_audio import write_songs

root = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def crafted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("crafted")
    return prepare(data.check(data.read(write_songs(folder / "songs", 3))).tracks, folder / "data")


@pytest.fixture
def settings(crafted, tmp_path):
    "Settings for a clone that is made with these changes."
    def make(changes=None, **clone):
        write_clone(tmp_path / "clone", **clone)
        paths = dict(data=str(crafted), clone=str(tmp_path / "clone"), python=str(tmp_path / "clone/bin/python"), output=str(tmp_path / "run"))
        return Craft(**paths | dict(epochs=2, updates=4, trackers=[]) | (changes or {}))
    return make


def alive(pid: int) -> bool:
    try: return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError): return False

def wait_for(what, seconds=30.0):
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.02)
    return found

def fatal(craft) -> dict[str, str]: return {finding.what: finding.detail for finding in examine(craft) if finding.fatal}


def test_a_good_clone_has_nothing_fatal(settings):
    findings = examine(settings())
    assert not [finding for finding in findings if finding.fatal]
    assert {"data", "settings", "clone", "git", "ffmpeg", "team", "disk", "python", "torch", "card"} <= {finding.what for finding in findings}


@pytest.mark.parametrize("clone, changes, what, says", [
    (dict(without=("audiocraft/train.py",)), {}, "clone", "not a clone"),
    ({}, {"clone": "/nowhere"}, "clone", "not a clone"),
    ({}, {"python": "/nowhere/python"}, "python", "is no program"),
    ({}, {"python": "/bin/true"}, "python", "gives no answer"),
    ({}, {"team": "mine"}, "team", "missing"),
    (dict(without=("dora/__init__.py", "dora/__main__.py")), {}, "packages", "dora"),
    (dict(numpy="2.1.0"), {}, "numpy", "does not work with torch 2.1.0"),
    (dict(torch="2.1.0", memory=8_000_000_000), {"scale": "large"}, None, ""),
    ({}, {"data": "/nowhere"}, "data", "4 problems"),
    ({}, {"extra": ["optim.lrr=1"]}, "settings", "no setting"),
    ({}, {"model": "./no-such-model"}, "settings", "does not exist")])
def test_every_reason_is_named(settings, clone, changes, what, says):
    found = fatal(settings(changes, **clone))
    assert (says in found[what]) if what else not found


def test_missing_programs_are_named(settings, tmp_path, monkeypatch):
    craft = settings(without=("bin/ffmpeg",))
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert {"git", "ffmpeg"} <= fatal(craft).keys()

def test_a_torch_that_breaks_is_named(settings, tmp_path):
    craft = settings()
    (tmp_path / "clone/torch/__init__.py").write_text("raise OSError('libcudart.so.11.0: cannot open shared object file')")
    assert "libcudart" in fatal(craft)["torch"]

def test_a_card_that_is_absent_or_small(settings, tmp_path):
    craft = settings(memory=16_000_000_000)
    small = next(finding for finding in examine(craft) if finding.what == "card")
    assert "batch_size=2 would fit" in small.fix and not small.fatal
    (tmp_path / "clone/torch/__init__.py").write_text("__version__ = '2.1.0'\nclass cuda: is_available = staticmethod(lambda: False)\n")
    assert "no graphics card" in fatal(craft)["card"]


def test_a_new_torch_is_told_what_to_do(settings):
    found = next(finding for finding in examine(settings(torch="2.13.0+cu130")) if finding.what == "torch")
    assert "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD" in found.fix and environment(settings(), sys.executable)["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1"

def test_a_user_is_always_named(settings, monkeypatch):
    monkeypatch.delenv("USER", raising=False)
    monkeypatch.setenv("PYTHONPATH", "/ours")
    variables = environment(settings({"team": "mine"}), sys.executable)
    assert variables["USER"] and variables["AUDIOCRAFT_TEAM"] == "mine" and variables["AUDIOCRAFT_DORA_DIR"].endswith("/run") and "PYTHONPATH" not in variables
    assert any(finding.what == "USER" for finding in examine(settings()))


def recorded(folder: Path) -> tuple[list[int], list[dict]]:
    "The steps whose loss stands in the log, and the records of epochs."
    records = read_log(folder / "logs/log.jsonl")
    return [record["step"] for record in records if "ce" in record], [record for record in records if "epoch" in record]


def test_a_run_is_followed_to_its_end_and_goes_on(settings, tmp_path):
    craft = settings({"epochs": 4}, dora=train("if (epoch, step) == (3, 1): sys.exit(1)"))
    with pytest.raises(MusiclabError, match="status 1"): launch(craft)
    steps, epochs = recorded(tmp_path / "run")
    assert steps == [*range(1, 11)] and [epoch["valid_epoch"]["ce"] for epoch in epochs] == pytest.approx([3.1, 2.1])
    write_clone(tmp_path / "clone")
    ended = launch(craft)
    assert (ended.epochs, ended.stopped) == (4, None) and "starting with 2 epochs" in (tmp_path / "run/launch.log").read_text()
    steps, epochs = recorded(tmp_path / "run")
    assert steps == [*range(1, 17)] and [epoch["epoch"] for epoch in epochs] == [1, 2, 3, 4]
    other = launch(craft.model_copy(update={"epochs": 1}))
    assert other.epochs == 1 and other.folder != ended.folder and read_log(tmp_path / "run/logs/log.jsonl")[-1]["step"] == 4


def test_curves_reach_tensorboard(settings, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    launch(settings({"trackers": ["tensorboard"]}))
    board = EventAccumulator(str(tmp_path / "run/logs"))
    board.Reload()
    assert len(board.Scalars("ce")) == 8 and [scalar.step for scalar in board.Scalars("valid_epoch/ce")] == [4, 8]


@pytest.mark.parametrize("dora, says", [
    ("import sys; print('torch.cuda.OutOfMemoryError: CUDA out of memory.'); sys.exit(1)", "failed with status 1.*out of memory.*batch_size"),
    ("raise KeyError('USER')", "Set the variable USER"),
    ("print('\\x1b[31mbye\\x1b[0m'); import sys; sys.exit(3)", r"status 3: bye\. The log has the rest"),
    ("import sys; sys.exit(2)", "it printed nothing"),
    ("import os; os.kill(os.getpid(), 9)", "was killed .SIGKILL.*memory"),
    ("import os; os.kill(os.getpid(), 11)", "ended by signal 11")])
def test_a_failing_child_says_why(settings, dora, says):
    with pytest.raises(MusiclabError, match=says): launch(settings(dora=dora))


def test_what_a_finished_run_leaves_running_is_ended(settings, tmp_path):
    craft = settings(dora="import os, pathlib, subprocess, sys\nchild = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(120)'])\n"
                          "pathlib.Path(os.environ['AUDIOCRAFT_DORA_DIR'], 'pid').write_text(str(child.pid))\n")
    launch(craft)
    assert not alive(int((tmp_path / "run/pid").read_text()))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL], ids=lambda number: number.name)
def test_nothing_is_left_running_when_our_side_ends(settings, tmp_path, number):
    craft = settings(dora=STUBBORN)
    code = (f"from musiclab.musicgen.launch import launch; from musiclab.musicgen.overrides import Craft; import signal, sys\n"
            f"signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"  # whoever runs these tests may be deaf to it
            f"ended = launch(Craft(**{craft.model_dump()!r}), patience=0.3); sys.exit(ended.stopped)")
    ours = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(root)}, stderr=subprocess.PIPE, text=True)
    pids = [int(pid) for pid in wait_for(lambda: (tmp_path / "run/pids").exists() and (tmp_path / "run/pids").read_text()).split()]
    assert all(map(alive, pids))
    ours.send_signal(number)
    told = ours.communicate(timeout=30)[1]
    wait_for(lambda: not any(map(alive, pids)), 10)
    assert ours.returncode == (1 if number in (signal.SIGINT, signal.SIGTERM) else -number), told
    assert number not in (signal.SIGINT, signal.SIGTERM) or number.name in told


def test_two_launches_do_not_share_a_folder(settings, tmp_path):
    import fcntl
    craft = settings()
    (tmp_path / "run").mkdir()
    with (tmp_path / "run/launch.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(MusiclabError, match="another launch"): launch(craft)


def test_a_fatal_finding_stops_before_anything_is_started(settings, tmp_path):
    with pytest.raises(MusiclabError, match="team"): launch(settings({"team": "mine"}))
    assert not (tmp_path / "run").exists()


def test_the_command_line_stops_and_goes_on(settings, tmp_path):
    craft = settings({"epochs": 3}, dora=train("time.sleep(0.02 if epoch < 2 else 30)"))
    words = [f"{name}={json.dumps(value)}" for name, value in craft.model_dump().items() if value is not None]
    command = [sys.executable, "-m", "musiclab.cli", "audiocraft", "launch", *words]
    ours = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(root)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: (tmp_path / "run/logs/log.jsonl").exists() and any("epoch" in record for record in read_log(tmp_path / "run/logs/log.jsonl")))
    ours.terminate()
    told, errors = ours.communicate(timeout=30)
    assert ours.returncode == 143 and "stopped by SIGTERM after 1 epochs" in told, errors
    write_clone(tmp_path / "clone")
    assert launch(craft).epochs == 3


def test_the_command_is_printed_as_one_would_type_it(settings):
    text = as_typed(settings({"output": "/my runs"}))
    assert "AUDIOCRAFT_DORA_DIR='/my runs'" in text and "python -m dora run" in text and "optim.lr=1e-05" in text
