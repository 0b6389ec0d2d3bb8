"SimpleTuner's two files, unchanged: every key of the plan, the policy for the rest, and what its users stumbled over."
import json
import re
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from musiclab import compose, simpletuner
from musiclab.ace_step.settings import TARGETS, AceStepConfig
from musiclab.config import load as load_settings
from musiclab.core import MusiclabError
from musiclab.data import to_hf
from musiclab.readers import read
from musiclab.recipes import load_config, read_data
from musiclab.sets import read_sets
from musiclab.simpletuner_data import translate_backends
from tests.house import notebook, root, source
from tests.test_cli import run

PLAN = root / "config"


def environment(folder: Path, name="demo", backends=None, **values) -> Path:
    "A folder with config/NAME and its two files."
    place = folder / "config" / name
    place.mkdir(parents=True, exist_ok=True)
    values = {"model_family": "ace_step", "data_backend_config": f"config/{name}/multidatabackend.json"} | values
    (place / "config.json").write_text(json.dumps(values))
    (place / "multidatabackend.json").write_text(json.dumps(backends or {"type": "local", "instance_data_dir": "songs", "caption_strategy": "textfile"}))
    return place / "config.json"


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    "An empty folder, which is the current one."
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def songs(tmp_path_factory) -> Path:
    return compose.dataset(tmp_path_factory.mktemp("tuner") / "songs", 3, seconds=3)


def settings(*overrides, **values) -> AceStepConfig:
    environment(Path(), **values)
    return simpletuner.load("env=demo", overrides).config


# the plan's files, as they are

@pytest.mark.parametrize("name, family", [("acestep-training-demo", "ace_step"), ("heartmula-training-demo", "heartmula")])
@pytest.mark.parametrize("backends", ["multidatabackend.json", "multidatabackend.local.json"])
def test_the_plans_files_load_verbatim(name, family, backends, here):
    place = here / "config" / name
    shutil.copytree(PLAN / name, place)
    if backends != "multidatabackend.json": shutil.copy(place / backends, place / "multidatabackend.json")
    status, text = run("train", f"env={name}", "--dry-run")
    assert status == 0, text
    printed = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    (here / "mine.yaml").write_text(printed)
    config = load_settings(here / "mine.yaml", [], simpletuner.settings_class(family, ""))  # what is printed is a configuration
    assert config == load_config(f"env={name}")
    assert (config.task, config.quantize, config.precision, config.method, config.lr) == (family, "int8", "bf16", "lora", 1e-4)
    assert config.data[0]["path"] == {"multidatabackend.local.json": "datasets/my_audio_files"}.get(backends,
        {"ace_step": "Yi3852/ACEStep-Songs"}.get(family, "your-org/heartmula-audio-tokens"))
    assert "# acestep-demo-data: " in text or "# heartmula-demo-data: " in text or "# my-audio-dataset: " in text


def test_the_fragments_and_the_converted_set_load_verbatim(here):
    fragment = lambda name: json.loads((PLAN / "acestep-training-demo" / name).read_text())
    environment(here, backends={"type": "local", "instance_data_dir": "songs", "caption_strategy": "textfile", **fragment("audio_lyrics_filename.json")},
        **fragment("lyrics_embedder.json"))
    config = load_config("env=demo")
    assert config.data == [{"path": "songs", "text": ["{filename}.txt"], "lyrics": ["{filename}_lyrics.txt"]}]
    assert (config.lyrics_embedder_train, config.lyrics_embedder_lr, config.lyrics_embedder_optimizer, config.lyrics_embedder_schedule) == (True, 5e-5,
        "adamw", "cosine_with_restarts")
    environment(here, backends=fragment("multidatabackend.converted.json"))
    assert load_config("env=demo").data == [{"path": "path/to/converted/dataset", "allow_outside": True, "columns": {"lyrics": ["norm_lyrics"],
        "tags": ["tags"], "caption": [],
        "captions": []}}]


def test_they_come_with_the_package(here):
    assert run("init", here / "mine")[0] == 0
    for path in sorted(PLAN.glob("*-training-demo/*.json")):
        assert (here / "mine/config" / path.relative_to(PLAN)).read_bytes() == path.read_bytes()


def test_an_environment_that_does_not_exist_is_named(here):
    status, text = run("train", "env=acestep-traning-demo", "--dry-run")
    assert status == 1 and "Did you mean env=acestep-training-demo?" in text and "config/acestep-traning-demo/config.json" in text


# keys

def test_a_known_key_without_meaning_is_one_warning_and_an_unknown_one_an_error(here, capsys):
    settings(vae_enable_tiling=True, push_to_hub=False, snr_gamma=5)
    said = capsys.readouterr().err
    assert said.count("note:") == 1 and all(key in said for key in ("vae_enable_tiling", "push_to_hub", "snr_gamma"))
    for values, said in (({"learning_rte": 1}, "did you mean 'learning_rate'"), ({"validation_promt": "x"}, "'validation_prompt'")):
        with pytest.raises(MusiclabError, match=f"(?i){said}"): settings(**values)
    with pytest.raises(MusiclabError, match=r"multidatabackend.json: audio-0.*Did you mean 'caption_strategy'"):
        environment(here, backends={"type": "local", "instance_data_dir": "x", "caption_stategy": "textfile"})
        load_config("env=demo")


def test_every_key_that_means_something_is_one_that_simpletuner_knows():
    known = set().union(*simpletuner.known_keys().values())
    extra = {"dataloader_num_workers", "ace_step_ssl_loss_weight", "disable_vae_cache", "vae_cache_preprocess",
        "evaluation_type"}  # promised, removed or read elsewhere
    assert not (simpletuner.WORDS.keys() | simpletuner.ELSEWHERE) - known - extra


def test_values_as_people_write_them(here, monkeypatch):
    monkeypatch.setenv("SONGS", "/data/mine")
    config = settings(**{"--learning_rate": "2e-4", "gradient_checkpointing": "false", "lora_rank": None, "use_ema": "true", "seed": -1,
        "output_dir": "{env:SONGS}/out", "checkpointing_steps": 50,
                         "save_total_limit": 2, "validation_steps": 25, "lr_scheduler": "cosine_with_warmup", "lr_warmup_steps": 7, "report_to": "none",
                             "optimizer_config": "weight_decay=0.1,eps=1"})
    assert (config.lr, config.gradient_checkpointing, config.rank, config.ema, config.seed, config.output) == (2e-4, False, 16, 0.995, 0, "/data/mine/out")
    assert (config.save_every, config.keep, config.sample_every, config.schedule, config.warmup, config.trackers, config.weight_decay) == (50, 2, 25,
        "cosine", 7, [], 0.1)
    with pytest.raises(MusiclabError, match="NOWHERE is not set"): settings(output_dir="{env:NOWHERE}")


def test_what_cannot_be_done_is_refused_with_a_reason(here):
    for values, said in (({"num_validation_images": 4}, "songs are played one by one"), ({"evaluation_type": "clip"}, "scores pictures"),
        ({"model_flavour": "v15-turbo"}, "there is base"),
                         ({"base_model_precision": "int4-quanto"}, "int8-quanto, int8-torchao, nf4-bnb"), ({"model_family": "sdxl"}, "ace_step, heartmula"),
                         ({"disable_vae_cache": True}, "vae_cache_disable"), ({"lora_type": "lycoris"}, "standard")):
        with pytest.raises(MusiclabError, match=said): settings(**values)


def test_only_max_train_steps_trains_that_many(here):
    assert settings(max_train_steps=7).max_steps == 7 and settings(max_train_steps=7, num_train_epochs=0).max_steps == 7
    assert settings(num_train_epochs=3, max_train_steps=0).max_steps is None and settings(num_train_epochs=3).epochs == 3


def test_workers_are_a_key_and_reach_the_settings(here):
    assert settings(dataloader_num_workers=3).workers == 3 and settings().workers == 8


def test_the_table_of_defaults_is_true(here):
    text = "\n".join(source(cell) for cell in notebook(root / "nbs/5_tools/54a_simpletuner.ipynb")["cells"] if cell["cell_type"] == "markdown")
    table = re.findall(r"^\| `(\w+)` \| (\S*) \| (\S*) *\|$", text, re.MULTILINE)
    assert len(table) >= 15
    for column, family in enumerate(("ace_step", "heartmula")):
        config = settings(model_family=family)
        said = {name: row[column] for name, *row in table if row[column]}
        found = {name: getattr(config, name) for name in said}
        assert {name: str(value).lower() if not isinstance(value, (int, float)) else float(value) for name, value in found.items()} == \
               {name: value if re.match("[a-z]", value) else float(value) for name, value in said.items()}


def test_the_command_line_speaks_both_languages(here):
    config = settings("--lora_rank=64", "learning_rate=5e-5", "max_steps=9", "--vae_cache_disable", "model=tiny", "--init_lora=mine.safetensors",
        "output=out", lora_rank=8)
    assert (config.rank, config.alpha, config.lr, config.max_steps, config.cache, config.model, config.init_adapter, config.output) == (64, 64, 5e-5, 9,
        False, "tiny", "mine.safetensors", "out")
    assert settings("lora_alpha=32", lora_rank=8).alpha == 32
    status, text = run("train", "env=demo", "--init_lora=mine.safetensors", "--vae_cache_disable", "--dry-run")
    assert status == 0 and "init_adapter: mine.safetensors" in text and "cache: false" in text
    assert "unknown" in run("train", "env=demo", "lrr=1", "--dry-run")[1] or "no key 'lrr'" in run("train", "env=demo", "lrr=1", "--dry-run")[1]


def test_adapters_validation_and_rollout(here):
    config = settings(acestep_lora_target="attn_qkv", use_dora=True, validation_prompt="pop", validation_lyrics="la", validation_audio_duration=12,
        validation_guidance=4, validation_num_inference_steps=9,
                      scheduled_sampling_max_step_offset=20, scheduled_sampling_ramp_steps=100, scheduled_sampling_start_step=10,
                          scheduled_sampling_strategy="biased_late", scheduled_sampling_ramp_shape="cosine")
    assert (config.targets, config.method, config.sample_prompts, config.sample_seconds, config.guidance, config.sample_steps) == (TARGETS["attn_qkv"],
        "dora", [{"caption": "pop", "lyrics": "la"}], 12, 4, 9)
    assert (config.rollout_offset, config.rollout, config.rollout_from, config.rollout_at(60), config.rollout_strategy) == (20, 0.5, 0,
        pytest.approx(0.25), "biased_late")
    assert settings(peft_lora_target_modules=["to_q", "to_out.0"]).targets == r"(.*\.)?(to_q|to_out\.0)"
    heart = settings(model_family="heartmula", caption_dropout_probability=0.2, scheduled_sampling_probability=0.3)
    assert (heart.condition_dropout, heart.rollout) == (0.2, 0.3)


# data

def test_only_the_columns_asked_for_become_the_caption(tmp_path):
    import datasets
    rows = [{"audio": str(tmp_path / "a.wav"), "prompt": "a prompt", "lyrics": "la la", "tags": ["a", "b"]}]
    (tmp_path / "a.wav").write_bytes(b"RIFF")
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "set")
    def text(fields):
        given = translate_backends({"type": "huggingface", "dataset_name": str(tmp_path / "set"), "config": {"audio_caption_fields": fields}}, "ace_step",
            "x")
        (track,) = read_sets([given[0].data])
        return track.text, track.lyrics
    assert text(["tags"]) == ("a, b", "la la") and text(["prompt", "tags"])[0] == "a prompt, a, b"
    with pytest.raises(MusiclabError, match="no column tag"): text(["tag"])


def test_backends_as_they_are_written(here, songs):
    listed = [{"id": "off", "disabled": "true", "type": "local", "instance_data_dir": "nowhere"},
              {"id": "mine", "type": "local", "dataset_type": "audio", "instance_data_dir": str(songs), "caption_strategy": "textfile",
                  "metadata_backend": "discovery", "repeats": 2, "resolution": 512,
               "cache_dir_vae": "cache/{model_family}/{id}", "audio": {"max_duration_seconds": 30, "truncation_mode": "random",
                   "min_duration_seconds": 1}, "probability": 0.5},
              {"dataset_type": "text_embeds", "default": True, "type": "local", "cache_dir": "cache/text"}]
    environment(here, backends=listed)
    made = simpletuner.load("env=demo")
    config = made.config
    assert (config.store, config.crop_seconds, config.crop, config.bucket) == ("cache/ace_step/mine", 30, "random", True)
    assert made.ignored == ["mine: probability"] and len(config.data) == 1
    train, valid = read_data(config)
    assert len(train) + len(valid) == 3 and set((train + valid).column("weight")) == {3.0}
    assert sum(lyrics is not None for lyrics in (train + valid).column("lyrics")) == 3  # the files are there, one of them is empty
    for wrong, said in ((listed[:1], "no back-end with songs"), ([listed[1]] * 2, "two back-ends with the id"), ([{**listed[1], "type": "aws"}],
        "local folder"),
                        ([{**listed[1], "cache_dir_vae": "{modelfamily}"}], "model_family"), ([{**listed[1], "caption_strategy": "huggingface"}],
                            "does not go with")):
        environment(here, backends=wrong)
        with pytest.raises(MusiclabError, match=said): simpletuner.load("env=demo")


def test_an_eval_set_validates_and_copies_of_its_songs_are_not_learned(here, songs):
    (here / "kept").mkdir()
    for file in songs.glob("000*"): shutil.copy(file, here / "kept" / f"another name{file.suffix}")
    local = {"type": "local", "caption_strategy": "textfile"}
    environment(here, backends=[{"id": "a", "instance_data_dir": str(songs), **local},
                                {"id": "b", "instance_data_dir": "kept", "dataset_type": "eval", **local}])
    train, valid = read_data(load_config("env=demo", ["store=store"]))
    first = sorted(path.stem for path in songs.glob("*.flac"))
    assert (sorted(train.column("key")), sorted(valid.column("key"))) == (first[1:], [first[0], "another name"])


def test_captions_of_every_strategy(songs):
    def texts(**more):
        given = translate_backends({"type": "local", "instance_data_dir": str(songs), **more}, "ace_step", "x")
        return [track.text for track in read_sets([given[0].data])]
    assert texts(caption_strategy="textfile") == [track.text for track in read(songs)]
    assert texts()[0] == "000 808 hip hop" and texts(caption_strategy="instanceprompt", instance_prompt="mine") == ["mine"] * 3


def test_lyrics_under_another_name_and_missing_ones(tmp_path, songs):
    shutil.copytree(songs, tmp_path / "songs")
    first, second, _ = sorted((tmp_path / "songs").glob("*.lyrics"))
    first.rename(first.with_name(f"{first.stem}_lyrics.txt"))
    second.unlink()
    def lyrics(**audio):
        given = translate_backends({"type": "local", "instance_data_dir": str(tmp_path / "songs"), "caption_strategy": "textfile", "audio": audio},
            "ace_step", "x")
        return [track.lyrics is None for track in read_sets([given[0].data])]
    assert lyrics() == [True, True, False]
    assert lyrics(lyrics_filename_format="{stem}_lyrics.txt") == lyrics(lyrics_suffix="_lyrics") == [False, True, True]


def test_tokens_lie_beside_the_songs_or_in_a_column(tmp_path, songs):
    import numpy as np
    folder = tmp_path / "songs"
    shutil.copytree(songs, folder)
    tokens = np.arange(80).reshape(10, 8)
    for song in folder.glob("*.flac"): np.save(song.with_suffix(".tokens.npy"), tokens)
    (lyrics := sorted(folder.glob("*.lyrics"))[0]).write_text("")
    given = translate_backends(json.loads((PLAN / "heartmula-training-demo/multidatabackend.local.json").read_text()), "heartmula", "x", str(folder))
    tracks = read_sets([given[0].data])
    assert all((track.tokens.array() == tokens).all() for track in tracks) and tracks[0].lyrics == "" and lyrics.stem == tracks[0].key
    import datasets
    rows = [{"tags": "pop", "lyrics": "", "audio_tokens": tokens.tolist()}]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "set")
    given = translate_backends(json.loads((PLAN / "heartmula-training-demo/multidatabackend.json").read_text()), "heartmula", "x", str(tmp_path / "set"))
    (track,) = read_sets([given[0].data])
    assert (track.tokens.array() == tokens).all() and (track.text, track.lyrics) == ("pop", "")


def test_a_folder_in_place_of_a_data_set_keeps_the_rest(here, songs):
    environment(here, backends={"type": "huggingface", "dataset_name": "someone/else", "repeats": 1, "config": {"audio_caption_fields": ["tags"]}})
    for word in ("data", "dataset_name"):
        config = simpletuner.load("env=demo", [f"{word}={songs}"]).config
        assert config.data[0]["path"] == str(songs) and config.data[0]["weight"] == 2
    saved = to_hf(read(songs), here / "saved")
    tracks = read_sets(simpletuner.load("env=demo", [f"data={saved}"]).config.data)
    assert [track.text for track in tracks] == [track.text for track in read(songs)]


# both ways train, end to end

def tiny(folder):
    from musiclab.ace_step.checkpoint import tiny_checkpoint
    return tiny_checkpoint(folder)


QUICK = ("device=cpu", "sample_steps=2", "sample_seconds=1", "workers=0", "store=store")


def test_simpletuners_files_train_and_the_lyrics_embedder_comes_back(here, songs):
    tiny(here / "tiny")
    fragment = json.loads((PLAN / "acestep-training-demo/lyrics_embedder.json").read_text())
    environment(here, "acestep-training-demo", backends=json.loads((PLAN / "acestep-training-demo/multidatabackend.json").read_text()),
                **json.loads((PLAN / "acestep-training-demo/config.json").read_text()) | fragment | {"base_model_precision": "no_change",
                    "mixed_precision": "no"})
    train = ("train", "env=acestep-training-demo", "model=tiny", f"data={songs}", "crop_seconds=2", *QUICK)
    status, text = run(*train, "--max_train_steps=2", "--validation_prompt=pop", "--validation_lyrics=la la", "--validation_step_interval=9")
    assert status == 0 and "done: 2 steps" in text, text
    output = here / "output/acestep-training-demo"
    assert (output / "samples/step-00000002/00.wav").exists() and list(output.glob("logs/*tfevents*"))
    saved = load_file(output / "checkpoints/step-00000002/trained.safetensors")
    assert any(".lora_" in name for name in saved) and any(name.startswith("lyric_encoder.") and ".lora_" not in name for name in saved)
    status, text = run(*train, "--max_train_steps=3")  # goes on, with the weights of the lyrics embedder
    assert status == 0 and "resuming from" in text and "done: 3 steps" in text, text
    assert load_file(output / "checkpoints/step-00000003/trained.safetensors").keys() == saved.keys()
    status, text = run(*train, "--max_train_steps=1", "output=third", "--init_lora=nothing/fits.safetensors")
    assert status == 1 and "fits.safetensors" in text


def test_heartmulas_files_train_on_tokens_beside_the_songs(here, songs):
    import numpy as np

    from musiclab.heartmula.checkpoint import tiny_checkpoint
    tiny_checkpoint(here / "tiny")
    shutil.copytree(songs, here / "datasets/my_audio_files")
    for number, song in enumerate((here / "datasets/my_audio_files").glob("*.flac")):
        np.save(song.with_suffix(".tokens.npy"), np.random.default_rng(number).integers(0, 64, (40, 8)))
    shutil.copytree(PLAN / "heartmula-training-demo", here / "config/heartmula-training-demo")
    shutil.copy(PLAN / "heartmula-training-demo/multidatabackend.local.json", here / "config/heartmula-training-demo/multidatabackend.json")
    status, text = run("train", "env=heartmula-training-demo", "model=tiny", "--max_train_steps=2", "--base_model_precision=no_change",
        "--mixed_precision=no", "workers=0",
                       "device=cpu", "store=store")
    assert status == 0 and "done: 2 steps" in text, text
    assert (here / "output/heartmula-training-demo/adapter").is_dir()


@pytest.mark.parametrize("key, value", [
    ("mixed_precision", ["bf16"]), ("num_validation_images", "two"), ("seed", "abc"), ("num_train_epochs", "many"), ("output_dir", 3), ("report_to", 3),
    ("peft_lora_target_modules", "[to_q"), ("optimizer_config", "weight_decay=much"), ("model_family", ["ace_step"]), ("validation_prompt", ["a"]),
    ("learning_rate", "fast")])
def test_a_value_of_the_wrong_kind_is_told_by_its_key(key, value, here):
    with pytest.raises(MusiclabError, match=f"{key}|YAML|weight_decay"): settings(**{key: value})


@pytest.mark.parametrize("entry", [
    {"audio": "loud"}, {"audio": {"max_duration_seconds": [3]}}, {"repeats": "often"}, {"config": []}, {"instance_data_dir": 3}, {"cache_dir_vae": 5}])
def test_a_back_end_with_a_value_of_the_wrong_kind_is_told(entry):
    with pytest.raises(MusiclabError, match=f"demo.*{next(iter(entry))}|max_duration"):
        translate_backends([{"id": "a", "type": "local", "instance_data_dir": "songs", "caption_strategy": "textfile"} | entry], "ace_step", "demo")


def test_what_a_log_of_ours_does_anyway_is_no_tracker(here):
    assert settings(report_to="simpletuner").trackers == [] and settings(report_to=["tensorboard"]).trackers == ["tensorboard"]
