"The transformer: the release's shapes, and what must not change an answer."
import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from musiclab.ace_step import lyric_encoder
from musiclab.ace_step.attention import CrossAttention, SelfAttention, linear_attention, places
from musiclab.ace_step.checkpoint import TINY
from musiclab.ace_step.lyric_encoder import LyricEncoder
from musiclab.ace_step.transformer import Conditions, Config, Transformer, open_transformer
from musiclab.layers import linears, quantize


def near(one, other, atol=1e-5): torch.testing.assert_close(one, other, atol=atol, rtol=1e-4)


@pytest.fixture(scope="module")
def model(tiny): return open_transformer(tiny)


@pytest.fixture(scope="module")
def song():
    "Three songs: whole, with padding, without lyrics."
    generator = torch.Generator().manual_seed(0)
    def normal(*size): return torch.randn(*size, generator=generator)
    tags, words = torch.arange(6) < torch.tensor([[6], [4], [6]]), torch.arange(9) < torch.tensor([[9], [5], [0]])
    return dict(x=normal(3, 8, 16, 25), time=torch.tensor([900.0, 500.0, 10.0]),
                told=(normal(3, 6, 32), tags, torch.randint(6693, (3, 9), generator=generator), words))


def test_shapes_of_the_release():
    patterns = json.loads((Path(__file__).parent / "release_shapes.json").read_text())
    depth = {"transformer_blocks": 24, "encoders": 6}
    wanted = {}
    for pattern, shape in patterns.items():
        repeated = next((n for name, n in depth.items() if f"{name}.*." in pattern), 1)
        wanted |= {pattern.replace("*", str(number)): shape for number in range(repeated)}
    with torch.device("meta"): model = Transformer(Config(), projectors=True, unused=True)
    assert {name: [*weight.shape] for name, weight in model.state_dict().items()} == wanted and len(wanted) == 874


def test_every_shape_in_the_reference(parity):
    file = parity / "ace_step" / "full_state_dict_shapes.json"
    if not file.is_file(): pytest.skip("the full list is not among the cases that the repository carries")
    with torch.device("meta"): model = Transformer(Config(), projectors=True, unused=True)
    assert {name: [*weight.shape] for name, weight in model.state_dict().items()} == json.loads(file.read_text())["shapes"]


@torch.no_grad()
def test_songs_of_a_batch_do_not_hear_each_other(model, song):
    told = model.encode(*song["told"])
    together = model.decode(song["x"], song["time"], told)
    for row in range(3):
        one = slice(row, row + 1)
        alone = model.encode(*(tensor[one] for tensor in song["told"]))
        near(model.decode(song["x"][one], song["time"][one], alone)[0], together[row])
        near(model.decode(song["x"][one], song["time"][one], model.remember(alone))[0], together[row])
        cut = [tensor[one, :max(1, song["told"][mask][row].sum())] for tensor, mask in zip(song["told"], (1, 1, 3, 3))]
        if row < 1: near(model.decode(song["x"][one], song["time"][one], model.encode(*cut))[0], together[row])


@torch.no_grad()
def test_padding_is_thrown_away_when_remembering(model, song):
    told = model.encode(*song["told"])
    assert not told.full and told.states.shape[1] == 16
    third = model.remember(told.rows(slice(2, 3)))
    assert third.full and third.states.shape[1] == 7 and third.memory[0][0].shape == (1, 2, 7, 16)
    second = told.rows(slice(1, 2))  # padding of the tags lies in the middle: places must not move
    near(model.decode(song["x"][:1], song["time"][:1], model.remember(second)), model.decode(song["x"][:1], song["time"][:1], second))


@torch.no_grad()
def test_masked_lyrics_may_say_anything(model, song):
    text, tags, ids, words = song["told"]
    other = torch.where(words, ids, 17)
    near(model(song["x"], song["time"], text, tags, other, words), model(song["x"], song["time"], text, tags, ids, words))


@torch.no_grad()
def test_focus_by_row(model, song):
    told = model.remember(model.encode(*song["told"]))
    sharp, blurred = (model.decode(song["x"], song["time"], told, focus=dict.fromkeys((1, 2), factor)) for factor in (1.0, 0.01))
    mixed = model.decode(song["x"], song["time"], told, focus=dict.fromkeys((1, 2), torch.tensor([1.0, 0.01, 1.0])))
    near(mixed[1], blurred[1])
    near(mixed[::2], sharp[::2])
    assert (sharp - blurred).abs().max() > 1e-4
    assert not torch.allclose(model.encode(*song["told"], focus={0: 0.01}).states, model.encode(*song["told"]).states)


@torch.no_grad()
def test_frames_that_do_not_exist(model, song):
    frames = torch.arange(25) < torch.tensor([[25], [20], [25]])
    told = model.encode(*song["told"])
    masked, whole = model.decode(song["x"], song["time"], told, frames), model.decode(song["x"], song["time"], told)
    near(masked[::2], whole[::2])
    assert masked.isfinite().all() and not torch.allclose(masked[1, ..., :20], whole[1, ..., :20], atol=1e-4)


@pytest.mark.parametrize("frames, words", [(1, 1), (2, 40), (60, 1)])
@torch.no_grad()
def test_any_length(model, frames, words):
    told = model.encode(torch.randn(1, 1, 32), torch.ones(1, 1), torch.zeros(1, words, dtype=torch.long), torch.zeros(1, words))
    assert model.decode(torch.randn(1, 8, 16, frames), torch.tensor(1.0), model.remember(told)).isfinite().all()


@torch.no_grad()
def test_linear_attention_is_the_quadratic_one():
    q, k, v = torch.rand(3, 2, 40, 3, 8, generator=torch.Generator().manual_seed(0))
    fits = torch.einsum("bthd,bshd->bhts", q, k)
    near(linear_attention(q, k, v), torch.einsum("bhts,bshd->bthd", fits / fits.sum(-1, keepdim=True), v))
    nothing = linear_attention(0 * q, k, v)
    assert torch.equal(nothing, torch.zeros_like(nothing))


@pytest.mark.parametrize("dtype, atol", [(torch.bfloat16, 0.1), (torch.float16, 0.02)])
@torch.no_grad()
def test_half_precision(tiny, model, song, dtype, atol):
    half = open_transformer(tiny, dtype)
    told = (song["told"][0].to(dtype), *song["told"][1:])
    velocity = half(song["x"].to(dtype), song["time"], *told)
    assert velocity.dtype == dtype
    near(velocity.float(), model(song["x"], song["time"], *song["told"]), atol)
    with torch.autocast("cpu", dtype): auto = model(song["x"], song["time"], *song["told"])
    near(auto.float(), model(song["x"], song["time"], *song["told"]), atol)


@torch.no_grad()
def test_half_precision_does_not_overflow():
    attention = SelfAttention(1, 8).half()
    for layer in (attention.to_q, attention.to_k, attention.to_v): torch.nn.init.constant_(layer.weight, 60)
    torch.nn.init.eye_(attention.to_out[0].weight)
    assert attention(torch.full((1, 5, 8), 130.0).half(), places(5, 8)).isfinite().all()


def test_tables_made_while_generating_serve_training(model, song):
    with torch.inference_mode(): model(song["x"][..., :13], song["time"], *song["told"])
    fresh = Transformer(Config.of(TINY["transformer"]), projectors=True)
    velocity, (after_first,) = fresh.tap(song["x"][..., :13], song["time"], fresh.encode(*song["told"]), after=(0,))
    (velocity.pow(2).mean() + fresh.projectors[0](after_first).pow(2).mean()).backward()
    assert fresh.transformer_blocks[3].cross_attn.to_k.weight.grad.abs().sum() > 0 and fresh.lyric_embs.weight.grad.abs().sum() > 0
    assert fresh.projectors[0][4].weight.grad.abs().sum() > 0 and fresh.projectors[1][4].weight.grad is None


@pytest.mark.parametrize("remembered", [True, False])
@torch.no_grad()
def test_blocks_compile_whole(model, song, remembered):
    told = model.encode(*song["told"])
    if remembered: told = model.remember(told)
    wanted = model.decode(song["x"], song["time"], told)
    fresh = Transformer(model.config).eval()
    fresh.load_state_dict(model.state_dict())
    for block in fresh.transformer_blocks: block.compile(backend="eager", fullgraph=True)  # a break of the graph would be an error
    near(fresh.decode(song["x"], song["time"], told), wanted)


@torch.no_grad()
def test_all_linear_layers_can_be_quantised(tiny, song):
    model = open_transformer(tiny, torch.bfloat16)
    names = linears(model)
    assert {"transformer_blocks.0.ff.inverted_conv.conv", "transformer_blocks.0.ff.point_conv.conv", "transformer_blocks.0.attn.to_out.0"} <= names.keys()
    told = (song["told"][0].bfloat16(), *song["told"][1:])
    before = model(song["x"].bfloat16(), song["time"], *told)
    quantize(model, "int8", r"transformer_blocks\..*")
    near(model(song["x"].bfloat16(), song["time"], *told).float(), before.float(), 0.2)
    assert "transformer_blocks.0.ff.inverted_conv.conv.weight" in model.state_dict()


@torch.no_grad()
def test_songs_are_joined_and_picked(model, song):
    told = model.remember(model.encode(*song["told"]))
    twice = Conditions.join([told, told])
    assert len(twice.states) == len(twice.memory[3][1]) == 6
    picked = twice.rows(slice(4, 5))
    near(model.decode(song["x"][1:2], song["time"][1:2], picked), model.decode(song["x"][1:2], song["time"][1:2], told.rows(slice(1, 2))))


@torch.no_grad()
def test_long_lyrics_ask_in_turns(monkeypatch):
    encoder, x = LyricEncoder(16, 16, 2, 32, 2).eval(), torch.randn(2, 50, 16)
    mask = torch.arange(50) < torch.tensor([[50], [31]])
    whole = encoder(x, mask)
    for at_once in (1, 7, 25):
        monkeypatch.setattr(lyric_encoder, "AT_ONCE", at_once)
        near(encoder(x, mask), whole)


@torch.no_grad()
def test_keys_of_padding_do_not_matter():
    attention = CrossAttention(2, 8)
    x, states, mask = torch.randn(1, 4, 16), torch.randn(1, 6, 16), torch.tensor([[1, 1, 1, 0, 0, 0]]).bool()
    seen = attention(x, places(4, 8), attention.remember(states, places(6, 8)), mask[:, None, None])
    near(seen, attention(x, places(4, 8), attention.remember(F.pad(states[:, :3], (0, 0, 0, 3)), places(6, 8)), mask[:, None, None]))
