"HID-MuseFormer trained: exact resume, several processes, straight from MIDI, texts and tokens, the commands of the plan."
import os
import runpy
import shutil
import socket
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from musiclab import compose, recipes
from musiclab.cli import main
from musiclab.core import MusiclabError
from musiclab.midi import read
from musiclab.museformer.model import SIZES, create_model
from musiclab.museformer.preprocess import preprocess
from musiclab.museformer.tokenizer import midi_to_txt
from musiclab.museformer.train import MuseFormerConfig, MuseFormerTask, open_model
from musiclab.train import fit
from tests.test_train import equal
from tests.toy import server

SIZES["mini"] = (32, 2, 2, 64)  # as real as the others, and quick
root = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def songs(tmp_path_factory): return compose.dataset(tmp_path_factory.mktemp("midi"), 6, seconds=8, format="mid")


def settings(songs, output, **changes):
    fields = dict(data=str(songs), output=str(output), model="mini", pos="none", max_seq_len=128, batch_size=2, max_steps=6, warmup=0, lr=3e-3,
                  valid_fraction=0.2, workers=0, cache=False, device="cpu", trackers=[], validate_every=3, save_every=3, save_minutes=None, infill=0.5)
    return MuseFormerConfig(**fields | changes)


def train(config): return fit(MuseFormerTask(config), *recipes.read_data(config), config)

def weights(output, step): return load_file(f"{output}/checkpoints/step-{step:08d}/trained.safetensors")


@pytest.mark.parametrize("changes", [dict(), dict(optimizer="muon", precision="bf16", workers=1),
                                     dict(gradient_checkpointing=True, accumulate=2, attention="dense")],
                         ids=["adamw", "muon", "checkpointing"])
def test_stopping_and_resuming_changes_no_bit(tmp_path, songs, changes):
    straight = train(settings(songs, tmp_path / "straight", **changes))
    train(settings(songs, tmp_path / "parts", **changes | dict(max_steps=6, time_budget=None)))
    shutil.rmtree(tmp_path / "parts/checkpoints/step-00000006") # as if it had been killed after step 3
    train(settings(songs, tmp_path / "parts", **changes))
    assert equal(weights(tmp_path / "straight", 6), weights(tmp_path / "parts", 6))
    losses = [r["valid"]["loss"] for r in straight.history if "valid" in r]
    assert losses[-1] < losses[0] and set(straight.history[-1]["valid"]["parts"]) >= {"token", "note", "pitch"}


def one_of_two(rank, port, config, results):
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    made = train(config)
    results.put((rank, {type(p.data).__name__ for p in made.engine.model.parameters()}))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_learn_what_one_learns(tmp_path, songs, strategy):
    alone = settings(songs, tmp_path / "alone", dropout=0.0, accumulate=2, max_steps=2, validate_every=2, save_every=2)
    train(alone)
    two = alone.model_copy(update=dict(output=str(tmp_path / "two"), accumulate=1, strategy=strategy))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    results = server().Queue()
    children = [server().Process(target=one_of_two, args=(rank, port, two, results)) for rank in range(2)]
    for child in children: child.start()
    kinds = [results.get(timeout=120)[1] for _ in children]
    for child in children: child.join(30)
    assert [child.exitcode for child in children] == [0, 0] and all(("DTensor" in kind) == (strategy == "fsdp") for kind in kinds)
    a, b = weights(tmp_path / "alone", 2), weights(tmp_path / "two", 2)
    assert a.keys() == b.keys() and all(torch.allclose(a[key], b[key], atol=1e-5) for key in a)
    best = torch.load(tmp_path / "two/best_model.pt", weights_only=True)
    assert best.keys() == a.keys()


def test_every_form_of_data_trains_the_same(tmp_path, songs):
    for path in songs.glob("*.mid"): midi_to_txt(path, tmp_path / "txt" / f"{path.stem}.txt")
    preprocess(songs, tmp_path / "token", workers=0)
    preprocess(songs, tmp_path / "pt", workers=0, format="pt")
    forms = [(songs, "midi"), (tmp_path / "txt", "txt"), (tmp_path / "token", "token"), (tmp_path / "pt", "token")]
    made = [train(settings(where, tmp_path / f"run-{i}", data_mode=mode, max_steps=1, valid_fraction=0.0, max_seq_len=4096)).history[-1]["loss"]
            for i, (where, mode) in enumerate(forms)]
    assert max(made) - min(made) < 0.3
    with pytest.raises(MusiclabError, match="no songs of the form txt"): train(settings(tmp_path / "pt", tmp_path / "x", data_mode="txt"))


def test_the_command_of_the_plan(tmp_path, songs):
    "Every flag, and what the plan's reader finds afterwards."
    preprocess(songs, tmp_path / "processed", workers=0)
    command = ["museformer", "train", "--data-path", str(tmp_path / "processed"), "--model-size", "mini", "--batch-size", "1", "--max-seq-len", "256",
               "--epochs", "2", "--lr", "1e-3", "--warmup-steps", "1", "--gradient-accumulation", "2", "--gradient-checkpointing",
               "--output-dir", str(tmp_path / "checkpoints"), "--save-every", "1", "--eval-every", "1", "--limit-batches", "2",
               "--set", "device=cpu", "--set", "pos=none", "--set", "workers=0"]
    run(command)
    folder = tmp_path / "checkpoints"
    assert {"checkpoint_epoch_1", "checkpoint_epoch_2", "best_model.pt", "config.json", "logs", "checkpoints"} <= {p.name for p in folder.iterdir()}
    assert list((folder / "logs").glob("events.out.tfevents*"))
    again = [*command[:-6], "--output-dir", str(tmp_path / "again"), "--resume", str(folder / "checkpoint_epoch_1.pt"), *command[-6:]]
    run(again)
    last = max(int(p.name.split("-")[1]) for p in (folder / "checkpoints").iterdir() if p.name.startswith("step"))
    assert equal(weights(folder, last), weights(tmp_path / "again", last))
    assert open_model(folder).fine == (0, 1, 2, 4, 8)


def run(command):
    "The command line in this process; it ends well."
    try: main(command)
    except SystemExit as end: assert not end.code, end.code


def script(*words):
    sys.argv = [str(root / "scripts/train_h800.py"), *words]
    try: runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end: assert not end.code, end.code


def test_the_script_runs_under_torchrun(tmp_path, songs):
    "Under torchrun's own agent, whose two processes are copies of this one."
    words = ["--data-path", str(songs), "--data-mode", "midi", "--model-size", "mini", "--batch-size", "1", "--max-seq-len", "64", "--epochs", "1",
             "--limit-batches", "1", "--fsdp", "--output-dir", str(tmp_path / "out")]
    words += [word for each in ("device=cpu", "workers=0", "pos=none", "max_steps=1", "trackers=[]") for word in ("--set", each)]
    how = LaunchConfig(1, 1, 2, run_id="test", rdzv_backend="c10d", rdzv_endpoint="127.0.0.1:0", start_method="fork", monitor_interval=0.1)
    elastic_launch(how, script)(*words)
    assert (tmp_path / "out/best_model.pt").is_file()


def test_the_snippet_of_the_plan_loads_the_best_model(tmp_path, songs):
    "With the real small model, as the plan's reader has it."
    train(settings(songs, tmp_path / "checkpoints", model="small", pos=None, max_steps=1, max_seq_len=64, batch_size=1, validate_every=1))
    model = create_model(vocab_size=415, model_size='small')
    model.load_state_dict(torch.load(tmp_path / 'checkpoints/best_model.pt', weights_only=True))


def test_debug_shows_what_is_learned_from(tmp_path, songs, capsys):
    "The plan's first aid: a census of tokens, gradients block by block, the first batch as music; beside what was trained before, which stays."
    output = tmp_path / "output"
    command = ["museformer", "train", "--data-path", str(songs), "--data-mode", "midi", "--model-size", "mini", "--batch-size", "2", "--max-seq-len", "128",
               "--output-dir", str(output), "--set", "device=cpu", "--set", "pos=none", "--set", "workers=0", "--set", "cache=false", "--limit-batches", "3"]
    run([*command, "--epochs", "1"])
    before = sorted(output.rglob("*"))
    for _ in range(2): run([*command, "--debug"]) # the second look does not go on from the first
    shown = capsys.readouterr().out
    assert all(line in shown for line in ("PITCH", "VEL", "most often", "block 1", "others", "done: 3 steps"))
    assert shown.count("block 0") == 6 and set(before) <= set(output.rglob("*"))
    written = list((output / "debug/first_batch").glob("*.mid"))
    assert written and any(read(path).end for path in written) and "canvas" in (output / "debug/first_batch.html").read_text()
    assert open_model(output).fine


@pytest.mark.filterwarnings("ignore:Error detected")
def test_debug_stops_at_the_first_number_that_is_none(tmp_path, songs, monkeypatch):
    loss = MuseFormerTask.loss
    poison = lambda parts: {part: value * float("nan") for part, value in parts.items()}
    monkeypatch.setattr(MuseFormerTask, "loss", lambda *given: poison(loss(*given)))
    with pytest.raises((MusiclabError, RuntimeError), match="not finite|nan"): train(settings(songs, tmp_path / "nan", debug=True))
