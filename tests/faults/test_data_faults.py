"Damage to data: what is bad is named and left out, what is good comes through, and nothing leads out of the folder."
import errno
import gzip
import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
import soundfile

from musiclab.core import MusiclabError, Problem, prepare_imports
from musiclab.data import Source, Track, Tracks, check, read, to_audiocraft, to_audiofolder, to_hf, to_metadata
from musiclab.files import Root, decode_text
from tests.test_data import A, B, put, tone

SECRET = "the password is swordfish"


def names(tracks: Tracks) -> list[str]: return sorted(tracks.column("key"))

def reasons(problems: list[Problem]) -> dict[str, str]: return {Path(problem.where).name: problem.reason for problem in problems}


def sound(samples, rate: int = 16000, subtype: str = "PCM_16") -> bytes:
    file = io.BytesIO()
    soundfile.write(file, np.asarray(samples), rate, format="WAV", subtype=subtype)
    return file.getvalue()


WAVE = 0.3 * np.sin(np.arange(16000) / 10)
BAD_SOUNDS = { # bytes, and a word of the reason
    "empty.wav": (b"", "empty"), "page.wav": (b"<!DOCTYPE html><title>404</title>", "web page"),
    "noise.mp3": (bytes(range(256)) * 40, "decoded"), "headless.flac": (A[100:], "decoded"),
    "lfs.flac": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "LFS"), "no samples.wav": (sound(np.zeros(0)), ""),
    "one sample.wav": (sound([0.5]), "too short"), "short.wav": (sound(WAVE[:1600]), "too short"),
    "nan.wav": (sound(np.where(WAVE == WAVE.max(), np.nan, WAVE), subtype="FLOAT"), "not numbers"),
    "silent.wav": (sound(np.zeros(16000)), "silent"),
    "page.mid": (b"<html></html>", "MIDI"), "cut.mid": (b"MThd\x00\x00\x00\x06\x00\x01", "MIDI")}
ODD_SOUNDS = {
    "six channels.wav": (sound(np.tile(WAVE[:, None], (1, 6))), "6 channels"), "telephone.wav": (sound(WAVE, 8000), "unusual rate"),
    "clipped.wav": (sound(np.clip(WAVE * 9, -1, 1)), "clipped"), "mostly silent.wav": (sound(np.pad(WAVE, (0, 32000))), "silent for 67%"),
    "flac named mp3.mp3": (A, "no caption"), "cut.flac": (tone(220, 4.0)[:12000], "breaks off")}

def test_bad_sounds_are_named_and_good_ones_come_through(tmp_path):
    put(tmp_path, {"good.flac": A, "also good.wav": sound(np.tile(WAVE, 3), 44100)})
    put(tmp_path, {name: data for name, (data, _) in (BAD_SOUNDS | ODD_SOUNDS).items()})
    report = check(read(tmp_path), decode=True)
    problems, remarks = reasons(report.problems), {}
    for remark in report.remarks: remarks.setdefault(Path(remark.where).name, []).append(remark.reason)
    assert set(problems) == set(BAD_SOUNDS)
    for name, (_, word) in BAD_SOUNDS.items(): assert word.lower() in problems[name].lower(), f"{name}: {problems[name]}"
    for name, (_, word) in ODD_SOUNDS.items(): assert any(word in reason for reason in remarks[name]), f"{name}: {remarks[name]}"
    assert len(report.tracks) == 2 + len(ODD_SOUNDS)
    text = str(report)
    assert f"{len(BAD_SOUNDS)} cannot be used" in text and "page.wav" in text


def test_nothing_usable_is_an_error(tmp_path):
    with pytest.raises(MusiclabError, match="nothing at all"): read(tmp_path)
    put(tmp_path, {"notes.pdf": "x", "cover.jpg": "x", "back.jpg": "x"})
    with pytest.raises(MusiclabError, match="no audio or MIDI in it, only 2 .jpg, 1 .pdf"): read(tmp_path)
    put(tmp_path, {"a.wav": b"", "b.mid": b"MThd"})
    with pytest.raises(MusiclabError, match="none of the 1 found can be used.*a.wav: an empty file"): read(tmp_path, kind="audio")
    with pytest.raises(MusiclabError, match="none of the 2 tracks can be used"): check(read(tmp_path))
    with pytest.raises(MusiclabError, match="no such file or folder"): read(tmp_path / "nowhere")
    for table in "[]", '{"samples": []}':
        with pytest.raises(MusiclabError, match="describes no music"): read(put(tmp_path / "set", {"a.flac": A, "metadata.json": table}))
    with pytest.raises(MusiclabError, match="no such kind: 'video'"): read(tmp_path, kind="video")
    with pytest.raises(MusiclabError, match="not a table of music"): read(put(tmp_path, {"song.mp3": b"ID3"}) / "song.mp3")


def test_a_data_set_that_is_not_here(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(MusiclabError, match="nobody/nothing: no such folder here, and it cannot be downloaded"): read("nobody/nothing")


def test_missing_words_lose_no_sound(tmp_path):
    put(tmp_path, {"a.flac": A, "b.flac": B, "b.txt": "rock", "b.lyrics": ""})
    tracks = read(tmp_path)
    assert names(tracks) == ["a", "b"] and tracks.column("lyrics") == [None, ""]
    assert reasons(check(tracks).remarks) == {"a.flac": "no caption and no tags"}


def read_locked(folder: str) -> list:
    "What is read of a folder in which some files may not be opened; runs in a child without root's rights."
    tracks = read(folder, "folder")
    found = [tracks, read(Path(folder, "metadata.json")), check(tracks).tracks]
    for name in "locked", "locked.json":
        try: found.append(read(Path(folder, name)))
        except MusiclabError as error: found.append(error)
    return [str(item) if isinstance(item, MusiclabError) else (names(item), reasons(item.problems)) for item in found]

def test_what_may_not_be_opened(tmp_path, as_nobody):
    put(tmp_path, {"a.flac": A, "b.flac": B, "c.flac": tone(500), "c.txt": "rock", "locked/d.flac": A, "locked.json": "[]",
                   "metadata.json": json.dumps([{"audio": name} for name in ("a.flac", "b.flac", "locked/d.flac")])})
    locked = [tmp_path / name for name in ("b.flac", "c.txt", "locked", "locked.json")]
    for path in locked: path.chmod(0)
    folder, manifest, checked, *errors = as_nobody(read_locked, str(tmp_path))
    for path in locked: path.chmod(0o700)
    assert folder == (["a", "c"], dict.fromkeys(["b.flac", "c.txt", "locked"], "Permission denied")) and checked[0] == ["a", "c"]
    assert manifest[0] == ["a", "b"] and "Permission denied" in manifest[1]["metadata.json[2]"] # a header was not looked at yet
    assert [error for error in errors if "Permission denied" in error] == errors and len(errors) == 2


@pytest.mark.parametrize("name, content, good, word", [
    ("metadata.jsonl", '{"file_name": "a.flac"}\n{"file_name": "b.fl\n[1]\n\n{"file_name": "b.flac"}', ["a", "b"], "not JSON"),
    ("metadata.jsonl", b'{"file_name": "a.flac"}\n{"text": "caf\xe9 x"}\n', ["a"], "not a text"),
    ("metadata.jsonl", '{"file_name": "a.flac"}\n'.encode("utf-16"), ["a"], None),
    ("data.jsonl.gz", gzip.compress(b'{"path": "a.flac", "duration": 1}\n' * 9, mtime=0)[:-12], ["a"], "to its end"),
    ("metadata.csv", 'file_name,text\na.flac,calm\nb.flac,loud,too,many\n', ["a"], "more values than columns"),
    ("metadata.csv", 'file_name,text\na.flac,calm\nb.flac,"never closed', ["a", "b"], None),
    ("metadata.json", '[{"audio": "a.flac"}, 7, {"text": "no sound"}, {"audio": null}, {"audio": ["b.flac"]}]', ["a"], "not an object"),
    ("metadata.json", '\ufeff[{"audio": "a.flac", "text": "half \\ud83d smile", "seconds": "long", "tags": [1, null]}]', ["a"], None)])
def test_damaged_tables(tmp_path, name, content, good, word):
    put(tmp_path, {"a.flac": A, "b.flac": B, name: content})
    tracks = read(tmp_path)
    assert {key.partition("#")[0] for key in tracks.column("key")} == set(good)
    assert (word is None) == (not tracks.problems) and (word is None or word in " ".join(map(str, tracks.problems)))


@pytest.mark.parametrize("content", ["", "{", '{"a": 1}', "7", "null", b"\xff\xfe\x00", b"\x93NUMPY\x01\x00"])
def test_tables_that_are_none(tmp_path, content):
    put(tmp_path, {"a.flac": A, "metadata.json": content})
    with pytest.raises(MusiclabError, match="metadata.json"): read(tmp_path)


def test_two_descriptions_are_a_question(tmp_path):
    put(tmp_path, {"a.flac": A, "metadata.csv": "file_name\na.flac\n", "metadata.jsonl": '{"file_name": "a.flac"}'})
    with pytest.raises(MusiclabError, match=r"several ways: jsonl \(metadata.jsonl\), csv \(metadata.csv\).*format='jsonl'"): read(tmp_path)
    assert len(read(tmp_path, "csv")) == len(read(tmp_path, "folder")) == 1
    with pytest.raises(MusiclabError, match="cannot be read as 'audiocraft'"): read(tmp_path, "audiocraft")


OUTSIDE = ["../secret.txt", "x/../../secret.txt", "link.wav", "linked/secret.txt", "linked/../secret.txt", "{base}/secret.txt",
           "/etc/passwd", "/dev/zero", "/proc/self/environ"]
NO_FILES = ["a.wav\0.txt", "", " ", ".", "..", "x", "nowhere.wav", "file:///etc/passwd", "https://example.org/a.wav", "//server/a.wav",
            r"\\server\share\a.wav", r"C:\music\a.wav", "a" * 5000, "a\n.wav"]

@pytest.mark.parametrize("format", ["json", "jsonl", "csv", "audiocraft", "hf"])
def test_no_path_leads_out(tmp_path, format):
    put(tmp_path, {"secret.txt": SECRET, "set/good.flac": A, "set/x/y.txt": ""})
    data = tmp_path / "set"
    os.symlink("../secret.txt", data / "link.wav")
    os.symlink("..", data / "linked")
    os.symlink("good.flac", data / "inside.flac")
    bad = [name.format(base=tmp_path) for name in OUTSIDE] + NO_FILES
    good = ["good.flac", "./good.flac", "x/../good.flac", r"x\..\good.flac", str(data / "good.flac"), "inside.flac"]
    if format == "csv": bad = [name for name in bad if "\0" not in name and "\n" not in name]
    rows = [{"path" if format == "audiocraft" else "audio": name, "duration": 1.0} for name in bad + good]
    if format == "hf":
        prepare_imports()
        import datasets
        tracks = read(datasets.Dataset.from_list(rows), root=data)
    else:
        table = {"json": json.dumps(rows), "csv": "audio,duration\n" + "".join(f'"{row["audio"]}",1\n' for row in rows if "audio" in row)}
        file = data / f"table.{format if format in table else 'jsonl'}"
        put(data, {file.name: table.get(format, "\n".join(map(json.dumps, rows)))})
        tracks = read(file)
    counted = sum(track.extra.get("weight", 1) for track in tracks)  # equal rows are one track that weighs more
    assert counted == len(good) and {track.source.read() for track in tracks} == {A} and len(tracks.problems) >= len(bad)
    told = " ".join(map(str, tracks.problems))
    assert SECRET not in told and told.count("leads out of the data folder") >= len(OUTSIDE) and "allow_outside=True" in told


def test_going_out_can_be_allowed(tmp_path):
    put(tmp_path, {"a.flac": A, "set/b.flac": B, "set/metadata.json": '[{"audio": "../a.flac"}, {"audio": "b.flac"}]'})
    os.symlink(tmp_path / "a.flac", tmp_path / "set" / "c.flac")
    assert names(read(tmp_path / "set")) == ["b"]
    assert names(read(tmp_path / "set", allow_outside=True)) == ["a", "b"]
    assert names(read(tmp_path / "set", root=tmp_path)) == ["a", "set/b"]
    assert names(read(tmp_path / "set", "folder")) == ["b"] and names(read(tmp_path / "set", "folder", allow_outside=True)) == ["b", "c"]


def test_links_in_a_folder(tmp_path):
    put(tmp_path, {"secret.txt": SECRET, "elsewhere/d.flac": tone(300), "set/a.flac": A, "set/b.flac": B, "set/deep/c.flac": tone(500)})
    data = tmp_path / "set"
    os.symlink("../secret.txt", data / "a.txt") # words from outside
    os.symlink("../elsewhere", data / "other") # sound from outside
    os.symlink("..", data / "deep" / "up") # round and round
    os.symlink("gone.flac", data / "e.flac")
    os.mkfifo(data / "pipe.wav") # reading it would wait for ever
    tracks = read(data)
    assert names(tracks) == ["a", "b", "deep/c"] and not any(tracks.column("caption")) and SECRET not in "".join(map(str, tracks))
    assert set(reasons(tracks.problems)) == {"a.txt", "other", "up", "e.flac", "pipe.wav"}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "gb18030"])
@pytest.mark.parametrize("text", ["piano, 90 bpm", "钢琴，安静的深夜，72 bpm", "[Verse]\r\n雨が降る夜に\r\n静かに\r\n",
                                  "爱 🎹 love\n\n再来一遍", "繁體中文的歌詞，愛與夢"])
def test_encodings(tmp_path, encoding, text):
    put(tmp_path, {"a.flac": A, "a.txt": f"{text}\n".encode(encoding), "a.lyrics": f"{text}\n".encode(encoding)})
    [track] = read(tmp_path)
    assert track.lyrics == text.replace("\r\n", "\n").strip() and "\ufeff" not in track.text


def test_other_encodings_are_asked_for(tmp_path):
    put(tmp_path, {"a.flac": A, "a.lyrics": "déjà vu, Zoë".encode("latin-1"), "b.flac": B, "b.lyrics": "夜の雨".encode("shift_jis")})
    put(tmp_path, {"b.txt": bytes(range(256))})
    tracks = read(tmp_path)
    assert tracks.column("lyrics")[0] is None and "a.lyrics" in reasons(tracks.problems) and "b.txt" in reasons(tracks.problems)
    assert read(tmp_path, encoding="latin-1").column("lyrics")[0] == "déjà vu, Zoë"
    assert read(tmp_path, encoding="shift_jis").column("lyrics")[1] == "夜の雨"
    with pytest.raises(MusiclabError, match="not a text in klingon"): decode_text(b"nuqneH", "klingon")


def test_long_and_decomposed_text(tmp_path):
    put(tmp_path, {"a.flac": A, "a.lyrics": "la la la\n" * 120_000, "a.txt": "cafe\u0301, " * 600})
    [track] = read(tmp_path)
    assert len(track.lyrics) > 10**6 and track.tags == ("caf\u00e9",)


def test_file_names_of_all_kinds(tmp_path):
    put(tmp_path, {"夜 曲 #1 (live).flac": A, "._夜.flac": b"x", ".hidden/c.flac": B, "__MACOSX/d.flac": B, "trailing.dot..flac": B})
    put(tmp_path, {"夜 曲 #1 (live).txt": "calm"})
    with open(os.fsencode(tmp_path) + b"/\xd2\xb9\xff.flac", "wb") as file: file.write(A) # a name in another encoding
    tracks = read(tmp_path)
    assert names(tracks) == ["trailing.dot.", "夜 曲 #1 (live)"] and tracks[1].text == "calm"
    assert ["not utf-8" in problem.reason for problem in tracks.problems] == [True]
    assert names(read(to_metadata(tracks, tmp_path / "copy"))) == names(tracks)


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", b"PK\x03\x04", b"[[1, 2]]"])
def test_damaged_tokens(tmp_path, content):
    put(tmp_path, {"a.flac": A, "a.tokens.npy": content})
    [track] = read(tmp_path)
    with pytest.raises(MusiclabError, match="a.tokens.npy: no array of numbers"): track.tokens.array()


def test_tokens_are_never_unpickled(tmp_path):
    file = io.BytesIO()
    np.save(file, np.array([{"a": 1}], dtype=object))
    with pytest.raises(MusiclabError, match="no array of numbers"): Source.of(file.getvalue()).array()


@pytest.mark.parametrize("write", [to_metadata, to_audiofolder, to_audiocraft, to_hf])
def test_writing_never_harms_what_is_there(tmp_path, write):
    put(tmp_path, {"songs/a.flac": A, "songs/b.flac": B})
    tracks = read(tmp_path / "songs")
    with pytest.raises(MusiclabError, match="exists already"): write(tracks, tmp_path / "songs") # the very folder they lie in
    (tmp_path / "songs" / "b.flac").unlink()
    with pytest.raises(MusiclabError, match="b.flac"): write(tracks, tmp_path / "made")
    assert os.listdir(tmp_path) == ["songs"] and os.listdir(tmp_path / "songs") == ["a.flac"] # nothing half done is left


@pytest.mark.parametrize("write", [to_metadata, to_audiofolder, to_audiocraft, to_hf])
def test_a_full_disk_leaves_nothing_half_done(tmp_path, monkeypatch, write):
    tracks = Tracks.gather([Track("a", Source.of(A, "a.flac")), Track("b", Source.of(B, "b.flac"))])
    written = []
    def fills(path, data, write=Path.write_bytes):
        if len(written) == 1: raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append(path)
        return write(path, data)
    monkeypatch.setattr(Path, "write_bytes", fills)
    monkeypatch.setattr("datasets.arrow_writer.ArrowWriter.write", lambda writer, row: fills(tmp_path / ".row", b""))
    with pytest.raises(MusiclabError, match=r"made: cannot be written \(No space left on device\)"): write(tracks, tmp_path / "made")
    (tmp_path / ".row").unlink(missing_ok=True)
    assert not os.listdir(tmp_path)


def write_here(folder: str) -> str:
    try: to_metadata(Tracks.gather([Track("a", Source.of(A, "a.flac"))]), Path(folder, "made"))
    except MusiclabError as error: return str(error)

def test_a_folder_that_may_not_be_written(tmp_path, as_nobody):
    tmp_path.chmod(0o500)
    error = as_nobody(write_here, str(tmp_path))
    tmp_path.chmod(0o700)
    assert "cannot be written (Permission denied)" in error


def test_broken_data_sets(tmp_path):
    put(tmp_path, {"saved/state.json": "{", "saved/dataset_info.json": "{}", "parquet/train.parquet": b"PAR1garbage"})
    for name in "saved", "parquet":
        with pytest.raises(MusiclabError, match="cannot be opened as a data set"): read(tmp_path / name)


def test_root_sees_through_a_moving_target(tmp_path):
    put(tmp_path, {"set/a.wav": A, "out/a.wav": B})
    root = Root(str(tmp_path / "set"))
    assert root.file("a.wav") == str(tmp_path / "set" / "a.wav")
    (tmp_path / "set" / "a.wav").unlink()
    os.symlink(tmp_path / "out" / "a.wav", tmp_path / "set" / "a.wav")
    with pytest.raises(MusiclabError, match="leads out"): root.file("a.wav")


def test_a_song_that_vanishes_while_it_is_checked(tmp_path):
    put(tmp_path, {"a.flac": A, "b.flac": B})
    tracks = read(tmp_path) + Tracks.gather([Track("from memory", Source.of(A))])
    (tmp_path / "b.flac").unlink()
    report = check(tracks)
    assert names(report.tracks) == ["a", "from memory"] and reasons(report.problems)["b.flac"]
