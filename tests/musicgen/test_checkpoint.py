"What lies in a checkpoint, and how its parts are opened."
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from musiclab.core import MusiclabError
from musiclab.musicgen.checkpoint import (
    PARTS, open_part, open_tokenizer, part_identity, read_config, read_weights, release_name, tiny_checkpoint)
from tests.musicgen.conftest import open_whole


@pytest.fixture
def copy(tiny, tmp_path): return shutil.copytree(tiny, tmp_path / "copy")


def change(folder, change):
    "Write the weights anew."
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", metadata={"format": "pt"})


def configure(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    for place, value in changes.items():
        part, _, key = place.partition("__")
        (config[part] if key else config)[key or part] = value
    (folder / "config.json").write_text(json.dumps(config))


def equal(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("kind", ["tiny", "wide"])
def test_layout_of_the_release(kind, request):
    folder = request.getfixturevalue(kind)
    assert {file.name for file in folder.iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert sum(file.stat().st_size for file in folder.iterdir()) < 1_200_000
    names = load_file(folder / "model.safetensors").keys()
    assert "audio_encoder.encoder.layers.0.conv.weight_g" in names and not any("parametrizations" in name for name in names)
    whole, config = open_whole(folder), read_config(folder)
    assert config.decoder.num_codebooks == (8 if kind == "wide" else 4) and config.decoder.audio_channels == (2 if kind == "wide" else 1)
    assert all(equal(open_part(folder, part), getattr(whole, part)) for part in PARTS)
    assert (whole.generation_config.guidance_scale, whole.generation_config.decoder_start_token_id) == (3.0, 64)
    from transformers import AutoProcessor
    processor = AutoProcessor.from_pretrained(folder)
    assert (processor.feature_extractor.feature_size, processor.feature_extractor.sampling_rate) == (config.decoder.audio_channels, 32_000)
    assert processor.tokenizer("dark 808").input_ids == open_tokenizer(folder)("dark 808").input_ids


def test_a_seed_makes_the_same_checkpoint_and_leaves_chance_alone(tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    one, same, other = (tiny_checkpoint(tmp_path / name, seed) for name, seed in (("one", 3), ("same", 3), ("other", 4)))
    assert torch.equal(torch.rand(1), expected)
    assert (one / "model.safetensors").read_bytes() == (same / "model.safetensors").read_bytes() != (other / "model.safetensors").read_bytes()


@pytest.mark.parametrize("seed", range(4))
def test_random_codecs_are_quiet_enough_and_hear_something(seed, tmp_path):
    codec = open_part(tiny_checkpoint(tmp_path / "tiny", seed, card=[64, 128, 256, 32][seed]), "audio_encoder")
    card = codec.config.codebook_size
    sound = codec.decode(torch.randint(card, (1, 1, 4, 200), generator=torch.Generator().manual_seed(seed)), [None]).audio_values
    assert sound.isfinite().all() and 0.05 < sound.abs().max() <= 1
    codes = codec.encode(0.3 * torch.randn(1, 1, 64_000, generator=torch.Generator().manual_seed(seed))).audio_codes
    assert codes.shape == (1, 1, 4, 100) and all(len(row.unique()) > 8 for row in codes[0, 0])


def test_old_and_new_names_of_weight_norm_open_alike(tiny, copy):
    new_names = {"weight_g": "parametrizations.weight.original0", "weight_v": "parametrizations.weight.original1"}
    def rename(weights):
        for old, new in new_names.items(): weights = {name.replace(old, new): weight for name, weight in weights.items()}
        return weights
    change(copy, rename)
    assert set(map(release_name, load_file(copy / "model.safetensors"))) == set(load_file(tiny / "model.safetensors"))
    assert equal(open_part(copy, "audio_encoder"), open_part(tiny, "audio_encoder"))
    assert part_identity(copy, "audio_encoder") == part_identity(tiny, "audio_encoder")


def test_tensors_that_older_files_hold_besides_do_no_harm(tiny, copy):
    change(copy, lambda weights: weights | {"decoder.model.decoder.embed_positions.weights": torch.zeros(2048, 48),
                                            "text_encoder.encoder.embed_tokens.weight": weights["text_encoder.shared.weight"].clone()})
    assert all(equal(open_part(copy, part), open_part(tiny, part)) for part in PARTS)


def test_a_part_needs_only_its_own_shards(tiny, copy):
    weights = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    shards = {"text_encoder": "model-00001-of-00002.safetensors", "audio_encoder": "model-00001-of-00002.safetensors",
              "decoder": "model-00002-of-00002.safetensors", "enc_to_dec_proj": "model-00002-of-00002.safetensors"}
    places = {name: shards[name.partition(".")[0]] for name in weights}
    for shard in set(shards.values()): save_file({name: weights[name] for name in weights if places[name] == shard}, copy / shard)
    (copy / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    assert all(equal(open_part(copy, part), open_part(tiny, part)) for part in PARTS)
    (copy / shards["decoder"]).unlink()
    assert equal(open_part(copy, "text_encoder"), open_part(tiny, "text_encoder"))
    with pytest.raises(MusiclabError, match="model-00002-of-00002.safetensors is missing"): open_part(copy, "decoder")


def test_parts_come_frozen_in_the_dtype_asked_for(tiny):
    decoder = open_part(tiny, "decoder", torch.bfloat16, dropout=0.25)
    assert decoder.dtype == torch.bfloat16 and not decoder.training and not any(p.requires_grad for p in decoder.parameters())
    assert decoder.config._attn_implementation == "sdpa" and decoder.model.decoder.layers[0].dropout == 0.25
    assert set(read_weights(tiny, "enc_to_dec_proj")) == {"weight", "bias"}


@pytest.mark.parametrize("start", ["missing", "null"])
def test_the_start_token_is_always_set(start, copy):
    config = json.loads((copy / "config.json").read_text())
    if start == "null": config["decoder"]["decoder_start_token_id"] = None
    (copy / "config.json").write_text(json.dumps(config))
    assert read_config(copy).decoder.decoder_start_token_id == 64


@pytest.mark.parametrize("damage, message", [
    (lambda folder: (folder / "config.json").unlink(), "no config.json"),
    (lambda folder: (folder / "config.json").write_text("{"), "not valid JSON"),
    (lambda folder: configure(folder, model_type="musicgen_melody"), "musicgen_melody, not of musicgen"),
    (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors is missing"),
    (lambda folder: (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:5000]), "damaged"),
    (lambda folder: change(folder, lambda w: {n: t for n, t in w.items() if not n.startswith("decoder.lm_heads.2")}), "lm_heads.2.weight"),
    (lambda folder: change(folder, lambda w: {n: t for n, t in w.items() if not n.startswith("decoder")}), "of decoder are missing"),
    (lambda folder: configure(folder, decoder__hidden_size=64), "of another size")])
def test_what_is_wrong_is_said(damage, message, copy):
    damage(copy)
    with pytest.raises(MusiclabError, match=message): open_part(copy, "decoder")


def test_missing_tokenizer(copy):
    (copy / "tokenizer.json").unlink()
    with pytest.raises(MusiclabError, match="tokenizer.json is missing"): open_tokenizer(copy)
