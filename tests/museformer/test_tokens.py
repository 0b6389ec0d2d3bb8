"Tokens: the exact vocabulary, round trips over real music, the grammar against the tokenizer, and what no input may break."
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from musiclab.midi import Part, Song, notes, read
from musiclab.museformer.chords import find_chords
from musiclab.museformer.encoding import from_tokens, to_tokens
from musiclab.museformer.grammar import Grammar, mistakes
from musiclab.museformer.grid import lay_repaired, round_notes, steps_of, to_grid, to_song
from musiclab.museformer.tokenizer import HIDTokenizerV2, midi_to_txt, txt_to_midi
from musiclab.museformer.vocabulary import CONDUCTOR, FIELDS, FIRST, ID, SUM, VOCABULARY, annotate, instruments, is_kind

tokenizer = HIDTokenizerV2()


def same(one, other): return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in ("hits", "bars", "paces"))


def test_the_vocabulary_is_the_one_that_was_agreed():
    assert len(tokenizer) == len(set(VOCABULARY)) == 415
    firsts = dict(TSN=7, TSD=19, TMPH=23, TMPL=39, POS=55, POS_CARRY=103, FAM=104, DRUMS=120, VAR=121, VOICE=129, PITCH=132, DRUM=260, VEL=321,
                  DUR=353, ROOT=393, QUAL=405, NC=414)
    assert {kind: FIRST[kind] for kind in firsts} == firsts
    assert [ID[name] for name in ("PAD", "BOS", "EOS", "BAR", "SUM", "MASK", "SEP")] == list(range(7))


def test_the_worked_example(music):
    ids, info = tokenizer.encode_with_info(music/"midi/bad/bad_00_control_ok.mid")
    assert ids == [1, 3, 10, 20, 29, 47, 398, 410, 79, 393, 410, 4, 104, 121, 55, 192, 341, 358, 61, 194, 358, 67, 196, 358, 73, 197, 358, 79, 199, 358,
                   85, 201, 358, 91, 203, 358, 97, 204, 358, 4, 2]
    assert info["bar"].tolist() == [-1] + [0] * 40
    assert info["seg"].tolist() == [0] * 12 + [1] * 28 + [2]
    assert info["part"].tolist() == [CONDUCTOR] * 12 + [0] * 28 + [CONDUCTOR]


@pytest.mark.parametrize("folder, count", [("freedoom", 75), ("pop909", 200)])
def test_every_note_of_real_music_survives(music, folder, count):
    files = sorted((music/"midi"/folder).glob("*.mid"))
    assert len(files) == count
    for path in files:
        song = read(path)
        grid = to_grid(song)
        ids = to_tokens(grid, find_chords(grid))
        assert not grid.warnings and same(from_tokens(ids), grid), path.name
        assert (tokenizer.encode(tokenizer.song(ids)) == ids).all(), path.name # to a song and back
        assert tokenizer.encode_with_info(tokenizer.decode(ids))[0] == ids.tolist(), path.name # to text and back
        hits, _ = round_notes(song) # before bars: nothing may have moved
        _, first = np.unique((hits["part"].astype(np.int64) * 10**7 + hits["step"]) * 128 + hits["pitch"], return_index=True)
        fields = ["part", "step", "pitch", "velocity", "duration"]
        assert sorted(hits[first][fields].tolist()) == sorted(from_tokens(ids).hits[fields].tolist()), path.name


def test_pop909_has_bars_of_four_quarters(music):
    bars = [len(to_grid(read(path)).bars) for path in sorted((music/"midi/pop909").glob("*.mid"))[::10]]
    assert 60 < np.mean(bars) < 110


def test_real_music_is_grammatical(music):
    for path in [*sorted((music/"midi/freedoom").glob("*.mid"))[::40], music/"midi/freedoom/d_e2m8.mid"]:
        assert mistakes(tokenizer.encode(read(path))[:300]) == [], path.name


rows = st.lists(st.tuples(st.integers(0, 9000), st.integers(0, 5000), st.integers(0, 127), st.integers(1, 127)), min_size=1, max_size=25)
parts = st.lists(st.tuples(st.sampled_from([0, 5, 127]), st.booleans(), rows), min_size=1, max_size=6)
meters = st.lists(st.tuples(st.integers(0, 9000), st.integers(1, 40), st.sampled_from([1, 2, 4, 8, 16, 32, 64])), max_size=5, unique_by=lambda m: m[0])
tempos = st.lists(st.tuples(st.integers(1, 9000), st.floats(5, 500)), max_size=12, unique_by=lambda t: t[0])

@settings(deadline=None, max_examples=30)
@given(parts, meters, tempos, st.sampled_from([24, 89, 96, 480]), st.booleans())
def test_any_song_survives(played, meters, tempos, ppq, chords):
    song = Song([Part(program=program, drums=drums, notes=notes(row)) for program, drums, row in played], [(0, 100.0), *sorted(tempos)],
                [(0, 4, 4), *sorted(meter for meter in meters if meter[0])], ppq=ppq)
    grid = to_grid(song)
    ids = to_tokens(grid, find_chords(grid) if chords else None)
    assert same(from_tokens(ids), grid)
    assert same(to_grid(to_song(grid)), grid)
    assert mistakes(ids[:80]) == []
    assert (np.diff(annotate(ids)["bar"]) >= 0).all()


@settings(deadline=None)
@given(meters, st.integers(0, 3000))
def test_bars_have_no_gaps_and_reach_the_end(meters, last):
    bars, _ = lay_repaired([(0, 4, 4), *sorted(meter for meter in meters if meter[0])], last)
    assert bars["start"][0] == 0 and bars["start"][-1] <= last < bars["start"][-1] + bars["length"][-1] + 288
    assert (bars["start"][1:] == bars["start"][:-1] + bars["length"][:-1]).all()
    assert all(n <= 12 and d in FIELDS["TSD"] and length == steps_of(n, d) for _, length, n, d in bars.tolist())


def typed(walk, steps, seed):
    "Tokens at random, all of them allowed."
    generator, tokens = torch.Generator().manual_seed(seed), []
    for _ in range(steps):
        weights = walk.allowed() * torch.rand(walk.allowed().shape, generator=generator) ** 3
        weights[:, SUM] *= 8
        weights[:, ID["EOS"]] *= 1e-6
        tokens.append(torch.multinomial(weights, 1, generator=generator)[:, 0])
        walk.feed(tokens[-1])
    return [piece[:np.flatnonzero(piece == SUM)[-1] + 1] for piece in torch.stack(tokens, 1).numpy() if (piece == SUM).any()]


def test_whatever_the_grammar_allows_is_what_the_tokenizer_writes():
    for ids in typed(Grammar(chords=False).start(12), 200, 0):
        grid = from_tokens(ids)
        assert not grid.warnings and (to_tokens(grid)[:-1] == ids).all()
    for ids in typed(Grammar(chords=False, parts=[*range(0, 512, 4), 512]).start(12), 200, 1): # voices begin at 0, as in a song
        if ids[-1] == SUM and not is_kind(ids[np.flatnonzero(ids == ID["BAR"])[-1]:], "PITCH", "DRUM").any(): continue # ends with an empty bar
        assert (tokenizer.encode(tokenizer.song(ids), False)[:-1] == ids).all()


def test_wishes_are_kept():
    wanted = [0, 3, 33 * 4 + 1, 512]
    for ids in typed(Grammar(chords=True, parts=wanted).start(8), 160, 2):
        assert set(from_tokens(ids).hits["part"].tolist()) <= set(wanted)
        bars = np.flatnonzero(ids == ID["BAR"])
        heads = [ids[bar:bar + 7] for bar in bars]
        assert all(is_kind(head, "ROOT", "NC").any() for head in heads)


def test_gaps_are_filled_where_they_are():
    for ids in typed(Grammar(infill=True).start(8), 160, 3):
        masks, gaps = (ids == ID["MASK"]).sum(), (ids == ID["SEP"]).sum()
        assert gaps <= masks


def test_a_walk_cares_for_each_piece_alone():
    ids = tokenizer.encode(Song([Part(notes=notes([(0, 480, 60, 90), (2000, 480, 64, 90)]))]))
    alone, both = Grammar().start(1), Grammar().start(2)
    for token in ids.tolist()[:-1]:
        assert torch.equal(alone.allowed()[0], both.allowed()[0])
        choice = torch.tensor([token, int(both.allowed()[1].nonzero()[-1])])
        alone.feed(choice[:1])
        both.feed(choice)
    assert torch.equal(alone.allowed(), both[[0]].allowed())


@settings(deadline=None, max_examples=15)
@given(st.lists(st.integers(0, 414), max_size=40))
def test_nonsense_is_read_without_a_crash(ids):
    grid = from_tokens(np.array(ids, np.int64))
    assert len(grid.hits) + sum(int(warning.split()[2]) for warning in grid.warnings) <= is_kind(np.array(ids, np.int64), "PITCH", "DRUM").sum()
    to_song(grid).to_bytes()
    found = mistakes(ids)
    assert mistakes([token for place, token in enumerate(ids) if place not in found]) == []


def test_no_token_knows_the_future():
    ids = tokenizer.encode(Song([Part(program=33, notes=notes([(0, 480, 40, 90)])), Part(program=33, notes=notes([(0, 480, 45, 90)]))]))
    for end in range(1, len(ids)):
        assert (instruments(ids[:end]) == instruments(ids)[:end]).all()
        for name in ("bar", "seg"): assert (annotate(ids[:end])[name] == annotate(ids)[name][:end]).all()


def test_floods_are_dammed():
    late = Song([Part(notes=notes([(0, 480, 60, 80), (480 * 90_000, 480, 62, 80)]))])
    grid = to_grid(late)
    assert len(grid.bars) == 10 and "left out" in grid.warnings[0]
    long = Song([Part(notes=notes([(1920 * bar, 480, 60, 80) for bar in range(5000)]))])
    assert len(to_grid(long).bars) == 4096
    assert len(tokenizer.encode(late)) < 200


def test_files_and_texts(tmp_path, music):
    source = sorted((music/"midi/freedoom").glob("*.mid"))[3]
    text = midi_to_txt(source, tmp_path/"a.txt", quantize=True, detect_chords=True).read_text()
    raw = midi_to_txt(source, tmp_path/"raw.txt", quantize=False).read_text()
    assert text.startswith("#HID2 grid=12") and raw.startswith("#HID2 ppq=")
    ids = tokenizer.encode_with_info(source)[0]
    assert tokenizer.encode_with_info(text)[0] == tokenizer.encode_with_info(tmp_path/"a.txt")[0] == tokenizer.encode_with_info(raw)[0] == ids
    again = midi_to_txt(txt_to_midi(tmp_path/"a.txt", tmp_path/"b.mid"), tmp_path/"b.txt").read_text()
    assert again == text and read(tmp_path/"b.mid").ppq == 480


def test_counting_gives_chances():
    "The benchmark's n-gram: all that may follow adds up to one, and what was seen often costs little."
    sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
    try: from kneser_ney import VOCABULARY, KneserNey
    finally: sys.path.pop(0)
    model = KneserNey(3).fit([[1, 3, 55, 192, 361, 4, 3, 55, 192, 361, 4, 2]] * 3 + [[1, 3, 4, 2]])
    for context in ([55, 192], [7, 7], [3, 55]):
        grams = np.array([[*context, token] for token in range(VOCABULARY)])
        assert abs(model.probabilities(grams).sum() - 1) < 1e-9
    assert model.losses([3, 55, 192])[-1] < 0.5 < 3 < model.losses([3, 55, 200])[-1]
