"What lies in a checkpoint, and how its parts are opened: exactly, or with an error that says a name."
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from musiclab.ace_step.checkpoint import (
    PARTS, RELEASE, TINY, open_text_encoder, open_text_tokenizer, part_identity, read_config, read_weights, tiny_checkpoint, weight_names)
from musiclab.ace_step.lyrics import open_lyric_tokenizer
from musiclab.ace_step.transformer import is_unused, open_transformer, save_transformer
from musiclab.core import MusiclabError

WEIGHTS = "ace_step_transformer/diffusion_pytorch_model.safetensors"
release = json.loads((Path(__file__).parent / "release_shapes.json").read_text())


@pytest.fixture
def copy(tiny, tmp_path): return shutil.copytree(tiny, tmp_path / "copy")


def change(file, change):
    "Write the weights anew."
    save_file(change(load_file(file)), file)


def without(name): return lambda weights: {key: weight for key, weight in weights.items() if key != name}


def test_layout_of_the_release(tiny):
    files = {str(file.relative_to(tiny)) for file in tiny.rglob("*") if file.is_file()}
    diffusers = {f"{PARTS[part]}/{name}" for part in TINY if part != "text" for name in ("config.json", "diffusion_pytorch_model.safetensors")}
    assert files >= diffusers | {"umt5-base/config.json", "umt5-base/model.safetensors", "umt5-base/tokenizer.json", "umt5-base/tokenizer_config.json"}
    weights = load_file(tiny / WEIGHTS)
    assert {re.sub(r"(transformer_blocks|encoders)\.\d+\.", r"\1.*.", name) for name in weights} == release.keys()
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    assert sum((tiny / file).stat().st_size for file in files) < 5_000_000


def test_a_seed_makes_the_same_checkpoint_and_leaves_chance_alone(tiny, tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    same, other = tiny_checkpoint(tmp_path / "same"), tiny_checkpoint(tmp_path / "other", seed=1)
    assert torch.equal(torch.rand(1), expected)
    for part in TINY: assert part_identity(same, part) == part_identity(tiny, part) != part_identity(other, part)


@pytest.mark.parametrize("damage, complaint", [
    (without("transformer_blocks.2.attn.to_q.weight"), "transformer_blocks.2.attn.to_q.weight is missing"),
    (without("transformer_blocks.1.ff.point_conv.conv.weight"), "transformer_blocks.1.ff.point_conv.conv.weight is missing"),
    (lambda weights: weights | {"transformer_blocks.4.attn.to_q.bias": torch.zeros(32)}, "transformer_blocks.4.attn.to_q.bias is unexpected"),
    (lambda weights: weights | {"proj_out.bias": torch.zeros(3)}, "proj_out.bias is unexpected"),
    (lambda weights: weights | {"lyric_proj.bias": torch.zeros(3)}, "lyric_proj.bias is [3] instead of [32]")])
def test_a_wrong_weight_is_named(copy, damage, complaint):
    change(copy / WEIGHTS, damage)
    with pytest.raises(MusiclabError, match=re.escape(complaint)): open_transformer(copy)


def test_unused_weights_are_not_missed(copy):
    change(copy / WEIGHTS, lambda weights: {name: weight for name, weight in weights.items() if not is_unused(name) and "projectors" not in name})
    open_transformer(copy)
    with pytest.raises(MusiclabError, match="add_q_proj.weight is missing"): open_transformer(copy, unused=True)
    with pytest.raises(MusiclabError, match="projectors.0.0.weight is missing"): open_transformer(copy, projectors=True)


def test_a_sharded_part(copy):
    weights = load_file(copy / WEIGHTS)
    halves = dict(list(weights.items())[::2]), dict(list(weights.items())[1::2])
    (copy / WEIGHTS).unlink()
    names = [f"diffusion_pytorch_model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    for name, half in zip(names, halves): save_file(half, copy / PARTS["transformer"] / name)
    index = {"weight_map": {key: name for name, half in zip(names, halves) for key in half}}
    (copy / PARTS["transformer"] / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    assert all(torch.equal(weights[name], weight) for name, weight in read_weights(copy, "transformer").items())
    (copy / PARTS["transformer"] / names[1]).unlink()
    with pytest.raises(MusiclabError, match=f"{names[1]} is missing"): open_transformer(copy)


@pytest.mark.parametrize("damage, complaint", [
    (lambda folder: shutil.rmtree(folder / PARTS["transformer"]), "there is no ace_step_transformer"),
    (lambda folder: (folder / PARTS["transformer"] / "config.json").unlink(), "config.json is missing"),
    (lambda folder: (folder / PARTS["transformer"] / "config.json").write_text("{"), "not valid JSON"),
    (lambda folder: (folder / WEIGHTS).unlink(), "are missing"),
    (lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:1000]), "the file is damaged"),
    (lambda folder: (folder / WEIGHTS).write_bytes(b"<html>"), "the file is damaged")])
def test_a_damaged_folder(copy, damage, complaint):
    damage(copy)
    with pytest.raises(MusiclabError, match=complaint): open_transformer(copy)


def test_the_text_encoder_is_exact_too(copy):
    from transformers import UMT5EncoderModel
    theirs = UMT5EncoderModel.from_pretrained(copy / "umt5-base", dtype=torch.float32)
    ours = open_text_encoder(copy)
    pieces = open_text_tokenizer(copy)("dreamy synth, 90 bpm", return_tensors="pt")
    torch.testing.assert_close(ours(**pieces).last_hidden_state, theirs(**pieces).last_hidden_state)
    change(copy / "umt5-base/model.safetensors", without("encoder.final_layer_norm.weight"))
    with pytest.raises(MusiclabError, match="encoder.final_layer_norm.weight is missing"): open_text_encoder(copy)
    (copy / "umt5-base/tokenizer.json").unlink()
    with pytest.raises(MusiclabError, match="tokenizer.json is missing"): open_text_tokenizer(copy)


def test_only_the_part_is_downloaded(tiny, monkeypatch):
    asked = []
    monkeypatch.setattr("musiclab.ace_step.checkpoint.fetch", lambda name, files: asked.append((name, files)) or tiny)
    assert read_config(RELEASE, "text")["model_type"] == "umt5"
    assert asked == [(RELEASE, ("umt5-base/*",))]


def test_saving_writes_back_what_was_left_out(tiny, tmp_path):
    model = open_transformer(tiny, torch.bfloat16)
    with torch.no_grad(): model.lyric_proj.bias += 1
    save_transformer(model, tmp_path / "new", tiny)
    before, after = load_file(tiny / WEIGHTS), load_file(tmp_path / "new" / WEIGHTS)
    assert {name for name in before if not torch.equal(before[name], after[name])} == {"lyric_proj.bias"}
    assert weight_names(tmp_path / "new", "transformer") == before.keys()
    whole = open_transformer(tmp_path / "new", projectors=True, unused=True)
    assert torch.equal(whole.lyric_proj.bias, model.lyric_proj.bias.float())
    assert {name: tuple(weight.shape) for name, weight in whole.state_dict().items()} == {name: tuple(weight.shape) for name, weight in before.items()}


def test_lyrics_fit_the_embedding(tiny):
    tokenizer = open_lyric_tokenizer(tiny)
    assert max(tokenizer.pieces.get_vocab().values()) < TINY["transformer"]["lyric_encoder_vocab_size"]
