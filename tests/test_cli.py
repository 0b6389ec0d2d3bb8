"The command line and the scripts, run as a user runs them: their words, their files, their exit statuses."
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from click import unstyle
from typer.testing import CliRunner

from musiclab import cli, compose
from musiclab.audio import load
from musiclab.musicgen.checkpoint import tiny_checkpoint
from musiclab.weights import read_tensors, weight_files

root = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    "Songs, a tiny model, and an adapter that was trained on them."
    folder = tmp_path_factory.mktemp("cli")
    compose.dataset(folder / "songs", 6, seconds=4)
    tiny_checkpoint(folder / "tiny")
    assert run(*train(folder, "run"))[0] == 0
    return folder


def train(folder, output, *more):
    return ("train", "musicgen_lora", f"data={folder}/songs", f"model={folder}/tiny", f"output={folder}/{output}", f"store={folder}/features", "max_steps=6",
            "accumulate=1", "frames=100", "lr=0.01", "workers=0", "validate_every=3", "device=cpu", "trackers=none", *more)


def caught(call, *args) -> tuple[int, str]:
    "The exit status of a program that is called in this process, and all it printed."
    import contextlib
    import io
    out = io.StringIO()
    status = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try: call(*args)
        except SystemExit as end: status = end.code or 0
    return status, out.getvalue()


def run(*args) -> tuple[int, str]:
    "Run a command in this process."
    return caught(cli.main, [str(a) for a in args])


def script(name, *args) -> tuple[int, str]:
    "Run a script in this process."
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *map(str, args)])
        return caught(runpy.run_path, str(root / "scripts" / name), None, "__main__")


def commands():
    from typer.main import get_command
    def walk(command, path):
        for name, sub in getattr(command, "commands", {}).items(): yield from walk(sub, (*path, name))
        if not hasattr(command, "commands"): yield path
    return list(walk(get_command(cli.app), ()))


@pytest.mark.parametrize("path", commands(), ids=" ".join)
def test_every_command_explains_itself_with_an_example(path):
    result = CliRunner().invoke(cli.app, [*path, "--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0 and f"musiclab {' '.join(path)}" in unstyle(result.output).split("Example", 1)[1]


def test_help_does_not_wait_for_torch():
    code = ("import sys; from musiclab.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
            "print([m for m in ('torch', 'numpy', 'transformers') if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(root)})
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_training_made_what_it_should(work):
    assert (work / "run/adapter/adapter_model.safetensors").exists() and (work / "run/checkpoints/latest").exists()
    assert json.loads((work / "run/logs/log.jsonl").read_text().splitlines()[0])["step"] == 0
    status, text = run(*train(work, "run", "max_steps=8"))
    assert status == 0 and "resuming from" in text and "8 steps" in text


def test_a_dry_run_touches_nothing(work):
    status, text = run("train", "musicgen_lora", "data=nowhere", "model=nothing", f"output={work}/dry", "lr=1e-4", "--dry-run")
    assert status == 0 and "lr: 0.0001" in text and not (work / "dry").exists()


def test_strength_zero_is_the_base_and_one_is_not(work):
    def tone(name, *more):
        status, text = run("generate", "--model", work / "tiny", "--prompt", "techno", "--seconds", 0.5, "--out", work / name, *more)
        assert status == 0, text
        return load(work / name).samples
    base, off, on = tone("base.wav"), tone("off.wav", "--adapter", work / "run", "--strength", 0), tone("on.wav", "--adapter", work / "run")
    assert np.array_equal(base, off) and not np.array_equal(base, on)
    assert json.loads((work / "on.json").read_text())["prompt"] == "techno"
    assert np.array_equal(tone("again.wav", "--adapter", work / "run/adapter"), on)


def test_several_prompts_and_a_beginning(work):
    status, text = run("generate", "--model", work / "tiny", "--prompt", "a", "--prompt", "b", "--seconds", 0.4, "--out", work / "two.flac")
    assert status == 0 and (work / "two-00.flac").exists() and (work / "two-01.flac").exists()
    assert run("generate", "--model", work / "tiny", "--seconds", 0.8, "--continue", work / "two-00.flac", "--out", work / "longer.wav")[0] == 0
    assert load(work / "longer.wav").seconds == pytest.approx(0.8)


def test_exports_play_what_the_adapter_plays(work):
    def tone(name, model, *more):
        status, text = run("generate", "--model", model, "--prompt", "rock", "--seconds", 0.5, "--temperature", 0, "--out", work / name, *more)
        assert status == 0, text
        return load(work / name).samples
    expected = tone("e.wav", work / "tiny", "--adapter", work / "run")
    assert run("export", work / "run", work / "one.safetensors")[0] == 0
    assert run("export", work / "run", work / "folder", "--to", "peft")[0] == 0
    assert run("export", work / "run", work / "whole", "--to", "merged")[0] == 0
    assert np.array_equal(tone("f.wav", work / "tiny", "--adapter", work / "one.safetensors"), expected)
    assert np.array_equal(tone("g.wav", work / "tiny", "--adapter", work / "folder"), expected)
    assert np.array_equal(tone("h.wav", work / "whole"), expected)
    status, text = run("inspect", work / "one.safetensors")
    assert status == 0 and "rank 12, alpha 24" in text


def test_a_full_fine_tune_becomes_a_model(work):
    assert run(*train(work, "full", "method=full", "lr=1e-3"))[0] == 0
    status, text = run("export", work / "full", work / "tuned", "--to", "merged")
    assert status == 0, text
    assert run("generate", "--model", work / "tuned", "--seconds", 0.2, "--out", work / "t.wav")[0] == 0
    assert run("export", work / "full", work / "x.safetensors")[1].startswith("error")
    status, text = run("export", work / "full", work / "tuned", "--to", "merged")
    assert status == 1 and "exists already and is not empty" in text
    assert run("export", work / "full", work / "half", "--to", "merged", "--strength", 0.5)[0] == 0
    first, half, last = (read_tensors(weight_files(work / name)) for name in ("tiny", "half", "tuned"))
    moved = [name for name in half if not torch.equal(half[name], first[name])]
    assert moved and all(torch.allclose(half[name], (first[name] + last[name]) / 2, atol=1e-6) for name in moved)


def test_init_writes_configurations_and_keeps_yours(tmp_path):
    assert run("init", tmp_path)[0] == 0
    file = tmp_path / "config/musicgen_lora.yaml"
    file.write_text(file.read_text() + "# mine\n")
    assert "kept" in run("init", tmp_path)[1] and file.read_text().endswith("# mine\n")


def test_data_commands(work, tmp_path):
    status, text = run("data", "check", work / "songs")
    assert status == 0 and "6 tracks" in text
    status, text = run("data", "split", work / "songs", "--valid", 0.34)
    sides = [line.split("\t")[0] for line in text.splitlines()]
    assert set(sides) == {"train", "valid"} and len(sides) == 6
    for to in ("json", "jsonl", "hf", "audiocraft"):
        status, text = run("data", "convert", work / "songs", tmp_path / to, "--to", to, "--rate", 32000)
        assert status == 0 and "wrote 6 tracks" in text, text
        assert run("data", "check", tmp_path / to)[0] == 0


def test_features_commands(work):
    store = ("--store", work / "features")
    status, text = run("features", "ls", *store)
    assert status == 0 and "codes" in text and "text" in text
    assert run("features", "verify", *store)[0] == 0
    assert run("features", "make", "musicgen_lora", f"data={work}/songs", f"model={work}/tiny", f"store={work}/ahead", "device=cpu")[0] == 0
    shard = next((work / "ahead").glob("codes-*/*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    assert run("features", "verify", "--store", work / "ahead")[0] == 1
    assert run("features", "prune", *store)[0] == 0


def test_doctor(work):
    status, text = run("doctor")
    assert status == 0 and "decoders" in text and "torch" in text


@pytest.mark.parametrize("args, said", [
    (["train", "musicgen_lora", "rnk=3"], "did you mean 'rank'"),
    (["train", "musicgen_lroa"], "Did you mean musicgen_lora"),
    (["train", "musicgen_lora", "lr=fast"], "lr"),
    (["train", "musicgen_lora", "data=/no/such/place"], "/no/such/place"),
    (["generate", "--model", "/no/such/model"], "/no/such/model"),
    (["tiny", "musikgen", "x"], "Did you mean musicgen"),
    (["data", "check", "/no/such/place"], "/no/such/place"),
    (["data", "convert", ".", "x", "--to", "cassette"], "cassette"),
    (["inspect", "/no/such/adapter"], "/no/such/adapter"),
    (["evaluate", "/no/a", "/no/b"], "/no/a"),
    (["train", "museformer_small", "data={work}/songs", "model={work}/tiny"], "no midi in it"),
    (["train", "musicgen_lora", "data={work}/songs", "model={work}/tiny", "output={work}/songs/out"], "out: lies in the folder of songs"),
    (["tiny", "musicgen", "{work}/songs"], "songs: exists already and holds other things"),
    (["export", "{work}/run", "{work}/songs", "--to", "peft"], "songs: exists and is not an adapter"),
    (["generate", "--adapter", "{work}/run", "--continue", "{work}/x.wav", "--out", "{work}/x.wav"], "x.wav: is the piece that is gone on from"),
    (["museformer", "generate", "--model", "{work}/tiny", "--meter", "3"], "--meter: no such time signature: 3"),
    (["plan", "museformer_small", "data=x", "model={work}/tiny"], "holds a model of type 'musicgen', not a HID-MuseFormer"),
    (["train", "musicgen_lora", "data={work}/songs", "model={work}/tiny", "output={work}/tiny/config.json"], "config.json: cannot be written to"),
    (["train", "musicgen_lora", "data={work}/songs", "model={work}/tiny", "output={work}/new", "init_adapter={work}/none"], "none: no adapter here"),
    (["train", "musicgen_lora", "data={work}/songs", "model={work}/tiny", "output={work}/new", "resume={work}/none"], "none: is no checkpoint"),
], ids=lambda a: " ".join(a) if isinstance(a, list) else None)
def test_errors_are_one_clear_line(args, said, work):
    status, text = run(*(arg.format(work=work) for arg in args))
    assert status == 1 and said in text and len([line for line in text.splitlines() if line.startswith("error: ")]) == 1
    assert "Traceback" not in text


@pytest.mark.parametrize("args, said", [
    (["--set", "temperature=hot"], "--temperature: cannot be 'hot'. Give a number"),
    (["--steps", 3], "--steps: MusicGen (text to music, EnCodec tokens) has no such setting. See"),
    (["--top-k", -1], "top_k: cannot be -1"),
    (["--continue", "x.mid"], "x.mid: is notes, and this model goes on from sound"),
    (["--device", "gpu"], "no such device: 'gpu'"),
], ids=lambda a: " ".join(map(str, a)) if isinstance(a, list) else None)
def test_what_generate_is_given_is_checked(args, said, work):
    status, text = run("generate", "--model", work / "tiny", "--prompt", "a", "--seconds", 0.1, "--out", work / "x.wav", *args)
    assert status == 1 and said in text and text.count("\n") == 1


def test_songs_without_words_are_told(work, tmp_path):
    import shutil
    (tmp_path / "mute").mkdir()
    for song in list((work / "songs").glob("*.flac"))[:2]: shutil.copy(song, tmp_path / "mute")
    status, text = run(*train(work, "mute", f"data={tmp_path}/mute", "max_steps=1"))
    assert status == 0 and "1 tracks to learn from, 1 to validate\nnote: 1 of them have no caption and no tags" in text


def test_an_adapter_knows_its_model(work):
    assert run("generate", "--adapter", work / "run", "--prompt", "a", "--seconds", 0.1, "--out", work / "own.wav")[0] == 0
    assert json.loads((work / "own.json").read_text())["model"] == str(work / "tiny")


@pytest.mark.parametrize("error, status, said", [
    (KeyboardInterrupt(), 130, "error: stopped\n"),
    (OSError(28, "No space left on device", "there"), 1, "error: there: No space left on device. Free some space and give the command again\n"),
    (torch.OutOfMemoryError("CUDA out of memory"), 1, "error: the graphics card is out of memory"),
], ids=["ctrl-c", "full disk", "full card"])
def test_what_the_machine_refuses_is_one_line(error, status, said, monkeypatch):
    def refuse(): raise error
    monkeypatch.setattr("musiclab.doctor.examine", refuse)
    ended, text = run("doctor")
    assert ended == status and text.startswith(said) and text.count("\n") == 1


def test_debug_shows_the_traceback():
    from musiclab.core import MusiclabError
    with pytest.raises(MusiclabError): cli.main(["--debug", "inspect", "/no/such/adapter"])


def test_a_stop_is_told_to_the_shell(work):
    status, text = run(*train(work, "budget", "time_budget=0.0001"))
    assert status == 0 and "stopped" in text
    assert run(*train(work, "budget"))[0] == 0


def test_the_scripts_of_the_plan(work, tmp_path):
    status, text = script("prepare_data.py", work / "songs", tmp_path / "data")
    assert status == 0, text
    rows = json.loads((tmp_path / "data/metadata.json").read_text())
    assert {row["audio"].split("/")[0] for row in rows} == {"train", "valid"} and all(row["text"] for row in rows)
    assert soundfile.info(tmp_path / "data" / rows[0]["audio"]).samplerate == 32000
    command = [sys.executable, root / "scripts/train_lora.py", *train(work, "script")[2:], f"data={tmp_path}/data", f"output={tmp_path}/output"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, env=os.environ | {"PYTHONPATH": str(root)}, timeout=200)
    assert done.returncode == 0, done.stderr
    status, text = script("inference_lora.py", "--model", work / "tiny", "--adapter", tmp_path / "output", "--prompt", "techno", "--seconds", 3.2,
                          "--out", tmp_path / "made/beat.wav")
    assert status == 0, text
    status, text = script("evaluate.py", work / "songs", tmp_path / "made", "--out", tmp_path / "report.html")
    assert status == 0 and "<audio" in (tmp_path / "report.html").read_text(), text
