"Players: what the page carries is the sound that was given, compared sounds are equally loud, and no label can become code."
import base64
import io
import re

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings, strategies as st

from musiclab.audio import Audio
from musiclab.core import MusiclabError
from musiclab.players import compare, data_uri, envelope, match_loudness, player


def tone(hertz=440.0, seconds=2.0, rate=32000, gain=0.3, channels=1):
    wave = gain * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)
    return Audio(np.tile(wave, (channels, 1)), rate)


def sounds_in(html):
    "Every sound that a page carries, decoded."
    codes = re.findall(r'src="data:audio/mpeg;base64,([^"]+)"', html)
    return [soundfile.read(io.BytesIO(base64.b64decode(code)), always_2d=True) for code in codes]


@pytest.mark.parametrize("rate", [8000, 22050, 44100, 48000])
@pytest.mark.parametrize("stereo", [False, True])
def test_the_page_carries_the_sound(rate, stereo):
    sound = Audio(np.stack([tone(440, rate=rate).samples[0], tone(660, rate=rate).samples[0]]), rate)
    [(samples, found)] = sounds_in(player(sound, stereo=stereo).html)
    assert (found, samples.shape[1]) == ((44100, 2) if stereo else (32000, 1))
    assert abs(len(samples) / found - sound.seconds) < 0.05
    spectrum = np.abs(np.fft.rfft(samples.sum(1)))
    peaks = np.sort(np.argsort(spectrum)[-2:] * found / len(samples))
    assert np.allclose(peaks, [440, 660], atol=1)


def test_sounds_stay_small():
    noise = Audio(np.random.default_rng(0).uniform(-0.5, 0.5, (2, 44100 * 10)), 44100)
    assert len(data_uri(noise)) < 85_000 and len(data_uri(noise, stereo=True)) < 225_000
    assert len(player(noise).html) < 100_000


def test_long_sounds_are_cut_and_the_title_says_so():
    view = player(tone(seconds=5), "a song", seconds=2)
    assert "a song (the first 2 s of 5 s)" in view.html
    assert abs(len(sounds_in(view.html)[0][0]) / 32000 - 2) < 0.05
    assert "first" not in player(tone(seconds=2), "a song", seconds=2).text


@pytest.mark.parametrize("samples", [np.zeros((2, 1)), np.zeros((1, 32000)), np.full((1, 3200), 2.0)])
def test_odd_sounds_are_shown_too(samples):
    sound = Audio(samples, 32000)
    assert len(sounds_in(player(sound).html)) == 1
    assert len(sounds_in(compare({"odd": sound, "tone": tone()}).html)) == 2


def test_compared_sounds_are_equally_loud_and_none_clips():
    clicks = np.zeros((1, 64000))
    clicks[0, ::8000] = 0.5
    given = {"soft": tone(gain=0.01), "loud": tone(gain=0.9), "peaks": Audio(clicks, 32000), "silent": Audio(np.zeros((1, 64000)), 32000)}
    sounds, gains = match_loudness(given)
    loudness = [sound.loudness() for label, sound in sounds.items() if label != "silent"]
    assert np.ptp(loudness) < 0.1 and max(loudness) < -18.5, "the clicks would clip at -18 LUFS: all have to be softer"
    assert max(sound.peak for sound in sounds.values()) < 1
    assert gains["silent"] == 0 and not sounds["silent"].samples.any()
    assert gains["soft"] > 0 > gains["loud"]


@given(st.integers(1, 50), st.integers(0, 400), st.integers(1, 2))
@settings(max_examples=50, deadline=None)
def test_the_envelope_misses_no_peak(bins, length, channels):
    samples = np.random.default_rng(length).uniform(-1, 1, (channels, length)).astype(np.float32)
    heights = envelope(Audio(samples, 100), bins)
    assert len(heights) == bins
    assert heights.max() == np.abs(samples).max(initial=0)


def test_labels_are_text():
    evil = "</button><script>alert(1)</script>\"'&"
    view = compare({evil: tone(), "b": tone()}, title=evil)
    assert "<script>alert" not in view.html and view.html.count("<script>") == 1


def test_nothing_to_play_is_said():
    empty = Audio(np.zeros((1, 0)), 32000)
    with pytest.raises(MusiclabError, match="no sound"): compare({})
    with pytest.raises(MusiclabError, match="a song: the sound is empty"): player(empty, "a song")
    with pytest.raises(MusiclabError, match="after: the sound is empty"): compare({"before": tone(), "after": empty})


def test_nothing_comes_from_outside():
    text = player(tone(), "a").html
    assert not re.findall(r'(?:src|href)="(?!data:)|@import|url\((?!&quot;data:|"data:)|fetch\(|https?://(?!www.w3.org)', text)
