"Tokens of whole tracks, and the delay pattern."
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from musiclab.audio import Audio
from musiclab.core import MusiclabError
from musiclab.features import prepare
from musiclab.musicgen.checkpoint import open_part
from musiclab.musicgen.codes import Codes, decode, delay, delays, encode, trained, training_pair, undelay
from musiclab.tracks import Source, Track


def noise(samples, channels=1, rate=32_000, seed=0):
    return Audio(np.random.default_rng(seed).uniform(-0.5, 0.5, (channels, samples)).astype(np.float32), rate)


@st.composite
def batches(draw):
    "Codes, lengths, channels."
    channels, rows, frames = draw(st.sampled_from([1, 2])), draw(st.integers(1, 3)), draw(st.integers(1, 12))
    codes = torch.randint(64, (rows, 4 * channels, frames), generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
    lengths = draw(st.lists(st.integers(0, frames), min_size=rows, max_size=rows))
    return codes, torch.arange(frames) < torch.tensor(lengths)[:, None], delays(4 * channels, channels)


@given(batches())
@settings(deadline=None)
def test_delay_is_undone(batch):
    codes, _, late = batch
    delayed = delay(codes, late, 64)
    assert delayed.shape[-1] == codes.shape[-1] + max(late)
    assert torch.equal(undelay(delayed, late), codes)
    assert (delayed == 64).sum() == max(late) * codes[:, :, 0].numel()


@given(batches())
@settings(deadline=None)
def test_training_pair_is_the_recipe(batch):
    from transformers.models.musicgen.modeling_musicgen import shift_tokens_right
    codes, valid, late = batch
    inputs, targets = training_pair(codes, valid, late, 64)
    frames, labels = codes.shape[-1], torch.full((len(codes), codes.shape[-1], codes.shape[1]), -100)
    for b in range(len(codes)):
        for k, d in enumerate(late):
            for t in range(frames - d):
                if valid[b, t + d]: labels[b, t + d, k] = codes[b, k, t]
    assert torch.equal(targets, labels.transpose(1, 2))
    if valid.all(): assert torch.equal(inputs, shift_tokens_right(labels, 64, 64))
    assert torch.equal(trained(valid, late).sum((0, 2)), (targets >= 0).sum((0, 2)))
    for b, length in enumerate(valid.sum(1).tolist()):
        assert (targets[b, :, length:] == -100).all()
        if not length: continue
        alone = training_pair(codes[b:b + 1, :, :length], valid[b:b + 1, :length], late, 64)
        assert torch.equal(alone[0][0], inputs[b, :, :length]) and torch.equal(alone[1][0], targets[b, :, :length])


@given(batches())
@settings(deadline=None)
def test_a_mask_of_tokens_is_taken_as_it_is(batch):
    codes, valid, late = batch
    inputs, targets = training_pair(codes, valid[:, None].expand_as(codes), late, 64)
    padded = codes.masked_fill(~valid[:, None], 64)
    assert torch.equal(inputs[..., 1:], delay(padded, late, 64)[..., :codes.shape[-1] - 1])
    assert torch.equal(targets, delay(padded, late, 64)[..., :codes.shape[-1]].masked_fill(delay(padded, late, 64)[..., :codes.shape[-1]] == 64, -100))


@pytest.mark.parametrize("samples", [1, 639, 640, 641, 40_000, 64_001])
def test_any_length_as_in_one_go(samples, tiny):
    codec, sound = open_part(tiny, "audio_encoder"), noise(samples)
    whole = codec.encode(torch.from_numpy(sound.samples)[None]).audio_codes[0, 0]
    assert whole.shape == (4, -(-samples // 640))
    for piece in (13, 1500): assert torch.equal(encode(codec, sound, piece=piece), whole)
    there = codec.decode(whole[None, None], [None]).audio_values[0].numpy()
    for piece in (13, 1500): assert np.allclose(decode(codec, whole, piece=piece).samples, there, atol=1e-5)


def test_stereo_is_interleaved_as_transformers_does(wide):
    from tests.musicgen.conftest import open_whole
    sound = noise(33_000, channels=2)
    theirs = open_whole(wide)._prepare_audio_encoder_kwargs_for_generation(torch.from_numpy(sound.samples)[None], {})["decoder_input_ids"]
    codec = open_part(wide, "audio_encoder")
    codes = encode(codec, sound, channels=2, piece=20)
    assert torch.equal(codes, theirs)
    back = decode(codec, codes, channels=2)
    assert (back.channels, back.samples.shape[1]) == (2, 52 * 640)
    assert np.allclose(back.samples[1], decode(codec, codes[1::2]).samples[0], atol=1e-5)


def test_rate_and_channels_are_made_to_fit(tiny):
    codec = open_part(tiny, "audio_encoder")
    assert encode(codec, noise(44_100, 2, 44_100)).shape == (4, 50)
    assert torch.equal(encode(codec, noise(32_000), channels=2)[0::2], encode(codec, noise(32_000)))
    with pytest.raises(MusiclabError, match="no sound"): encode(codec, noise(0))


@pytest.mark.parametrize("codes", [torch.full((4, 3), 64), torch.full((4, 3), -1), torch.zeros(4, 0, dtype=torch.long)])
def test_what_has_no_sound(codes, tiny):
    with pytest.raises(MusiclabError, match="between 0 and 63"): decode(open_part(tiny, "audio_encoder"), codes)


def test_feature_in_a_store_and_on_demand(tiny, wide, tmp_path):
    (tmp_path / "page.wav").write_text("<html>")
    sources = [noise(50_000, 2, 44_100).save(tmp_path / "a.wav"), noise(70_000, seed=1).save(tmp_path / "b.flac"), tmp_path / "page.wav"]
    tracks = [*(Track(path.name, Source.of(path)) for path in sources), Track("prompt")]
    for folder, codebooks in ((tiny, 4), (wide, 8)):
        stored, fresh = prepare([Codes(folder)], tracks, tmp_path / "store"), prepare([Codes(folder)], tracks, None)
        assert stored.kept == [0, 1, 3] and "page.wav" in str(stored.problems) and stored.rows(tracks[3])["codes"] == []
        for track in tracks[:2]:
            [row], [again] = stored.rows(track)["codes"], fresh.rows(track)["codes"]
            assert row["codes"].dtype == np.int16 and row["codes"].shape[0] == codebooks and np.array_equal(row["codes"], again["codes"])
        fresh.close()
