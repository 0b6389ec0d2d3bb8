"Damaged MIDI files: each ends as a song, a song with warnings, or a MidiError; never otherwise."
import json
import subprocess
import sys

import numpy as np
import pytest

from musiclab.core import MusiclabError
from musiclab.midi import MidiError, Part, Song, notes, read

song = Song([Part("tune", 73, notes=notes([(240 * i, 200, 60 + i % 12, 90) for i in range(24)])),
             Part("kit", 25, True, notes([(480 * i, 60, 36, 100) for i in range(12)]))],
            tempos=[(0, 90.0), (960, 100.0)], keys=[(0, 2, False)], lyrics=[(0, "words")], markers=[(0, "verse")])

READ_ALL = """
import json, resource, sys
from pathlib import Path
from musiclab.midi import MidiError, read
resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
ends = {}
for path in sorted(Path(sys.argv[1]).glob("*.mid")):
    try: song = read(path)
    except MidiError as error: ends[path.name] = {"error": error.what, "where": error.where}
    else: ends[path.name] = {"notes": sum(len(part.notes) for part in song.parts), "warnings": song.warnings, "bars": len(song.bars())}
print(json.dumps(ends))
"""


@pytest.fixture(scope="module")
def ends(music):
    "How each file of the folder of damaged ones ended, read in a process of its own with 2 GB of address space."
    done = subprocess.run([sys.executable, "-c", READ_ALL, music/"midi/bad"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_damaged_files_end_as_they_should(music, ends):
    facts = json.loads((music/"midi/bad/manifest.json").read_text())["files"]
    assert set(ends) == set(facts)
    wrong = []
    for name, fact in facts.items():
        ways, end = set(fact["expect"].split("_or_")), ends[name]
        if "error" in end:
            fine = ways & {"reject", "reject_too_long"} and end["where"].endswith(name) and end["error"]
        elif end["notes"] == 0: fine = ways & {"empty", "ok"} and end["warnings"]
        else:
            fine = ways & {"ok", "salvage"} and end["notes"] == fact.get("notes", end["notes"]) and end["bars"] < 100
            if "ok" in ways: fine = fine and not end["warnings"]
        if not fine: wrong.append((name, fact["expect"], end))
    assert not wrong


@pytest.mark.parametrize("number, warning", [
    ("09", "announces 1"), ("10", "cut off"), ("12", "cut off"), ("14", "no end mark"), ("22", "without length"), ("25", "10 to 1000"),
    ("26", "10 to 1000"), ("32", "0/4"), ("35", "format 99"), ("38", "after the last track")])
def test_a_repair_is_reported(ends, number, warning):
    assert warning in " ".join(next(end for name, end in ends.items() if f"bad_{number}_" in name)["warnings"])


def test_a_file_cut_anywhere_is_read_or_refused():
    data = song.to_bytes()
    ended = set()
    for length in range(len(data)):
        try: ended.add(bool(read(data[:length]).warnings))
        except MidiError: ended.add("refused")
    assert False not in ended and "refused" in ended # no cut goes unnoticed


def test_bytes_changed_at_random_never_surprise():
    data, rng = song.to_bytes(), np.random.default_rng(0)
    ended = {"read": 0, "refused": 0}
    for _ in range(600):
        damaged = bytearray(data)
        for _ in range(rng.integers(1, 8)):
            at = int(rng.integers(len(damaged)))
            if rng.random() < .5: damaged[at] = rng.integers(256)
            elif rng.random() < .5: del damaged[at:at + int(rng.integers(1, 20))]
            else: damaged[at:at] = rng.integers(0, 256, 10, dtype=np.uint8).tobytes()
        try: survivor = read(bytes(damaged))
        except MidiError: ended["refused"] += 1
        else:
            ended["read"] += 1
            assert len(survivor.bars()) and np.isfinite(survivor.seconds)
            read(survivor.to_bytes())
    assert min(ended.values()) > 20


@pytest.mark.parametrize("content, reason", [
    (b"", "too short"), (b"RIFF" + bytes(20), "not a MIDI file"), (b"<!DOCTYPE html><html></html>", "not a MIDI file"),
    (b"MThd\0\0\0\6\0\1\0\1\0\0", "ticks per quarter"), (b"MThd\0\0\0\6\0\1\0\1\xe7\x28", "ticks per quarter")])
def test_what_is_no_midi_file_is_named(tmp_path, content, reason):
    (tmp_path/"strange.mid").write_bytes(content)
    with pytest.raises(MusiclabError, match=reason) as caught: read(tmp_path/"strange.mid")
    assert str(tmp_path/"strange.mid") in str(caught.value)


def test_a_missing_file_and_a_folder(tmp_path):
    with pytest.raises(MidiError, match="No such file"): read(tmp_path/"absent.mid")
    with pytest.raises(MidiError, match="cannot be read"): read(tmp_path)


def test_a_file_without_permission(tmp_path, as_nobody):
    song.save(tmp_path/"secret.mid")
    (tmp_path/"secret.mid").chmod(0)
    with pytest.raises(MidiError, match="Permission denied"): as_nobody(read, tmp_path/"secret.mid")


def test_a_song_that_cannot_be_written_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path/"song.mid"
    song.save(path)
    before = path.read_bytes()
    def full(*_): raise OSError(28, "No space left on device")
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"): Song().save(path)
    assert path.read_bytes() == before and [entry.name for entry in tmp_path.iterdir()] == ["song.mid"]
