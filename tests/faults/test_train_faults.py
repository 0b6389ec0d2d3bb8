"What goes wrong in a training run: kills, signals, damage, full disks, numbers that are none."
import importlib
import os
import signal
import time

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from musiclab import train
from musiclab.core import MusiclabError
from musiclab.train import fit
from tests.toy import Toy, server, settings, songs


def run(output, task=Toy, **changes):
    tracks = songs()
    return fit(task(config := settings(output, **changes)), tracks[:5], tracks[5:], config)


def weights(output, step=6): return load_file(f"{output}/checkpoints/step-{step:08d}/trained.safetensors")


def equal(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    output = tmp_path_factory.mktemp("straight")
    run(output)
    return weights(output)


def in_child(target, *args):
    child = server().Process(target=target, args=args)
    child.start()
    child.join(120)
    if child.exitcode is None: child.kill()
    return child.exitcode


def kill_at(output, where, number, sig):
    "Run, and send ourselves a signal at the `number`-th call of a function."
    module, name = importlib.import_module(where[0]), where[1]
    original, calls = getattr(module, name), [0]
    def counted(*args, **kwargs):
        calls[0] += 1
        if calls[0] == number: os.kill(os.getpid(), sig)
        return original(*args, **kwargs)
    setattr(module, name, counted)
    made = run(output)
    os._exit(143 if made.stopped == "SIGTERM" else 0)


STEPS = ("musiclab.engine", "apply_gradients")
MICRO = ("musiclab.engine", "seeded")
VALIDATION = ("musiclab.train", "evaluate")
SAVING = ("musiclab.train", "save_file")
RENAME = ("os", "replace")


@pytest.mark.parametrize("where, number", [(STEPS, 1), (STEPS, 4), (STEPS, 6), (MICRO, 6), (SAVING, 1), (SAVING, 2), (SAVING, 3), (RENAME, 9), (RENAME, 13)])
def test_killed_runs_resume_to_the_same_bits(tmp_path, straight, where, number):
    assert in_child(kill_at, tmp_path, where, number, signal.SIGKILL) == -signal.SIGKILL
    run(tmp_path)
    assert equal(weights(tmp_path), straight)


@pytest.mark.parametrize("where, number", [(STEPS, 3), (MICRO, 4), (VALIDATION, 1), (VALIDATION, 2), (SAVING, 1), (SAVING, 2)])
def test_a_term_signal_ends_in_a_checkpoint(tmp_path, straight, where, number):
    assert in_child(kill_at, tmp_path, where, number, signal.SIGTERM) == 143
    found = train.Checkpoints(tmp_path / "checkpoints").newest()
    assert found or (where, number) == (VALIDATION, 1) # before the first step there is nothing to keep
    run(tmp_path)
    assert equal(weights(tmp_path), straight)


def test_sound_that_a_signal_prevented_is_made_by_the_next_run(tmp_path):
    class Interrupted(Toy):
        def sample(self, model, rows, at):
            if at.step == 3 and not (tmp_path / "once").exists():
                (tmp_path / "once").touch()
                os.kill(os.getpid(), signal.SIGTERM)
            return super().sample(model, rows, at)
    for _ in range(2): made = run(tmp_path / "run", Interrupted, sample_prompts=["la"], sample_seconds=2)
    assert all([r["step"] for r in made.history if name in r] == [0, 3, 6] for name in ("samples", "valid"))


def test_a_time_budget_ends_in_a_checkpoint(tmp_path, straight):
    class Slow(Toy):
        def loss(self, model, batch, at):
            if at.training: time.sleep(0.15)
            return super().loss(model, batch, at)
    stopped = run(tmp_path, Slow, time_budget=0.8 / 60, save_every=100)
    assert stopped.stopped == "time budget" and 0 < stopped.step < 6
    run(tmp_path)
    assert equal(weights(tmp_path), straight)


def test_a_damaged_checkpoint_is_refused_and_the_one_before_taken(tmp_path, straight, capsys):
    run(tmp_path, save_every=1)
    newest = tmp_path / "checkpoints/step-00000006/trained.safetensors"
    data = bytearray(newest.read_bytes())
    data[-1] ^= 1
    newest.write_bytes(data)
    assert run(tmp_path, save_every=1).step == 6
    assert "refused a damaged checkpoint" in (text := capsys.readouterr().out) and "trained.safetensors" in text and "step-00000005" in text
    assert equal(weights(tmp_path), straight)


def test_when_every_checkpoint_is_damaged_nothing_is_overwritten(tmp_path):
    run(tmp_path)
    for file in (tmp_path / "checkpoints").glob("*/state.json"): file.write_text("{}")
    with pytest.raises(MusiclabError, match="no checkpoint here is intact"): run(tmp_path)


def test_a_full_disk_loses_nothing(tmp_path, straight, monkeypatch):
    def full(tensors, path, **_):
        open(path, "wb").write(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)") # as the library says it
    with monkeypatch.context() as patch:
        count, original = [0], train.save_file
        def second_fails(tensors, path, **kwargs):
            count[0] += 1
            return (full if count[0] == 2 else original)(tensors, path, **kwargs)
        patch.setattr(train, "save_file", second_fails)
        with pytest.raises(MusiclabError, match="disk is full"): run(tmp_path)
    assert [p.name for p in sorted((tmp_path / "checkpoints").iterdir())] == ["latest", "step-00000002"]
    run(tmp_path)
    assert equal(weights(tmp_path), straight)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_skipped_and_end_the_run(tmp_path, poison):
    class Poisoned(Toy):
        from_step, until = 3, 99
        def loss(self, model, batch, at):
            sums = super().loss(model, batch, at)
            if at.training and self.from_step <= at.step < self.until: sums["next"] = sums["next"] * poison
            return sums
    class Once(Poisoned):
        until = 4
    made = run(tmp_path / "once", Once)
    assert [r["step"] for r in made.history if "skipped" in r] == [4] and made.step == 6
    with pytest.raises(MusiclabError, match=r"5 steps in a row .* rows song"): run(tmp_path / "always", Poisoned, max_steps=20)
    kept = train.Checkpoints(tmp_path / "always/checkpoints").newest()
    assert kept.name == "step-00000002"
    assert all(torch.isfinite(w).all() for w in load_file(kept / "trained.safetensors").values())


def test_bad_tracks_are_left_out_and_named(tmp_path, capsys):
    class Fussy(Toy):
        pass
    from tests.toy import Letters
    class Strict(Letters):
        def read(self, text):
            if "number 5" in text: raise MusiclabError("an unlucky song", text)
            return text
    Fussy.features = (Strict(),)
    made = run(tmp_path, Fussy)
    assert made.step == 6 and len(made.problems) == 1 and "an unlucky song" in capsys.readouterr().out


def test_no_usable_track_is_an_error(tmp_path):
    from tests.toy import Letters
    class Hopeless(Toy):
        class All(Letters):
            def read(self, text): raise MusiclabError("unreadable", text)
        features = (All(),)
    with pytest.raises(MusiclabError): run(tmp_path, Hopeless)


def test_another_models_checkpoint_is_refused(tmp_path):
    run(tmp_path)
    class Wider(Toy):
        def load(self, device, dtype, quantize):
            model = super().load(device, dtype, quantize)
            model.blocks.append(torch.nn.Sequential(*[type(layer)(16, 16) if isinstance(layer, torch.nn.Linear) else layer for layer in model.blocks[0]]))
            return model
    with pytest.raises(MusiclabError, match="trained weights differ"): run(tmp_path, Wider, max_steps=8)
