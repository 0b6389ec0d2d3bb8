"The mask, executed three ways, on random pieces, packed in all ways; causality; what the layout may know."
import numpy as np
import pytest
import torch

from musiclab.museformer.attention import PRESETS, Chunked, Dense
from musiclab.museformer.flex import Flex
from musiclab.museformer.layout import lay_out, pack
from musiclab.museformer.model import SIZES, create_model
from musiclab.museformer.vocabulary import VOCABULARY
from tests.museformer.streams import stream


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("lengths", [[700], [1, 2, 300], [130, 40, 7, 260], [256, 128, 128]], ids=str)
def test_chunks_and_flex_give_what_the_dense_mask_gives(name, lengths):
    at = pack([lay_out(stream(n, seed=n, fill=n % 2 == 0)) for n in lengths])
    q, k, v, grad = (torch.randn(len(at), 2, 16, requires_grad=True, generator=torch.Generator().manual_seed(i)) for i in range(4))
    truth = Dense(at, PRESETS[name])(q, k, v)
    slopes = torch.autograd.grad(truth, (q, k, v), grad)
    for size in (16, 128):
        ours = Chunked.plan(at, PRESETS[name], size)(q, k, v)
        assert torch.allclose(ours, truth, atol=1e-5)
        for a, b in zip(torch.autograd.grad(ours, (q, k, v), grad), slopes): assert torch.allclose(a, b, atol=1e-5)
    plain = (x.detach() for x in (q, k, v)) # FlexAttention has no backward pass on a CPU, and refuses what could ask for one
    assert torch.allclose(Flex.plan(at, PRESETS[name])(*plain), truth, atol=1e-5)


def test_in_half_precision_it_is_close():
    at = lay_out(stream(400))
    q, k, v = (torch.randn(len(at), 2, 16) for _ in range(3))
    truth, half = Dense(at, PRESETS["hid"])(q, k, v), Chunked.plan(at, PRESETS["hid"])(q.bfloat16(), k.bfloat16(), v.bfloat16())
    assert half.dtype == torch.bfloat16 and (half.float() - truth).abs().max() < 0.05


@pytest.mark.parametrize("name", ["hid", "full"])
def test_no_token_changes_what_was_said_before_it(name):
    torch.manual_seed(0)
    model, ids, chance = create_model(preset=name).eval(), torch.from_numpy(stream(300, fill=True)), np.random.default_rng(0)
    with torch.no_grad():
        scores = model(ids)
        for place in chance.choice(300, 50, replace=False):
            other = ids.clone()
            other[place] = (other[place] + chance.integers(1, 415)) % 415
            assert torch.allclose(model(other)[:place], scores[:place], atol=1e-5), VOCABULARY[int(ids[place])]


def test_a_layout_knows_only_the_past():
    ids = stream(500, fill=True)
    whole = lay_out(ids)
    for end in range(1, 500, 7):
        for a, b in zip(vars(whole).values(), vars(lay_out(ids[:end])).values()): assert torch.equal(a[:end], b)


@pytest.mark.parametrize("size, millions", [("small", 14.690463), ("base", 50.369439), ("large", 119.646367), ("xlarge", 302.204319)])
def test_sizes_are_those_of_the_plan(size, millions):
    with torch.device("meta"): assert sum(p.numel() for p in create_model(415, size).parameters()) == round(millions * 1e6)
    assert SIZES[size][0] // SIZES[size][1] == 64


def test_checkpointed_layers_give_the_same_gradients():
    from musiclab.engine import recompute
    ids, answers = torch.from_numpy(stream(200)), []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = create_model(dropout=0.0)
        if checkpointing: recompute(model.blocks)
        model(ids).logsumexp(-1).sum().backward()
        answers.append(model.blocks[0].attention.sum_qkv.weight.grad)
    assert torch.allclose(*answers, atol=1e-5)
