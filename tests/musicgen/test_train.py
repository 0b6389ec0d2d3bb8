"MusicGen trained from the command line: killed, stopped, resumed, mono and stereo, every precision."
import multiprocessing
import os
import random
import signal
import time

import pytest
import torch
from safetensors.torch import load_file

from musiclab import compose, recipes
from musiclab.cli import main
from musiclab.log import read_log
from musiclab.musicgen.checkpoint import tiny_checkpoint
from musiclab.musicgen.settings import MusicGenConfig
from musiclab.musicgen.train import MusicGenTask
from musiclab.train import fit


@pytest.fixture(scope="module")
def songs(tmp_path_factory):
    return compose.dataset(tmp_path_factory.mktemp("songs"), 5, seconds=4)


def settings(folder, songs, stereo=False, **changes):
    model = folder / ("stereo" if stereo else "mono")
    if not model.exists(): tiny_checkpoint(model, stereo=stereo)
    fields = dict(data=str(songs), model=str(model), output=str(folder / "run"), store=str(folder / "features"), max_steps=4, accumulate=1, frames=80, lr=0.01,
                  warmup=0, workers=0, validate_every=2, save_every=2, save_minutes=None, device="cpu", trackers=[])
    return MusicGenConfig(**fields | changes)


def train(config):
    return fit(MusicGenTask(config), *recipes.read_data(config), config)


@pytest.mark.parametrize("changes", [dict(stereo=True), dict(precision="bf16"), dict(method="dora", text_padding="audiocraft"),
                                     dict(quantize="int8"), dict(method="full"),
                                     dict(caption_variants=3, condition_dropout_by="batch", bucket=True)], ids=lambda c: "-".join(map(str, c.values())))
def test_every_way_of_training_learns(tmp_path, songs, changes):
    if changes.get("quantize"): pytest.importorskip("torchao")
    seen = [record["valid"] for record in train(settings(tmp_path, songs, max_steps=12, validate_every=6, **changes)).history if "valid" in record]
    assert seen[-1]["loss"] < seen[0]["loss"]
    assert len(seen[0]["parts"]) == (8 if changes.get("stereo") else 4)


def test_validation_is_the_true_loss(tmp_path, songs):
    "The validation loss of the loop is the mean over codebooks of the model's own per-codebook means."
    config = settings(tmp_path, songs, batch_size=2)
    task = MusicGenTask(config)
    run = train(config)
    parts = [record["valid"] for record in run.history if "valid" in record][-1]
    assert parts["loss"] == pytest.approx(sum(parts["parts"].values()) / 4)
    assert task.parts == dict.fromkeys(parts["parts"], 0.25)


def test_killed_and_stopped_from_outside_it_ends_with_the_same_bits(tmp_path, songs):
    config = settings(tmp_path, songs, max_steps=20, save_every=2, validate_every=20)
    straight = train(config.model_copy(update={"output": str(tmp_path / "straight")}))
    command = ["train", "musicgen_lora"] + [
        f"{key}={'none' if value in (None, []) else value}" for key, value in config.model_dump().items() if key not in ("sample_prompts",)]
    chance, statuses = random.Random(0), []
    for sig in (signal.SIGKILL, signal.SIGTERM, None):
        process = multiprocessing.get_context("fork").Process(target=main, args=(command,))
        process.start()
        def steps(): return max((record["step"] for record in read_log(tmp_path / "run/logs/log.jsonl")), default=0)
        goal = steps() + chance.randint(2, 6)
        while sig and process.is_alive() and steps() < goal: time.sleep(0.02)
        if sig: os.kill(process.pid, sig)
        process.join(120)
        statuses.append(process.exitcode)
    assert statuses == [-signal.SIGKILL, 143, 0]
    ends = [load_file(tmp_path / f"{name}/checkpoints/step-00000020/trained.safetensors") for name in ("straight", "run")]
    assert straight.step == 20 and ends[0].keys() == ends[1].keys() and all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])
