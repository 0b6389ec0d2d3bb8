"The training loop: exact resume, several processes, averages, precisions, limits."
import json
import os
import shutil
import socket

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from musiclab import adapters
from musiclab.core import MusiclabError
from musiclab.engine import wrap
from musiclab.log import read_log
from musiclab.task import At, Step
from musiclab.train import fit
from tests.toy import Toy, server, settings, songs


def run(output, dropout=0.1, **changes):
    tracks = songs()
    return fit(Toy(config := settings(output, **changes), dropout), tracks[:5], tracks[5:], config)


def weights(output, step):
    return load_file(f"{output}/checkpoints/step-{step:08d}/trained.safetensors")


def equal(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("changes", [dict(), dict(method="full"), dict(method="dora", ema=0.9), dict(optimizer="adafactor", workers=2, bucket=False),
                                     dict(precision="bf16"), dict(precision="fp16", clip=0.5)], ids=lambda c: "-".join(map(str, c.values())) or "lora")
def test_stopping_and_resuming_changes_no_bit(tmp_path, changes):
    straight = run(tmp_path / "straight", **changes)
    parts = tmp_path / "parts"
    run(parts, **changes | dict(save_every=1, keep=9))
    for step in (3, 4, 5, 6): shutil.rmtree(parts / f"checkpoints/step-{step:08d}") # as if it had been killed after step 2
    again = run(parts, **changes)
    for file in ("trained", "memory"):
        assert equal(*(load_file(folder / f"checkpoints/step-00000006/{file}.safetensors") for folder in (tmp_path / "straight", parts)))
    assert [r["step"] for r in read_log(parts / "logs/log.jsonl") if "grad_norm" in r] == [1, 2, 3, 4, 5, 6]
    steps = lambda made: {r["step"]: r["loss"] for r in made.history if "grad_norm" in r}
    assert steps(straight) == steps(again) and again.step == 6


def test_learning_is_seen_on_the_probes(tmp_path):
    history = run(tmp_path, max_steps=60, validate_every=20, save_every=60).history
    valid = [r["valid"] for r in history if "valid" in r]
    assert valid[-1]["loss"] < valid[0]["loss"] - 0.1
    assert set(valid[0]) == {"loss", "parts", "probes"} and len(valid[0]["probes"]) == 2


def test_micro_batches_do_not_change_what_is_learned(tmp_path):
    a, b = run_with(tmp_path / "a", batch_size=4, accumulate=1), run_with(tmp_path / "b", batch_size=1, accumulate=4)
    assert all(torch.allclose(a[k], b[k], atol=1e-6) for k in a)


def run_with(output, **changes):
    tracks = songs()
    config = settings(output, **dict(dropout=0.0, max_steps=3, workers=0) | changes)
    fit(Toy(config, 0.0), tracks[:5], tracks[5:], config)
    return weights(output, 3)


def one_of_two(rank, port, output, changes, results):
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    tracks = songs()
    config = settings(output, **changes)
    made = fit(Toy(config, 0.0), tracks[:5], tracks[5:], config)
    kinds = {type(p.data).__name__ for p in made.engine.model.parameters() if p.requires_grad}
    before = made.sample(["la"], seconds=3, strength=0.0)
    results.put((rank, kinds, [r["loss"] for r in made.history if "grad_norm" in r] if rank == 0 else None, before and before[0].samples))
    torch.distributed.destroy_process_group()


def two_processes(output, **changes):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    results = server().Queue()
    children = [server().Process(target=one_of_two, args=(rank, port, output, changes, results)) for rank in range(2)]
    for child in children: child.start()
    answers = sorted([results.get(timeout=120) for _ in children], key=lambda a: a[0])
    for child in children: child.join(30)
    assert [child.exitcode for child in children] == [0, 0]
    return answers


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_learn_what_one_learns(tmp_path, strategy):
    alone = run_with(tmp_path / "alone", batch_size=4)
    losses = [r["loss"] for r in read_log(tmp_path / "alone/logs/log.jsonl") if "grad_norm" in r]
    answers = two_processes(tmp_path / "two", dropout=0.0, max_steps=3, batch_size=2, strategy=strategy, sample_prompts=["la"], sample_seconds=3)
    assert all(("DTensor" in kinds) == (strategy == "fsdp") for _, kinds, *_ in answers)
    task = Toy(settings(tmp_path), 0.0)
    first = task.load("cpu", torch.float32, None).requires_grad_(False)
    assert np.array_equal(answers[0][3], task.decode(task.sample(first, [{}], At(seconds=3)))[0].samples) # the head is trained whole, and the adapter is off
    assert answers[0][2] == pytest.approx(losses, abs=1e-5)
    together = weights(tmp_path / "two", 3)
    assert alone.keys() == together.keys() and all(torch.allclose(alone[k], together[k], atol=1e-5) for k in alone)
    assert (tmp_path / "two/samples/step-00000003/00.wav").exists()


def test_a_quantised_base_is_shared_among_processes(tmp_path):
    pytest.importorskip("torchao")
    net = Toy(settings(tmp_path), 0.0).load("cpu", torch.float32, "int8")
    adapters.attach(net, r"blocks\.\d+\.[03]", rank=2, alpha=2)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try: assert isinstance(wrap(Step(net), [], "ddp", torch.device("cpu")), torch.nn.parallel.DistributedDataParallel)
    finally: torch.distributed.destroy_process_group()
    with pytest.raises(MusiclabError, match="cannot be cut"): settings(tmp_path, quantize="int8", strategy="fsdp")


def test_a_sharded_run_goes_on_alone(tmp_path):
    straight = run_with(tmp_path / "straight", batch_size=4, max_steps=3)
    two_processes(tmp_path / "run", dropout=0.0, max_steps=3, save_every=1, batch_size=2, strategy="fsdp")
    (tmp_path / "run/checkpoints/step-00000003").rename(tmp_path / "gone")
    went_on = run_with(tmp_path / "run", batch_size=4)
    assert all(torch.allclose(straight[k], went_on[k], atol=1e-5) for k in straight)


def test_averaged_weights_are_what_is_saved(tmp_path):
    made = run(tmp_path, ema=0.5)
    raw = weights(tmp_path, 6)
    adapter = load_file(tmp_path / "adapter/adapter_model.safetensors")
    key = next(k for k in raw if ".lora_B" in k)
    saved = next(v for k, v in adapter.items() if k.endswith(key.replace(".default", "")))
    assert torch.equal(saved, made.engine.ema.average[key]) and not torch.equal(saved, raw[key])


def test_before_and_after(tmp_path):
    made = run(tmp_path, max_steps=40, save_every=40, validate_every=40)
    (pair,) = made.before_after(["la la"], seconds=4)
    assert pair["before"].samples.shape == pair["after"].samples.shape
    again = made.sample(["la la"], seconds=4)
    assert (again[0].samples == pair["after"].samples).all()


class Heard(Toy):
    "What it plays are numbers that depend on every weight."
    def sample(self, model, rows, at): return model(torch.arange(9)[None])
    def decode(self, raw): return [raw]


@pytest.mark.parametrize("changes", [dict(), dict(ema=0.5), dict(method="full")], ids=["lora", "ema", "full"])
def test_before_is_the_model_as_it_was(tmp_path, changes):
    "The toy's head is trained whole, beside the adapter."
    tracks, config = songs(), settings(tmp_path, lr=0.05, **changes)
    made = fit(Heard(config, 0.0), tracks[:5], tracks[5:], config)
    (pair,), (half,) = made.before_after([""]), made.sample([""], strength=0.5)
    with torch.no_grad(): first = Heard(config, 0.0).load("cpu", torch.float32, None)(torch.arange(9)[None])
    assert torch.equal(pair["before"], first) and not torch.equal(pair["after"], first)
    assert all(0.2 < float((other - half).norm() / (pair["after"] - first).norm()) < 0.8 for other in pair.values())
    assert torch.equal(made.sample([""])[0], pair["after"]) and equal(weights(tmp_path, 6), {k: p.detach() for k, p in made.engine.params.items()})


def test_samples_are_written_on_the_way(tmp_path):
    made = run(tmp_path, sample_prompts=["la", {"caption": "do re"}], sample_seconds=2, sample_every=3)
    assert [r["step"] for r in made.history if "samples" in r] == [0, 3, 6]
    assert len(list((tmp_path / "samples").rglob("*.wav"))) == 6


class Kept(Toy):
    best = "best.pt"


def test_the_best_weights_and_whole_epochs_are_kept(tmp_path):
    tracks, config = songs(), settings(tmp_path, max_steps=None, epochs=4, validate_epochs=1, save_epochs=2, accumulate=1, batch_size=2, keep=1, lr=0.02)
    made = fit(Kept(config), tracks[:4], tracks[4:], config)
    losses = {r["step"]: r["valid"]["loss"] for r in made.history if "valid" in r}
    assert list(losses) == [0, 2, 4, 6, 8] and {p.name for p in tmp_path.glob("checkpoint_epoch_*")} == {"checkpoint_epoch_2", "checkpoint_epoch_4"}
    best, last = torch.load(tmp_path / "best.pt", weights_only=True), weights(tmp_path, 8)
    assert equal(best, last) == (min(losses, key=losses.get) == 8) and best.keys() == last.keys()
    other = settings(tmp_path / "other", max_steps=None, epochs=4, accumulate=1, batch_size=2, lr=0.02, resume=str(tmp_path / "checkpoint_epoch_2.pt"))
    fit(Kept(other), tracks[:4], tracks[4:], other)
    assert equal(weights(tmp_path / "other", 8), last)


def test_without_validation_the_last_is_the_best(tmp_path):
    tracks, config = songs(), settings(tmp_path)
    fit(Kept(config), tracks[:5], tracks[:0], config)
    assert equal(torch.load(tmp_path / "best.pt", weights_only=True), weights(tmp_path, 6))


class Packed(Toy):
    max_tokens = 40
    def lengths(self, tracks, prepared): return np.full(len(tracks), 9)
    def example(self, track, rows, draw):
        self.seen = getattr(self, "seen", 0) + 1
        return super().example(track, rows, draw)


def test_examples_are_packed_up_to_a_number_of_tokens(tmp_path):
    tracks, config = songs(), settings(tmp_path, workers=0, accumulate=1, max_steps=1)
    task = Packed(config)
    fit(task, tracks[:6], tracks[:0], config)
    assert task.seen == 4 # four times nine fit into forty


def test_debug_and_limits(tmp_path):
    assert run(tmp_path / "debug", debug=True, max_steps=None).step == 2
    for task in (Toy, Packed): # one batch is half a step
        config = settings(tmp_path / task.__name__, limit_batches=3, max_steps=None, epochs=4, validate_every=1)
        seen, tracks = task(config), songs(40)
        assert fit(seen, tracks[:30], tracks[30:], config).step == 6
    limited = run(tmp_path / "limited", limit_batches=1, max_steps=None, epochs=3, validate_every=1)
    assert limited.step == 2


def test_on_demand_gives_the_same_weights(tmp_path):
    run(tmp_path / "stored", max_steps=3, save_every=3)
    run(tmp_path / "demand", max_steps=3, save_every=3, cache=False)
    assert equal(weights(tmp_path / "stored", 3), weights(tmp_path / "demand", 3))


def test_settings_that_cannot_change_are_refused(tmp_path):
    run(tmp_path, max_steps=2)
    with pytest.raises(MusiclabError, match="rank=2, not 4"): run(tmp_path, rank=4)
    with pytest.raises(MusiclabError, match="earlier run"): run(tmp_path, resume="none")


def test_changed_settings_are_said(tmp_path, capsys):
    run(tmp_path, max_steps=2)
    run(tmp_path, max_steps=4, lr=5e-3)
    assert "lr: 0.01 → 0.005" in capsys.readouterr().out


def test_tensorboard_gets_the_numbers(tmp_path):
    run(tmp_path, max_steps=2, trackers=["tensorboard"], sample_prompts=["la"], sample_seconds=2)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    board = EventAccumulator(str(tmp_path / "logs"))
    board.Reload()
    assert {"loss", "grad_norm", "lr", "valid/loss", "parts/next"} <= set(board.Tags()["scalars"])
    assert board.Tags()["audio"] == ["sample/0"]


def test_a_checkpoint_says_what_it_is(tmp_path):
    run(tmp_path, max_steps=2)
    state = json.loads((tmp_path / "checkpoints/step-00000002/state.json").read_text())
    assert state["step"] == 2 and state["config"]["rank"] == 2 and state["musiclab"]
