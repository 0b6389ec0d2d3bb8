"The trained module: its loss, its text, its adapters."
import math
import re
import warnings

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from musiclab import adapters
from musiclab.core import MusiclabError
from musiclab.features import prepare
from musiclab.musicgen.checkpoint import open_part, open_tokenizer, tiny_checkpoint
from musiclab.musicgen.model import LONGEST, LORA_TARGETS, Text, open_lm, pad_states, text_states
from musiclab.tracks import Track
from tests.musicgen.conftest import open_whole


def batch_of(folder, captions=("dark techno", "piano ballad, slow"), frames=(20, 14), seed=0):
    "Codes, valid, states, mask."
    channels = open_lm(folder).config.audio_channels
    codes = torch.randint(64, (len(captions), 4 * channels, max(frames)), generator=torch.Generator().manual_seed(seed))
    encoder, tokenizer = open_part(folder, "text_encoder"), open_tokenizer(folder)
    states, mask = pad_states([text_states(encoder, tokenizer, caption) for caption in captions])
    return codes, torch.arange(max(frames)) < torch.tensor(frames)[:, None], states, mask


@pytest.mark.parametrize("kind", ["tiny", "wide"])
def test_loss_is_that_of_transformers_where_nothing_is_padded(kind, request):
    folder = request.getfixturevalue(kind)
    captions = ["dark techno", "soft piano"]
    codes, valid, states, mask = batch_of(folder, captions, (20, 20))
    lm, whole = open_lm(folder), open_whole(folder)
    sums, counts = lm.losses(codes, valid, states, mask)
    labels = torch.full((2, 20, codes.shape[1]), -100)
    for k, late in enumerate(lm.late): labels[:, late:, k] = codes[:, k, :20 - late]
    whole.config.decoder.decoder_start_token_id = 64
    theirs = whole(**open_tokenizer(folder)(captions, padding=True, return_tensors="pt"), labels=labels).loss
    assert torch.isclose((sums / counts).mean(), theirs, atol=1e-6)


def test_sums_add_up_over_any_division_of_a_batch(tiny):
    lm, batch = open_lm(tiny), batch_of(tiny)
    sums, counts = lm.losses(*batch)
    parts = [lm.losses(*(tensor[i:i + 1] for tensor in batch)) for i in range(2)]
    assert torch.allclose(sum(s for s, _ in parts), sums, rtol=1e-5) and torch.equal(sum(c for _, c in parts), counts)
    shorter = [tensor[1:, ..., :14] if tensor.shape[-1] == 20 else tensor[1:] for tensor in batch]  # without its padding
    assert torch.allclose(lm.losses(*shorter)[0], parts[1][0], rtol=1e-5) and lm.losses(*shorter)[1].tolist() == [14, 13, 12, 11]


@pytest.mark.parametrize("frames", [1, 2, 3])
def test_songs_shorter_than_the_delay(frames, tiny):
    lm, (codes, valid, states, mask) = open_lm(tiny), batch_of(tiny)
    logits, counted = lm(codes[..., :frames], valid[:, :frames], states, mask)
    sums, counts = lm.losses(codes[..., :frames], valid[:, :frames], states, mask)
    assert logits.shape == (2, 4, frames, 64) and torch.equal(counts, counted.sum((0, 2)))
    assert counts.tolist() == [2 * max(0, frames - late) for late in range(4)] and ((sums > 0) == (counts > 0)).all()


def test_gradients_are_those_of_the_plain_computation(tiny):
    lm, batch = open_lm(tiny).requires_grad_(True), batch_of(tiny)
    def gradients(loss):
        lm.zero_grad()
        loss.backward()
        return torch.cat([p.grad.flatten() for p in lm.parameters()])
    sums, counts = lm.losses(*batch)
    frugal = gradients((sums / counts).mean())
    logits, trained = lm(*batch)
    plain = gradients(torch.stack([F.cross_entropy(logits[:, k][trained[:, k]], batch[0][:, k][trained[:, k]]) for k in range(4)]).mean())
    assert torch.allclose(frugal, plain, atol=1e-6) and frugal.norm() > 0.1


def test_loss_is_computed_in_float32(tiny):
    batch = batch_of(tiny)
    exact, (sums, counts) = open_lm(tiny).losses(*batch), open_lm(tiny, torch.bfloat16).losses(*batch)
    assert sums.dtype == torch.float32
    spacing = 2.0 ** -6  # of bfloat16 numbers between 4 and 8
    assert (sums / counts - exact[0] / exact[1]).abs().max() < spacing / 2


def test_neighbours_and_padding_do_not_matter(tiny):
    lm, (codes, valid, states, mask) = open_lm(tiny), batch_of(tiny)
    alone, counted = lm(codes[1:], valid[1:], states[1:, :mask[1].sum()], mask[1:, :mask[1].sum()])
    beside, _ = lm(codes, valid, states, mask)
    assert torch.allclose(beside[1], alone[0], atol=1e-5)
    other = codes.clone()
    other[1, :, 14:] = 7  # what lies behind the song's end
    assert torch.equal(lm(other, valid, states, mask)[0][counted.expand(2, -1, -1)], beside[counted.expand(2, -1, -1)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("text_padding", ["mask", "audiocraft"])
def test_a_row_without_text_is_finite_and_hears_nothing(dtype, text_padding, tiny):
    lm, (codes, valid, states, mask) = open_lm(tiny, dtype), batch_of(tiny, ("", "piano"))
    logits, _ = lm(codes, valid, states, mask, text_padding)
    assert logits.isfinite().all()
    nothing = lm(codes[:1], valid[:1], torch.randn(1, 1, 32), torch.zeros(1, 1, dtype=torch.bool))[0]
    assert torch.allclose(logits[:1].float(), nothing.float(), atol=1e-5 if dtype == torch.float32 else 0.02)


def test_training_mode_has_no_dropout_unless_asked_for(tiny):
    batch = batch_of(tiny)
    lm = open_lm(tiny)
    assert torch.equal(lm.train().losses(*batch)[0], lm.eval().losses(*batch)[0])
    noisy = open_lm(tiny, dropout=0.3).train()
    torch.manual_seed(0)
    assert not torch.equal(noisy.losses(*batch)[0], noisy.losses(*batch)[0])


def test_adapters_learn_and_touch_the_decoder_only(tiny):
    assert len([name for name, _ in open_whole(tiny).named_modules() if re.fullmatch(LORA_TARGETS, name)]) == 2 * 2 * 4
    lm, batch = open_lm(tiny), batch_of(tiny)
    before = lm.losses(*batch)[0]
    assert len(adapters.attach(lm, LORA_TARGETS, rank=3, alpha=6, dropout=0.0)) == 16
    assert torch.equal(lm.losses(*batch)[0], before)
    lm.decoder.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW([p for p in lm.parameters() if p.requires_grad], lr=2e-2)
    for _ in range(15):
        sums, counts = lm.train().losses(*batch)
        optimizer.zero_grad()
        (sums / counts).mean().backward()
        optimizer.step()
    learning = {name: p for name, p in lm.named_parameters() if p.requires_grad}
    assert len(learning) == 32 and all("lora_" in name and p.grad.abs().max() > 0 for name, p in learning.items())
    assert lm.losses(*batch)[0].sum() < 0.98 * before.sum()


def test_checkpoints_with_and_without_projection(tmp_path):
    same_width = tiny_checkpoint(tmp_path / "same", hidden=32)
    lm = open_lm(same_width)
    assert not [name for name in lm.state_dict() if name.startswith("enc_to_dec_proj")] and lm.losses(*batch_of(same_width))[0].isfinite().all()
    from safetensors.torch import load_file, save_file
    broken = tiny_checkpoint(tmp_path / "broken")
    save_file({n: w for n, w in load_file(broken / "model.safetensors").items() if not n.startswith("enc_to_dec_proj")}, broken / "model.safetensors")
    with pytest.raises(MusiclabError, match="enc_to_dec_proj are missing"): open_lm(broken)


def test_long_captions_are_cut_and_that_is_said(tiny):
    encoder, tokenizer = open_part(tiny, "text_encoder"), open_tokenizer(tiny)
    with pytest.warns(UserWarning, match="cut to 512"): states = text_states(encoder, tokenizer, "techno " * 600)
    assert states.shape == (LONGEST, 32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert text_states(encoder, tokenizer, "techno " * 511).shape == (LONGEST, 32)


def test_states_are_those_of_transformers(tiny):
    text = open_tokenizer(tiny)(["dark techno", "piano"], padding=True, return_tensors="pt")
    theirs = open_whole(tiny).text_encoder(**text).last_hidden_state
    _, _, states, mask = batch_of(tiny, ("dark techno", "piano"))
    assert torch.equal(mask, text.attention_mask.bool()) and torch.allclose(states[mask], theirs[mask], atol=1e-6)
    assert (states[~mask] == 0).all() and math.isclose(states[1].norm().item(), theirs[1][mask[1]].norm().item(), rel_tol=1e-5)


def test_feature_in_a_store_and_on_demand(tiny, tmp_path):
    tracks = [Track("a", tags=("dark", "techno")), Track("b", caption="dark, techno"), Track("c", extra={"captions": ["piano", "soft piano"]}), Track("d")]
    stored, fresh = prepare([Text(tiny)], tracks, tmp_path), prepare([Text(tiny)], tracks, None)
    assert [len(stored.rows(track)["text"]) for track in tracks] == [1, 1, 2, 1]
    for track in tracks:
        for row, again in zip(stored.rows(track)["text"], fresh.rows(track)["text"]): assert np.array_equal(row["states"], again["states"])
    assert stored.rows(tracks[3])["text"][0]["states"].shape == (0, 32)
    fresh.close()
