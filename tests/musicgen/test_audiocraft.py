"AudioCraft: manifests against its own examples, settings against its own keys, weights there and back."
import json
from pathlib import Path

import pytest
import torch
import yaml

from musiclab import data
from musiclab.audio import probe
from musiclab.core import MusiclabError
from musiclab.musicgen.audiocraft import PARTS, check, facts, pieces, prepare
from musiclab.musicgen.convert import from_audiocraft
from musiclab.musicgen.generate import generate
from musiclab.musicgen.overrides import Craft, dataset_yaml, defaults, overrides, spelled
from musiclab.musicgen.package import KNOWN, convert, own_weights, read_pickle, read_state
from tests.small_audio import write_songs

here = Path(__file__).parent
examples = here.parent / "parity" / "cases" / "musicgen_audiocraft_config"


def lines(path: Path) -> list[dict]: return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

def same_schema(got: dict, wanted: dict) -> list[str]:
    "Fields of the example that are missing, or hold another kind of value."
    def kind(value): return float if isinstance(value, (int, float)) and not isinstance(value, bool) else type(value)
    return [name for name, value in wanted.items() if name not in got or kind(got[name]) is not kind(value)]


@pytest.fixture
def songs(tmp_path): return data.check(data.read(write_songs(tmp_path / "songs", 4, seconds=1.5, text="calm piano, 72 bpm, A minor"))).tracks


def test_prepared_files_have_the_schema_of_audiocrafts_examples(songs, tmp_path):
    folder = prepare(songs, tmp_path / "crafted", valid=0.3)
    example, track = lines(examples / "example_data.jsonl")[0], json.loads((examples / "example_track.json").read_text())
    assert not check(folder).problems
    for part in PARTS:
        for line in lines(folder / part / "data.jsonl"):
            words = json.loads(Path(line["path"]).with_suffix(".json").read_text(encoding="utf-8"))
            assert list(line) == list(example) and not same_schema(line, example)
            assert not same_schema(words, track) and words["bpm"] == 72 and words["key"] == "A minor"
            info = probe(Path(line["path"]))
            assert (info.rate, info.channels) == (line["sample_rate"], 1) == (32000, 1) and abs(info.seconds - line["duration"]) < 0.01
    sides = [{line["path"] for line in lines(folder / part / "data.jsonl")} for part in PARTS]
    assert not sides[0] & sides[1] and sides[1] == sides[2] == sides[3] and len(sides[0] | sides[1]) == 4


def test_real_tracks_become_a_data_set(music, tmp_path):
    tracks = data.check(data.read(music / "audio" / "tracks")).tracks.select(range(4))
    folder = prepare(tracks, tmp_path / "crafted", chunk=24)
    track = json.loads((examples / "example_track.json").read_text())
    found = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("[tv]*/*.json")]
    assert not check(folder).problems and not any(same_schema(words, track) for words in found)
    assert {words["genre"] for words in found} == {""} and {type(words["bpm"]) for words in found} == {int} and all(words["key"] for words in found)
    assert all(words["duration"] >= 24 for words in found) and len(found) == sum(max(1, int(track.seconds // 24)) for track in tracks)


def test_what_is_read_back_is_what_was_written(songs, tmp_path):
    back = data.read(prepare(songs, tmp_path / "crafted"))
    assert sorted(track.text for track in back) == sorted(track.text for track in songs) and len(back) == 4


def test_pieces_are_equal_and_lose_nothing(songs):
    cut = pieces(songs, 0.5)
    assert len(cut) == 3 * len(songs) and set(cut.column("group")) == set(songs.column("group"))
    for group in set(cut.column("group")):
        sounds = [track.source.audio() for track in cut if track.group == group]
        assert len({len(sound.samples[0]) for sound in sounds}) == 1 and sum(sound.seconds for sound in sounds) == pytest.approx(1.5, abs=0.001)
    assert len(pieces(songs, 5.0)) == len(songs)


@pytest.mark.parametrize("text, wanted", [
    ("rock, 145 bpm, A key", {"bpm": 145, "key": "A"}),
    ("Slow, 60.5 BPM, in Bb minor.", {"bpm": 60.5, "key": "Bb minor"}), ("a key moment, A major hit", {}), ("", {})])
def test_tempo_and_key_are_found_in_the_words(text, wanted): assert facts(data.Track("x", caption=text)) == wanted


def damage(folder: Path, what: str) -> str:
    "Do something to a prepared folder; what the check must say."
    words = sorted((folder / "train").glob("*.json"))[0]
    manifest = folder / "train" / "data.jsonl"
    first, *rest = lines(manifest)
    told = json.loads(words.read_text(encoding="utf-8"))
    def write(line): manifest.write_text("".join(json.dumps(one) + "\n" for one in (line, *rest)), encoding="utf-8")
    if what == "no json": words.unlink(); return "no .json file"
    if what == "broken json": words.write_text("{"); return "cannot be read"
    if what == "no object": words.write_text("[]"); return "no object"
    if what == "missing field": words.write_text(json.dumps({k: v for k, v in told.items() if k != "artist"})); return "lacks artist"
    if what == "wrong type": words.write_text(json.dumps(told | {"genre": ["rock"]})); return "genre is ['rock']"
    if what == "no words": words.write_text(json.dumps(told | {"description": " "})); return "without text"
    if what == "no sound": Path(first["path"]).unlink(); return "No such file"
    if what == "relative path": write(first | {"path": "song.flac"}); return "not an absolute path"
    if what == "no path": write({"duration": 1.0}); return "path is None"
    if what == "duration": write(first | {"duration": 60.0}); return "the manifest says 60.0"
    if what == "rate": write(first | {"sample_rate": 44100}); return "the manifest says 44100"
    if what == "broken line": manifest.write_text(manifest.read_text(encoding="utf-8") + "{\n"); return "data.jsonl"
    if what == "no manifest": (folder / "generate" / "data.jsonl").unlink(); return "is missing"
    if what == "empty manifest": (folder / "evaluate" / "data.jsonl").write_text(""); return "names no file"
    (folder / "valid" / "data.jsonl").write_bytes(manifest.read_bytes())
    return "trained on and validated on"


@pytest.mark.parametrize("what", ["no json", "broken json", "no object", "missing field", "wrong type", "no words", "no sound", "relative path",
                                  "no path", "duration", "rate", "broken line", "no manifest", "empty manifest", "leak"])
def test_every_damage_is_named(songs, tmp_path, what):
    folder = prepare(songs, tmp_path / "crafted")
    hint = damage(folder, what)
    assert any(hint in str(problem) for problem in check(folder).problems), check(folder)


def test_one_song_cannot_be_split(songs, tmp_path):
    with pytest.raises(MusiclabError, match="at least two songs"): prepare(songs.select([0]), tmp_path / "crafted")
    assert not (tmp_path / "crafted").exists()


def test_the_keys_are_those_of_audiocrafts_configuration():
    flat = json.loads((examples / "musicgen_base_32khz_flat_config.json").read_text())
    changed = {key for key, value in flat.items() if defaults().get(key) != value} # what that run had overridden
    assert list(flat) == list(defaults()) and changed == {"dataset.batch_size", *(f"datasource.{part}" for part in PARTS)}


@pytest.mark.parametrize("case", json.loads((here / "overrides.json").read_text()), ids=lambda case: case["name"])
def test_overrides_are_as_expected(case):
    made = overrides(Craft(**case["settings"]))
    assert made == case["overrides"]
    assert {one.partition("=")[0] for one in made} <= {*defaults(), "solver", "model/lm/model_scale", "conditioner", "dset"}


@pytest.mark.parametrize("extra, hint", [
    ("optim.lrr=1", "optim.lr'"), ("lr=1", "optim.lr'"), ("optim.lr=fast", "a number"), ("autocast=1", "bool"), ("dataset=x", "no setting"),
    ("fuser.cross=description", "list"), ("optim.epochs=true", "a number"), ("nonsense", "key=value")])
def test_a_wrong_override_is_named(extra, hint):
    with pytest.raises(MusiclabError, match=hint): overrides(Craft(data="x", extra=[extra]))


@pytest.mark.parametrize("value, text", [
    (None, "null"), (True, "true"), (3, "3"), (1e-5, "1e-05"), ("a b", "'a b'"), ("true", "'true'"), ("12", "'12'"), ("", "''"), ("a'b", r"'a\'b'"),
    ("end\\", r"'end\\'"), ([1, "x,y"], "[1,'x,y']"), ("//pretrained//data/x", "//pretrained//data/x"), ("/歌", "'/歌'")])
def test_values_are_spelled_for_hydra(value, text): assert spelled(value) == text


def test_a_model_of_transformers_is_not_begun_with(tiny):
    with pytest.raises(MusiclabError, match="audiocraft convert"): overrides(Craft(data="x", model=str(tiny)))

def test_the_data_set_file_names_all_four_sources():
    source = yaml.safe_load(dataset_yaml("/songs", stereo=True))["datasource"]
    assert source["max_channels"] == 2 and all(source[part] == f"/songs/{part}" for part in PARTS)


@pytest.mark.parametrize("kind", ["tiny", "wide"])
def test_packages_there_and_back_are_equal(kind, request, tmp_path):
    model = request.getfixturevalue(kind)
    package = convert(model, tmp_path / "package")
    back = convert(package, tmp_path / "back", base=model)
    ours, theirs = own_weights(model), own_weights(back)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    pair = [generate(folder, "techno", seconds=0.5, temperature=0)[0].samples for folder in (model, back)]
    assert (pair[0] == pair[1]).all()
    told = yaml.safe_load(torch.load(package / "state_dict.bin", weights_only=True)["xp.cfg"])
    assert told["transformer_lm"]["n_q"] == len(told["codebooks_pattern"]["delay"]["delays"]) == (8 if kind == "wide" else 4)
    assert overrides(Craft(data="x", model=str(package)))[3] == f"continue_from=//pretrained/{package}"


def test_a_file_of_audiocraft_is_read_without_omegaconf():
    "A checkpoint that was written with omegaconf 2.3.1: its configuration lies in it as objects."
    file = here / "training_checkpoint.th"
    unsafe = set(torch.serialization.get_unsafe_globals_in_checkpoint(file))
    assert "omegaconf.dictconfig.DictConfig" in unsafe and unsafe <= {name for _, name in KNOWN}
    wanted = torch.arange(6.).view(3, 2)
    for which, dtype in (("best", torch.bfloat16), ("ema", torch.float32), ("last", torch.float32)):
        assert torch.equal(read_state(file, which)["emb.0.weight"], wanted.to(dtype))
    with pytest.raises(ImportError): import omegaconf # noqa: F401


class Evil:
    def __init__(self, path): self.path = path
    def __reduce__(self): return open, (str(self.path), "w")


def test_nothing_in_a_file_is_run(tmp_path):
    torch.save({"best_state": Evil(tmp_path / "touched")}, tmp_path / "evil.th")
    with pytest.raises(MusiclabError, match="open"): read_pickle(tmp_path / "evil.th")
    assert not (tmp_path / "touched").exists()


def test_full_precision_survives_a_base_of_half(tiny, tmp_path):
    "A base that is stored in 16 bits must not round what was trained in 32."
    from safetensors.torch import load_file, save_file
    from shutil import copytree
    half = copytree(tiny, tmp_path / "half")
    save_file({name: weight.half() for name, weight in load_file(tiny / "model.safetensors").items()}, half / "model.safetensors", metadata={"format": "pt"})
    back = convert(convert(tiny, tmp_path / "package"), tmp_path / "back", base=half)
    ours, theirs = own_weights(tiny), own_weights(back)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_what_does_not_fit_is_refused(tiny, wide, tmp_path):
    package = convert(tiny, tmp_path / "package")
    with pytest.raises(MusiclabError, match="do not fit"): convert(package, tmp_path / "out", base=wide)
    with pytest.raises(MusiclabError, match="--base"): convert(package, tmp_path / "out")
    with pytest.raises(MusiclabError, match="not empty"): convert(tiny, package)
    with pytest.raises(MusiclabError, match="no checkpoint.th"): read_state(tmp_path)
    (tmp_path / "short.th").write_bytes((package / "state_dict.bin").read_bytes()[:9000])
    with pytest.raises(MusiclabError, match="cannot be read"): read_state(tmp_path / "short.th")
    torch.save([1], tmp_path / "list.th")
    with pytest.raises(MusiclabError, match="no best_state"): read_state(tmp_path / "list.th")
    assert not (tmp_path / "out").exists()


def test_from_audiocraft_refuses_other_models():
    with pytest.raises(MusiclabError, match="another kind of model"):
        from_audiocraft({"condition_provider.conditioners.self_wav.output_proj.weight": torch.zeros(1)})


def test_the_commands_lead_there_and_back(tiny, tmp_path):
    "From songs to AudioCraft, and from a finished run to a model that plays and is evaluated."
    from tests.test_cli import run
    def done(*args):
        status, text = run(*args)
        assert status == 0, text
        return text
    songs = write_songs(tmp_path / "songs", 3, seconds=3.5, text="calm piano, 72 bpm")
    assert "no problems" in done("audiocraft", "prepare", songs, tmp_path / "crafted") and "no problems" in done("audiocraft", "check", tmp_path / "crafted")
    package = tmp_path / "start"
    done("audiocraft", "convert", tiny, package)
    command = done("audiocraft", "config", f"data={tmp_path}/crafted", f"model={package}", "batch_size=2", "--dataset", tmp_path / "mine.yaml")
    assert f"continue_from=//pretrained/{package}" in command and "dataset.batch_size=2" in command and "datasource" in (tmp_path / "mine.yaml").read_text()
    state = {name: weight + 0.01 for name, weight in read_state(package).items()}
    (tmp_path / "run/xps/0a1b2c3d").mkdir(parents=True)
    torch.save({"best_state": {"model": state}, "model": state}, tmp_path / "run/xps/0a1b2c3d/checkpoint.th")
    done("audiocraft", "convert", tmp_path / "run", tmp_path / "mine", "--base", tiny, "--state", "last")
    done("generate", "--model", tmp_path / "mine", "--prompt", "piano", "--seconds", 3.5, "--out", tmp_path / "made/one.wav")
    done("evaluate", songs, tmp_path / "made", "--out", tmp_path / "report.html")
    assert (tmp_path / "report.html").stat().st_size > 1000
    assert run("audiocraft", "check", tmp_path / "nowhere")[0] == 1 and run("audiocraft", "doctor", f"data={tmp_path}/crafted", "clone=/nowhere")[0] == 1
