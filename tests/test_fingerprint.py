"Fingerprints: copies are found through every change that files go through, other music is not."
import numpy as np
import pytest

from musiclab import audio
from musiclab.audio import Audio
from musiclab.fingerprint import ALIKE, bits, errors, matches


@pytest.fixture(scope="module")
def tracks(music): return [audio.load(file, seconds=20) for file in sorted((music/"audio"/"tracks").glob("*.mp3"))[::2]]


def through(sound, format, tmp_path): return audio.load(sound.save(tmp_path/f"x{format}"))


def test_copies_are_found_and_nothing_else(tracks, tmp_path):
    changes = [lambda s: through(s, ".mp3", tmp_path), lambda s: through(s, ".ogg", tmp_path), lambda s: through(s, ".opus", tmp_path),
               lambda s: Audio(s.samples * 0.05, s.rate), lambda s: s.mono().resample(16000), lambda s: s.crop(0.123), lambda s: s.crop(5.77, 8),
               lambda s: Audio(np.clip(3 * s.samples, -1, 1), s.rate)]
    copies = [change(tracks[i]) for i, change in enumerate(changes)]
    prints = [bits(sound) for sound in [*tracks, *copies]]
    found = {(m.one, m.other): m for m in matches(prints)}
    assert {tuple(sorted(pair)) for pair in found} == {(i, len(tracks) + i) for i in range(len(copies))}
    assert max(m.errors for m in found.values()) < ALIKE
    cut = next(m for pair, m in found.items() if set(pair) == {6, len(tracks) + 6})
    assert abs(abs(cut.later) - 5.77) < 0.05 and 6 < cut.seconds < 9


@pytest.mark.parametrize("length", [0, 1, 100, 6000])
def test_tiny_and_silent_sounds(length):
    for samples in (np.zeros((1, length)), np.ones((2, length))):
        assert matches([bits(Audio(samples, 44100))] * 2) == [] or samples.any()


def test_nothing_to_compare():
    assert matches([]) == [] == matches([np.zeros(0, np.uint32)])
    assert errors(np.zeros(5, np.uint32), np.ones(5, np.uint32)) == (0.5, 0)


def test_a_long_song_is_done_in_parts():
    sound = Audio(np.random.default_rng(0).standard_normal((1, 11025 * 60)) * 0.1, 11025)
    whole = bits(sound)
    assert np.mean(whole[1000:1500] == bits(sound.crop(1000 * 256 / 11025, 20))[:500]) > 0.95
