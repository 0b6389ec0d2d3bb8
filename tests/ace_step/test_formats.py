"An ACE-Step adapter in the files of other tools: whoever reads them, however they look for alpha, hears the same."
import json
import math

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from musiclab import adapters, recipes
from musiclab.ace_step.checkpoint import read_weights
from musiclab.ace_step.generate import open_model
from musiclab.ace_step.settings import TARGETS, AceStepConfig
from musiclab.ace_step.train import AceStepTask
from musiclab.ace_step.transformer import open_transformer
from musiclab.core import MusiclabError
from musiclab.engine import Engine


def answer(model):
    chance = torch.Generator().manual_seed(0)
    text, ids = torch.randn(1, 4, 32, generator=chance), torch.randint(7, 300, (1, 6), generator=chance)
    with torch.no_grad(): return model.eval()(torch.randn(1, 8, 16, 12, generator=chance), torch.tensor([500.0]), text, torch.ones(1, 4), ids, torch.ones(1, 6))


@pytest.fixture(scope="module", params=["lora", "rslora"])
def made(request, tiny, tmp_path_factory):
    "An adapter whose factor is not 1, in all layouts; and what the model answers with it."
    folder, model = tmp_path_factory.mktemp(request.param), open_transformer(tiny)
    adapters.attach(model, TARGETS["attn_qkv+linear_qkv+speech_embedder"], rank=4, alpha=6, method=request.param, dropout=0.0)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1)
        for name, p in model.named_parameters():
            if "lora_B" in name: p.normal_(std=0.3)
    adapters.save(model, folder / "adapter", base=str(tiny), config={"task": "ace_step"})
    for tool in ("file", "upstream", "diffusers", "comfyui"): recipes.export(folder / "adapter", folder / f"{tool}.safetensors", tool)
    return folder, request.param, answer(model)


def close(got, wanted): return torch.allclose(got, wanted, atol=1e-4)


@pytest.mark.parametrize("name", ["adapter", "file.safetensors", "upstream.safetensors", "diffusers.safetensors", "comfyui.safetensors"])
def test_generate_reads_them_all(made, tiny, name):
    folder, _, wanted = made
    assert close(answer(open_model(tiny, folder / name)), wanted) and not close(answer(open_model(tiny)), wanted)


ORIGINAL = {"prefix": None, "with_alpha": True}
HEADER = {"use_safetensors": True}


@pytest.mark.parametrize("name, how", [("file", ORIGINAL | HEADER), ("upstream", ORIGINAL), ("upstream", ORIGINAL | HEADER),
                                       ("diffusers", {}), ("diffusers", HEADER)])
def test_diffusers_reads_them_as_the_original_does(made, tiny, name, how):
    "The original's pipeline calls `load_lora_adapter(file, prefix=None, with_alpha=True)`, and without `use_safetensors` nobody looks into the header."
    from diffusers.loaders.peft import PeftAdapterMixin
    folder, _, wanted = made
    model = open_transformer(tiny)
    model.__class__ = type("Mixed", (type(model), PeftAdapterMixin), {"_hf_peft_config_loaded": False})
    model.load_lora_adapter(folder / f"{name}.safetensors", adapter_name="style", **how)
    assert close(answer(model), wanted)


@pytest.mark.parametrize("tool, prefix, alpha", [("comfyui", "diffusion_model.", True), ("upstream", "", False), ("diffusers", "transformer.", False)])
def test_readers_that_only_know_their_rule_agree(made, tiny, tool, prefix, alpha):
    "ComfyUI: names under `diffusion_model.`, factor alpha / rank. Old loaders: no header, factor 1."
    folder, _, wanted = made
    tensors, model = load_file(folder / f"{tool}.safetensors"), open_transformer(tiny)
    layers = {name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")}
    assert len(layers) == 42 and all(name.startswith(prefix) for name in tensors)
    for layer in layers:
        a, b = tensors[f"{layer}.lora_A.weight"], tensors[f"{layer}.lora_B.weight"]
        factor = tensors[f"{layer}.alpha"].item() / len(a) if alpha else 1.0
        model.get_submodule(layer.removeprefix(prefix)).weight.data += factor * b @ a
    assert close(answer(model), wanted)


def test_the_header_tells_the_factor(made):
    folder, method, _ = made
    with safe_open(folder / "file.safetensors", "pt") as file: header = json.loads(file.metadata()["lora_adapter_metadata"])
    assert (header["r"], header["lora_alpha"], header["use_rslora"]) == (4, 6, method == "rslora")
    assert adapters.inspect(folder / "file.safetensors").factor("speaker_embedder") == pytest.approx(6 / (math.sqrt(4) if method == "rslora" else 4))


def test_peft_reads_the_folder(made, tiny):
    from peft import PeftModel
    folder, _, wanted = made
    assert close(answer(PeftModel.from_pretrained(open_transformer(tiny), folder / "adapter")), wanted)


def test_the_merged_model_needs_no_adapter(made, tiny, tmp_path):
    folder, _, wanted = made
    whole = recipes.export(folder / "adapter", tmp_path / "whole", "merged", str(tiny))
    got, plain = answer(open_transformer(whole)), answer(open_transformer(tiny))
    assert (got - wanted).std() < 0.02 * (plain - wanted).std(), "up to the 16 bits of the checkpoint"
    old, new = read_weights(tiny, "transformer"), read_weights(whole, "transformer")
    assert old.keys() == new.keys() and all(old[name].dtype == new[name].dtype and old[name].shape == new[name].shape for name in old)
    assert torch.equal(old["projectors.0.0.weight"], new["projectors.0.0.weight"]), "what was never loaded is written back"
    assert {path.name for path in whole.iterdir()} == {path.name for path in tiny.iterdir()}


def test_an_adapter_of_a_quantised_run_is_merged_into_the_true_weights(made, tiny, tmp_path):
    "Never into the rounded ones: the output moves, and moves to where the adapter moves it."
    pytest.importorskip("torchao")
    folder, method, wanted = made
    config = AceStepConfig(data="x", model=str(tiny), quantize="int8", method=method, rank=4, alpha=6, device="cpu",
                           targets="attn_qkv+linear_qkv+speech_embedder", init_adapter=str(folder / "adapter"))
    model, plain = Engine(AceStepTask(config), config, torch.device("cpu")).model, answer(open_transformer(tiny))
    coarse = answer(model)
    with pytest.raises(MusiclabError, match="quantised"): adapters.merge(model)
    whole = answer(open_transformer(recipes.export(folder / "adapter", tmp_path / "whole", "merged", str(tiny))))
    assert (whole - plain).std() > 0.1 and (whole - coarse).std() < 0.2 * (whole - plain).std()


def test_what_fits_nowhere_is_an_error(made, tiny, tmp_path):
    folder, method, _ = made
    tensors = {name.replace("transformer_blocks", "blocks"): tensor for name, tensor in load_file(folder / "upstream.safetensors").items()}
    save_file(tensors, tmp_path / "foreign.safetensors")
    config = AceStepConfig(data="x", model=str(tiny), method=method, rank=4, alpha=6, init_adapter=str(tmp_path / "foreign.safetensors"), device="cpu")
    with pytest.raises(MusiclabError, match="no place in this model"): Engine(AceStepTask(config), config, torch.device("cpu"))
    with pytest.raises(MusiclabError, match="upstream, diffusers, comfyui"): recipes.export(folder / "adapter", tmp_path / "x.safetensors", "gguf")
