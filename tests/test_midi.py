"MIDI: real files there and back, time, bars, and what a `Song` must not lose."
import json
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from musiclab.midi import MidiError, Part, Song, lay_bars, notes, read, repair_meters, seconds_to_ticks, ticks_to_seconds
from musiclab.smf import mend, write_file


def contents(song):
    "What must survive a round trip, part by part; writing may reorder parts that share nothing."
    return sorted((part.name, part.program, part.drums, part.volume, part.pan, part.notes.tobytes()) for part in song.parts)


@pytest.mark.parametrize("folder, every", [("freedoom", 8), ("pop909", 20), ("edge", 1)])
def test_real_files_come_back_as_they_were(music, folder, every):
    files = sorted((music/"midi"/folder).glob("*.mid"))[::every]
    if folder == "edge":
        facts = json.loads((music/"midi/edge/manifest.json").read_text())["files"]
        files = [path for path in files if "notes" in facts[path.name]["observed"]["symusic"]]
    assert len(files) >= 9
    for path in files:
        song = read(path)
        again = read(song.to_bytes())
        assert contents(again) == contents(song), path.name
        assert (again.meters, again.keys, again.ppq) == (song.meters, song.keys, song.ppq), path.name
        np.testing.assert_allclose(np.array(again.tempos), np.array(song.tempos), rtol=1e-4, err_msg=path.name)


def test_files_that_every_library_reads_have_all_their_notes(music):
    facts = json.loads((music/"midi/edge/manifest.json").read_text())["files"]
    agreed = {name: seen["symusic"] for name, entry in facts.items()
              if len(set((seen := entry["observed"]).values())) == 1 and "notes" in seen["symusic"]}
    assert len(agreed) > 15
    for name, observed in agreed.items():
        assert sum(len(part.notes) for part in read(music/"midi/edge"/name).parts) == int(observed.split()[0]), name


def test_pop909_counts_four_quarters_where_its_files_say_one(music):
    files = sorted((music/"midi/pop909").glob("*.mid"))[::10]
    songs = [read(path) for path in files]
    assert not [path.name for path, song in zip(files, songs) if any(n == 1 for _, n, _ in song.meters)]
    assert sum("one beat a bar" in " ".join(song.warnings) for song in songs) > len(files) / 2
    assert 50 < np.mean([len(song.bars()) for song in songs]) < 120


def test_a_meter_in_mid_bar_cuts_the_bar(music):
    song = read(music/"midi/freedoom/d_e2m8.mid") # 9/16 enters in the middle of a bar of 7/8
    bars = song.bars()
    entry = next(i for i, bar in enumerate(bars) if (bar["numerator"], bar["denominator"]) == (9, 16))
    assert bars["length"][entry - 1] == bars["length"][entry - 2] / 2
    assert (bars["start"][1:] == bars["start"][:-1] + bars["length"][:-1]).all()


@pytest.fixture
def full_song():
    tune = notes([(0, 480, 60, 90), (480, 240, 64, 1), (480, 240, 67, 127), (2000, 1, 0, 64), (2000, 30, 127, 64)])
    kit = notes([(0, 10, 36, 100), (960, 10, 38, 100)])
    return Song([Part("Leier 鼓", 107, notes=tune, volume=90, pan=10), Part("", 39, notes=tune), Part("kit", 25, True, kit, pan=127)],
                tempos=[(0, 100.0), (960, 50.0)], meters=[(0, 7, 8), (1680, 3, 4)], keys=[(0, -3, True), (960, 4, False)],
                lyrics=[(0, "la"), (960, "夜色")], markers=[(0, "verse"), (960, "副歌")], ppq=960)


def test_everything_in_a_song_survives(full_song, tmp_path):
    full_song.save(tmp_path/"song.mid")
    again = read(tmp_path/"song.mid")
    assert contents(again) == contents(full_song)
    assert [part.name for part in again.parts] == [part.name for part in full_song.parts]
    for name in ("meters", "keys", "lyrics", "markers", "ppq", "warnings", "end"):
        assert getattr(again, name) == getattr(full_song, name), name
    assert again.seconds == pytest.approx(full_song.seconds, rel=1e-5)


def test_more_parts_than_channels():
    song = Song([Part(f"part {i}", i, notes=notes([(i, 100, 60, 90), (200, 100, 60, 80)])) for i in range(40)])
    assert contents(read(song.to_bytes())) == contents(song)


def test_a_song_without_notes():
    again = read(Song(tempos=[(0, 77.0)]).to_bytes())
    assert again.parts == [] and again.end == 0 and again.seconds == 0 and len(again.bars()) == 1
    assert again.tempos[0][1] == pytest.approx(77, rel=1e-5)


def test_tempos_that_midi_cannot_write_are_brought_into_range():
    song = Song([Part(notes=notes([(0, 1, 60, 1)]))], tempos=[(0, 0.01), (480, 1e9)])
    assert [bpm for _, bpm in read(song.to_bytes()).tempos] == pytest.approx([10, 1000])


maps = st.lists(st.tuples(st.integers(1, 50_000), st.floats(10, 400)), max_size=8, unique_by=lambda event: event[0]).map(
    lambda events: [(0, 120.0), *sorted(events)])

@given(maps, st.lists(st.integers(0, 100_000), min_size=1, max_size=20), st.sampled_from([1, 89, 96, 480, 960]))
def test_ticks_to_seconds_and_back(tempos, ticks, ppq):
    ticks = np.array(sorted(ticks))
    seconds = ticks_to_seconds(ticks, tempos, ppq)
    assert (np.diff(seconds) >= 0).all()
    assert (seconds_to_ticks(seconds, tempos, ppq) == ticks).all()


meters = st.lists(st.tuples(st.integers(-5, 30_000), st.integers(-1, 20), st.sampled_from([0, 1, 2, 3, 4, 8, 16, 32, 64, 255])), max_size=6)

@settings(deadline=None)
@given(meters, st.integers(1, 40_000), st.sampled_from([1, 24, 89, 480]))
def test_bars_of_any_meters_cover_the_song(events, end, ppq):
    repaired, _ = repair_meters([event for event in events if event[0] >= 0], ppq, end)
    bars = lay_bars(repaired, ppq, end)
    stops = bars["start"] + bars["length"]
    assert bars["start"][0] == 0 and stops[-1] >= end
    assert (bars["start"][1:] == stops[:-1]).all()
    assert {tick for tick, *_ in repaired} <= set(bars["start"].tolist())


rows = st.lists(st.tuples(st.integers(0, 10_000), st.integers(1, 2_000), st.integers(0, 127), st.integers(1, 127)), min_size=1, max_size=40,
                unique_by=lambda row: row[2])

@settings(deadline=None)
@given(st.lists(st.tuples(rows, st.integers(0, 127), st.booleans()), min_size=1, max_size=4))
def test_any_notes_survive(parts):
    song = Song([Part(f"p{i}", program, drums, notes(part)) for i, (part, program, drums) in enumerate(parts)])
    assert contents(read(song.to_bytes())) == contents(song)


def test_every_bad_file_ends_as_its_manifest_says(music):
    folder = music/"midi/bad"
    facts = json.loads((folder/"manifest.json").read_text())["files"]
    assert len(facts) == 30
    for name, fact in facts.items():
        begin, song = time.perf_counter(), None
        try: song = read(folder/name)
        except MidiError as error: assert name in str(error)
        count = sum(len(part.notes) for part in song.parts) if song else None
        assert time.perf_counter() - begin < 5
        if fact["expect"] == "ok": assert count and not song.warnings, name
        elif fact["expect"] == "salvage": assert count and song.warnings, name
        elif fact["expect"] == "empty": assert count == 0, name
        elif fact["expect"] in ("reject", "reject_too_long"): assert song is None, name
        else: assert song is None or song.warnings, name
        if song is not None and "notes" in fact: assert count == fact["notes"], name


def test_every_edge_file_ends_cleanly(music):
    for path in sorted((music/"midi/edge").glob("*.mid")):
        try: song = read(path)
        except MidiError as error: assert path.name in str(error)
        else: assert song.parts or "no notes" in song.warnings


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc for the most memory that was held")
def test_reading_is_bounded(tmp_path):
    "Two megabytes of damage, in a process that may not take much: a time, a memory, and an end."
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, 1_900_000, dtype=np.uint8).tobytes()
    files = {"noise": noise, "hanging": b"\x00\x90\x3c\x40" * 475_000, "texts": b"\x00\xff\x01\x7f" + noise}
    for name, track in files.items(): (tmp_path/f"{name}.mid").write_bytes(write_file(480, [track]))
    code = ("import sys; from musiclab.midi import read, MidiError\n"
            "for path in sys.argv[1:]:\n    try: print(len(read(path).parts))\n    except MidiError as error: print('refused')\n"
            "print(next(int(line.split()[1]) // 1024 for line in open('/proc/self/status') if line.startswith('VmHWM')))")
    command = [sys.executable, "-c", code, *(str(tmp_path/f"{name}.mid") for name in files)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout.split()[-1]) < 500 # MB


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=120), st.integers(0, 3))
def test_no_bytes_crash_the_reader(noise, tracks):
    for data in (noise, write_file(480, [noise] * tracks), write_file(480, [b"\x00\x90\x3c\x40" + noise])):
        try: song = read(data)
        except MidiError: continue
        assert song.end >= 0 and isinstance(song.warnings, list)


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_what_was_mended_needs_no_mending(noise):
    once, _, _ = mend(noise)
    assert mend(once) == (once, 0, False)
