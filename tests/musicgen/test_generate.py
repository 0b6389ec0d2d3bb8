"Generating: the referee's tokens, every way to the same song, and songs of any length."
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from musiclab import adapters, layers
from musiclab.audio import Audio
from musiclab.core import MusiclabError
from musiclab.dense import Int8, Packed, Plain, Turned, can_pack, dense
from musiclab.musicgen.decoder import Decoding, FastDecoder, forward
from musiclab.musicgen.generate import decode_codes, encode_texts, generate, open_decoder, write_codes
from musiclab.musicgen.model import LORA_TARGETS, open_lm, pad_states
from musiclab.musicgen.sampling import generate_tokens
from musiclab.sampling import Sampler
from tests.musicgen.conftest import open_whole, transformers_tokens

captions = ["dark melodic techno, 128 bpm", "piano", ""]


def song(fast, states, mask, frames=30, seeds=None, prompt=None, fixed=False, guidance=3.0, **how):
    sampler = Sampler(seeds or [0] * len(states), **how or {"temperature": 0})
    return generate_tokens(Decoding(fast, states, mask, frames, guidance), sampler, frames, prompt, fixed=fixed)


@pytest.fixture(scope="session")
def texts(tiny): return pad_states(encode_texts(tiny, captions))


@pytest.fixture(scope="session")
def fast(tiny): return open_decoder(tiny)


@pytest.fixture(scope="session")
def tuned(tiny, tmp_path_factory):
    "A model with an adapter that changes much, and the adapter's file."
    lm = open_lm(tiny)
    adapters.attach(lm, LORA_TARGETS, rank=4, alpha=12)
    for name, weight in lm.named_parameters():
        if "lora_B" in name: weight.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
    return lm.eval(), adapters.save(lm, tmp_path_factory.mktemp("adapter") / "adapter.safetensors")


@pytest.mark.parametrize("kind, guidance", [("tiny", 3.0), ("tiny", 1.0), ("wide", 3.0)])
def test_greedy_tokens_are_those_of_transformers(kind, guidance, request):
    folder = request.getfixturevalue(kind)
    fast, texts, whole = open_decoder(folder), pad_states(encode_texts(folder, captions[:2])), open_whole(folder)
    theirs = transformers_tokens(whole, folder, captions[:2], 40, guidance=guidance)
    assert torch.equal(song(fast, *texts, 40, guidance=guidance), theirs)
    going_on = transformers_tokens(whole, folder, captions[:2], 40, theirs[..., 5:17].contiguous(), guidance)
    assert torch.equal(song(fast, *texts, 40, prompt=theirs[..., 5:17], guidance=guidance), going_on)
    assert torch.equal(song(fast, *texts, 40, prompt=theirs[..., 5:17], guidance=guidance, fixed=True), going_on)


@pytest.mark.parametrize("how", [{"temperature": 1.0}, {"temperature": 0.7, "top_k": 10}, {"top_k": 0, "top_p": 0.8},
                                 {"temperature": 1.3, "top_k": 30, "top_p": 0.9}])
def test_each_song_has_its_own_chance(how, fast, texts):
    together = song(fast, *texts, 80, [3, 4, 5], **how)
    assert not torch.equal(together[0], together[1])
    assert torch.equal(song(fast, *texts, 80, [3, 4, 5], fixed=True, **how), together)
    for i in range(3): assert torch.equal(song(fast, *(tensor[i:i + 1] for tensor in texts), 80, [3 + i], **how)[0], together[i])


def test_chances_are_those_of_the_softmax():
    logits = torch.randn(1, 2, 8, generator=torch.Generator().manual_seed(0)).expand(6000, -1, -1)
    def shares(**how):
        sampler = Sampler(range(6000), **how)
        sampler.refill(2, 8, "cpu")
        return torch.stack([F.one_hot(sampler.choose(logits, step), 8).float().mean(0) for step in range(4)]).mean(0)
    chances = logits[0].softmax(-1)
    assert torch.allclose(shares(top_k=0), chances, atol=0.015)
    assert torch.allclose(shares(top_k=0, temperature=2.0), (logits[0] / 2).softmax(-1), atol=0.015)
    best = chances * (chances >= chances.topk(3).values[:, -1:])
    assert torch.allclose(shares(top_k=3), best / best.sum(-1, keepdim=True), atol=0.015)
    few = shares(top_k=0, top_p=0.6)
    for row, kept in zip(chances, few > 0):
        order = row.argsort(descending=True)
        needed = int((row[order].cumsum(0) < 0.6).sum()) + 1
        assert set(kept.nonzero().flatten().tolist()) == set(order[:needed].tolist())


def test_without_text_guidance_has_no_effect(fast, texts):
    states, mask = (tensor[2:] for tensor in texts)
    assert torch.equal(song(fast, states, mask, guidance=3.0), song(fast, states, mask, guidance=1.0))


def test_padding_matters_to_audiocraft_only(fast, texts):
    def first(states, mask, padding): return forward(Decoding(fast, states, mask, 5, 1, padding), torch.full((len(states), 4, 1), 64), 0)
    states, mask = (tensor[1:2] for tensor in texts)
    length = mask.sum()
    alone = first(states[:, :length], mask[:, :length], "mask")
    for others in (texts, (states, mask)):  # as one of three songs, and as one with a longer text than it needs
        row = slice(1, 2) if others is texts else slice(0, 1)
        assert torch.allclose(first(*others, "mask")[row], alone, atol=1e-6)
        assert not torch.allclose(first(*others, "audiocraft")[row], alone, atol=1e-4)
    assert torch.allclose(first(states[:, :length], mask[:, :length], "audiocraft"), alone, atol=1e-6)


def test_adapter_strength(tuned, tiny, fast, texts):
    lm, file = tuned
    merged = open_lm(tiny)
    adapters.load(merged, file)
    adapters.merge(merged)
    base, full = song(fast, *texts), song(FastDecoder(merged), *texts)
    assert not torch.equal(base, full)
    assert torch.equal(song(FastDecoder(lm), *texts), full) and torch.equal(song(open_decoder(tiny, file), *texts), full)
    assert torch.equal(song(FastDecoder(lm, strength=0), *texts), base)
    half = open_lm(tiny)
    adapters.load(half, file, strength=0.5)
    assert torch.equal(song(FastDecoder(half), *texts), song(FastDecoder(lm, strength=0.5), *texts))


@pytest.mark.parametrize("strength", [0.0, 1.0])
def test_a_quantised_base_with_its_adapter(strength, tiny, tuned, texts):
    lm = open_lm(tiny)
    layers.quantize(lm, "int8", LORA_TARGETS)
    adapters.load(lm, tuned[1])
    fast = FastDecoder(lm, strength)
    adapters.set_strength(lm, strength)
    there = lm(torch.full((3, 4, 1), 5), torch.ones(3, 1, dtype=torch.bool), *texts)[0][:, 0, 0]
    assert torch.allclose(forward(Decoding(fast, *texts, 1, guidance=1), torch.full((3, 4, 1), 64), 0)[:, 0], there, atol=2e-3)


def test_weights_spread_by_fsdp(tiny, fast, texts):
    from torch.distributed import HashStore, destroy_process_group, init_process_group
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor
    init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        lm = open_lm(tiny)
        for layer in lm.decoder.model.decoder.layers: fully_shard(layer)
        fully_shard(lm)
        assert torch.equal(song(FastDecoder(lm), *texts), song(fast, *texts))
        assert all(isinstance(weight, DTensor) for weight in lm.parameters())
    finally: destroy_process_group()


@pytest.mark.parametrize("int8, most", [(False, 0.03), (True, 0.06)])
def test_coarser_numbers_are_close(int8, most, tiny, fast, texts):
    coarse = open_decoder(tiny, dtype=torch.bfloat16, int8=int8)
    prompt = torch.randint(64, (3, 4, 20), generator=torch.Generator().manual_seed(0))
    exact, other = (forward(Decoding(d, *texts, 20), prompt, 0) for d in (fast, coarse))
    assert 0 < (other - exact).norm() / exact.norm() < most
    assert song(coarse, *texts, 20).max() < 64


def test_every_form_of_a_weight_multiplies_alike():
    draw = torch.Generator().manual_seed(0)
    weight, x, total = (torch.randn(*shape, generator=draw) for shape in ((640, 512), (70, 512), (70, 640)))
    wanted = x @ weight.T
    forms = (Plain, Turned, Packed) if can_pack(torch.float32) else (Plain,)
    assert isinstance(dense(weight), forms[1:] or Plain) and type(dense(weight[:64])) is Plain
    for form in (kind(weight) for kind in forms):
        for rows in (1, 2, 5, 70):
            x_, wanted_, total_ = x[:rows], wanted[:rows], total[:rows]
            assert form(x_).is_contiguous() and torch.allclose(form(x_), wanted_, atol=1e-4)
            assert torch.allclose(form.add(total_.clone(), x_), total_ + wanted_, atol=1e-4)
    whole = Int8(weight)
    assert whole.weight.dtype == torch.int8 and (whole(x.bfloat16()) - wanted).norm() / wanted.norm() < 0.02
    assert torch.equal(Int8(torch.zeros(64, 64))(x[:, :64].bfloat16()), torch.zeros(70, 64, dtype=torch.bfloat16))


@pytest.mark.parametrize("frames, given", [(1, 0), (2, 0), (7, 0), (100, 0), (101, 0), (250, 0), (250, 40), (250, 180), (30, 50)])
def test_songs_are_exactly_as_long_as_asked(frames, given, fast, texts):
    prompt = torch.randint(64, (3, 4, given), generator=torch.Generator().manual_seed(0)) if given else None
    codes = write_codes(fast, *texts, frames, Sampler([1, 2, 3]), prompt, window=100, stride=60)
    assert codes.shape == (3, 4, frames) and 0 <= codes.min() and codes.max() < 64
    if given: assert torch.equal(codes[..., :given], prompt[..., :frames])


def test_windows_go_on_from_the_last_frames(fast, texts):
    greedy = Sampler([0] * 3, temperature=0)
    codes = write_codes(fast, *texts, 220, greedy, window=100, stride=60)
    assert torch.equal(codes[..., :100], song(fast, *texts, 100))
    for end in (160, 220): assert torch.equal(song(fast, *texts, 100, prompt=codes[..., end - 100:end - 60]), codes[..., end - 100:end])


def test_stopping_keeps_what_is_done(fast, texts):
    whole, done = song(fast, *texts, 50), []
    asked = iter(range(100))
    codes = generate_tokens(Decoding(fast, *texts, 50), Sampler([0] * 3, temperature=0), 50, stop=lambda: next(asked) == 20, tick=done.append)
    assert codes.shape[-1] == 18 and torch.equal(codes, whole[..., :18]) and sum(done) == 21
    assert write_codes(fast, *texts, 50, Sampler([0] * 3), stop=lambda: True).shape[-1] == 0
    for step, given in ((0, 0), (1, 0), (0, 7)):
        stop = iter([False] * step + [True]).__next__
        codes = generate_tokens(Decoding(fast, *texts, 50), Sampler([0] * 3), 50, whole[..., :given], stop)
        assert torch.equal(codes, whole[..., :given])


def test_autocast_around_changes_the_dtype_and_nothing_else(tiny, fast, texts):
    lm = open_lm(tiny)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert FastDecoder(lm).dtype == torch.bfloat16 and song(FastDecoder(lm), *texts).shape == (3, 4, 30)
        assert torch.equal(song(FastDecoder(lm, dtype=torch.float32), *texts), song(fast, *texts))


def test_generate_from_caption_to_sound(tiny, wide, tuned):
    takes = generate(tiny, ["piano", "techno", "piano"], seconds=0.5, seed=4, batch=2)
    assert [(take.seconds, take.channels, take.rate) for take in takes] == [(0.5, 1, 32_000)] * 3
    assert not np.allclose(takes[0].samples, takes[2].samples) and all(take.peak <= 1 for take in takes)
    [again] = generate(tiny, "piano", seconds=0.5, seed=[6])
    assert np.allclose(again.samples, takes[2].samples, atol=1e-5)
    [base], [tuned_] = (generate(tiny, "piano", seconds=0.3, adapter=tuned[1], strength=s, temperature=0) for s in (0, 1))
    assert np.array_equal(base.samples, generate(tiny, "piano", seconds=0.3, temperature=0)[0].samples)
    assert not np.array_equal(base.samples, tuned_.samples)
    [start] = generate(wide, "piano", seconds=0.5)
    [longer] = generate(wide, "piano", seconds=1.3, start=start, window=1, stride=0.5)
    assert (longer.seconds, longer.channels) == (1.3, 2)


def test_an_open_decoder_is_used_again(tiny, fast):
    one, other = (generate(tiny, "piano", seconds=0.3, decoder=decoder)[0].samples for decoder in (fast, None))
    assert np.array_equal(one, other)


def test_what_would_clip_is_made_quieter(tiny, monkeypatch):
    loud = Audio(np.array([[0.5, -2.0]], np.float32), 32_000)
    monkeypatch.setattr("musiclab.musicgen.generate.decode", lambda *_: loud)
    assert decode_codes(tiny, [torch.zeros(4, 1)])[0].samples.tolist() == [[0.25, -1.0]]


@pytest.mark.parametrize("how, message", [({"seconds": 0}, "has no frame"), ({"seed": [1, 2]}, "2 seeds for 1 prompts"),
                                          ({"stride": 30}, "does not fit a window"), ({"adapter": "nowhere.safetensors"}, "nowhere")])
def test_what_is_wrong_is_said(how, message, tiny):
    with pytest.raises(MusiclabError, match=message): generate(tiny, "piano", **{"seconds": 1} | how)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA graphics card")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_recorded_step_gives_the_same_tokens(dtype, tiny, texts):
    fast = open_decoder(tiny, device="cuda", dtype=dtype)
    for how in ({"temperature": 0}, {"top_k": 20}):
        recorded, stepwise = (song(fast, *texts, 200, [1, 2, 3], fixed=fixed, **how) for fixed in (None, False))
        assert (recorded == stepwise).float().mean() > (0.999 if dtype == torch.float32 else 0.5)
