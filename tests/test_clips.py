"Figures of clips against signals of which the truth is known, and coordinates that change only with the music."
import re

import numpy as np
import pytest

from musiclab import audio
from musiclab.audio import Audio
from musiclab.clips import NOTES, RATE, decibels, embed, figures, find_tempo, key_fit, onsets, pitch_classes, spectrum
from musiclab.core import MusiclabError

T = np.arange(4 * 44100) / 44100
SINE = 0.5 * np.sin(2 * np.pi * 1000 * T)
NOISE = 0.1 * np.random.default_rng(0).standard_normal((2, len(T)))


def clicks(bpm, seconds=10.0, rate=44100):
    sound = np.zeros(int(seconds * rate))
    for beat in np.arange(0.1, seconds - 0.1, 60 / bpm): sound[int(beat * rate):][:2000] += np.exp(-np.arange(2000) / 300)
    return Audio(0.5 * sound * np.random.default_rng(0).uniform(-1, 1, len(sound)), rate)


def test_a_sine_wave():
    found = figures(Audio(np.stack([SINE, SINE]), 44100))
    assert found["seconds"] == 4 and abs(found["true_peak"] + 6.02) < 0.05 and abs(found["lufs"] + 6.02) < 0.1
    assert abs(found["centroid"] - 1000) < 30 and found["width"] == found["clipping"] == found["silence"] == 0 and abs(found["dc"]) < 1e-4


@pytest.mark.parametrize("samples, width", [(SINE[None], 0), (np.stack([SINE, SINE]), 0), (NOISE, 0.5), (np.stack([SINE, -SINE]), 1),
                                            (np.stack([SINE, 0 * SINE]), 0.5)])
def test_stereo_width(samples, width): assert abs(figures(Audio(samples, 44100))["width"] - width) < 0.01


def test_faults_are_counted():
    assert abs(figures(Audio(SINE[None] + 0.2, 44100))["dc"] - 0.2) < 1e-3
    assert abs(figures(Audio(np.where(T < 1, 0, SINE)[None], 44100))["silence"] - 0.25) < 0.01
    clipped = np.clip(4 * SINE, -1, 1)
    assert abs(figures(Audio(clipped[None], 44100))["clipping"] - np.mean(np.abs(clipped) == 1)) < 0.01


@pytest.mark.parametrize("bpm", [66, 90, 120, 145, 174])
def test_the_beat_of_a_metronome(bpm):
    found = figures(clicks(bpm))
    assert min(abs(found["tempo"] / bpm / octave - 1) for octave in (0.5, 1, 2)) < 0.01
    assert abs(found["onset_rate"] - bpm / 60) < 0.35


@pytest.mark.parametrize("length", [1, 100, 3000])
def test_tiny_and_silent_sounds(length):
    for samples in (np.zeros((1, length)), np.ones((2, length))):
        sound = Audio(samples, 44100)
        assert figures(sound)["tempo"] is None or length > 100
        assert embed(sound).shape == (116,) and np.isfinite(embed(sound)).all()


@pytest.mark.parametrize("samples", [np.zeros((1, 0)), np.full((1, 1000), np.nan), np.array([[0.0, np.inf]])])
def test_no_figures_for_what_is_no_sound(samples):
    with pytest.raises(MusiclabError, match="empty, or has samples that are not numbers"): figures(Audio(samples, 44100))


def test_coordinates_know_music_not_levels_and_channels():
    sound = Audio(np.stack([clicks(120).samples[0], clicks(120).samples[0]]), 44100)
    same = [Audio(sound.samples * 0.05, 44100), sound.mono(), sound.resample(48000)]
    base = embed(sound)
    near = max(np.linalg.norm(embed(other) - base) for other in same)
    far = min(np.linalg.norm(embed(other) - base) for other in (clicks(90), Audio(sound.samples + 0.01 * NOISE[:, :1], 44100)))
    assert near < 0.2 * far


def test_the_tempo_of_real_music(music):
    right, files = [], sorted((music/"audio"/"tracks").glob("*.mp3"))[::2]
    for file in files:
        true = float(re.search(r"(\d+) bpm", file.with_name(file.stem + "_prompt.txt").read_text()).group(1))
        found = find_tempo(onsets(decibels(spectrum(audio.load(file, rate=RATE, channels=1, seconds=20)))))
        right.append(min(abs(found / true / octave - 1) for octave in (0.5, 1, 2)) < 0.04)
    assert np.mean(right) >= 0.75


def test_the_key_of_real_music(music):
    short = []
    for file in sorted((music/"audio"/"tracks").glob("*.mp3"))[::2]:
        tonic = NOTES.index(re.search(r"(\S+) key", file.with_name(file.stem + "_prompt.txt").read_text()).group(1))
        fit = key_fit(pitch_classes(audio.load(file, rate=RATE, channels=1)))
        short.append(fit.max() - max(fit[tonic], fit[12 + tonic]))
    assert np.mean(np.array(short) < 0.1) >= 0.75  # the told tonic is the best or nearly
