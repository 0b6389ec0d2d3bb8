"Adapters on real architectures: other libraries read what we write, and we read what they write, with the same outputs."
import copy
import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file, save_file

from musiclab import adapters
from musiclab.adapter_files import COMFYUI, METHODS, Format, inspect, write
from musiclab.layers import base_weight, linears

import peft  # noqa: E402  after musiclab, which makes it safe to import
from transformers import LlamaConfig, LlamaModel, MusicgenDecoderConfig, MusicgenForCausalLM

ATTENTION = r"layers\.\d+\.self_attn\.[qkvo]_proj"
METHOD = pytest.mark.parametrize("method", METHODS)


def llama(seed=0) -> LlamaModel:
    torch.manual_seed(seed)
    return LlamaModel(LlamaConfig(vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                                  num_key_value_heads=2)).eval()


def output(model, seed=0):
    ids = torch.randint(32, (2, 9), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad(): return model(input_ids=ids).last_hidden_state


def trained(model, method="lora", targets=ATTENTION, rank=4, alpha=6.0, name="default", seed=1):
    "A model with an adapter that looks trained: every part of it is off its start."
    adapters.attach(model, targets, rank=rank, alpha=alpha, method=method, name=name)
    chance = torch.Generator().manual_seed(seed)
    for key, tensor in adapters.adapter_state(model, name).items():
        if "lora_A" not in key: tensor.add_(0.2 * torch.randn(tensor.shape, generator=chance))
    return model.eval()


# ---- attaching

@METHOD
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attached_model_starts_as_the_model_and_learns_in_fp32(method, dtype):
    model = llama().to(dtype)
    expected, kind = output(model), type(model)
    layers = adapters.attach(model, ATTENTION, rank=4, alpha=6, method=method)
    assert len(layers) == 8 and type(model) is kind
    assert torch.equal(output(model.eval()), expected)
    learns = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(learns) == 8 * (3 if method == "dora" else 2) and all("lora_" in n and p.dtype == torch.float32 for n, p in learns.items())
    model.train()(input_ids=torch.arange(9)[None]).last_hidden_state.float().square().sum().backward()
    assert all(p.grad is not None for p in learns.values())


def test_the_start_depends_on_seed_and_name_only():
    one, other = llama(), llama(seed=5)
    torch.manual_seed(123)
    state = torch.get_rng_state()
    adapters.attach(one, ATTENTION, seed=7)
    assert torch.equal(torch.get_rng_state(), state), "nobody else's chance is touched"
    torch.manual_seed(0)
    adapters.attach(other, r"layers\.1\.self_attn\.q_proj|layers\.0\.mlp\.up_proj", seed=7)
    key = "layers.1.self_attn.q_proj.lora_A.weight"
    assert torch.equal(adapters.adapter_state(one)[key], adapters.adapter_state(other)[key])
    again = llama()
    adapters.attach(again, ATTENTION, seed=8)
    assert not torch.equal(adapters.adapter_state(one)[key], adapters.adapter_state(again)[key])


def test_musicgen_decoder_targets():
    config = MusicgenDecoderConfig(vocab_size=64, hidden_size=16, ffn_dim=32, num_hidden_layers=2, num_attention_heads=2)
    model = MusicgenForCausalLM(config)
    layers = adapters.attach(model, r"model\.decoder\.layers\.\d+\.(self_attn|encoder_attn)\.(q|k|v|out)_proj", rank=12, alpha=24)
    assert len(layers) == 16 and sum(p.numel() for p in model.parameters() if p.requires_grad) == 16 * 2 * 12 * 16


def test_a_second_adapter_leaves_the_first_as_it_was():
    model = trained(llama())
    model.layers[0].self_attn.q_proj.lora_A["default"].weight.requires_grad_(False)
    adapters.attach(model, r".*mlp\.up_proj|.*q_proj", rank=2, name="second", method="dora")
    learns = {name for name, p in model.named_parameters() if p.requires_grad}
    assert "layers.0.self_attn.q_proj.lora_A.default.weight" not in learns and "layers.1.self_attn.q_proj.lora_A.default.weight" in learns
    assert sum(".second." in name for name in learns) == 3 * 4 and not any("base_layer" in name for name in learns)


# ---- strength and merging

@METHOD
@settings(max_examples=12, deadline=None)
@given(strength=st.floats(-1, 2, width=32), factor=st.floats(0, 1.5, width=32))
def test_weight_and_layer_agree_at_any_strength(method, strength, factor):
    model = trained(llama(), method)
    adapters.set_strength(model, strength)
    layer, x = model.layers[0].self_attn.q_proj, torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    weight = adapters.merged_weight(layer)
    assert torch.allclose(layer(x), x @ weight.T, atol=1e-4)
    base = base_weight(layer)
    assert torch.allclose(adapters.merged_weight(layer, factor), base + factor * (weight - base), atol=1e-5), "linear in strength"


@METHOD
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strength_zero_is_exactly_the_base_and_one_exactly_the_adapter(method, dtype):
    base, model = llama().to(dtype), trained(llama().to(dtype), method)
    full = output(model)
    adapters.set_strength(model, 0)
    assert torch.equal(output(model), output(base)) and not torch.equal(full, output(base))
    adapters.set_strength(model, 1)
    assert torch.equal(output(model), full)


@METHOD
def test_merging_gives_an_ordinary_model_with_the_same_output(method, tmp_path):
    model, names = trained(llama(), method), set(llama().state_dict())
    adapters.set_strength(model, 0.7)
    expected = output(model)
    merged = adapters.merge(model)
    assert merged is model and set(model.state_dict()) == names and not hasattr(model, "peft_config")
    assert torch.allclose(output(model), expected, atol=1e-5) and not torch.allclose(expected, output(llama()), atol=1e-2)
    model.save_pretrained(tmp_path)
    assert torch.equal(output(LlamaModel.from_pretrained(tmp_path)), output(model))


@pytest.mark.parametrize("first, second", itertools.product(METHODS, repeat=2))
def test_stacked_adapters_merge_to_what_they_do(first, second):
    model = trained(trained(llama(), first), second, targets=r".*(q_proj|up_proj)", name="second", seed=2)
    adapters.set_strength(model, 0.6, "default")
    adapters.set_strength(model, 1.2, "second")
    expected = output(model)
    adapters.set_strength(model, 0, "second")
    assert not torch.allclose(output(model), expected, atol=1e-3)
    adapters.set_strength(model, 1.2, "second")
    assert torch.allclose(output(adapters.merge(model)), expected, atol=1e-5)


def test_a_copy_has_its_own_knob():
    model = trained(llama(), "dora")
    twin = copy.deepcopy(model)
    adapters.set_strength(twin, 0)
    assert torch.equal(output(twin), output(llama())) and not torch.allclose(output(model), output(twin), atol=1e-2)


# ---- files of other libraries, compared by output, alpha never equal to rank

def test_merging_by_hand_is_what_peft_merges():
    for method in METHODS:
        model = trained(llama(), method)
        layer = model.layers[1].self_attn.v_proj
        expected = adapters.merged_weight(layer)
        layer.merge()
        assert torch.allclose(layer.get_base_layer().weight, expected, atol=1e-6)


@METHOD
def test_peft_reads_our_folder(method, tmp_path):
    model = trained(llama(), method)
    adapters.save(model, tmp_path/"adapter", base="tiny/llama")
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path/"adapter").eval()
    assert torch.allclose(output(theirs), output(model), atol=1e-6)
    assert torch.allclose(output(theirs.merge_and_unload()), output(model), atol=1e-5)


@pytest.mark.parametrize("options", [dict(), dict(use_rslora=True), dict(use_dora=True), dict(use_dora=True, use_rslora=True),
                                     dict(rank_pattern={"v_proj": 2}, alpha_pattern={"layers.1.self_attn.v_proj": 9}),
                                     dict(alpha_pattern={"layers.1.self_attn.v_proj": 9, "v_proj": 3}),
                                     dict(rank_pattern={r"layers\.0\.self_attn\.v_proj": 2}, use_rslora=True)])
def test_we_read_a_folder_made_by_peft_and_write_it_again(options, tmp_path):
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"], init_lora_weights=False, **options)
    theirs = peft.get_peft_model(llama(), config).eval()
    theirs.save_pretrained(tmp_path/"theirs")
    for source in (tmp_path/"theirs", tmp_path/"again", tmp_path/"one.safetensors"):
        model = llama()
        report = adapters.load(model, source)
        assert torch.allclose(output(model), output(theirs), atol=1e-6)
        if source.name == "theirs":
            for target in ("again", "one.safetensors"): adapters.save(model, tmp_path/target)
    assert report.rank == 4 or 2 in report.ranks.values()
    again = peft.PeftModel.from_pretrained(llama(), tmp_path/"again").eval()
    assert torch.allclose(output(again), output(theirs), atol=1e-6)


def diffusion():
    from diffusers import SD3Transformer2DModel
    torch.manual_seed(0)
    return SD3Transformer2DModel(sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
                                 num_attention_heads=2, joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=8,
                                 pos_embed_max_size=8).eval()


def denoised(model):
    chance = torch.Generator().manual_seed(0)
    latents, text, pooled = (torch.randn(1, *shape, generator=chance) for shape in [(4, 8, 8), (5, 16), (8,)])
    with torch.no_grad(): return model(latents, text, pooled, torch.tensor([3])).sample


@METHOD
def test_diffusers_reads_our_single_file(method, tmp_path):
    model = trained(diffusion(), method, targets=r"transformer_blocks\.\d+\.attn\.(to_q|to_k|to_v|to_out\.0)")
    file = adapters.save(model, tmp_path/"pytorch_lora_weights.safetensors", base="tiny/diffusion")
    theirs = diffusion()
    theirs.load_lora_adapter(tmp_path, weight_name=file.name, prefix=None)
    assert torch.allclose(denoised(theirs), denoised(model), atol=1e-5)
    assert not torch.allclose(denoised(theirs), denoised(diffusion()), atol=1e-3)


@METHOD
def test_a_reader_that_ignores_alpha_is_served_by_a_baked_file(method, tmp_path):
    model = trained(diffusion(), method, targets=r"transformer_blocks\.\d+\.attn\.(to_q|to_k|to_v|to_out\.0)")
    upstream = Format("upstream", lambda *item: item, lambda *item: item, alpha="baked")
    file = adapters.save(model, tmp_path/"pytorch_lora_weights.safetensors", format=upstream)
    for options in (dict(), dict(use_safetensors=True)):  # a bare path, where diffusers does not look into the header; and where it does
        theirs = diffusion()
        theirs.load_lora_adapter(str(file) if not options else tmp_path, prefix=None, **options)
        assert torch.allclose(denoised(theirs), denoised(model), atol=1e-5)
    ours = diffusion()
    adapters.load(ours, file, formats={"upstream": upstream})
    assert torch.allclose(denoised(ours), denoised(model), atol=1e-5)


@METHOD
def test_we_read_the_single_file_of_diffusers(method, tmp_path):
    theirs = trained(diffusion(), method, targets=r"transformer_blocks\.\d+\.attn\.(to_q|to_out\.0)")
    theirs.save_lora_adapter(tmp_path)
    model = diffusion()
    report = adapters.load(model, tmp_path)  # the folder, in which the file has its usual name
    assert torch.allclose(denoised(model), denoised(theirs), atol=1e-6) and report.method == method


@pytest.mark.parametrize("method", ["lora", "rslora"])
def test_a_reader_that_only_knows_alpha_beside_the_matrices(method, tmp_path):
    model = trained(llama(), method)
    held = load_file(adapters.save(model, tmp_path/"comfy.safetensors", format=COMFYUI))
    for layer in adapters.adapted(model):  # what ComfyUI does: weight + alpha / rank * up @ down
        name = f"diffusion_model.{layer}"
        down, up = held.pop(f"{name}.lora_A.weight"), held.pop(f"{name}.lora_B.weight")
        weight = base_weight(linears(model)[layer]) + held.pop(f"{name}.alpha") / down.shape[0] * up @ down
        assert torch.allclose(weight, adapters.merged_weight(linears(model)[layer]), atol=1e-6)
    assert not held
    other = llama()
    assert adapters.load(other, tmp_path/"comfy.safetensors").format == "comfyui"
    assert torch.allclose(output(other), output(model), atol=1e-5)


@pytest.mark.parametrize("rename", [
    lambda layer, part: f"lora_unet_{layer.replace('.', '_')}." + {"A": "lora_down.weight", "B": "lora_up.weight", "alpha": "alpha"}[part],
    lambda layer, part: f"transformer.{layer}." + {"A": "lora_A.weight", "B": "lora_B.weight", "alpha": "alpha"}[part],
    lambda layer, part: f"base_model.model.{layer}." + {"A": "lora_A.default.weight", "B": "lora_B.default.weight", "alpha": "alpha"}[part],
    lambda layer, part: f"unet.{layer}." + {"A": "lora.down.weight", "B": "lora.up.weight", "alpha": "alpha"}[part]])
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_names_of_other_tools(rename, suffix, tmp_path):
    model, tensors = trained(llama()), {}
    for layer, module in adapters.adapted(model).items():
        tensors[rename(layer, "A")], tensors[rename(layer, "B")] = (p["default"].weight.detach() for p in (module.lora_A, module.lora_B))
        tensors[rename(layer, "alpha")] = torch.tensor(6.0)
    file = tmp_path/f"other{suffix}"
    if suffix == ".bin": torch.save(tensors, file)
    else: save_file(tensors, file)
    other = llama()
    report = adapters.load(other, file)
    assert torch.allclose(output(other), output(model), atol=1e-6) and report.recorded and (report.rank, report.alpha) == (4, 6)


def test_without_any_alpha_the_factor_is_one_and_the_report_says_so(tmp_path):
    model = trained(llama(), alpha=4)
    save_file(adapters.adapter_state(model), tmp_path/"bare.safetensors")
    other = llama()
    report = adapters.load(other, tmp_path/"bare.safetensors")
    assert torch.allclose(output(other), output(model), atol=1e-6) and "not recorded" in str(report)


def test_we_read_what_a_pipeline_of_diffusers_saves(tmp_path):
    from diffusers import StableDiffusion3Pipeline
    theirs = trained(diffusion(), targets=r"transformer_blocks\.\d+\.attn\.(to_q|to_v)")
    StableDiffusion3Pipeline.save_lora_weights(tmp_path, transformer_lora_layers=peft.get_peft_model_state_dict(theirs),
                                               transformer_lora_adapter_metadata=theirs.peft_config["default"].to_dict())
    model = diffusion()
    report = adapters.load(model, tmp_path)
    assert torch.allclose(denoised(model), denoised(theirs), atol=1e-6) and report.alpha == 6


# ---- layouts: rows in another order

def rows(change):
    def convert(name, tensor):
        theirs = name.replace("layers.", "blocks.") if change is pairs else name.replace("blocks.", "layers.")
        return theirs, change(tensor) if "q_proj" in name and not name.endswith("lora_A.weight") and tensor.ndim else tensor
    return convert

def pairs(t): return t.unflatten(0, (2, -1)).transpose(0, 1).flatten(0, 1)

def halves(t): return torch.cat([t[0::2], t[1::2]])

INTERLEAVED = Format("interleaved", rows(pairs), rows(halves))


@METHOD
@pytest.mark.parametrize("target", ["one.safetensors", "folder"])
def test_a_layout_goes_both_ways_and_is_found_by_its_header(method, target, tmp_path):
    model = trained(llama(), method)
    adapters.save(model, tmp_path/target, format=INTERLEAVED)
    outside = inspect(tmp_path/target)
    for layer, module in adapters.adapted(model).items():  # the adapter of converted weights is the converted adapter
        theirs, base = INTERLEAVED.to_external(f"{layer}.weight", base_weight(module))
        name = theirs.removesuffix(".weight")
        weight = base + outside.factor(name) * outside.tensors[f"{name}.lora_B.weight"] @ outside.tensors[f"{name}.lora_A.weight"]
        if method == "dora": weight *= outside.tensors[f"{name}.lora_magnitude_vector"][:, None] / weight.norm(dim=1, keepdim=True)
        assert torch.allclose(weight, INTERLEAVED.to_external(f"{layer}.weight", adapters.merged_weight(module))[1], atol=1e-6)
    other = llama()
    adapters.load(other, tmp_path/target, formats={"interleaved": INTERLEAVED})
    assert torch.allclose(output(other), output(model), atol=1e-6)


def test_a_foreign_file_without_header_is_read_in_the_format_whose_names_fit(tmp_path):
    model = trained(llama(), alpha=4)
    save_file(dict(INTERLEAVED.to_external(*item) for item in adapters.adapter_state(model).items()), tmp_path/"foreign.safetensors")
    other = llama()
    adapters.load(other, tmp_path/"foreign.safetensors", formats={"interleaved": INTERLEAVED})
    assert torch.allclose(output(other), output(model), atol=1e-6)


# ---- provenance

def test_the_report_tells_what_is_in_a_file(tmp_path):
    model = trained(llama(), "rslora")
    file = adapters.save(model, tmp_path/"a.safetensors", base="tiny/llama", steps=1500, config={"lr": 3e-4, "data": "my songs"})
    report = inspect(file)
    assert (report.base, report.rank, report.alpha, report.method, report.steps) == ("tiny/llama", 4, 6.0, "rslora", 1500)
    assert report.targets == ATTENTION
    text = str(report)
    for words in ("rslora adapter for tiny/llama", "rank 4, alpha 6, factor 3", "8 layers: 2 k_proj", "float32", "1,500 steps", "data=my"):
        assert words in text
    assert report.parameters == sum(t.numel() for t in adapters.adapter_state(model).values())
    header = json.loads(file.read_bytes()[8:8 + int.from_bytes(file.read_bytes()[:8], "little")])["__metadata__"]
    assert json.loads(header["lora_adapter_metadata"])["lora_alpha"] == 6 and json.loads(header["musiclab"])["base"] == "tiny/llama"


def test_half_precision_files_are_loaded_as_fp32(tmp_path):
    model = trained(llama())
    report = inspect(adapters.save(model, tmp_path/"a"))
    half = write(adapters.replace(report, tensors={key: t.bfloat16() for key, t in report.tensors.items()}), tmp_path/"half.safetensors")
    other = llama()
    assert "bfloat16" in str(adapters.load(other, half))
    assert all(t.dtype == torch.float32 for t in adapters.adapter_state(other).values())
    assert torch.allclose(output(other), output(model), atol=0.05)


# ---- training on from a file

@METHOD
def test_training_on_from_a_file(method, tmp_path):
    model = trained(llama(), method)
    adapters.save(model, tmp_path/"a")
    filled = llama()
    adapters.attach(filled, ATTENTION, rank=4, alpha=6, method=method)
    adapters.load(filled, tmp_path/"a")
    assert torch.equal(output(filled.eval()), output(model)) and any(p.requires_grad for p in filled.parameters())
    loaded = llama()
    adapters.load(loaded, tmp_path/"a", trainable=True, dropout=0.5)
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == {n for n, p in filled.named_parameters() if p.requires_grad}
    assert torch.equal(output(loaded.eval()), output(model)) and not torch.equal(output(loaded.train()), output(model))
    frozen = llama()
    adapters.load(frozen, tmp_path/"a")
    assert not any(p.requires_grad for p in frozen.parameters())


# ---- quantised bases

@pytest.mark.parametrize("quantisation, bound", [("int8", 0.03), ("nf4", 0.3)])
@METHOD
def test_learning_on_a_quantised_base_and_merging_into_the_real_one(quantisation, bound, method, tmp_path):
    exact, model = llama(), llama()
    adapters.quantize(model.layers, quantisation)
    before = output(model)
    assert (before - output(exact)).norm() / output(exact).norm() < bound
    adapters.attach(model, ATTENTION, rank=4, alpha=6, dropout=0.0, method=method)
    assert torch.allclose(output(model), before, atol=1e-5)
    layer, x = model.layers[0].self_attn.q_proj, torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    frozen = [base_weight(layer) for layer in adapters.adapted(model).values()]
    learns = [p for p in model.parameters() if p.requires_grad]
    goal, optimizer, losses = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(3)), torch.optim.AdamW(learns, lr=2e-2), []
    for _ in range(12):
        loss = (model(input_ids=torch.arange(18).view(2, 9)).last_hidden_state - goal).square().mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in learns)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert all(torch.equal(a, base_weight(b)) for a, b in zip(frozen, adapters.adapted(model).values())), "the base is as it was"
    assert torch.allclose(layer(x), x @ adapters.merged_weight(layer).T, atol=1e-3), "what it does is known even so"
    with pytest.raises(adapters.MusiclabError, match="Load the base again in bf16 or fp32"): adapters.merge(model)
    adapters.save(model, tmp_path/"a.safetensors")
    adapters.load(exact, tmp_path/"a.safetensors")
    expected = output(exact)
    assert torch.allclose(output(adapters.merge(exact)), expected, atol=1e-5)
    assert not torch.allclose(expected, output(llama()), atol=1e-2), "the merge moved the output"


@pytest.mark.parametrize("method, bits", [("int8", 8.1), ("nf4", 4.3)])
def test_quantised_weights_take_what_they_promise(method, bits):
    model = torch.nn.ModuleList([torch.nn.Linear(512, 512, bias=False)]).bfloat16()
    assert adapters.weight_bytes(model) == 2 * 512 * 512
    adapters.quantize(model, method)
    assert 512 * 512 * int(bits) / 8 <= adapters.weight_bytes(model) < 512 * 512 * bits / 8


def test_quantising_only_the_blocks():
    model = llama()
    names = adapters.quantize(model, "int8", r"layers\.\d+\.mlp\..*")
    assert len(names) == 6 and model.embed_tokens.weight.dtype == torch.float32
    adapters.attach(model, ATTENTION)
    assert math.isfinite(output(model).sum())


def test_loaders_take_paths_as_text(tmp_path):
    adapters.save(trained(llama()), str(tmp_path/"a"))
    assert Path(tmp_path, "a", "adapter_config.json").is_file() and inspect(str(tmp_path/"a")).rank == 4
