"Composed songs: true tags, real form, smooth voices, and a sound in which tempo and key are found again."
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from musiclab import data
from musiclab.audio import load
from musiclab.compose import STYLES, compose, dataset, form, plan
from musiclab.core import MusiclabError
from musiclab.harmony import SCALES, Key, chord, lead
from musiclab.midi import read
from musiclab.synth import render

styles = pytest.mark.parametrize("style", STYLES)


@styles
def test_a_song_is_a_function_of_style_and_seed(style):
    song = compose(style, 5, 20).song.to_bytes()
    assert song == compose(style, 5, 20).song.to_bytes() and song != compose(style, 6, 20).song.to_bytes()
    ask = f"from musiclab import compose as c, core; print(core.sha256(c.compose({style!r}, 5, 20).song.to_bytes()))"
    digests = {subprocess.run([sys.executable, "-c", ask], env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
                              capture_output=True, text=True, check=True).stdout for seed in "12"}
    assert len(digests) == 1


@styles
@pytest.mark.parametrize("seed", range(8))
def test_tags_are_true(style, seed):
    piece = compose(style, seed, 40)
    song = piece.song
    assert piece.tags[0] == style and f"{piece.bpm} bpm" in piece.tags and piece.key in piece.tags
    assert song.tempos[0] == (0, piece.bpm) and STYLES[style].bpm[0] <= piece.bpm <= STYLES[style].bpm[1]
    tonic, mode = (7 * song.keys[0][1] + 9 * song.keys[0][2]) % 12, "minor" if song.keys[0][2] else "major"
    assert Key(tonic, mode).name == piece.key
    instruments = {sound for player in STYLES[style].players.values() for sound, _ in player.sounds}
    assert {part.name for part in song.parts} == instruments & set(piece.tags) and all(len(part.notes) for part in song.parts)
    assert set(piece.tags) & set(STYLES[style].moods[mode]) and ("instrumental" in piece.tags) == (piece.lyrics == "")
    assert all(word in piece.caption for word in (style, piece.key, f"{piece.bpm} bpm"))


@styles
@pytest.mark.parametrize("seconds", [4, 12, 30, 75, 200])
def test_length_and_form(style, seconds):
    piece = compose(style, 1, seconds)
    assert piece.song.seconds == pytest.approx(seconds, abs=8) # whole bars, and the last one may slow down
    names = [name for _, name in piece.song.markers]
    assert "chorus" in names and (seconds < 30 or names[0] == "intro" and names[-1] == "end" and "verse" in names)
    ticks = [tick for tick, _ in piece.song.markers]
    assert ticks == sorted(set(ticks)) and set(ticks) <= set(piece.song.bars()["start"].tolist())


@given(st.integers(1, 400))
def test_sections_fill_the_song(bars):
    sections = form(bars)
    assert sum(length for _, length in sections) == bars and all(length > 0 for _, length in sections)
    assert all(a[0] != b[0] for a, b in zip(sections, sections[1:])) and any(name == "chorus" for name, _ in sections)


@styles
def test_notes_are_in_the_key_and_in_range(style):
    for seed in range(6):
        piece = compose(style, seed, 40)
        _, key, _ = plan(STYLES[style], seed, 40)
        scale = {(key.tonic + step) % 12 for step in SCALES[key.mode]}
        for part in piece.song.parts:
            assert part.notes["velocity"].min() >= 1 and part.notes["velocity"].max() <= 127 and part.notes["start"].min() >= 0
            if part.drums: continue
            assert 24 <= part.notes["pitch"].min() and part.notes["pitch"].max() <= 100
            assert np.isin(part.notes["pitch"] % 12, list(scale)).mean() > .8 # the rest are leading notes


@pytest.mark.parametrize("style, role", [("808 hip hop", 4), ("piano ballad", 2)])
def test_every_chorus_has_the_same_tune_and_words(style, role):
    piece = compose(style, 2, 120)
    lead, borders = piece.song.parts[role].notes, [*piece.song.markers, (piece.song.end, "")]
    tunes = [lead["pitch"][(lead["start"] >= tick - 60) & (lead["start"] < stop - 60)].tolist()
             for (tick, name), (stop, _) in zip(borders, borders[1:]) if name == "chorus"]
    assert len(tunes) >= 2 and len(tunes[0]) > 8
    shortest = min(map(len, tunes)) - 1 # the last note of a section may be held
    assert all(tune[:shortest] == tunes[0][:shortest] for tune in tunes)
    blocks = [block.splitlines() for block in piece.lyrics.split("\n\n")]
    choruses = [lines[1:] for head, *rest in blocks for lines in [[head, *rest]] if head == "[Chorus]"]
    verses = [lines for lines in blocks if lines[0] == "[Verse]"]
    assert len(choruses) >= 2 and len(verses) >= 2 and choruses[0][:2] == choruses[1][:2] and verses[0] != verses[1]
    assert [line for _, line in piece.song.lyrics] == [line for block in blocks for line in block[1:]]


def test_voices_move_little():
    for tonic in range(12):
        chords = [chord(numeral, Key(tonic, "minor")) for numeral in "i VI III VII i iv V7 i".split()]
        voicings = lead(chords)
        assert [{pitch % 12 for pitch in voicing} for voicing in voicings] == [set(one.tones) for one in chords]
        steps = [min(abs(a - b) for b in before) for before, after in zip(voicings, voicings[1:]) for a in after]
        assert np.mean(steps) < 2 and max(steps) <= 5 and all(52 <= pitch <= 72 for voicing in voicings for pitch in voicing)


# Krumhansl and Kessler's profiles: how well each pitch class fits a key on C
PROFILES = {"major": (6.35, 2.23, 3.48, 2.33, 4.38, 4.09, 2.52, 5.19, 2.39, 3.66, 2.29, 2.88),
            "minor": (6.33, 2.68, 3.52, 5.38, 2.60, 3.53, 2.54, 4.75, 3.98, 2.69, 3.34, 3.17)}

def test_tempo_and_key_are_found_in_the_sound():
    import librosa
    tempos, keys, count = 0, 0, 0
    for style in STYLES:
        for seed in range(100, 103):
            piece = compose(style, seed, 16)
            sound = render(piece.song, 22050).mono().samples[0]
            beat = float(np.atleast_1d(librosa.feature.tempo(y=sound, sr=22050))[0])
            tempos += min(abs(np.log2(beat / piece.bpm) - octave) for octave in (-1, 0, 1)) < .06
            chroma = librosa.feature.chroma_cqt(y=sound, sr=22050).mean(axis=1)
            _, found = max((np.corrcoef(np.roll(profile, tonic), chroma)[0, 1], Key(tonic, mode).name)
                           for mode, profile in PROFILES.items() for tonic in range(12))
            keys += found == piece.key
            count += 1
    assert tempos >= count - 1 and keys >= count - 1


@styles
def test_each_style_has_its_sound(style):
    "Where the energy lies and how often something starts."
    sound = render(compose(style, 7, 24).song, 22050)
    power = np.abs(np.fft.rfft(sound.mono().samples[0])) ** 2
    f = np.fft.rfftfreq(sound.samples.shape[1], 1 / 22050)
    share = lambda low, high: power[(f >= low) & (f < high)].sum() / power.sum()
    if style == "piano ballad": assert share(0, 60) < .01 < .3 < share(120, 1000) and share(2000, 8000) < .2
    else: assert share(30, 120) > .3 and .02 < share(1000, 10000) < .5
    assert sound.loudness() == pytest.approx(-14, abs=.3) and sound.true_peak() < -.9


def test_a_data_set_is_read_back(tmp_path):
    folder = dataset(tmp_path/"songs", n=4, seed=1, seconds=6, rate=16000, format="wav")
    tracks = data.read(folder)
    assert len(tracks) == 4 and not tracks.problems
    names = [track.tags[0] for track in tracks]
    assert names == ["808 hip hop", "techno", "piano ballad", "808 hip hop"]
    assert [track.lyrics == "" for track in tracks] == [False, True, False, False]
    assert all("[Chorus]" in track.lyrics for track in tracks if track.lyrics)
    assert tracks[0].source.audio().rate == 16000 and tracks[0].tags != tracks[3].tags
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {path.name: path.read_bytes() for path in dataset(tmp_path/"again", 4, 1, 6, 16000, "wav").iterdir()} == before


def test_a_data_set_of_notes(tmp_path):
    folder = dataset(tmp_path, n=2, seconds=10, format="mid", styles=("techno",))
    songs = [read(path) for path in sorted(folder.glob("*.mid"))]
    assert len(songs) == 2 and all(song.keys and song.markers and not song.warnings for song in songs)
    assert load(dataset(tmp_path/"sound", 1, seconds=4, rate=8000).joinpath("000_808_hip_hop.flac")).rate == 8000


def test_unknown_styles_and_formats(tmp_path):
    with pytest.raises(MusiclabError, match="Did you mean 'techno'"): compose("tecno")
    with pytest.raises(MusiclabError, match="xyz"): dataset(tmp_path, 1, seconds=4, rate=8000, format="xyz")
