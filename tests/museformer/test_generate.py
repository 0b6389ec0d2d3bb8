"Writing: the cache against the model that reads everything, gaps, wishes, seeds, and the plan's snippets."
import numpy as np
import pytest
import torch

from musiclab import compose
from musiclab.core import MusiclabError
from musiclab.museformer.attention import PRESETS
from musiclab.museformer.cache import Cache
from musiclab.museformer.generate import Wish, arrive, choose, generate, write
from musiclab.museformer.grammar import Grammar, mistakes
from musiclab.museformer.infill import fill, infill, make_gaps
from musiclab.museformer.model import HIDMuseFormer
from musiclab.museformer.tokenizer import HIDTokenizerV2, midi_to_txt, txt_to_midi
from musiclab.museformer.vocabulary import BAR, EOS, MASK, PAD, SEP, SUM, annotate, is_kind
from tests.museformer.streams import stream


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return HIDMuseFormer(415, 32, 2, 2, 64, positions=4096).eval()


@pytest.fixture(scope="module")
def piece(): return HIDTokenizerV2().encode(compose.compose("techno", seed=3, seconds=12).song).astype(np.int64)


@pytest.mark.parametrize("rope", [False, True])
@pytest.mark.parametrize("name", PRESETS)
def test_the_cache_forgets_nothing_that_is_read(name, rope):
    "Three pieces at once, deep into many bars, with gaps that are filled in earlier bars at the end."
    torch.manual_seed(1)
    model = HIDMuseFormer(415, 32, 2, 2, 64, preset=name, positions=0 if rope else 4096, rope=rope).eval()
    rows = [stream(n, seed=n, per_bar=24, fill=True) for n in (420, 380, 400)]
    prompts = (1, 57, 200)
    with torch.inference_mode():
        whole = [model(torch.from_numpy(row)) for row in rows]
        cache = Cache(model, [torch.from_numpy(row[:n]) for row, n in zip(rows, prompts)])
        for i in range(min(len(row) - n for row, n in zip(rows, prompts)) - 1):
            for b, n in enumerate(prompts): assert torch.allclose(cache.scores[b], whole[b][n - 1 + i], atol=1e-4), (b, i)
            cache.step([int(row[n + i]) for row, n in zip(rows, prompts)])
    if name == "window": assert max(memory.notes.shape[3] for memory in cache.memories) < 300


def test_the_same_tokens_with_and_without_a_cache(model):
    made = write(model, max_length=90, seed=5, temperature=0.9, top_k=50, top_p=0.95)[0].tolist()
    walk, tokens, chance = Grammar().start().feed(torch.tensor([1])), [1], torch.Generator().manual_seed(5)
    while len(tokens) < 90 and tokens[-1] != EOS:
        with torch.inference_mode(): scores = model(torch.tensor(tokens))[-1:]
        scores = scores.masked_fill(~walk.allowed(), float("-inf"))
        token = choose(scores, torch.empty(415).exponential_(generator=chance)[None], 0.9, 50, 0.95)
        walk.feed(token)
        tokens.append(token.item())
    assert made == tokens


def test_whatever_is_written_is_music(model):
    rows = write(model, max_length=400, batch=6, seed=1, bars=3).tolist()
    for row in rows:
        assert not mistakes(row) and row.count(BAR) <= 3
        if EOS in row: assert row.count(BAR) == 3 and set(row[row.index(EOS) + 1:]) <= {PAD}
    wish = Wish(bars=2, parts=[33, "drums"], meter=(3, 4), tempo=100, chords=["A:min", "NC"])
    row = write(model, max_length=300, wish=wish, seed=2)[0].numpy()
    assert not mistakes(row) and set(annotate(row)["part"].tolist()) <= {-1, 132, 512} and row[1:8].tolist() == [3, 9, 20, 28, 43, 402, 406]


def test_wishes_that_cannot_be_are_refused(model):
    for wish, reason in ((Wish(meter=(13, 4)), "13/4"), (Wish(tempo=300), "300"), (Wish(chords=["H:maj"]), "H:maj"), (Wish(parts=[128]), "128")):
        with pytest.raises(MusiclabError, match=reason): write(model, wish=wish, max_length=20)
    with pytest.raises(MusiclabError, match="empty"): write(model, prompt=torch.tensor([[EOS]]))
    with pytest.raises(MusiclabError, match="not a piece"): write(model, prompt=[1, 200, 300])


def test_a_prompt_is_gone_on_with(model, piece):
    row = write(model, prompt=torch.from_numpy(piece)[None], max_length=len(piece) + 30)[0].tolist()
    assert row[:len(piece) - 1] == piece[:-1].tolist() and piece[-1] == EOS and not mistakes(row)


def test_the_grammar_stands_where_the_prompt_ends(piece):
    for end in (len(piece) - 1, 200, 211, 333):
        whole = Grammar().start()
        for token in torch.from_numpy(piece[:end]): whole.feed(token[None])
        assert (arrive(Grammar(), [piece[:end]]).allowed() == whole.allowed()).all()


def test_gaps_are_made_and_filled(model, piece):
    part = int(annotate(piece)["part"].max())
    segments = make_gaps(piece[:-1], part, range(1, 3))
    assert sum(segment == [MASK] for segment in segments) == 2
    where = annotate(piece)
    hidden = np.unique(where["seg"][(where["part"] == part) & np.isin(where["bar"], (1, 2))])
    written = [token for number in hidden for token in [SEP, *piece[where["seg"] == number]]]
    assert fill(segments, [*written, EOS]).tolist() == piece.tolist()
    for made in infill(model, piece, part, range(1, 3), batch=2, max_length=len(piece) + 150):
        assert not mistakes(made) and (made == BAR).sum() == (piece == BAR).sum()


def test_repetition_is_punished_in_pitches_only(model, piece):
    from musiclab.museformer.generate import penalise
    scores = torch.ones(1, 415)
    penalise(scores, [piece[:300].tolist()], 2.0)
    changed = (scores[0] != 1).nonzero()[:, 0].numpy()
    assert len(changed) and is_kind(changed, "PITCH", "DRUM").all() and scores[0, SUM] == 1


def test_the_snippets_of_the_plan(model, tmp_path, piece):
    tokenizer, device = HIDTokenizerV2(), torch.device("cpu")
    with torch.no_grad():
        generated = model.generate(bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id, max_length=64, temperature=0.9, top_k=50, top_p=0.95, device=device)
    txt_to_midi(tokenizer.decode(generated[0].tolist()), tmp_path / "new.mid")
    HIDTokenizerV2().song(piece).save(tmp_path / "input.mid")
    midi_to_txt(tmp_path / "input.mid", tmp_path / "input.txt", quantize=True, detect_chords=True)
    prompt_ids, _ = tokenizer.encode_with_info((tmp_path / "input.txt").read_text(), add_special=True)
    prompt_tensor = torch.tensor([prompt_ids], device=device)
    with torch.no_grad():
        generated = model.generate(prompt=prompt_tensor, eos_id=tokenizer.eos_id, max_length=len(prompt_ids) + 20, temperature=0.85, repetition_penalty=1.1)
    assert generated[0, :len(prompt_ids) - 1].tolist() == prompt_ids[:-1]


def test_the_family_call_says_what_it_cannot_do(tmp_path):
    with pytest.raises(MusiclabError, match="reads no texts"): generate(tmp_path, "a waltz")
    with pytest.raises(MusiclabError, match="holds none of"): generate(tmp_path)
