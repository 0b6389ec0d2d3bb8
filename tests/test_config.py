"Config: what is read from files and command lines, and what is said when it is wrong."
import json
import subprocess
import sys
from typing import Literal

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, Field

from musiclab.config import ELSEWHERE, PlainDumper, Settings, TrainConfig, describe, dump, load, nearest, parse_yaml
from musiclab.core import MusiclabError

GIVEN = {"task": "musicgen", "model": "facebook/musicgen-small", "data": "songs"}


class Decoder(BaseModel):
    layers: int = Field(2, ge=1)
    width: int = 64


class Family(TrainConfig):
    "A family's own"
    frames: int = Field(1500, ge=50, description="length of a crop, in frames")
    decoder: Decoder = Field(Decoder(), description="shape of the decoder")
    extra: dict[str, float] = Field({}, description="anything")
    lr: float = Field(1e-4, gt=0, description="learning rate")


def error(source=None, *overrides, cls=TrainConfig):
    with pytest.raises(MusiclabError) as caught: load(GIVEN if source is None else source, overrides, cls)
    return str(caught.value)


def test_the_defaults_are_those_of_the_plan():
    config = load(GIVEN)
    plan = dict(
        output="output", seed=0, valid_data=None, valid_fraction=0.2,
        method="lora", rank=12, alpha=24, dropout=0.1, targets=None, init_adapter=None, quantize=None,
        epochs=8, max_steps=None, batch_size=2, accumulate=8, lr=3e-4, optimizer="adamw", weight_decay=0.01,
        schedule="cosine", warmup=100, restarts=1, clip=1.0, ema=0.0,
        precision="auto", device="auto", gradient_checkpointing=True, compile=False, strategy="auto", workers=2, bucket=False,
        store=None, cache=True, validate_every=None, sample_every=None, sample_prompts=[], sample_seconds=8, log_every=1,
        trackers=["tensorboard"], project="musiclab", save_every=None, save_minutes=15, keep=3, resume="latest", time_budget=None, debug=False,
        limit_batches=None, save_epochs=None, validate_epochs=None)
    assert config.model_dump() == GIVEN | plan
    assert TrainConfig(**GIVEN).sample_prompts is not TrainConfig(**GIVEN).sample_prompts


@pytest.mark.parametrize("text, value", [
    ("3e-4", 3e-4), ("1E3", 1000.0), (".5", 0.5), ("-7", -7), ("010", 10), ("null", None), ("~", None), ("", None), ("true", True),
    ("False", False), ("'3e-4'", "3e-4"), ("[a, no, 1e2]", ["a", "no", 100.0]),
    *((word, word) for word in ("no", "off", "NO", "none", "1:30", "2024-01-01", "1_000", "0x10", "C:\\songs", "日本", "="))])
def test_yaml_says_what_it_seems_to_say(text, value):
    read = parse_yaml(text)
    assert read == value and type(read) is type(value)


@pytest.mark.parametrize("text, reason", [
    ("lr: 1\nrank: 2\nlr: 3", "the key 'lr' stands there twice"), ("a: [1", "line 1"), ("a: *b", "undefined alias"),
    ("a:\n\t- b", "line 2"),
    ("!!python/object/apply:os.system [ls]", "could not determine a constructor"), ("a: 1\n---\nb: 2", "another document"), ("\x00", "")])
def test_broken_yaml_says_where(text, reason, tmp_path):
    file = tmp_path / "my.yaml"
    file.write_text(text)
    assert error(file).startswith(f"{file}: not readable as YAML") and reason in error(file)


words = st.text(st.characters(exclude_categories=["C"]))
plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | words

@given(st.recursive(plain, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3)))
def test_what_is_dumped_reads_back_the_same(value):
    read = parse_yaml(yaml.dump(value, Dumper=PlainDumper, allow_unicode=True))
    assert read == value == yaml.safe_load(yaml.dump(value, Dumper=PlainDumper)) and type(read) is type(value)


CHANGES = dict(
    lr=st.floats(1e-9, 1), rank=st.integers(1, 999), method=st.sampled_from(["lora", "dora"]), debug=st.booleans(),
    quantize=st.sampled_from([None, "int8"]), save_minutes=st.none() | st.floats(0.1, 1e6), sample_prompts=st.lists(words),
    resume=st.sampled_from(["none", "latest", "no", "null", "12", "1e3"]),
    data=st.sampled_from(["no", "true", "3e-4", "2024", "a: b", "# x", "ünï 歌"]))

@settings(deadline=None, max_examples=50)
@given(st.fixed_dictionaries({}, optional=CHANGES))
def test_a_resolved_configuration_reads_back_the_same(tmp_path_factory, changes):
    config = load(GIVEN | changes)
    path = tmp_path_factory.mktemp("config") / "config.yaml"
    dump(config, path)
    assert load(path) == config
    assert load(json.loads(json.dumps(config.model_dump(mode="json")))) == config


def test_json_yaml_and_bom_files_read_alike(tmp_path):
    content = json.dumps(GIVEN | {"lr": 1e-5, "sample_prompts": ["techno"]}, indent="\t")
    (tmp_path / "a.json").write_text(content)
    (tmp_path / "b.yaml").write_text(content.replace("\t", " "))
    windows = ["\ufefftask: musicgen", "model: facebook/musicgen-small", "data: songs", "lr: 1e-5", "sample_prompts: techno"]
    (tmp_path / "c.yml").write_bytes("\r\n".join(windows).encode())
    configs = [load(path) for path in sorted(tmp_path.iterdir())]
    assert configs[0] == configs[1] == configs[2] == load(str(tmp_path / "a.json")) and configs[0].lr == 1e-5


@pytest.mark.parametrize("content, reason", [
    (b"", "does not hold settings"), (b"- a", "does not hold settings"), (b"1: 2", "does not hold settings"),
    (b"\xff\xfea", "is not utf-8 text"), (None, "cannot be read (No such file or directory)")])
def test_files_that_are_no_configuration(tmp_path, content, reason):
    file = tmp_path / "my.yaml"
    if content is not None: file.write_bytes(content)
    assert error(file).startswith(f"{file}: {reason}")


def test_broken_json_says_where(tmp_path):
    (tmp_path / "my.json").write_text('{"lr": 1,}')
    said = error(tmp_path / "my.json")
    assert said.startswith(f"{tmp_path / 'my.json'}: not readable as JSON: ") and "line 1" in said


@pytest.mark.parametrize("override, value", [
    ("lr=1e-5", 1e-5), ("lr=0.5", 0.5), (" lr =1", 1.0), ("epochs=3", 3), ("data=2024", "2024"), ("data=a=b", "a=b"),
    ("targets=.*q_proj", ".*q_proj"),
    ("quantize=int8", "int8"), ("quantize=none", None), ("quantize=null", None), ("quantize=", None), ("save_minutes=none", None),
    ("init_adapter=None", None), ("resume=none", "none"), ("model=facebook/musicgen-small@main", "facebook/musicgen-small@main"),
    ("compile=yes", True), ("compile=no", False), ("compile=off", False), ("compile=1", True), ("compile=true", True),
    ("trackers=none", []), ("trackers=[]", []), ("trackers=wandb", ["wandb"]), ("trackers=[wandb, tensorboard]", ["wandb", "tensorboard"]),
    ("sample_prompts=slow piano", ["slow piano"]), ("sample_prompts=['a: b', no]", ["a: b", "no"]),
    ("sample_prompts=[{caption: x, tags: [a, b]}]", [{"caption": "x", "tags": ["a", "b"]}])])
def test_overrides_mean_what_they_seem_to_mean(override, value):
    assert getattr(load(GIVEN, [override]), override.partition("=")[0].strip()) == value


def test_overrides_win_in_order_and_reach_into_mappings():
    config = load(GIVEN | {"decoder": {"width": 32}}, ["lr=1", "lr=0.5", "decoder.layers=4", "extra.a=1e-3", "extra.b=2"], Family)
    assert config.lr == 0.5 and config.decoder == Decoder(layers=4, width=32) and config.extra == {"a": 1e-3, "b": 2}
    assert load(GIVEN, [], Family).lr == 1e-4
    assert error(None, "lr.a=1") == "lr: expected number > 0 and ≤ 1, got {'a': 1}"
    assert "holds 3, so there is no a in it" in error({**GIVEN, "lr": 3}, "lr.a=1")
    assert error(None, "decoder.layers=0", cls=Family) == "decoder.layers: Input should be greater than or equal to 1, got 0"


def test_home_is_expanded_and_other_paths_are_left_to_the_current_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", "/home/ada")
    (tmp_path / "my.yaml").write_text("task: musicgen\nmodel: ~/model\ndata: songs/mine\nstore: ~\n")
    config = load(tmp_path / "my.yaml", ["output=~/out"])
    assert (config.model, config.data, config.output, config.store) == ("/home/ada/model", "songs/mine", "/home/ada/out", None)


@pytest.mark.parametrize("key, near", [
    ("learning_rate", "lr"), ("lora_r", "rank"), ("Epochs", "epochs"), ("batch-size", "batch_size"), ("warm_up", "warmup"),
    ("max_step", "max_steps"), ("gradient_acumulation_steps", "accumulate"), ("modle", "model"), ("zzz", None)])
def test_an_unknown_key_names_the_nearest(tmp_path, key, near):
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(GIVEN | {key: 1}))
    expected = f"{tmp_path / 'my.yaml'}: unknown setting {key!r}" + (f", did you mean {near!r}?" if near else " (--explain lists all)")
    assert error(tmp_path / "my.yaml") == expected
    assert error(None, f"{key}=1") == expected.removeprefix(f"{tmp_path / 'my.yaml'}: ")


def test_names_from_elsewhere_lead_to_settings_that_exist():
    assert set(ELSEWHERE.values()) <= set(TrainConfig.model_fields) and not set(ELSEWHERE) & set(TrainConfig.model_fields)
    assert nearest("learning_rate", ["rate"]) != "lr" # only where there is such a setting


@pytest.mark.parametrize("override, said", [
    ("rank=twelve", "rank: expected whole number ≥ 1, got 'twelve'"), ("rank=0", "rank: expected whole number ≥ 1, got 0"),
    ("rank=2.5", "rank: expected whole number ≥ 1, got 2.5"), ("rank=true", "rank: expected whole number ≥ 1, got 'true'"),
    ("rank=", "rank: expected whole number ≥ 1, got None"), ("lr=-1", "lr: expected number > 0 and ≤ 1, got -1"),
    ("lr=.nan", "lr: expected number > 0 and ≤ 1, got nan"), ("lr=no", "lr: expected number > 0 and ≤ 1, got 'no'"),
    ("dropout=1", "dropout: expected number ≥ 0 and < 1, got 1"), ("ema=1.0", "ema: expected number ≥ 0 and < 1, got 1.0"),
    ("method=lroa", "method: expected lora | rslora | dora | full, got 'lroa'"),
    ("quantize=no", "quantize: expected int8 | nf4 or none, got 'no'"),
    ("compile=perhaps", "compile: expected true | false, got 'perhaps'"),
    ("trackers=[tensorbord]", "trackers: expected list of (tensorboard | wandb), got 'tensorbord'"),
    ("save_minutes=0", "save_minutes: expected number > 0 or none, got 0"), ("model=[a]", "model: expected text, got ['a']"),
    ("batch_size={a: 1}", "batch_size: expected whole number ≥ 1, got {'a': 1}"),
    ("keep=0", "keep: expected whole number ≥ 1, got 0"), ("valid_fraction=1", "valid_fraction: expected number ≥ 0 and < 1, got 1"),
    ("targets=(", "targets: '(' is not a regular expression: missing ), unterminated subpattern at position 0"),
    ("lr", "lr: is not of the form key=value"), ("=3", "=3: is not of the form key=value"), ("lr=[", "lr=[: not readable as YAML")])
def test_a_wrong_value_says_what_is_expected(override, said):
    assert error(None, override).startswith(said)


@pytest.mark.parametrize("overrides, said", [
    (["method=full", "quantize=int8"], "use an adapter, or quantize=none"), (["method=full", "init_adapter=a"], "has no adapter"),
    (["restarts=3"], "restarts=3 is for schedule=cosine_with_restarts, not cosine")])
def test_settings_that_contradict_each_other(overrides, said): assert said in error(None, *overrides)


def test_everything_wrong_is_said_at_once():
    said = error({"task": "musicgen", "modle": "x", "rank": "a", "quantize": 3})
    assert said == ("rank: expected whole number ≥ 1, got 'a'; quantize: expected int8 | nf4 or none, got 3; "
                    "unknown setting 'modle', did you mean 'model'?; "
                    "'data' is missing: the songs: a folder, a manifest, or a Hugging Face data set; or several with options (musiclab.sets)")


@pytest.mark.parametrize("cls", [TrainConfig, Family])
def test_every_setting_is_documented(cls):
    table = describe(cls)
    lines = {line.split()[0]: line for line in table.splitlines() if line.startswith("  ")}
    assert list(lines) == list(cls.model_fields) and all(field.description for field in cls.model_fields.values())
    assert "0.0003" in describe(TrainConfig) and ("0.0001" in table) == (cls is Family)
    assert ("A family's own" in table) == (cls is Family) and "None" not in table and "null" not in table


def test_a_setting_made_in_code_is_checked_too():
    class Metronome(Settings):
        bpm: float = Field(120, gt=0)
        sound: Literal["click", "none"] = "click"
    assert Metronome(sound="none").sound == "none"
    with pytest.raises(MusiclabError, match="unknown setting 'bpn', did you mean 'bpm'"): Metronome(bpn=1)


def test_config_loads_without_torch_and_numpy():
    program = "import sys, musiclab.config; print([name for name in ('torch', 'numpy', 'transformers') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "[]\n"
