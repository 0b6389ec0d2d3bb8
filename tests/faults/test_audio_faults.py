"Sound files that are broken: each gives one clear line, or the right result."
import os
import re
import resource
import signal
import struct
import sys

import numpy as np
import pytest
import soundfile

from musiclab.audio import Audio, load
from musiclab.core import MusiclabError
from musiclab.decode import probe

SUFFIXES = [".wav", ".flac", ".mp3", ".ogg", ".aiff", ".opus"]
noise = np.random.default_rng(0).normal(scale=0.1, size=(2, 44100 * 3))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "A sound of 3 s in some formats, by suffix."
    folder = tmp_path_factory.mktemp("whole")
    return {suffix: Audio(noise, 44100).save(folder / f"whole{suffix}").read_bytes() for suffix in SUFFIXES}


def refuses(path, *words):
    "`load` and `probe` fail with one line that names the file and says these words."
    for read in (load, probe):
        with pytest.raises(MusiclabError) as caught: read(path)
        text = str(caught.value)
        assert "\n" not in text and str(path) in text and all(re.search(word, text) for word in words), text


@pytest.mark.parametrize("name, content, word", [
    ("empty.wav", b"", "is empty"),
    ("page.wav", b"<!DOCTYPE html>\n<html><body>404 Not Found</body></html>" * 40, "is a web page"),
    ("page.mp3", b"\xef\xbb\xbf \n<HTML><head></head></HTML>", "is a web page"),
    ("notes.mp3", b"MThd\0\0\0\6\0\1", "holds notes"),
    ("pointer.flac", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "Git LFS pointer"),
    ("text.mp3", b"la la la\n" * 4000, "cannot be decoded"),
    ("random.mp3", np.random.default_rng(1).bytes(100_000), "cannot be decoded"),
    ("random.m4a", np.random.default_rng(1).bytes(100_000), "cannot be decoded"),
    ("playlist.mp3", b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfile:///etc/hostname\n#EXT-X-ENDLIST\n", "cannot be decoded"),
    ("header.wav", b"RIFF\x24\x00\x00\x00WAVEfmt ", "cannot be decoded")])
def test_no_sound(tmp_path, name, content, word):
    (tmp_path / name).write_bytes(content)
    refuses(tmp_path / name, word)
    with pytest.raises(MusiclabError, match=word): load(content)


def test_absent_and_unreadable(tmp_path, as_nobody):
    refuses(tmp_path / "absent.wav", "cannot be opened", "No such file")
    refuses(tmp_path, "cannot be opened", "directory")
    locked = Audio(noise, 44100).save(tmp_path / "locked.wav")
    locked.chmod(0)
    with pytest.raises(MusiclabError, match="locked.wav: cannot be opened .Permission denied"): as_nobody(load, locked)


def test_no_samples(tmp_path):
    soundfile.write(tmp_path / "none.wav", np.zeros((0, 2)), 44100)
    refuses(tmp_path / "none.wav", "holds no samples")


def test_one_sample(tmp_path):
    soundfile.write(tmp_path / "one.wav", np.array([[0.5, -0.5]]), 44100, subtype="FLOAT")
    one = load(tmp_path / "one.wav")
    assert one.samples.tolist() == [[0.5], [-0.5]]
    assert one.resample(16000).samples.shape == (2, 1) and one.mono().samples.tolist() == [[0]]
    assert np.isfinite(one.loudness()) and one.normalize().peak <= 1


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_not_a_number(tmp_path, bad):
    samples = noise.T.copy()
    samples[44100, 1] = bad
    soundfile.write(tmp_path / "bad.wav", samples, 44100, subtype="FLOAT")
    with pytest.raises(MusiclabError, match="bad.wav: holds samples that are not numbers"): load(tmp_path / "bad.wav")
    assert load(tmp_path / "bad.wav", seconds=0.5).seconds == 0.5 # the part before is fine
    with pytest.raises(MusiclabError, match="not all numbers"): Audio(samples.T, 44100).save(tmp_path / "again.wav")
    assert not (tmp_path / "again.wav").exists()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_that_breaks_off_gives_what_it_has(tmp_path, whole, suffix):
    path = tmp_path / f"half{suffix}"
    path.write_bytes(whole[suffix][:len(whole[suffix]) // 2])
    assert 0.5 < load(path).seconds < 2


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_damage_in_the_middle_costs_only_the_damaged_part(tmp_path, whole, suffix):
    content = bytearray(whole[suffix])
    at = len(content) // 2
    content[at:at + 500] = np.random.default_rng(2).bytes(500)
    (tmp_path / f"hole{suffix}").write_bytes(content)
    sound = load(tmp_path / f"hole{suffix}")
    assert 1.4 < sound.seconds < 3.1 and np.isfinite(sound.samples).all()


def lies(whole):
    "Files of 3 s whose headers promise 12 hours or more."
    hours = 12 * 3600 * 44100
    wav = bytearray(whole[".wav"])
    at = wav.index(b"data")
    wav[at + 4:at + 8], wav[4:8] = struct.pack("<I", 2**32 - 100), struct.pack("<I", 2**32 - 64)
    flac = bytearray(whole[".flac"])
    flac[18:26] = (int.from_bytes(flac[18:26], "big") >> 36 << 36 | hours).to_bytes(8, "big") # 36 bits of STREAMINFO count the samples
    mp3 = bytearray(whole[".mp3"])
    at = max(mp3.find(b"Xing"), mp3.find(b"Info"))
    assert at > 0 and mp3[at + 7] & 1
    mp3[at + 8:at + 12] = struct.pack(">I", hours // 1152)
    return {".wav": wav, ".flac": flac, ".mp3": mp3}


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".mp3"])
def test_a_header_that_promises_twelve_hours(tmp_path, whole, suffix):
    path = tmp_path / f"lie{suffix}"
    path.write_bytes(lies(whole)[suffix])
    assert abs(load(path).seconds - 3) < 0.05 and abs(probe(path).seconds - 3) < 0.05
    with pytest.raises(MusiclabError, match="ends before 3600 s"): load(path, start=3600, seconds=10)


def test_parts_that_do_not_exist(tmp_path, whole):
    (tmp_path / "a.wav").write_bytes(whole[".wav"])
    with pytest.raises(MusiclabError, match="a.wav: ends before 3 s"): load(tmp_path / "a.wav", start=3)
    for start, seconds in ((-1, None), (0, 0), (0, -2)):
        with pytest.raises(MusiclabError, match="start >= 0 and seconds > 0"): load(tmp_path / "a.wav", start=start, seconds=seconds)
    assert load(tmp_path / "a.wav", start=2.5, seconds=9).seconds == pytest.approx(0.5)


@pytest.mark.parametrize("name, word", [("take.xyz", "cannot write .xyz"), ("take", "without a suffix")])
def test_a_format_that_cannot_be_written(tmp_path, name, word):
    with pytest.raises(MusiclabError, match=word): Audio(noise, 44100).save(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_a_rate_that_the_format_does_not_know(tmp_path):
    with pytest.raises(MusiclabError, match="take.mp3: cannot be written"): Audio(noise, 12345).save(tmp_path / "take.mp3")
    assert not list(tmp_path.iterdir())


def save_on_a_full_disk(path):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    Audio(noise, 44100).save(path, params=dict(seed=1))


@pytest.mark.skipif(sys.platform == "win32", reason="no limits there")
def test_a_full_disk_leaves_the_old_take(tmp_path, as_nobody):
    old = Audio(noise[:, :10], 44100).save(tmp_path / "take.wav").read_bytes()
    with pytest.raises(MusiclabError, match="take.wav: cannot be written .*too large"):
        as_nobody(save_on_a_full_disk, tmp_path / "take.wav")
    assert os.listdir(tmp_path) == ["take.wav"] and (tmp_path / "take.wav").read_bytes() == old
