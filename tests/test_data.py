"Data: every convention gives the same tracks, what is written reads back equal, and a split neither leaks nor moves."
import csv
import gzip
import io
import json
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings, strategies as st

from musiclab.core import MusiclabError, prepare_imports
from musiclab.data import WRITERS, Source, Track, Tracks, check, drawn, read, resampled, split, to_hf
from musiclab.tracks import songs_of


def tone(hz: float, seconds: float = 1.0, rate: int = 16000, format: str = "flac") -> bytes:
    "A short sine as the bytes of a file."
    file = io.BytesIO()
    soundfile.write(file, 0.3 * np.sin(2 * np.pi * hz * np.arange(int(seconds * rate)) / rate), rate, format=format)
    return file.getvalue()


def put(folder: Path, files: dict) -> Path:
    "Write files by name; texts as utf-8."
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def facts(tracks: Tracks) -> dict:
    "What was read, by the sound."
    return {track.source.read(): (track.tags, track.caption, track.lyrics, track.seconds) for track in tracks}


A, B = tone(220), tone(440)
SOUNDS = {"a.flac": A, "b.flac": B}
WANTED = {A: (("piano", "90 bpm"), "A calm piano.", "夜\nla la", 1.0), B: ((), "Loud drums and a guitar, live.", None, 1.0)}
ROWS = [{"tags": ["piano", "90 bpm"], "caption": "A calm piano.", "lyrics": "夜\nla la", "seconds": 1.0},
        {"caption": "Loud drums and a guitar, live.", "seconds": 1.0}]


def as_csv(rows: list[dict], delimiter: str = ",") -> str:
    file = io.StringIO()
    writer = csv.DictWriter(file, ["file_name", "tags", "caption", "lyrics", "seconds"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(row | {"tags": ", ".join(row.get("tags", []))} for row in rows)
    return file.getvalue()


def lines(rows: list[dict]) -> str: return "\n".join(map(json.dumps, rows))


def named(column: str) -> list[dict]: return [{column: f"{name}.flac"} | row for name, row in zip("ab", ROWS)]


MANIFEST = lines([{"path": f"{name}.flac", "duration": 1.0, "sample_rate": 16000, "amplitude": None, "weight": None, "info_path": None}
                  for name in "ab"])
WORDS = {"a.json": json.dumps({"name": "a", "keywords": ["piano", "90 bpm"], "description": "A calm piano.", "lyrics": "夜\nla la"}),
         "b.json": json.dumps({"name": "b", "keywords": "", "description": "Loud drums and a guitar, live."})}
CONVENTIONS = {
    "json": {"metadata.json": json.dumps(named("audio"))},
    "json in an object": {"dataset.json": json.dumps({"metadata": {"name": "x"}, "samples": named("audio_path")})},
    "jsonl": {"metadata.jsonl": lines(named("file_name"))},
    "csv": {"metadata.csv": as_csv(named("file_name"))},
    "csv with semicolons": {"metadata.csv": as_csv(named("file_name"), ";")},
    "audiocraft": WORDS | {"data.jsonl": MANIFEST},
    "audiocraft compressed": WORDS | {"data.jsonl.gz": gzip.compress(MANIFEST.encode())},
}

@pytest.mark.parametrize("name", CONVENTIONS)
def test_every_table_gives_the_same_tracks(tmp_path, name):
    put(tmp_path, SOUNDS | CONVENTIONS[name])
    tracks = read(tmp_path)
    assert facts(tracks) == WANTED and tracks.column("key") == ["a", "b"] and not tracks.problems
    [table] = [path for path in tmp_path.iterdir() if path.name.split(".")[0] in ("metadata", "dataset", "data")]
    assert list(read(table)) == list(tracks) # the file itself may be named


@pytest.mark.parametrize("text, lyrics, options", [
    ("{}.txt", "{}.lyrics", {}), ("{}_prompt.txt", "{}_lyrics.txt", {}), ("{}.txt", "{}_lyrics.txt", {"lyrics": "{filename}_lyrics.txt"}),
    ("about/{}.flac.txt", "{}.words", {"text": ["about/{name}.txt"], "lyrics": ["{stem}.words"]})])
def test_text_files_beside_the_sound(tmp_path, text, lyrics, options):
    put(tmp_path, SOUNDS | {text.format("a"): "piano，90 bpm", lyrics.format("a"): "夜\r\nla la\n"})
    put(tmp_path, {text.format("b"): "Loud drums and a guitar, live.", lyrics.format("b"): ""})
    found = facts(read(tmp_path, **options))
    assert found == {A: (("piano", "90 bpm"), None, "夜\nla la", None), B: ((), "Loud drums and a guitar, live.", "", None)}


def test_several_lines_are_several_captions(tmp_path):
    put(tmp_path, SOUNDS | {"a.txt": "A calm piano in the rain.\nRain, and somebody plays.\n"})
    a, b = read(tmp_path)
    assert a.captions == ("A calm piano in the rain.", "Rain, and somebody plays.") and a.caption == a.captions[0] and b.captions == ("",)


def test_tokens_beside_the_sound(tmp_path):
    codes = np.arange(16).reshape(8, 2)
    put(tmp_path, {"a.flac": A, "b.flac": B})
    np.save(tmp_path / "a.tokens.npy", codes)
    np.savez(tmp_path / "b.tokens.npz", other=codes * 0, tokens=codes)
    for track in read(tmp_path): assert np.array_equal(track.tokens.array(), codes)


def test_kind_of_music(tmp_path):
    put(tmp_path, {"a.flac": A, "a.mid": b"MThd", "B.MID": b"MThd", "c.txt": "x"})
    assert [len(read(tmp_path, kind=kind)) for kind in ("audio", "midi", None)] == [1, 2, 3]
    assert read(tmp_path).column("key") == ["B", "a", "a#2"] # a.flac and a.mid


def test_a_given_split_is_kept(tmp_path):
    files = {f"{name}.flac": tone(hz) for name, hz in (("train/audio1", 200), ("train/audio2", 300), ("valid/audio3", 400))}
    put(tmp_path, files | {"metadata.json": json.dumps([{"audio": name, "text": "hip hop 808 beat"} for name in files])})
    for format in "json", "folder":
        train, valid = split(read(tmp_path, format), valid=0.9)
        assert train.column("key") == ["train/audio1", "train/audio2"] and valid.column("key") == ["valid/audio3"]


@pytest.mark.parametrize("sides, wanted", [
    ([("a", "train"), ("b", "test")], {"a": "train", "b": "valid"}), # a test part serves where there is no other
    ([("a", "train"), ("b", "validation"), ("c", "test")], {"a": "train", "b": "valid"}), # else it is left alone
    ([("a", "train"), ("b", "valid"), ("b", None)], {"a": "train", "b": "valid", "b#2": "valid"}), # what was left out follows its song
    ([("a", None), ("b", "valid"), ("c", None)], {"a": "train", "b": "valid", "c": "train"}), # or trains, where somebody has named what validates
    ([("a", "train"), ("b", None), ("c", "train")], {"a": "train", "b": "train", "c": "train"}), # one song alone is not held back
    ([("a", "valid"), ("b", "test")], {"b": "train", "a": "valid"})]) # something must be learned from: by lot
def test_parts_of_a_given_split(sides, wanted):
    from musiclab.tracks import SPLITS
    tracks = Tracks.gather(Track(name, group=name, extra={"split": SPLITS[side]} if side else {}) for name, side in sides)
    train, valid = split(tracks)
    assert {track.key: track.extra["split"] for track in train + valid} == wanted


def test_a_given_split_that_leaks_is_named(tmp_path):
    put(tmp_path, {"train/song-part1.flac": A, "valid/song-part2.flac": B, "train/other.flac": tone(600)})
    tracks = read(tmp_path)
    train, valid = split(tracks)
    assert len(train) == 2 and len(valid) == 1 and valid.problems[-1].where == "song"
    assert "pieces of it are in train and in valid" in str(check(tracks))


songs = st.lists(st.text("abcd123-_ 夜", min_size=1, max_size=8), min_size=1, max_size=40)

@settings(max_examples=60, deadline=None)
@given(songs, songs, st.floats(0.05, 0.95), st.integers(0, 3))
def test_songs_do_not_move_when_others_come(old, new, share, seed):
    many = [f"other {i}" for i in range(300)] # so that neither side is empty
    lots = drawn(old + many, share, seed) & set(old)
    assert drawn(old + new + many, share, seed) & set(old) == lots
    few = drawn(old, share, seed)
    assert len(few ^ lots) <= (lots in (set(), set(old))) # one song is moved, only when the lots alone would leave a side empty
    assert (len(set(old)) > 1) <= len(few) < len(set(old))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(0, 5)), min_size=2, max_size=40), st.floats(0.01, 0.99))
def test_no_song_on_both_sides(pieces, share):
    tracks = Tracks.gather(Track(f"{song}-part{number}", group=song) for song, number in pieces)
    train, valid = split(tracks, share)
    assert sorted(train.column("key") + valid.column("key")) == sorted(tracks.column("key"))
    assert not set(train.column("group")) & set(valid.column("group"))
    if len({song for song, _ in pieces}) > 1: assert len(train) and len(valid)


def test_split_shares():
    tracks = Tracks.gather(Track(f"song {i}") for i in range(2000))
    assert [len(split(tracks, share)[1]) for share in (0, 0.2)] == [0, 373] # by lot: about 400, and always the same
    assert set(split(tracks, seed=1)[1].column("key")) != set(split(tracks)[1].column("key"))


@pytest.mark.parametrize("keys, wanted", [
    (["song_000", "song_001", "b"], ["song", "song", "b"]), (["song_001", "song_002", "b"], ["song_001", "song_002", "b"]),
    (["song-part2", "song part 3", "song_chunk0001"], ["song"] * 3), (["album/seg1", "album/seg2"], ["album"] * 2),
    (["train/x_0", "valid/x_1", "c"], ["x", "x", "c"]), (["audio1", "audio2"], ["audio1", "audio2"]), (["001", "000"], ["001", "000"]),
    (["pop_0", "pop_1"], ["pop_0", "pop_1"]), (["apartment 2", "department3"], ["apartment 2", "department3"]),
    (["part1", "part2"], ["part1", "part2"])])
def test_songs_by_name(keys, wanted): assert songs_of(keys, [""] * len(keys)) == wanted


def test_groups_that_are_told_stay(tmp_path):
    rows = [{"audio": "a.flac", "id": "x_000", "group": "one"}, {"audio": "b.flac", "id": "x_001", "song_id": 2}]
    put(tmp_path, SOUNDS | {"metadata.json": json.dumps(rows)})
    assert read(tmp_path).column("group") == ["one", "2"]


NASTY = [
    Track("album/夜 曲: 1?", Source.of(A, "x.flac"), ("piano", "90 bpm"), "A calm piano, at night.", "夜\n\nla", None, 1.0, "album",
          {"bpm": 90, "artist": "Ada"}),
    Track("plain", Source.of(B, "y.flac"), seconds=1.0, extra={"captions": ["Loud.", "Very loud."], "live": True}, caption="Loud."),
    Track("plain", Source.of(tone(330), "no suffix"), ("tag",), None, "", Source.of(np.arange(8).reshape(4, 2)), 1.0, extra={"bpm": 120.5}),
    Track("../up", Source.of(tone(550, format="wav"), "z.wav"), ("a",), seconds=1.0, extra={"artist": "夜"})]

@pytest.mark.parametrize("splits", [[None] * 4, ["train", "train", "valid", "test"], ["train", None, None, "valid"]],
                         ids=["whole", "split", "in part"])
@pytest.mark.parametrize("format", WRITERS)
def test_what_is_written_reads_back_equal(tmp_path, format, splits):
    if format == "hf": splits = ["train" if any(splits) and side is None else side for side in splits] # a DatasetDict has no other place
    tracks = Tracks.gather(replace(track, extra=track.extra | ({"split": side} if side else {})) for track, side in zip(NASTY, splits))
    made = WRITERS[format](tracks, tmp_path / "made")
    back = read(made)
    def whole(track): return replace(track, source=track.source.read(), tokens=track.tokens and track.tokens.array().tolist())
    assert {track.key: whole(track) for track in back} == {track.key: whole(track) for track in tracks}
    assert not back.problems and all(path.resolve().is_relative_to(made) for path in made.rglob("*"))
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


@pytest.fixture
def hub():
    "The datasets library, ready to be imported."
    prepare_imports()
    import datasets
    datasets.disable_progress_bars()
    yield datasets
    datasets.enable_progress_bars()


def test_columns_of_a_data_set(hub, tmp_path):
    table = hub.Dataset.from_dict({
        "sound": [{"bytes": A, "path": "/home/ada/a.flac"}, {"bytes": B, "path": None}], "lyrics": ["la", ""], "prompt": ["dreamy", "loud"],
        "tags": [["a", "b"], ["c"]], "mood": [0, 1], "embedding": [[0.1] * 512] * 2})
    table = table.cast_column("sound", hub.Audio()).cast_column("mood", hub.ClassLabel(names=["sad", "happy"]))
    first, second = read(table)
    assert (first.tags, first.caption, first.lyrics, first.key, first.source.read()) == (("a", "b"), "dreamy", "la", "a", A)
    assert (second.lyrics, second.source.read(), dict(second.extra)) == ("", B, {"mood": "happy"})
    assert first.source.audio().seconds == pytest.approx(1) # decoded here: no torchcodec is installed
    assert read(table, columns={"caption": ["tags"], "tags": None})[0].text == "a, b" # the given field only, no brackets
    assert read(table, columns={"caption": ["mood", "prompt"]})[1].caption == "happy, loud"
    with pytest.raises(MusiclabError, match="no column mod"): read(table, columns={"caption": "mod"})
    with pytest.raises(MusiclabError, match="no such field: words"): read(table, columns={"words": "lyrics"})
    assert list(read(table.select([1, 0]).with_format("numpy")))[1].source.read() == A


def test_data_sets_on_disk(hub, tmp_path):
    table = hub.Dataset.from_dict({"audio": [{"bytes": A, "path": "a.flac"}], "text": ["calm"]})
    table = table.cast_column("audio", hub.Audio(decode=False))
    hub.DatasetDict(train=table, validation=table).save_to_disk(tmp_path / "saved")
    table.to_parquet(tmp_path / "parquet" / "data" / "train-00000-of-00001.parquet")
    assert read(tmp_path / "saved").column("split") == ["train", "valid"] and read(tmp_path / "saved").column("key") == ["a", "a#2"]
    for where in tmp_path / "parquet", tmp_path / "parquet" / "data" / "train-00000-of-00001.parquet":
        [track] = read(where)
        assert track.source.read() == A and track.text == "calm"
    big = hub.Dataset.from_dict({"audio": [{"bytes": bytes(10**6), "path": None}] * 20})
    big.save_to_disk(tmp_path / "big")
    tracks = read(tmp_path / "big")
    assert len(pickle.dumps(tracks)) < 10**5 and len(pickle.loads(pickle.dumps(tracks))[19].source.read()) == 10**6 # by reference
    assert tracks[3].source.stamp == read(tmp_path / "big")[3].source.stamp != tracks[4].source.stamp


def test_data_set_of_the_upstream_converter(hub, tmp_path):
    put(tmp_path, {"data/song.flac": A})
    rows = {"keys": ["song"], "filename": ["data/song.flac"], "tags": [["melodic techno", "124 bpm"]], "speaker_emb_path": [""],
            "norm_lyrics": ["[Verse]\nLately"], "recaption": [{"short": "Techno.", "empty": None}]}
    hub.Dataset.from_dict(rows).save_to_disk(tmp_path / "zh_lora_dataset")
    [track] = read(tmp_path / "zh_lora_dataset") # its paths count from the folder in which the converter ran
    assert (track.key, track.tags, track.lyrics, track.captions) == ("song", ("melodic techno", "124 bpm"), "[Verse]\nLately", ("Techno.",))
    assert track.source.read() == A


def test_data_set_of_tokens_only(hub):
    [track] = read(hub.Dataset.from_dict({"tags": ["piano,happy"], "lyrics": [""], "audio_tokens": [[[1, 2, 3], [4, 5, 6]]]}))
    assert track.source is None and track.tokens.array().tolist() == [[1, 2, 3], [4, 5, 6]] and track.tags == ("piano", "happy")
    report = check(Tracks.gather([track]))
    assert len(report.tracks) == 1 and report.formats == {"tokens": 1}


any_track = st.builds(
    Track, st.text("ab", min_size=1), tags=st.lists(st.text(min_size=1), max_size=3).map(tuple), caption=st.none() | st.text(),
    lyrics=st.none() | st.text(), seconds=st.none() | st.floats(0, 1e6), group=st.text("xy", min_size=1, max_size=1),
    extra=st.dictionaries(st.text(), st.none() | st.integers() | st.text() | st.lists(st.text(), max_size=2), max_size=2))

@settings(max_examples=50, deadline=None)
@given(st.lists(any_track, max_size=8), st.data())
def test_columns_hold_what_a_list_holds(listed, data):
    tracks = Tracks.gather(listed)
    keyless = [replace(track, key="") for track in tracks]
    assert keyless == [replace(track, key="") for track in listed] and len(set(tracks.column("key"))) == len(tracks)
    part = data.draw(st.slices(len(listed)))
    assert list(tracks[part]) == list(tracks)[part] and list(pickle.loads(pickle.dumps(tracks))) == list(tracks)
    assert [tracks[i] for i in range(-len(tracks), len(tracks))] == [*tracks, *tracks]
    numbered = tracks.with_column("new", list(range(len(tracks))))
    assert [track.extra for track in numbered] == [track.extra | {"new": i} for i, track in enumerate(tracks)]


def test_memory_of_many_tracks():
    names = (f"{i % 450:03}/{i:06x}" for i in range(20000))
    tracks = Tracks.gather(Track(f"midi/{name}", Source.of(f"/data/MIDI/midi_valid/{name}.mid")) for name in names)
    assert tracks.table.nbytes / len(tracks) < 150 # bytes a track: 450,000 of them take less than 68 MB


def test_digest_follows_the_content(tmp_path):
    put(tmp_path, {"a.flac": A, "copy.flac": A, "b.flac": B})
    a, b, copy = (track.source for track in read(tmp_path))
    assert a.digest() == copy.digest() == Source.of(A).digest() != b.digest() and a.stamp != copy.stamp
    before = a.stamp
    put(tmp_path, {"a.flac": B})
    assert a.stamp != before and a.digest() == b.digest()


def test_twins_share_a_group(tmp_path):
    put(tmp_path, {"a.flac": A, "copy.flac": A, "third.flac": A, "b.flac": B, "copy-part2.flac": tone(700)})
    report = check(read(tmp_path))
    groups = {track.key: track.group for track in report.tracks}
    assert groups["a"] == groups["copy"] == groups["third"] != groups["b"]
    assert sum("the same file as" in remark.reason for remark in report.remarks) == 2
    report = check(read(tmp_path).regroup(r"^(copy|a|b|third)"))
    groups = {track.key: track.group for track in report.tracks}
    assert groups["a"] == groups["third"] == groups["copy"] == groups["copy-part2"] != groups["b"] # whole songs are joined


def test_real_music(music):
    tracks = read(music / "audio" / "tracks")
    assert len(tracks) == 32 == len(set(tracks.column("group"))) and not tracks.problems
    assert sum(bool(text) for text in tracks.column("lyrics")) == 16 and all(len(tags) >= 4 for tags in tracks.column("tags"))
    report = check(tracks)
    assert len(report.tracks) == 32 and not report.problems and report.formats == {"mp3": 32} and report.rates == {44100: 32}
    assert np.allclose(report.tracks.column("seconds"), 30, atol=0.1)
    assert not any("decoded" in remark.reason for remark in report.remarks) # French, Chinese and Japanese are no rubbish


def test_real_formats(music):
    report = check(read(music / "audio" / "formats"), decode=True)
    assert len(report.tracks) == 14 and not report.problems and {"mp3", "aac", "opus", "wmav2", "alac"} <= report.formats.keys()


def test_real_formats_at_one_rate(music, tmp_path):
    tracks = check(read(music / "audio" / "formats")).tracks.select(range(0, 14, 3))
    before = dict(zip(tracks.column("key"), tracks.column("seconds")))
    report = check(read(to_hf(resampled(tracks, 32000, channels=1), tmp_path / "made")))
    assert report.rates == {32000: 5} and report.channels == {1: 5} and report.formats == {"flac": 5}
    assert all(abs(track.seconds - before[track.key]) < 0.05 for track in report.tracks)


def test_real_damaged_notes(music):
    folder = music / "midi" / "bad"
    expected = {name: row["expect"] for name, row in json.loads((folder / "manifest.json").read_text())["files"].items()}
    report = check(read(folder, kind="midi"), shortest=0)
    usable = {Path(track.source.name).name for track in report.tracks}
    assert not [name for name in usable if expected[name] == "reject"] and "bad_00_control_ok.mid" in usable
    assert usable | {Path(problem.where).name for problem in report.problems} == set(expected)
