"The synthesiser: right pitches, clean spectra, and a mix that is loud, stereo and the same every time."
import shutil

import numpy as np
import pytest

from musiclab.audio import silence
from musiclab.core import MusiclabError
from musiclab.drums import CONSOLE, DUSTY, KITS, TR808, drum
from musiclab.effects import amplify, echo, limit, master, peaks, tape
from musiclab.midi import Part, Song, notes, read
from musiclab.synth import channel, pumping, render
from musiclab.voices import VOICES, WAVES, hertz, oscillate, play, table, voice_of

rate = 44100


@pytest.fixture
def sketch():
    chords = notes([(960 * i, 900, pitch, 80 + i) for i in range(4) for pitch in (57, 60, 64)])
    kit = notes([(480 * i, 60, 36 if i % 2 == 0 else 38, 100) for i in range(8)] + [(240 * i, 60, 42, 70) for i in range(16)])
    return Song([Part("keys", 4, notes=chords, pan=40), Part("bass", 39, notes=notes([(0, 2000, 33, 100), (1920, 1900, 38, 100)])),
                 Part("kit", TR808, True, kit)], tempos=[(0, 120.0)], keys=[(0, 0, True)])


def loudest(sound, low=0.0, high=rate / 2):
    "The frequency of the strongest partial between two bounds, to about a hertz."
    spectrum = np.abs(np.fft.rfft(sound * np.hanning(len(sound)), 1 << 17))
    f = np.fft.rfftfreq(1 << 17, 1 / rate)
    return f[np.argmax(np.where((f >= low) & (f < high), spectrum, 0))]


@pytest.mark.parametrize("first", VOICES)
def test_every_voice_plays_in_tune(first):
    voice = voice_of(first)
    for pitch in (45, 69):
        sound = play(voice, ((0.0, pitch),), 1.0, 100, rate)
        assert sound.dtype == np.float32 and np.isfinite(sound).all() and 0.05 < np.abs(sound).max() < 4
        if first in (14, 96, 112): continue # bells: the strike is in tune, partials need not be
        near = loudest(sound[0, 2000:], hertz(pitch) * .9, hertz(pitch) * 1.1)
        assert abs(1200 * np.log2(near / hertz(pitch))) < 30 # cents


def test_the_ends_of_the_keyboard_and_of_the_range():
    for pitch in (0, 127):
        for first in VOICES:
            for r in (16000, 48000): assert np.isfinite(play(voice_of(first), ((0.0, pitch),), .02, 1, r)).all()
    assert voice_of(127) is VOICES[120]


@pytest.mark.parametrize("wave", [*WAVES, (1, 1), (5, 7)])
def test_no_partial_is_folded_back(wave):
    n, pitch = 1 << 16, 98
    f = np.round(hertz(pitch) * n / rate) # turns in the window
    carrier = wave[0] if isinstance(wave, tuple) else 1
    tone = oscillate(table(wave, pitch, .8, rate), np.arange(n) * f / n / carrier, np.full(n, 26, np.float32))
    spectrum = np.abs(np.fft.rfft(tone * np.blackman(n))) # leaks over three bins at most
    bins = np.arange(len(spectrum))
    distance = np.abs(bins - np.round(bins / (f / carrier)) * (f / carrier))
    assert spectrum[distance > 4].max() < 2e-3 * spectrum.max() # 54 dB


def test_the_filter_darkens():
    waves = table("saw", 45, .8, rate)
    level = np.abs(np.fft.rfft(waves[:, :-1]))
    centre = (level * np.arange(level.shape[1])).sum(1) / level.sum(1)
    assert (np.diff(centre[3:]) > 0).all()


def test_overlapping_notes_glide_on_the_808_bass_only():
    rows = notes([(0, 1000, 40, 100), (960, 960, 52, 100)])
    for program, glides in ((39, True), (38, False)):
        sound = channel(Part("bass", program, notes=rows), Song(tempos=[(0, 120.0)]), rate, 2 * rate)[0]
        assert abs(loudest(sound[:40000], 60, 200) - hertz(40)) < 2
        assert abs(loudest(sound[52000:84000], 60, 200) - hertz(52)) < 2
        quiet = np.abs(sound[45000:47000]).max() / np.abs(sound[30000:40000]).max()
        assert glides == (np.abs(np.diff(sound[44100:46000])).max() < .1 * np.abs(sound).max()) and quiet > .3


def test_a_closed_hat_mutes_an_open_one():
    ring = lambda rows: channel(Part("kit", TR808, True, notes(rows)), Song(), rate, rate)[0]
    alone, muted = ring([(0, 60, 46, 100)]), ring([(0, 60, 46, 100), (120, 60, 42, 100)])
    both = muted - ring([(120, 60, 42, 100)])
    at = int(.125 * rate)
    assert np.abs(alone[at + 500:at + 3000]).max() > .01 and np.abs(both[at + 500:at + 3000]).max() < 1e-6
    np.testing.assert_allclose(both[:at - 500], alone[:at - 500], atol=1e-6)


@pytest.mark.parametrize("kit", KITS)
def test_the_kick_is_tuned(kit):
    for root in (41.2, 61.7): # E and B
        assert abs(loudest(drum(36, kit, root, rate)[0, int(.1 * rate):], 30, 100) - root) < 6


@pytest.mark.parametrize("kit", KITS)
def test_every_drum_of_every_kit(kit):
    for pitch in range(27, 88):
        sound = drum(pitch, kit, 48.0, 22050)
        assert sound.dtype == np.float32 and np.isfinite(sound).all() and .01 < np.abs(sound).max() < 3
        assert np.abs(sound[:, -20:]).max() < .02 * np.abs(sound).max() or pitch == 30 # no click where it ends; the riser does end at its top


def centroid(sound):
    power = np.abs(np.fft.rfft(sound)) ** 2
    return float((power @ np.fft.rfftfreq(sound.shape[-1], 1 / rate)).sum() / power.sum())


def test_soft_strokes_are_darker_and_kits_differ():
    for pitch in (38, 42):
        bright = [centroid(drum(pitch, TR808, 48.0, rate, soft)) for soft in range(4)]
        assert sorted(bright, reverse=True) == bright and bright[3] < .9 * bright[0]
    snares = [centroid(drum(38, kit, 48.0, rate)) for kit in KITS]
    assert centroid(drum(38, DUSTY, 48.0, rate)) == min(snares) and len({round(one) for one in snares}) == len(KITS)
    levels = np.unique(np.abs(drum(42, CONSOLE, 48.0, rate)[0]).round(4))
    assert len(levels) > 15


def test_a_riser_is_as_long_as_its_note_and_ends_at_its_top():
    sound = channel(Part("kit", TR808, True, notes([(0, 1920, 30, 100)])), Song(tempos=[(0, 120.0)]), rate, 3 * rate)
    level = np.abs(sound[0]).reshape(30, -1).max(axis=1) # of tenths of a second; the riser takes 2 seconds
    assert level[19] > 2 * level[5] and level[21:].max() < .02 * level.max()


def test_the_fader_the_pan_and_the_pump(sketch):
    part = sketch.parts[0]
    level = lambda part: np.square(channel(part, sketch, rate, 5 * rate)).sum(axis=1)
    left, right = level(Part("keys", 4, notes=part.notes, pan=0)), level(Part("keys", 4, notes=part.notes, pan=127))
    assert left[1] < 1e-9 * left[0] and right[0] < 1e-9 * right[1]
    middle, soft = level(Part("keys", 4, notes=part.notes)), level(Part("keys", 4, notes=part.notes, volume=50))
    assert middle.sum() == pytest.approx((left.sum() + right.sum()) / 2, rel=.01) and soft.sum() == pytest.approx(middle.sum() / 8, rel=.01)
    duck = pumping(sketch, rate, 5 * rate)
    assert duck[0] == pytest.approx(.7) and duck[rate - 100] > .99 and duck[rate] == pytest.approx(.7, abs=.01)


def test_rendering_is_repeatable_loud_and_clean(sketch):
    sound = render(sketch)
    assert np.array_equal(sound.samples, render(sketch).samples)
    assert sound.channels == 2 and sound.seconds == pytest.approx(sketch.seconds + 2, abs=.01)
    assert sound.loudness() == pytest.approx(-14, abs=.3) and sound.true_peak() < -.9
    assert abs(sound.samples.mean()) < 1e-3 and not np.array_equal(sound.samples[0], sound.samples[1])


@pytest.mark.parametrize("other", [16000, 22050, 48000])
def test_other_rates_sound_alike(sketch, other):
    sound = render(sketch, other)
    assert sound.rate == other and sound.loudness() == pytest.approx(-14, abs=.3) and sound.true_peak() < -.9
    power = lambda sound: np.square(np.abs(np.fft.rfft(sound.samples[0] / np.abs(sound.samples).mean())))
    low = lambda sound: power(sound)[:int(300 * sound.seconds)].sum() / power(sound).sum()
    assert low(sound) == pytest.approx(low(render(sketch)), abs=.1)


def test_chords_go_through_the_amplifier_together():
    "A fifth, driven: the octave below appears, which neither note has."
    guitar = lambda *pitches: channel(Part("guitar", 30, notes=notes([(0, 960, pitch, 110) for pitch in pitches])), Song(), rate, rate)[0]
    def at(sound, hz): return np.abs(np.fft.rfft(sound * np.hanning(len(sound))))[round(hz) - 2:round(hz) + 3].max()
    both, low, high = guitar(57, 64), guitar(57), guitar(64)
    assert at(both, 110) > 10 * max(at(low, 110), at(high, 110)) # A3 and E4 give A2
    assert np.abs(np.fft.rfft(both))[9000:].max() < 1e-3 * np.abs(np.fft.rfft(both)).max() # the loudspeaker
    quiet = np.random.default_rng(0).standard_normal((2, rate)).astype(np.float32)
    assert np.abs(amplify(quiet, rate, 8)).max() < 2


def test_echoes_come_in_time_from_both_sides():
    click = np.zeros((2, 2 * rate), np.float32)
    click[:, 1000] = 1
    back = echo(click, rate, .25)
    tops = [int(np.abs(back[:, i * rate // 4:(i + 1) * rate // 4]).sum(axis=0).argmax()) for i in range(1, 5)]
    assert all(abs(top - 1000) < 20 for top in tops)
    level = np.abs(back).reshape(2, 8, -1).max(axis=2)
    assert (np.diff(level.sum(axis=0)[1:6]) < 0).all() and not np.abs(back[:, :rate // 4]).max() > 1e-3
    assert [level[0, i] > level[1, i] for i in range(1, 5)] == [False, True, False, True]


def test_tape_wavers_and_keeps_time():
    t = np.arange(3 * rate) / rate
    tone = np.stack([np.sin(2 * np.pi * 440 * t)] * 2).astype(np.float32)
    worn = tape(tone, rate, 30)[0]
    crossings = np.flatnonzero(np.diff(np.signbit(worn).astype(int)) > 0) / rate
    cents = 1200 * np.log2(10 / (crossings[10:] - crossings[:-10]) / 440)
    assert 15 < cents.max() < 35 and -35 < cents.min() < -15 and abs(cents.mean()) < 8


def test_programs_differ():
    "Every voice has a sound of its own."
    marks = {}
    for first in VOICES:
        sound = play(voice_of(first), ((0.0, 60),), .5, 100, 22050)[0][:11025]
        power = np.log(np.abs(np.fft.rfft(sound, 16384)).reshape(-1)[:8192].reshape(64, -1).mean(axis=1) + 1e-3)
        marks[first] = np.concatenate([power, np.log(np.abs(np.pad(sound, (0, 11025 - len(sound)))).reshape(9, -1).mean(axis=1) + 1e-3)])
    alike = [(a, b) for a in marks for b in marks if a < b and np.abs(marks[a] - marks[b]).mean() < .01]
    assert [pair for pair in alike if pair != (32, 35)] == []


def test_no_clicks():
    "Between the notes of a soft pad nothing happens above its own spectrum."
    song = Song([Part("pad", 89, notes=notes([(0, 1000, 57, 60), (480, 7, 60, 60), (1500, 1000, 64, 60)]))])
    sound = render(song).samples
    f = np.abs(np.fft.rfft(sound[0][:rate * 4].reshape(-1, 2205) * np.hanning(2205), axis=1)) # 50 ms frames
    assert f[:, 600:].max() < 2e-3 * f.max() # above 12 kHz


def test_silence_stays_silent():
    for song in (Song(), Song([Part("rests")])):
        sound = render(song)
        assert sound.peak == 0 and silence(sound).fraction == 1


def test_the_limiter_only_touches_what_is_too_loud():
    t = np.arange(rate, dtype=np.float32) / rate
    quiet = np.stack([np.sin(440 * 2 * np.pi * t)] * 2).astype(np.float32) * .5
    np.testing.assert_array_equal(limit(quiet, rate, peaks(quiet, rate)), quiet)
    peak = quiet.copy()
    peak[:, 20000] = 4
    limited = limit(peak, rate, peaks(peak, rate))
    assert np.abs(limited).max() < .9
    np.testing.assert_allclose(limited[:, :15000], quiet[:, :15000], atol=1e-6) # it recovers within 100 ms on both sides
    np.testing.assert_allclose(limited[:, 25000:], quiet[:, 25000:], atol=1e-6)
    assert not master(np.zeros((2, rate), np.float32), rate).any()


def test_real_music_is_rendered(music):
    song = read(music/"midi/freedoom/d_bunny.mid")
    sound = render(song, 22050)
    assert sound.loudness() == pytest.approx(-14, abs=.5) and sound.true_peak() < -.9 and silence(sound).fraction < .2


def test_engines_are_named(sketch, monkeypatch):
    with pytest.raises(MusiclabError, match="unknown engine 'moog'"): render(sketch, engine="moog")
    with pytest.raises(MusiclabError, match="6.9 hours"): render(Song([Part(notes=notes([(0, 24_000_000, 60, 90)]))]))
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(MusiclabError, match="fluidsynth is not installed"): render(sketch, engine="fluidsynth")


@pytest.mark.skipif(not shutil.which("fluidsynth"), reason="the program fluidsynth is not installed")
def test_fluidsynth_plays_the_same_notes(sketch, monkeypatch, tmp_path):
    sound = render(sketch, 32000, engine="fluidsynth")
    assert sound.rate == 32000 and sound.channels == 2 and sound.seconds > sketch.seconds
    assert sound.loudness() == pytest.approx(-14, abs=.5) and sound.true_peak() < -.9
    monkeypatch.setenv("MUSICLAB_SOUNDFONT", str(tmp_path/"absent.sf2"))
    with pytest.raises(MusiclabError, match="absent.sf2: there is no such sound font"): render(sketch, engine="fluidsynth")
