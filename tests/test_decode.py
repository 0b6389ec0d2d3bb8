"Every format by every decoder that is installed; what happens when one is absent."
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from musiclab.core import MusiclabError
from musiclab.decode import AUDIO_SUFFIXES, READERS, decode, decoders, probe, read_av, read_ffmpeg, read_soundfile
from musiclab.dsp import resample

FORMATS = ["clip.wav", "clip.flac", "clip.aiff", "clip.mp3", "clip.ogg", "clip.opus", "clip.m4a", "clip.alac.m4a", "clip.aac", "clip.wma",
           "mono_22050.wav", "stereo_48000_24bit.flac", "eight_khz.wav", "surround_5_1.wav"]
BY_AV_ONLY = ["clip.m4a", "clip.alac.m4a", "clip.aac", "clip.wma"]


@pytest.fixture
def without(monkeypatch):
    "`without(\"soundfile\", \"av\", \"ffmpeg\")` hides decoders."
    def hide(*names):
        for name in names:
            if name == "ffmpeg": monkeypatch.setattr(shutil, "which", lambda program: None)
            else: monkeypatch.setitem(sys.modules, name, None)
    return hide


@pytest.fixture(scope="module")
def formats(music):
    return music / "audio" / "formats"


def test_the_list_is_complete(formats):
    assert {path.name for path in formats.iterdir() if path.suffix in AUDIO_SUFFIXES} == set(FORMATS)


def likeness(one, other, shift=0.0):
    "The correlation of two sounds, one of them moved by up to `shift` samples."
    size = len(one) + len(other)
    products = np.fft.irfft(np.fft.rfft(one, size) * np.fft.rfft(other, size).conj(), size)
    near = np.minimum(np.arange(size), size - np.arange(size)) <= shift
    return products[near].max() / np.linalg.norm(one) / np.linalg.norm(other)


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_decodes(formats, name):
    samples, rate = decode(formats / name)
    info = probe(formats / name)
    assert (info.rate, info.channels) == (rate, len(samples)) and samples.dtype == np.float32 and samples.flags.c_contiguous
    assert abs(info.seconds - samples.shape[1] / rate) < 0.05
    assert np.array_equal(decode((formats / name).read_bytes())[0], samples)


@pytest.mark.parametrize("name", [name for name in FORMATS if name.startswith("clip.")])
def test_all_formats_hold_the_same_clip(formats, name):
    original, rate = decode(formats / "clip.wav")
    samples, own = decode(formats / name)
    samples = resample(samples, own, rate)
    assert abs(samples.shape[1] - original.shape[1]) < 0.05 * rate
    assert likeness(samples[0], original[0], shift=0.05 * rate) > 0.95


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("start, seconds", [(0, 0.5), (0.3, 1.0), (1.7, 0.8), (2.5, None)])
def test_a_part_equals_the_part_of_the_whole(formats, name, start, seconds):
    samples, rate = decode(formats / name)
    part, _ = decode(formats / name, start, seconds)
    wanted = samples[:, round(start * rate):][:, :None if seconds is None else round(seconds * rate)]
    assert part.shape == wanted.shape
    if name in ("clip.m4a", "clip.aac"): assert likeness(part[0], wanted[0]) > 0.99 # AAC draws its noise anew
    else: assert np.abs(part - wanted).max() < 1e-6


@pytest.mark.parametrize("name", FORMATS)
def test_decoders_agree(formats, name):
    content = (formats / name).read_bytes()
    window = (0, None) if name == "clip.wma" else (0.5, 1.0) # wma marks time in milliseconds: the program jumps only roughly
    by_av, rate = read_av(content, *window)
    others = [] if name in BY_AV_ONLY else [read_soundfile(content, *window)]
    if shutil.which("ffmpeg"): others.append(read_ffmpeg(content, *window))
    for samples, own in others:
        assert own == rate and samples.shape == by_av.shape and likeness(samples[0], by_av[0]) > 0.99


@pytest.mark.parametrize("name", FORMATS)
def test_pyav_takes_over(formats, name, without):
    samples, rate = decode(formats / name)
    without("soundfile", "ffmpeg")
    taken, own = decode(formats / name)
    assert probe(formats / name).decoder == "PyAV"
    assert own == rate and abs(taken.shape[1] - samples.shape[1]) < 0.05 * rate


@pytest.mark.skipif(not shutil.which("ffprobe"), reason="no ffmpeg program")
@pytest.mark.parametrize("name", FORMATS)
def test_the_ffmpeg_program_takes_over(formats, name, without):
    samples, rate = decode(formats / name)
    without("soundfile", "av")
    taken, own = decode(formats / name)
    info = probe(formats / name)
    assert info.decoder == "ffmpeg" and (info.rate, info.channels) == (rate, len(samples))
    assert own == rate and abs(taken.shape[1] - samples.shape[1]) < 0.05 * rate


def test_what_is_missing_is_named(formats, without):
    without("av", "ffmpeg")
    assert decode(formats / "clip.mp3")[0].shape == (2, 220500)
    wanted = r"clip.m4a: cannot be decoded .*PyAV: not installed; ffmpeg: not installed.*musiclab\[codecs\]"
    with pytest.raises(MusiclabError, match=wanted): decode(formats / "clip.m4a")


def test_the_table_of_decoders_tells_what_happens(formats, without):
    with_all = decoders()
    assert set(with_all) == set(AUDIO_SUFFIXES) and None not in with_all.values()
    for name in FORMATS: assert probe(formats / name).decoder == with_all[Path(name).suffix]
    without("av", "ffmpeg")
    assert {suffix for suffix, decoder in decoders().items() if decoder is None} == {".m4a", ".mp4", ".aac", ".alac", ".wma"}
    without("soundfile")
    assert set(decoders().values()) == {None}


def test_content_counts_and_not_the_name(formats, tmp_path):
    for name in ("clip.flac", "clip.m4a", "clip.mp3"):
        disguised = tmp_path / "song.wav"
        shutil.copy(formats / name, disguised)
        assert probe(disguised).format == probe(formats / name).format and np.array_equal(decode(disguised)[0], decode(formats / name)[0])


def test_odd_names(tmp_path):
    for name in ("-i.wav", "a b.wav", "file:x.wav", "歌 ♪.wav", "100%d.wav", "concat:a|b.wav"):
        soundfile.write(tmp_path / name, np.zeros(100), 8000)
        assert decode(tmp_path / name)[0].shape == (1, 100)


def test_there_are_three_decoders_in_the_order_of_trust():
    assert list(READERS) == ["soundfile", "PyAV", "ffmpeg"]


def test_longer_than_one_block(tmp_path):
    ramp = np.arange((1 << 24) + 1000, dtype=np.int16)
    soundfile.write(tmp_path / "long.wav", ramp, 8000, subtype="PCM_16")
    samples, _ = decode(tmp_path / "long.wav")
    assert samples.shape == (1, len(ramp)) and np.array_equal(samples[0] * 32768, ramp)
