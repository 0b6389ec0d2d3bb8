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
from musiclab.melody import PLANS, cheapest, melody
from musiclab.midi import read
from musiclab.styles import proofread
from musiclab.synth import render

styles = pytest.mark.parametrize("style", STYLES)


def test_there_are_many_styles_and_all_are_proofread():
    assert len(STYLES) >= 8
    for style in STYLES.values():
        proofread(style)
        assert set(style.heard) == {"intro", "verse", "chorus", "bridge", "outro", "end"}
        assert len(style.heard["chorus"].split()) >= len(style.heard["verse"].split()) # it lifts


@styles
def test_a_song_is_a_function_of_style_and_seed(style):
    song = compose(style, 5, 20).song.to_bytes()
    assert song == compose(style, 5, 20).song.to_bytes() and song != compose(style, 6, 20).song.to_bytes()


def test_songs_are_the_same_in_every_process():
    ask = "from musiclab import compose as c, core; print(*(core.sha256(c.compose(style, 5, 20).song.to_bytes()) for style in c.STYLES))"
    digests = {subprocess.run([sys.executable, "-c", ask], env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
                              capture_output=True, text=True, check=True).stdout for seed in "12"}
    assert [len(line.split()) for line in digests] == [len(STYLES)]


@styles
@pytest.mark.parametrize("seed", range(6))
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


@given(st.integers(1, 400), st.sampled_from([4, 8]))
def test_sections_fill_the_song(bars, phrase):
    sections = form(bars, phrase)
    assert sum(length for _, length in sections) == bars and all(length > 0 for _, length in sections)
    assert all(a[0] != b[0] for a, b in zip(sections, sections[1:])) and any(name == "chorus" for name, _ in sections)


@styles
def test_notes_are_in_the_key_and_in_range(style):
    inside = []
    for seed in range(6):
        piece = compose(style, seed, 40)
        _, key, _ = plan(STYLES[style], seed, 40)
        scale = {(key.tonic + step) % 12 for step in SCALES[key.mode]}
        for part in piece.song.parts:
            assert part.notes["velocity"].min() >= 1 and part.notes["velocity"].max() <= 127 and part.notes["start"].min() >= 0
            if part.drums: continue
            assert 23 <= part.notes["pitch"].min() and part.notes["pitch"].max() <= 100
            inside.append(np.isin(part.notes["pitch"] % 12, list(scale)).mean())
    assert min(inside) > .7 and np.mean(inside) > .93 # the rest are leading notes and borrowed chords


def tunes(piece, role):
    "The tune in each chorus, in pitches."
    lead, borders = piece.song.parts[role].notes, [*piece.song.markers, (piece.song.end, "")]
    return [lead["pitch"][(lead["start"] >= tick - 60) & (lead["start"] < stop - 60)].tolist()
            for (tick, name), (stop, _) in zip(borders, borders[1:]) if name == "chorus"]


@pytest.mark.parametrize("style, role", [("808 hip hop", 4), ("piano ballad", 3), ("rock", 5), ("waltz", 5), ("chiptune", 3)])
def test_every_chorus_has_the_same_tune_and_words(style, role):
    piece = compose(style, 2, 150)
    choruses = tunes(piece, role)
    assert len(choruses) >= 2 and len(choruses[0]) > 8
    shortest = min(map(len, choruses)) - 1 # the last note of a section may be held
    assert all(tune[:shortest] == choruses[0][:shortest] for tune in choruses)
    if not STYLES[style].words: return
    blocks = [block.splitlines() for block in piece.lyrics.split("\n\n")]
    refrains, verses = ([lines for lines in blocks if lines[0] == head] for head in ("[Chorus]", "[Verse]"))
    assert len(refrains) >= 2 and len(verses) >= 2 and refrains[0][:3] == refrains[1][:3] and verses[0] != verses[1]
    assert [line for _, line in piece.song.lyrics] == [line for block in blocks for line in block[1:]]


@styles
def test_songs_of_different_seeds_differ_clearly(style):
    pieces = [compose(style, seed, 40) for seed in range(8)]
    assert len({(piece.bpm, piece.key) for piece in pieces}) >= 6
    assert len({piece.tags[1:] for piece in pieces}) == 8
    lines = [np.diff(piece.song.parts[-1].notes["pitch"][:12]).tolist() for piece in pieces] # in intervals, so that the key does not count
    assert len({str(line) for line in lines}) >= 5


def energy(song, wanted):
    "How much is struck in the sections of a name, by a tick: velocities times faders."
    borders = [*song.markers, (song.end, "")]
    spans = [(tick, stop) for (tick, name), (stop, _) in zip(borders, borders[1:]) if name == wanted]
    heard = sum(float((part.notes["velocity"][(part.notes["start"] >= a) & (part.notes["start"] < b)] / 127).sum() * part.volume)
                for part in song.parts for a, b in spans)
    return heard / sum(b - a for a, b in spans)


@styles
def test_the_song_grows_and_ends(style):
    "More is played in a chorus than in a verse; the last bar holds the chord of home."
    for seed in range(4):
        song = compose(style, seed, 90).song
        assert energy(song, "chorus") > 1.05 * energy(song, "verse") and energy(song, "chorus") > 1.2 * energy(song, "intro")
        last = song.markers[-1][0]
        final = [note for part in song.parts if not part.drums for note in part.notes[part.notes["start"] >= last - 100].tolist()]
        tonic = (7 * song.keys[0][1] + 9 * song.keys[0][2]) % 12
        assert len(final) >= 2 and min(final, key=lambda note: note[2])[2] % 12 == tonic
        assert {note[2] % 12 for note in final if note[0] >= last} <= {(tonic + step) % 12 for step in (0, 3, 4, 7)}


@styles
def test_drummers_mark_the_sections(style):
    "A crash opens each chorus, a fill leads to it."
    for seed in range(4):
        song = compose(style, seed, 60).song
        kit = next((part.notes for part in song.parts if part.drums), None)
        chorus = next(tick for tick, name in song.markers if name == "chorus")
        assert (kit["pitch"][np.abs(kit["start"] - chorus) <= 20] == 49).any() or "drums+" in STYLES[style].heard["chorus"]


def test_tunes_keep_to_the_rules():
    "Mostly steps, within a twelfth, on the chord where it matters, and motifs come again."
    for seed in range(30):
        key = Key(seed % 12, ("major", "minor")[seed % 2])
        chords = tuple(chord(numeral, key) for numeral in (("I V vi IV " if seed % 2 == 0 else "i VI III VII ") * 2).split())
        tune = melody(("x---x-x---x-x---", "x-x-x---x-------", "..x-x-x-x---x---"), chords, key, ("rules", seed), 35)
        steps = np.array([step for _, _, step in tune])
        moves = np.abs(np.diff(steps))
        assert np.ptp(steps) <= 12 and (moves <= 2).mean() > .6 and moves.max() <= 7 and len(set(steps.tolist())) >= 4
        strong = [key.pitch(step, chords[at // 16]) % 12 in chords[at // 16].tones for at, _, step in tune if at % 16 == 0]
        assert np.mean(strong) > .9
        assert tune == melody(("x---x-x---x-x---", "x-x-x---x-------", "..x-x-x-x---x---"), chords, key, ("rules", seed), 35)
        rhythm = [[(at % 32, length) for at, length, _ in tune if at // 32 == cell] for cell in range(4)]
        assert any(len({str(rhythm[i]) for i, letter in enumerate(plan) if letter == "a"}) == 1 for plan in PLANS)


@given(st.integers(0, 10 ** 6))
def test_the_cheapest_path_is_the_cheapest(seed):
    from itertools import product

    from musiclab.melody import LEAPS
    costs = list(np.random.default_rng(seed).uniform(0, 4, (4, 5)))
    price = lambda path: sum(costs[i][here] for i, here in enumerate(path)) + sum(LEAPS[abs(a - b)] for a, b in zip(path, path[1:]))
    assert price(cheapest(costs)) == pytest.approx(min(price(path) for path in product(range(5), repeat=4)))


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
        for seed in range(100, 102):
            piece = compose(style, seed, 14)
            sound = render(piece.song, 22050).mono().samples[0]
            beat = float(np.atleast_1d(librosa.feature.tempo(y=sound, sr=22050))[0])
            tempos += min(abs(np.log2(beat / piece.bpm) - octave) for octave in (-1, 0, 1)) < .06
            chroma = librosa.feature.chroma_stft(y=sound, sr=22050, n_fft=8192, tuning=0.0).mean(axis=1)
            _, found = max((np.corrcoef(np.roll(profile, tonic), chroma)[0, 1], Key(tonic, mode).name)
                           for mode, profile in PROFILES.items() for tonic in range(12))
            keys += found == piece.key
            count += 1
    assert count >= 16 and tempos >= .8 * count and keys >= .8 * count


SOUND = { # share of the energy below 120 Hz and above 2 kHz
    "808 hip hop": ((.3, .95), (.01, .3)), "techno": ((.25, .9), (.02, .3)), "drum and bass": ((.25, .9), (.02, .35)),
    "chiptune": ((.1, .7), (.03, .5)), "rock": ((.15, .7), (.005, .2)), "lo-fi": ((.15, .8), (.0001, .05)),
    "waltz": ((.05, .7), (.001, .15)), "bossa nova": ((.15, .8), (.001, .1)), "piano ballad": ((.005, .4), (.001, .2))}

@styles
def test_each_style_has_its_sound(style):
    "Where the energy lies and how often something starts."
    sound = render(compose(style, 7, 16).song, 22050)
    power = np.abs(np.fft.rfft(sound.mono().samples[0])) ** 2
    f = np.fft.rfftfreq(sound.samples.shape[1], 1 / 22050)
    share = lambda low, high: power[(f >= low) & (f < high)].sum() / power.sum()
    low, bright = SOUND[style]
    assert low[0] < share(25, 120) < low[1] and bright[0] < share(2000, 11000) < bright[1]
    assert sound.loudness() == pytest.approx(-14, abs=.3) and sound.true_peak() < -.9
    assert np.mean(np.abs(sound.samples) >= .999) == 0 and abs(sound.samples.mean()) < 2e-3
    width = np.square(np.diff(sound.samples, axis=0)).sum() / np.square(sound.samples).sum() / 2
    assert .005 < width < .5 # stereo, and safe in mono


def test_a_data_set_is_read_back(tmp_path):
    folder = dataset(tmp_path/"songs", n=4, seed=1, seconds=6, rate=16000, format="wav")
    tracks = data.read(folder)
    assert len(tracks) == 4 and not tracks.problems
    names = [track.tags[0] for track in tracks]
    assert names == list(STYLES)[:4]
    assert [track.lyrics == "" for track in tracks] == [not STYLES[name].words for name in names]
    assert all("[Chorus]" in track.lyrics for track in tracks if track.lyrics)
    assert tracks[0].source.audio().rate == 16000 and tracks[0].tags != tracks[3].tags
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {path.name: path.read_bytes() for path in dataset(tmp_path/"again", 4, 1, 6, 16000, "wav").iterdir()} == before


def test_a_data_set_of_notes(tmp_path):
    folder = dataset(tmp_path, n=2 * len(STYLES), seconds=20, format="mid")
    songs = [read(path) for path in sorted(folder.glob("*.mid"))]
    assert len(songs) == 2 * len(STYLES) and all(song.keys and song.markers and not song.warnings for song in songs)
    assert load(dataset(tmp_path/"sound", 1, seconds=4, rate=8000).joinpath("000_808_hip_hop.flac")).rate == 8000


def test_unknown_styles_and_formats(tmp_path):
    with pytest.raises(MusiclabError, match="Did you mean 'techno'"): compose("tecno")
    with pytest.raises(MusiclabError, match="xyz"): dataset(tmp_path, 1, seconds=4, rate=8000, format="xyz")
