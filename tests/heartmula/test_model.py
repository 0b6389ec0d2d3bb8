"The writer: every tensor of the release, nothing missing, nothing else; and the same songs in every way of writing them."
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from musiclab import adapters, layers
from musiclab.core import MusiclabError
from musiclab.heartmula.checkpoint import RELEASE, Config, part_folder, read_weights, shapes, tiny_checkpoint
from musiclab.heartmula.fast import FastModel
from musiclab.heartmula.frames import Writing, frames_of, length_of, write
from musiclab.heartmula.model import LORA_TARGETS, HeartMuLa, open_lm, our_name, release_name, to_ours, to_release
from musiclab.heartmula.prompts import Reader, as_rows
from musiclab.sampling import Sampler

release = json.loads((Path(__file__).parent / "release_shapes.json").read_text())


def test_every_tensor_of_the_release_has_its_place():
    theirs = {name: tuple(size) for name, size in release["shapes"].items()}
    assert shapes(Config.of(release["config"])) == theirs and len(theirs) == release["n_tensors"] == 289
    with torch.device("meta"): model = HeartMuLa(RELEASE)
    own = {name: weight.shape for name, weight in model.state_dict().items()}
    assert {our_name(name): torch.Size(size) for name, size in theirs.items()} == own
    assert {release_name(name) for name in own} == theirs.keys()
    assert sum(parameter.numel() for parameter in model.parameters()) == release["n_params"] == 3_938_113_536
    assert len([name for name, layer in model.named_modules() if re.fullmatch(LORA_TARGETS, name)]) == 217


@pytest.mark.parametrize("change, complaint", [
    (lambda w: w.pop("decoder.norm.scale"), "decoder.norm.scale is missing"),
    (lambda w: w.update({"backbone.extra": torch.ones(1)}), "backbone.extra is unexpected"),
    (lambda w: w.update({"audio_head": torch.ones(7, 32, 70)}), r"audio_head is \[7, 32, 70\] instead of \[7, 32, 69\]")])
def test_a_checkpoint_that_does_not_fit_is_refused_by_name(tiny, tmp_path, change, complaint):
    copy = shutil.copytree(tiny, tmp_path / "copy")
    file = next(part_folder(copy, "model").glob("*.safetensors"))
    weights = load_file(file)
    change(weights)
    save_file(weights, file)
    with pytest.raises(MusiclabError, match=complaint): open_lm(copy)


@pytest.mark.parametrize("name, content, complaint", [
    ("HeartMuLa-oss-3B/config.json", "{", "not valid JSON"), ("HeartMuLa-oss-3B/config.json", '{"model_type": "musicgen"}', "no HeartMuLa in it"),
    ("HeartMuLa-oss-3B/config.json", '{"model_type": "heartmula", "backbone_flavor": "llama-1B"}', "llama-1B"),
    ("HeartMuLa-oss-3B/model.safetensors", "torn", "damaged"), ("tokenizer.json", "{}", "tokenizer cannot be read")])
def test_damaged_files_are_named(tiny, tmp_path, name, content, complaint):
    copy = shutil.copytree(tiny, tmp_path / "copy")
    (copy / name).write_text(content)
    with pytest.raises(MusiclabError, match=complaint):
        open_lm(copy)
        Reader(copy)


def test_a_seed_is_a_checkpoint_and_leaves_chance_alone(tiny, tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    same, other = read_weights(tiny_checkpoint(tmp_path / "same", codec=False)), read_weights(tiny_checkpoint(tmp_path / "other", seed=1, codec=False))
    assert torch.equal(torch.rand(1), expected)
    first = read_weights(tiny)
    assert all(torch.equal(weight, same[name]) for name, weight in first.items())
    assert not torch.equal(first["audio_head"], other["audio_head"])


def test_adapters_take_the_release_names_and_come_back():
    config = Config.of(release["config"])
    for name, rows in (("backbone.layers.3.self_attn.q_proj.lora_B.weight", 3072), ("decoder.layers.1.self_attn.k_proj.lora_B.weight", 1536),
                       ("decoder.layers.1.mlp.up_proj.lora_A.weight", 16), ("backbone.layers.0.self_attn.q_proj.lora_A.weight", 16)):
        tensor = torch.randn(rows, 2)
        there = to_release(name, tensor, config)
        assert ("lora_A" in name or "mlp" in name) == torch.equal(there[1], tensor)
        back = to_ours(*there, config)
        assert back[0] == name != there[0] and torch.equal(back[1], tensor)


def greedy(model, prompts, frames, **how):
    fixed = how.pop("fixed", False)
    return write(Writing(model, prompts, frames, Sampler([0] * len(prompts), temperature=0), end=model.config.audio_vocab, **how), fixed=fixed)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_fixed_frames_write_the_same_songs(lm, read, guidance):
    prompts = [read("piano,calm,happy", "[verse]\nla la la la"), read("techno")]
    model = FastModel(lm)
    together = greedy(model, prompts, 20, guidance=guidance)
    for song, fixed, prompt in zip(together, greedy(model, prompts, 20, guidance=guidance, fixed=True), prompts):
        assert torch.equal(song, fixed) and torch.equal(song, greedy(model, [prompt], 20, guidance=guidance)[0])


def test_recordings_end_at_buckets(lm, read, monkeypatch):
    monkeypatch.setattr("musiclab.heartmula.frames.BUCKET", 16)
    model, prompt = FastModel(lm), read("piano")
    assert torch.equal(greedy(model, [prompt], 40)[0], greedy(model, [prompt], 40, fixed=True)[0])


def test_adapters_and_quantised_weights_are_written_with(tiny, read):
    lm, prompt = open_lm(tiny), read("piano")
    plain = greedy(FastModel(lm), [prompt], 12, guidance=1.0)[0]
    layers.quantize(lm, "int8", r"(backbone|decoder)\.layers\..+")
    adapters.attach(lm, LORA_TARGETS, rank=4, alpha=12, dropout=0)
    for name, p in lm.named_parameters():
        if ".lora_B." in name: p.data.normal_(std=0.3)
    changed = greedy(FastModel(lm), [prompt], 12, guidance=1.0)[0]
    assert not torch.equal(changed, plain)
    tokens, counts = (torch.from_numpy(table)[None] for table in as_rows(prompt, changed.numpy()))
    with torch.no_grad(): first, rest = lm(tokens, counts, torch.tensor([prompt.slot]))
    begin = len(prompt.ids) - 1
    assert torch.equal(first[0, begin:].argmax(-1), changed[:, 0]) and torch.equal(rest[0, begin:].argmax(-1), changed[:, 1:])
    assert not torch.equal(greedy(FastModel(lm, strength=0.0), [prompt], 12, guidance=1.0)[0], changed)


def test_songs_end_where_the_model_says_so(lm, read):
    model, end = FastModel(lm), lm.config.eos
    codes = torch.zeros(5, 8, dtype=torch.long)
    assert length_of(codes, end) == 5
    codes[3, 6] = end
    assert length_of(codes, end) == 3
    codes[0, 0] = end  # the first frame is not looked at
    assert length_of(codes, end) == 3
    writing = Writing(model, [read("piano")] * 2, 300, Sampler([1, 2], top_k=0))
    portions = list(frames_of(writing, portion=16))
    songs = [song[:length_of(song, end)] for song in torch.cat(portions, 1)]
    assert sum(p.shape[1] for p in portions) < 300 and all(len(song) and song.max() < lm.config.card for song in songs)
    assert [torch.equal(a, b) for a, b in zip(songs, write(Writing(model, [read("piano")] * 2, 300, Sampler([1, 2], top_k=0))))] == [True, True]


def test_a_stop_ends_the_songs_where_they_are(lm, read):
    asked = []
    song, = write(Writing(FastModel(lm), [read("piano")], 50, Sampler([0], temperature=0), end=69), stop=lambda: asked.append(1) or len(asked) == 7)
    assert len(song) == 7


def test_too_long_a_song_says_how_long_it_may_be(lm, read):
    with pytest.raises(MusiclabError, match="At most 65. s are left"): Writing(FastModel(lm), [read("a")], 8200, Sampler([0]))


def test_a_song_goes_on_from_its_beginning(lm, read):
    model, prompts = FastModel(lm), [read("piano"), read("techno,dark")]
    whole = greedy(model, prompts, 15)
    rest = greedy(model, prompts, 9, start=[song[:6].numpy() for song in whole])
    assert all(torch.equal(torch.cat([song[:6], more]), song) for song, more in zip(whole, rest))
