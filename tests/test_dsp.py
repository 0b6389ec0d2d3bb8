"Resampling and mel: the numbers of the references, and what must hold for any sound."
import json
import re
from math import ceil

import librosa
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file

from musiclab.core import MusiclabError
from musiclab.dsp import has_torchaudio, log_mel, mel_filterbank, resample, resample_sinc, sinc_weights

RATES = st.sampled_from([8000, 11025, 16000, 22050, 24000, 32000, 44100, 48000])


def case(folder):
    "Settings, inputs and outputs of a reference case."
    if not folder.is_dir(): pytest.skip(f"no reference case {folder}")
    return json.loads((folder / "config.json").read_text()), *(load_file(folder / f"{name}.safetensors") for name in ("inputs", "outputs"))


def test_ace_step_mel(parity):
    config, inputs, outputs = case(parity / "ace_step" / "log_mel")
    samples = inputs["wav_int16"].float() / 32767
    samples = torch.nn.functional.pad(samples, (0, -samples.shape[-1] % config["pad_multiple"]))
    mel = log_mel(samples, config["sample_rate"], config["n_fft"], config["hop_length"], config["n_mels"], config["f_min"], config["f_max"],
                  power=1, eps=1e-6, floor=config["log_floor"], pad=(config["win_length"] - config["hop_length"]) // 2)
    normalised = 2 * (mel - config["min_mel"]) / (config["max_mel"] - config["min_mel"]) - 1
    bank = mel_filterbank(config["sample_rate"], config["n_fft"], config["n_mels"], config["f_min"], config["f_max"])
    torch.testing.assert_close(mel, outputs["mel"], rtol=0, atol=1e-3)
    torch.testing.assert_close(normalised, outputs["mel_normalised"], rtol=0, atol=1e-3)
    torch.testing.assert_close(torch.from_numpy(bank).T, outputs["mel_filterbank"], rtol=0, atol=1e-6)


def test_ace_step_resampling(parity):
    _, inputs, outputs = case(parity / "ace_step" / "log_mel")
    wanted = {tuple(map(int, m.groups())): name for name in outputs if (m := re.fullmatch(r"resample_(\d+)_to_(\d+)", name))}
    assert wanted
    samples, = (value for name, value in inputs.items() if name.startswith("wav") and name != "wav_int16")
    for (orig, new), name in wanted.items():
        torch.testing.assert_close(resample(samples.float() / 32767, orig, new, "sinc"), outputs[name], rtol=0, atol=1e-5)


def test_heartmula_resampling(parity):
    config, inputs, outputs = case(parity / "heartmula" / "codec_resample")
    wanted = {tuple(map(int, m.groups())): name for name in outputs if (m := re.fullmatch(r"(\d+)_to_(\d+)", name))}
    assert len(wanted) == len(config["rates"]) + 1
    for (orig, new), name in wanted.items():
        torch.testing.assert_close(resample_sinc(inputs[f"wav_{orig}"].float(), orig, new), outputs[name], rtol=0, atol=1e-5)


@pytest.mark.skipif(not has_torchaudio(), reason="no torchaudio that loads")
@pytest.mark.parametrize("orig, new", [(44100, 32000), (44100, 48000), (48000, 24000), (24000, 16000), (22050, 44100)])
def test_torchaudio_gives_the_same(orig, new):
    from torchaudio.functional import resample as theirs
    samples = torch.randn(2, orig, generator=torch.Generator().manual_seed(0)) / 10
    torch.testing.assert_close(resample_sinc(samples, orig, new), theirs(samples, orig, new), rtol=0, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_gpu_gives_the_same():
    samples = torch.randn(2, 44100, generator=torch.Generator().manual_seed(0)) / 10
    torch.testing.assert_close(resample_sinc(samples.cuda(), 44100, 32000).cpu(), resample_sinc(samples, 44100, 32000), rtol=0, atol=1e-5)
    torch.testing.assert_close(log_mel(samples.cuda(), 44100).cpu(), log_mel(samples, 44100), rtol=0, atol=1e-3)


@pytest.mark.parametrize("orig, new", [(44100, 32000), (24000, 16000), (3, 2), (1, 3), (44100, 44099), (7, 1000), (1000, 7)])
def test_blocks_give_the_sum_that_defines_the_sinc(orig, new):
    samples = np.random.default_rng(0).normal(size=800)
    got = resample_sinc(torch.from_numpy(samples), orig, new).numpy()
    cutoff = 0.99 * min(1, new / orig)
    for at in np.linspace(0, len(got) - 1, 50).astype(int):
        t = (cutoff * (np.arange(800) - at * orig / new)).clip(-6, 6)
        assert got[at] == pytest.approx((samples * np.cos(np.pi * t / 12) ** 2 * np.sinc(t) * cutoff).sum(), abs=2e-6)


def test_the_weights_of_a_phase_add_up_to_one():
    for step, phases in ((441, 320), (147, 160), (2, 1), (1, 2)): assert np.allclose(sinc_weights(step, phases)[1].sum(1), 1, atol=0.02)


@given(RATES, RATES, st.integers(1, 3000), st.sampled_from(["soxr", "sinc"]))
@settings(max_examples=60, deadline=None)
def test_length_and_kind(orig, new, length, method):
    samples = np.random.default_rng(length).normal(size=(2, length)).astype(np.float32)
    for given_kind in (samples, torch.from_numpy(samples)):
        got = resample(given_kind, orig, new, method)
        assert type(got) is type(given_kind) and got.dtype == given_kind.dtype
        assert tuple(got.shape) == (2, ceil(length * new / orig))


@given(RATES, RATES, st.sampled_from(["soxr", "sinc"]))
@settings(max_examples=20, deadline=None)
def test_channels_are_independent_and_the_map_is_linear(orig, new, method):
    x = np.random.default_rng(0).normal(size=(2, 3, 500))
    y = resample(x, orig, new, method)
    assert np.allclose(y[1, 2], resample(x[1, 2], orig, new, method), atol=1e-5)
    assert np.allclose(resample(2 * x[0, 0] - x[0, 1], orig, new, method), 2 * y[0, 0] - y[0, 1], atol=1e-4)


@pytest.mark.parametrize("method, error", [("soxr", 1e-4), ("sinc", 5e-3)])
@pytest.mark.parametrize("orig, new", [(44100, 32000), (16000, 44100), (48000, 24000)])
def test_a_tone_stays_that_tone(orig, new, method, error):
    def tone(rate): return np.sin(2 * np.pi * 1000 * np.arange(rate) / rate).astype(np.float32)
    middle = slice(new // 4, new // 2)
    assert np.abs(resample(tone(orig), orig, new, method)[middle] - tone(new)[middle]).max() < error


def test_gradients_flow_through_the_sinc():
    x = torch.randn(300, dtype=torch.float32, requires_grad=True)
    resample(x, 3, 2, "sinc").square().sum().backward()
    assert x.grad.abs().sum() > 0


def test_an_unknown_method_is_an_error():
    with pytest.raises(MusiclabError, match="unknown method 'linear'"): resample(np.zeros(10), 2, 1, "linear")


@pytest.mark.parametrize("rate, n_fft, n_mels, fmin, fmax", [
    (44100, 2048, 128, 40, 16000), (32000, 1024, 80, 0, None), (16000, 400, 80, 0, 8000), (8000, 512, 40, 300, 3000)])
def test_the_filterbank_is_librosas(rate, n_fft, n_mels, fmin, fmax):
    theirs = librosa.filters.mel(sr=rate, n_fft=n_fft, n_mels=n_mels, fmin=fmin, fmax=fmax)
    assert np.abs(mel_filterbank(rate, n_fft, n_mels, fmin, fmax) - theirs).max() < 1e-7


@pytest.mark.parametrize("how", [
    dict(), dict(n_fft=1024, hop=256, n_mels=80), dict(power=1.0), dict(pad_mode="constant", fmin=50, fmax=8000)])
def test_the_log_mel_is_librosas(how):
    samples = np.random.default_rng(0).normal(scale=0.1, size=(2, 20000)).astype(np.float32)
    ours = log_mel(samples, 22050, **how)
    how = {dict(hop="hop_length").get(name, name): value for name, value in how.items()}
    theirs = np.log(np.maximum(librosa.feature.melspectrogram(y=samples, sr=22050, **{"pad_mode": "reflect", **how}), 1e-10))
    assert ours.shape == theirs.shape and np.abs(ours - theirs).max() < 2e-5


def test_too_short_to_mirror():
    with pytest.raises(MusiclabError, match="too few"): log_mel(np.zeros(100, np.float32), 22050)
    assert log_mel(np.zeros(100, np.float32), 22050, pad_mode="constant").shape == (128, 1)
