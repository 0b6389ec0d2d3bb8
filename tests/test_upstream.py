"The tools that ACE-Step came with: their folder, their data set, every flag and default, their adapter's file."
import json
import re
import subprocess
import sys

import numpy as np
import pytest

from musiclab import simpletuner, upstream
from musiclab.audio import Audio
from musiclab.commands_ace_step import trainer
from musiclab.config import load
from musiclab.core import MusiclabError, prepare_imports
from musiclab.migration import FLAGS
from musiclab.readers import read
from musiclab.sets import read_sets
from tests.house import notebook, root, source
from tests.test_cli import run
from tests.test_simpletuner import environment

prepare_imports()
import datasets

# as the plan lists them
DEFAULTS = dict(num_nodes=1, shift=3.0, learning_rate=1e-4, num_workers=8, epochs=-1, max_steps=2_000_000, every_n_train_steps=2000,
    dataset_path="./zh_lora_dataset",
                exp_name="chinese_rap_lora", precision="32", accumulate_grad_batches=1, gradient_clip_val=0.5, gradient_clip_algorithm="norm", devices=1,
                logger_dir="./exps/logs/", ckpt_path=None, checkpoint_dir=None, reload_dataloaders_every_n_epochs=1, every_plot_step=2000,
                    val_check_interval=None,
                lora_config_path="config/zh_rap_lora_config.json")


@pytest.fixture
def here(tmp_path, monkeypatch):
    "A folder with data/ in the upstream layout, in several formats, with things missing; it is the current one."
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    tone = Audio(np.sin(np.arange(8000) / 9).astype("float32")[None] / 4, 8000)
    for name in ("one.mp3", "two.flac", "three.ogg", "four.wav"): tone.save(tmp_path / "data" / name)
    for name, tags in {"one": "melodic techno, male vocal,124 bpm", "two": "rap",
        "three": "a, b"}.items(): (tmp_path / "data" / f"{name}_prompt.txt").write_text(tags)
    (tmp_path / "data/one_lyrics.txt").write_text("[Verse]\nLately I've been wondering\n")
    (tmp_path / "data/ghost_prompt.txt").write_text("nothing")
    return tmp_path


def converted(here, repeat=20):
    status, text = run("ace-step", "convert2hf", "--data_dir", "./data", "--repeat_count", repeat, "--output_name", "zh_lora_dataset")
    assert status == 0, text
    return text


def test_the_converter_writes_what_the_trainer_reads(here):
    text = converted(here, 2000)
    assert "four_prompt.txt is missing" in text and "ghost_prompt.txt: there is no sound" in text and "wrote 3 songs, 6,000 rows" in text
    saved = datasets.load_from_disk("zh_lora_dataset")
    assert len(saved) == 6000 and saved.column_names == ["keys", "filename", "tags", "speaker_emb_path", "norm_lyrics", "recaption"]
    rows = {row["keys"]: row for row in saved.select(range(3))}
    assert rows["one"] == {"keys": "one", "filename": "data/one.mp3", "tags": ["melodic techno", "male vocal", "124 bpm"], "speaker_emb_path": "",
                           "norm_lyrics": "[Verse]\nLately I've been wondering", "recaption": {}}
    assert rows["two"]["norm_lyrics"] == ""  # lyrics may be missing
    assert sum(path.stat().st_size for path in (here / "zh_lora_dataset").iterdir()) < 200_000


@pytest.mark.parametrize("written", ["by us", "row by row"])
def test_repeats_are_weights_for_our_reader_and_for_the_converted_backend(here, written):
    if written == "by us": converted(here, 50)
    else: datasets.Dataset.from_list(upstream.song_rows("data")[0] * 50).save_to_disk("zh_lora_dataset")  # as the original does
    backend = json.loads((root / "config/acestep-training-demo/multidatabackend.converted.json").read_text()) | {"dataset_name": "zh_lora_dataset"}
    environment(here, backends=backend)
    for tracks in (read("zh_lora_dataset"), read_sets(simpletuner.load("env=demo").config.data)):
        assert {track.key: (track.text, track.lyrics[:7], track.extra["weight"]) for track in tracks} == {
            "one": ("melodic techno, male vocal, 124 bpm", "[Verse]", 50), "two": ("rap", "", 50), "three": ("a, b", "", 50)}


def test_songs_may_lie_anywhere(here, tmp_path_factory):
    away = tmp_path_factory.mktemp("away") / "set"
    upstream.convert(here / "data", 2, away)
    assert upstream.translate({"dataset_path": str(away), "epochs": 3}).max_steps == 18
    assert len(read_sets(upstream.translate({"dataset_path": str(away)}).data)) == 3


def test_the_converter_says_no(here):
    for folder, said in (("nowhere", "no such folder"), (".", "holds no song")):
        with pytest.raises(MusiclabError, match=said): upstream.convert(folder, 1, "out")
    with pytest.raises(MusiclabError, match="leaves nothing"): upstream.convert("data", 0, "out")


def test_every_flag_has_the_plans_default(here):
    import inspect
    signature = inspect.signature(trainer).parameters
    assert {name: signature[name].default for name in FLAGS} == DEFAULTS == {name: flag.default for name, flag in FLAGS.items()}
    converted(here)
    status, text = run("ace-step", "trainer", "--dry-run")
    assert status == 0, text
    (here / "mine.yaml").write_text(text)
    config = load(here / "mine.yaml", [], upstream.AceStepConfig)
    assert config == upstream.translate(DEFAULTS) == upstream.translate({})
    assert (config.shift, config.lr, config.workers, config.max_steps, config.save_every, config.output, config.precision, config.accumulate, config.clip,
        config.sample_every) == \
           (3.0, 1e-4, 8, 2_000_000, 2000, "exps/logs/chinese_rap_lora", "fp32", 1, 0.5, 2000)
    assert (config.rank, config.alpha, config.method, config.valid_fraction, config.resume, config.crop, config.crop_seconds) == (256, 32, "rslora", 0.0,
        "latest", "beginning", 240)
    assert config.sample_prompts[0]["caption"] in ("rap", "a, b", "melodic techno, male vocal, 124 bpm")


def test_the_mapping_table_is_true(here):
    text = "\n".join(source(cell) for cell in notebook(root / "nbs/5_tools/54d_migration.ipynb")["cells"] if cell["cell_type"] == "markdown")
    table = re.findall(r"^\| `--(\w+)` \| `(\w+)` \| `(\S+)` \|$", text, re.MULTILINE)
    assert len(table) == 8 and {name: FLAGS[name].simpletuner for name, _, _ in table} == {name: key for name, key, _ in table}
    assert {name: str(FLAGS[name].default) for name, _, _ in table} == {name: str(float(value)) if "e" in value else value for name, _, value in table}


def test_a_flag_and_its_key_become_the_same_setting(here):
    converted(here)
    flags = {"shift": 5.0, "learning_rate": 2e-5, "num_workers": 3, "max_steps": 70, "every_n_train_steps": 9, "precision": "bf16",
        "accumulate_grad_batches": 4,
             "gradient_clip_val": 0.7, "every_plot_step": 11, "val_check_interval": 13}
    ours = upstream.translate(flags)
    environment(here, **{FLAGS[name].simpletuner: value for name, value in flags.items()})
    theirs = simpletuner.load("env=demo").config
    assert {FLAGS[name].setting: getattr(ours, FLAGS[name].setting) for name in flags} == {FLAGS[name].setting: getattr(theirs,
        FLAGS[name].setting) for name in flags}
    assert ours.lr == 2e-5 and ours.valid_fraction == 0.2


def test_where_models_and_results_lie(here):
    converted(here)
    (here / "released/ace_step_transformer").mkdir(parents=True)
    assert upstream.translate({"checkpoint_dir": "released"}).model == "released"
    assert upstream.translate({"checkpoint_dir": "results"}).output == "results"
    assert upstream.translate({"ckpt_path": "exps/x"}, ["quantize=int8"]).resume == "exps/x"


def test_the_adapters_file_is_read_as_it_is(here):
    (here / "small.json").write_text('{"r": 16, "lora_alpha": 32, "target_modules": ["linear_q", "to_q", "to_out.0"]}')
    found = upstream.read_lora("small.json")
    assert (found["rank"], found["alpha"], found["method"]) == (16, 32, "lora")
    names = ["transformer_blocks.0.attn.to_q", "lyric_encoder.encoders.0.self_attn.linear_q", "transformer_blocks.0.cross_attn.to_out.0",
        "transformer_blocks.0.attn.to_k", "into_q"]
    assert [bool(re.fullmatch(found["targets"], name)) for name in names] == [True, True, True, False, False]
    (here / "wrong.json").write_text('{"r": 16, "lora_alfa": 32}')
    with pytest.raises(MusiclabError, match="Did you mean 'lora_alpha'"): upstream.read_lora("wrong.json")


def test_several_cards_are_started_with_torchrun(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    command = upstream.relaunch(4, 1, ["ace-step", "trainer"])
    assert command[:5] == [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "4"] and command[-3:] == ["musiclab.cli", "ace-step", "trainer"]
    with pytest.raises(MusiclabError, match="MASTER_ADDR and NODE_RANK"): upstream.relaunch(4, 2, [])
    monkeypatch.setenv("MASTER_ADDR", "first")
    monkeypatch.setenv("NODE_RANK", "1")
    assert {"--nnodes": "2", "--node_rank": "1", "--master_addr": "first"}.items() <= dict(zip(upstream.relaunch(4, 2, [])[3::2], upstream.relaunch(4, 2,
        [])[4::2])).items()
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert upstream.relaunch(4, 2, []) is None


def test_the_plans_commands_run_as_scripts(here):
    convert = [sys.executable, root / "scripts/convert2hf_dataset.py", "--data_dir", "./data", "--repeat_count", "3", "--output_name", "zh_lora_dataset"]
    done = subprocess.run(convert, capture_output=True, text=True, env={"PYTHONPATH": str(root), "PATH": "", "HOME": str(here)})
    assert done.returncode == 0 and "wrote 3 songs, 9 rows" in done.stdout, done.stderr
    done = subprocess.run([sys.executable, root / "scripts/trainer.py", "--dry-run"], capture_output=True, text=True, env={"PYTHONPATH": str(root),
        "PATH": "", "HOME": str(here)})
    assert done.returncode == 0 and "rank: 256" in done.stdout, done.stderr


def test_the_plans_commands_train(here):
    from musiclab.ace_step.checkpoint import tiny_checkpoint
    tiny_checkpoint(here / "tiny")
    converted(here, 3)
    (here / "config").mkdir()
    (here / "config/small.json").write_text('{"r": 4, "lora_alpha": 8, "target_modules": ["linear_q", "to_q", "to_out.0", "speaker_embedder"]}')
    train = ("ace-step", "trainer", "--checkpoint_dir", "tiny", "--lora_config_path", "config/small.json", "--num_workers", "0", "--every_plot_step", "2",
        "--every_n_train_steps", "2",
             "--set", "sample_steps=2", "--set", "sample_seconds=1", "--set", "device=cpu", "--set", "store=store")
    status, text = run(*train, "--max_steps", "2")
    assert status == 0 and "done: 2 steps" in text, text
    output = here / "exps/logs/chinese_rap_lora"
    assert (output / "adapter").is_dir() and (output / "samples/step-00000002/00.wav").exists()
    status, text = run(*train, "--max_steps", "3", "--ckpt_path", output / "checkpoints/step-00000002")
    assert status == 0 and "resuming from" in text and "done: 3 steps" in text, text
