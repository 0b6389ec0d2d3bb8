"The Audio object: channels, loudness, silence, saving, loading."
import json

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import arrays

from musiclab.audio import WRITABLE, Audio, load, mix_channels, silence
from musiclab.core import MusiclabError
from musiclab.dsp import resample

def noise(channels, length, level): return Audio(level * np.random.default_rng(length).uniform(-1, 1, (channels, length)), 8000)

sounds = st.builds(noise, st.integers(1, 2), st.integers(1, 12000), st.sampled_from([1.0, 0.1, 1e-3, 0.0]))


def tone(hz, seconds, rate=48000, channels=1):
    return Audio(np.tile(np.sin(2 * np.pi * hz * np.arange(round(seconds * rate)) / rate), (channels, 1)), rate)


def test_the_shape_is_always_channels_and_samples():
    assert Audio(np.zeros(5), 8000).samples.shape == (1, 5) and Audio(np.zeros((2, 5)), 8000).samples.dtype == np.float32
    for wrong in (np.zeros(5, np.int16), np.zeros((1, 2, 5)), np.float32(0)):
        with pytest.raises(MusiclabError, match="samples are floats"): Audio(wrong, 8000)


@pytest.mark.parametrize("given", range(1, 9))
def test_mixing_keeps_a_sound_that_is_everywhere(given):
    for channels in (1, 2): assert np.allclose(mix_channels(np.full((given, 4), 0.5, np.float32), channels), 0.5)
    assert np.abs(mix_channels(np.eye(given, dtype=np.float32), 2)).max() <= 1


def test_surround_is_mixed_as_itu_recommends():
    half = 0.5 ** 0.5
    wanted = np.array([[1, 0, half, 0, half, 0], [0, 1, half, 0, 0, half]]) / (1 + 2 * half)
    assert np.allclose(mix_channels(np.eye(6, dtype=np.float32), 2), wanted)
    with pytest.raises(MusiclabError, match="cannot make 2 channels out of 9"): mix_channels(np.zeros((9, 4)), 2)
    with pytest.raises(MusiclabError, match="cannot make 3 channels"): mix_channels(np.zeros((6, 4)), 3)


def test_six_channels_load_as_they_are(music):
    path = music / "audio" / "formats" / "surround_5_1.wav"
    assert load(path).channels == 6
    mixed = load(path, channels=2, rate=32000)
    assert (mixed.channels, mixed.rate) == (2, 32000) and 0 < mixed.peak <= 1
    assert np.isfinite(load(path).loudness())


def test_loudness_of_the_reference_tone(): # ITU-R BS.1770: a full-scale tone of 997 Hz on one channel is -3.01 LUFS; EBU 3341 allows 0.1
    for seconds in (5, 0.4, 0.1, 0.01): assert tone(997, seconds).loudness() == pytest.approx(-3.01, abs=0.1)
    assert tone(997, 5, channels=2).loudness() == pytest.approx(0.0, abs=0.1)
    assert Audio(np.zeros(10), 8000).loudness() == -np.inf


def test_the_true_peak_lies_between_the_samples():
    quarter = Audio(np.sin(np.pi / 2 * np.arange(4800) + np.pi / 4), 48000).crop(0.01, 0.08)
    assert quarter.peak == pytest.approx(0.5 ** 0.5, abs=1e-6) and quarter.true_peak() == pytest.approx(0, abs=0.5)
    assert Audio(np.zeros(10), 8000).true_peak() == -np.inf


@given(sounds, st.floats(-30, 0), st.floats(-6, 0))
@settings(max_examples=40, deadline=None)
def test_normalizing_reaches_the_loudness_or_the_peak_and_never_exceeds_either(sound, lufs, peak):
    even = sound.normalize(lufs, peak)
    if not np.isfinite(sound.loudness()): assert np.array_equal(even.samples, sound.samples)
    else:
        assert even.true_peak() <= peak + 0.01 and even.loudness() <= lufs + 0.1
        assert even.true_peak() > peak - 0.01 or even.loudness() > lufs - 0.1


@given(st.integers(0, 40), st.integers(1, 40), st.integers(0, 40), st.integers(1, 2))
@settings(max_examples=60, deadline=None)
def test_silence_at_the_ends_is_found(before, sounding, after, channels):
    block = 160 # one frame of 0.02 s
    samples = np.zeros((channels, block * (before + sounding + after)))
    samples[-1, block * before:block * (before + sounding)] = 0.1
    found = silence(Audio(samples, 8000))
    assert found == pytest.approx((before * 0.02, after * 0.02, (before + after) / (before + sounding + after)))
    assert silence(Audio(samples, 8000), db=-10).fraction == 1


@given(arrays(np.float32, st.tuples(st.integers(1, 2), st.integers(1, 500)), elements=st.floats(-1, 1, width=32)))
@settings(max_examples=30, deadline=None)
def test_silence_of_anything_adds_up(samples):
    found, length = silence(Audio(samples, 8000)), samples.shape[1] / 8000
    assert 0 <= found.fraction <= 1 and (found.start + found.end <= length + 1e-9 or found == (length, length, 1))


@pytest.mark.parametrize("suffix", WRITABLE)
@pytest.mark.parametrize("channels, rate", [(1, 32000), (2, 44100)])
def test_what_is_saved_is_loaded(suffix, channels, rate, tmp_path):
    sound = Audio(0.5 * tone(440, 1.5, rate, channels).samples, rate)
    path = sound.save(tmp_path / "new folder" / f"take{suffix}", params=dict(prompt="一首歌", seed=3))
    back = load(path, rate=rate)
    assert back.channels == channels and abs(back.seconds - 1.5) < 0.05
    middle = slice(rate // 2, rate)
    exact = suffix in (".wav", ".flac", ".aif", ".aiff")
    assert np.abs(back.samples[:, middle] - sound.samples[:, middle]).max() < (1 / 32768 if exact else 0.05)
    assert json.loads(path.with_suffix(".json").read_text(encoding="utf-8")) == dict(prompt="一首歌", seed=3)
    assert {p.name for p in path.parent.iterdir()} == {"take.json", path.name}


def test_what_is_too_loud_is_cut_off_and_not_wrapped_around(tmp_path):
    back = load(Audio(np.array([0.5, 1.5, -3.0, 1.0]), 8000).save(tmp_path / "loud.wav"))
    assert np.allclose(back.samples, [[0.5, 1, -1, 1]], atol=1e-4)


def test_a_long_ogg(tmp_path): # libvorbis overflows its stack when it is given minutes in one piece
    noise = Audio(np.random.default_rng(0).normal(scale=0.1, size=(2, 2_000_000)), 44100)
    assert load(noise.save(tmp_path / "long.ogg")).samples.shape == noise.samples.shape


def test_loading_is_decoding_mixing_and_resampling(tmp_path):
    sound = Audio(np.random.default_rng(0).uniform(-0.5, 0.5, (2, 30000)), 44100)
    path = sound.save(tmp_path / "a.wav")
    whole = load(path)
    assert np.array_equal(load(path, rate=32000, channels=1).samples, resample(whole.mono().samples, 44100, 32000))
    assert np.array_equal(load(path, start=0.1, seconds=0.2).samples, whole.crop(0.1, 0.2).samples)
    assert np.array_equal(load(str(path)).samples, load(path.read_bytes()).samples)
