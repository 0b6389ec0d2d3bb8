"Adapter files that are damaged, hostile or made for something else: each ends in one clear error, and the model stays as it was."
import json
import os
import pickle
import sys

import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file, save_file

from musiclab import adapters
from musiclab.adapter_files import COMFYUI, Format, inspect
from musiclab.core import MusiclabError

from tests.test_adapters import ATTENTION, llama, output, trained


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    "A folder with a good adapter in each kind of file."
    folder, model = tmp_path_factory.mktemp("good"), trained(llama())
    adapters.save(model, folder/"peft", base="tiny/llama")
    adapters.save(model, folder/"one.safetensors", base="tiny/llama")
    adapters.save(model, folder/"comfy.safetensors", base="tiny/llama", format=COMFYUI)
    adapters.save(trained(llama(), "dora"), folder/"dora", base="tiny/llama")
    return folder


def refused(path, *words, model=None, **options) -> str:
    "Loading fails with one clear line that has these words, and leaves the model as it was."
    model = model or llama()
    names, expected = [name for name, _ in model.named_modules()], output(model)
    with pytest.raises(MusiclabError) as caught: adapters.load(model, path, **options)
    text = str(caught.value)
    for word in words: assert word in text, text
    assert "\n" not in text and "\x1b" not in text and len(text) < 900
    assert [name for name, _ in model.named_modules()] == names and torch.equal(output(model), expected)
    return text


def changed(good, path, change=lambda tensors: tensors, settings=lambda settings: settings):
    "A copy of the good peft folder with something changed."
    path.mkdir(exist_ok=True)
    save_file(change(load_file(good/"peft"/"adapter_model.safetensors")), path/"adapter_model.safetensors")
    config = settings(json.loads((good/"peft"/"adapter_config.json").read_text()))
    (path/"adapter_config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return path


# ---- files that are no adapters

class Harmful:
    def __init__(self, file): self.file = file
    def __reduce__(self): return os.mkdir, (self.file,)


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".ckpt"])
def test_a_pickle_never_runs(suffix, tmp_path):
    trace = str(tmp_path/"was_run")
    for content in ({"layers.0.self_attn.q_proj.lora_A.weight": Harmful(trace)}, Harmful(trace)):
        (tmp_path/f"a{suffix}").write_bytes(pickle.dumps(content, protocol=2))
        refused(tmp_path/f"a{suffix}", "refused", "safetensors")
        torch.save(content, tmp_path/f"b{suffix}")
        refused(tmp_path/f"b{suffix}", "refused", "safetensors")
    assert not os.path.exists(trace)


@pytest.mark.parametrize("content", [[1, 2], {"a": [torch.zeros(2)]}, {1: torch.zeros(2)}, torch.zeros(3)])
def test_a_pickle_of_other_things(content, tmp_path):
    torch.save(content, tmp_path/"a.pt")
    refused(tmp_path/"a.pt", "refused", "no plain named tensors")


@pytest.mark.parametrize("content", [
    b"", b"\x00" * 4, b"<!DOCTYPE html><html>404</html>", b"\xff" * 64, (1 << 40).to_bytes(8, "little") + b"{}",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"])
def test_a_file_that_is_something_else(content, tmp_path):
    (tmp_path/"a.safetensors").write_bytes(content)
    refused(tmp_path/"a.safetensors", "a.safetensors", "not a whole safetensors file")


def test_nothing_there(tmp_path):
    refused(tmp_path/"missing.safetensors", "no adapter here")
    refused(tmp_path, "no adapter here")


def test_a_whole_model_is_not_an_adapter(tmp_path):
    save_file(llama().state_dict(), tmp_path/"model.safetensors")
    refused(tmp_path/"model.safetensors", "no LoRA")


@pytest.mark.parametrize("part", [0.0, 0.01, 0.3, 0.9, 0.999])
def test_cut_off_files(part, good, tmp_path):
    whole = (good/"one.safetensors").read_bytes()
    (tmp_path/"a.safetensors").write_bytes(whole[:int(part * len(whole))])
    refused(tmp_path/"a.safetensors", "not a whole safetensors file")


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damaged_bytes_give_a_clear_error_or_numbers(data, tmp_path_factory):
    "Bytes of the header and of the settings are changed at random: nothing but MusiclabError may come out."
    folder = tmp_path_factory.getbasetemp()/"damaged"
    if not folder.exists(): adapters.save(trained(llama(), "dora"), folder/"good", base="tiny/llama", config={"lr": 1})
    bad = folder/"bad"
    bad.mkdir(exist_ok=True)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        content = bytearray((folder/"good"/name).read_bytes())
        for _ in range(data.draw(st.integers(0, 3))):
            content[data.draw(st.integers(0, min(len(content), 4000) - 1))] = data.draw(st.integers(0, 255))
        (bad/name).write_bytes(content)
    try: str(inspect(bad))
    except MusiclabError as error: assert "\n" not in str(error)


def test_unreadable_files_and_folders(good, tmp_path, as_nobody):
    changed(good, tmp_path/"settings")
    changed(good, tmp_path/"folder")
    (tmp_path/"a.safetensors").write_bytes((good/"one.safetensors").read_bytes())
    torch.save({}, tmp_path/"a.bin")
    for closed in ("a.safetensors", "a.bin", "settings/adapter_config.json", "folder"): (tmp_path/closed).chmod(0)
    def attempt(name):
        try: inspect(tmp_path/name)
        except MusiclabError as error: return str(error)
    for name, word in [("a.safetensors", "denied"), ("a.bin", "denied"), ("settings", "adapter_config.json"), ("folder", "denied")]:
        text = as_nobody(attempt, name)
        assert name in text and word in text
    (tmp_path/"folder").chmod(0o755)


# ---- adapters that do not fit

def test_an_adapter_of_another_model_says_for_which_it_was_made(good):
    from transformers import LlamaConfig, LlamaModel
    wide = LlamaModel(LlamaConfig(vocab_size=32, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)).eval()
    refused(good/"one.safetensors", "made for tiny/llama", "(16, 32)", "(64, 64)", model=wide)
    shallow = LlamaModel(LlamaConfig(vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
                                     num_key_value_heads=2)).eval()
    refused(good/"peft", "made for tiny/llama", "layers.1.self_attn", "4 of its 8 layers", "near: layers.0", model=shallow)


Q = "base_model.model.layers.0.self_attn.q_proj"

@pytest.mark.parametrize("damage, word", [
    (lambda t: t | {Q + ".lokr_w1": torch.zeros(2)}, "lokr_w1"),
    (lambda t: t | {Q + ".lora_B.bias": torch.zeros(32)}, "lora_B.bias"),
    (lambda t: {key: v for key, v in t.items() if "layers.1.self_attn.v_proj.lora_B" not in key}, "layers.1.self_attn.v_proj"),
    (lambda t: t | {Q + ".lora_A.weight": torch.zeros(4, 31)}, "layers.0.self_attn.q_proj"),
    (lambda t: t | {Q + ".lora_A.weight": torch.zeros(4, 32, 1, 1)}, "do not multiply"),
    (lambda t: t | {Q + ".lora_A.weight": torch.full((4, 32), float("nan"))}, "not finite"),
    (lambda t: t | {Q + ".lora_A.weight": torch.zeros(4, 32, dtype=torch.int64)}, "not finite numbers"),
    (lambda t: t | {"base_model.model.\x1b[2J\n.lora_A.weight": torch.zeros(4, 32)}, "?[2J?"),
    (lambda t: t | {"base_model.model.layers.0.self_attn.z_proj.lora_A.weight": torch.zeros(4, 32),
                    "base_model.model.layers.0.self_attn.z_proj.lora_B.weight": torch.zeros(32, 4)}, "z_proj"),
    (lambda t: t | {Q + ".lora_A.weight": torch.zeros(5000, 32),
                    Q + ".lora_B.weight": torch.zeros(32, 5000)}, "rank 5000"),
    (lambda t: t | {"layers_0_self_attn_q_proj.lora_A.weight": torch.zeros(4, 32),
                    "layers_0_self_attn_q_proj.lora_B.weight": torch.zeros(32, 4)}, "2 of its 9 layers have no place")])
def test_matrices_that_do_not_fit(damage, word, good, tmp_path):
    refused(changed(good, tmp_path/"bad", damage), word)


@pytest.mark.parametrize("damage, word", [
    (dict(r=100_000_000), "100000000"), (dict(r=5), "rank 5"), (dict(r="4"), "r is '4'"), (dict(r=None), "not a sensible number"),
    (dict(lora_alpha="lots"), "lots"), (dict(lora_alpha=-1), "-1"), (dict(lora_alpha=True), "True"), (dict(lora_alpha=[6]), "[6]"),
    (dict(lora_alpha=float("inf")), "inf"), (dict(lora_alpha=float("nan")), "nan"),
    (dict(rank_pattern={"q_proj": 8}), "rank 8"), (dict(alpha_pattern={"q_proj": "x"}), "'x'"),
    (dict(alpha_pattern=["q_proj"]), "alpha_pattern"), (dict(use_dora=True), "no magnitude"), (dict(peft_type="LOHA"), "LOHA"),
    (dict(modules_to_save=["norm"]), "modules_to_save"), (dict(bias="all"), "bias"), (dict(lora_bias=True), "lora_bias"),
    (dict(fan_in_fan_out=True), "fan_in_fan_out"), (dict(layer_replication=[[0, 2]]), "layer_replication"),
    (dict(init_lora_weights="pissa"), "init_lora"), (dict(something_new_that_changes_everything=1), "something_new"),
    (dict(peft_type="\x1b]0;pwned\x07"), "?]0;pwned?")])
def test_settings_that_lie_or_ask_for_more(damage, word, good, tmp_path):
    refused(changed(good, tmp_path/"bad", settings=lambda s: s | damage), word)


@pytest.mark.parametrize("text", ["", "[]", "null", "{", "[" * 100_000, '{"r": 4, "lora_alpha": 1e999}', "\x00"])
def test_settings_that_are_no_settings(text, good, tmp_path):
    refused(changed(good, tmp_path/"bad", settings=lambda _: text), "adapter")


def test_patterns_in_a_file_are_never_run_as_expressions(good, tmp_path):
    bomb = "(([a-z_.0-9]+)+)+!"  # as a regular expression this would not end
    adapters.load(llama(), changed(good, tmp_path/"fine", settings=lambda s: s | dict(target_modules=bomb)))
    refused(changed(good, tmp_path/"bad", settings=lambda s: s | dict(alpha_pattern={bomb: 8})), "alpha_pattern names", "no layer")


@pytest.mark.parametrize("about, word", [
    ("nonsense", "JSON"), ('{"format": "unheard of"}', "unheard of"), ('{"format": "\\u001b[2J"}', "?[2J")])
def test_a_header_that_lies(about, word, good, tmp_path):
    save_file(load_file(good/"one.safetensors"), tmp_path/"a.safetensors", metadata={"musiclab": about})
    refused(tmp_path/"a.safetensors", word)


def test_injected_texts_are_one_printable_line(good, tmp_path):
    about = {"base": "nice\n\x1b[31mmodel" + "x" * 10_000, "steps": "\x1b[1m", "config": {"a\nb": "\x07" * 500, "c": ["d"]}}
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ["\x1b"]}
    header = {"musiclab": json.dumps(about), "lora_adapter_metadata": json.dumps(settings)}
    save_file(load_file(good/"one.safetensors"), tmp_path/"a.safetensors", metadata=header)
    text = str(inspect(tmp_path/"a.safetensors"))
    assert "\x1b" not in text and "\x07" not in text and len(text) < 1500 and len(text.splitlines()) == 5


def test_two_layers_that_are_one(good, tmp_path):
    twice = load_file(good/"one.safetensors")
    twice |= {f"transformer.{key}": tensor.clone() for key, tensor in twice.items()}
    save_file(twice, tmp_path/"a.safetensors")
    refused(tmp_path/"a.safetensors", "16 of its 16 layers have no place")


def test_alpha_beside_the_matrices_is_checked_too(good, tmp_path):
    tensors = load_file(good/"comfy.safetensors")
    key = next(key for key in tensors if key.endswith(".alpha"))
    for bad in (torch.tensor(0.0), torch.tensor(float("nan")), torch.zeros(3), torch.tensor(3)):
        save_file(tensors | {key: bad}, tmp_path/"a.safetensors")
        refused(tmp_path/"a.safetensors", key.removesuffix(".alpha"))
    save_file({key: tensors[key]}, tmp_path/"a.safetensors")
    with pytest.raises(MusiclabError): inspect(tmp_path/"a.safetensors")


def test_dora_files_must_have_all_lengths(good, tmp_path):
    tensors = load_file(good/"dora"/"adapter_model.safetensors")
    key = next(key for key in tensors if key.endswith("magnitude_vector"))
    (tmp_path/"a").mkdir()
    (tmp_path/"a"/"adapter_config.json").write_text((good/"dora"/"adapter_config.json").read_text())
    save_file({k: v for k, v in tensors.items() if k != key}, tmp_path/"a"/"adapter_model.safetensors")
    refused(tmp_path/"a", "no magnitude")
    save_file(tensors | {key: torch.ones(7)}, tmp_path/"a"/"adapter_model.safetensors")
    refused(tmp_path/"a", "7 magnitudes")


# ---- filling an adapter that is attached

@pytest.mark.parametrize("options, word", [(dict(alpha=8), "its factor is 1.5, not 2"), (dict(rank=2, alpha=3), "mis-shaped"),
                                           (dict(method="dora"), "missing weights"), (dict(method="rslora"), "its factor is 1.5, not 3")])
def test_an_attached_adapter_of_another_kind(options, word, good):
    model = llama()
    adapters.attach(model, ATTENTION, **dict(rank=4, alpha=6) | options)
    refused(good/"one.safetensors", word, model=model.eval())


def test_an_attached_adapter_with_other_layers(good):
    for targets, word in [(r".*q_proj", "unknown"), (ATTENTION + r"|.*up_proj", "missing")]:
        model = llama()
        adapters.attach(model, targets, rank=4, alpha=6)
        refused(good/"one.safetensors", word, model=model.eval())


# ---- wrong calls

@pytest.mark.parametrize("options, word", [
    (dict(targets=r"decoder\.layers\.\d+\.q_proj"), "layers.0.self_attn"), (dict(targets="["), "not an expression"),
    (dict(targets=r"layers\.0"), "LlamaDecoderLayer"), (dict(targets=""), "matches none"),
    (dict(rank=0), "rank 0"), (dict(rank=10**9), "rank 1000000000"), (dict(alpha=0), "alpha 0"),
    (dict(alpha=float("nan")), "alpha nan"), (dict(method="lokr"), "lora, rslora, dora")])
def test_attach_refuses(options, word):
    model = llama()
    with pytest.raises(MusiclabError) as caught: adapters.attach(model, **dict(targets=ATTENTION) | options)
    assert word in str(caught.value) and not hasattr(model, "peft_config")
    assert all(p.requires_grad for p in model.parameters())


def test_without_an_adapter_the_tools_say_so(tmp_path):
    for call in (lambda: adapters.merge(llama()), lambda: adapters.set_strength(llama(), 1), lambda: adapters.save(llama(), tmp_path/"a"),
                 lambda: adapters.adapter_state(llama())):
        with pytest.raises(MusiclabError, match="no adapter"): call()
    with pytest.raises(MusiclabError, match="no adapter other"): adapters.set_strength(trained(llama()), 1, "other")
    with pytest.raises(MusiclabError, match="already"): adapters.attach(trained(llama()), ATTENTION)


def test_quantising_refuses(monkeypatch):
    for method, layers, word in [("int4", ".*", "int8 or nf4"), ("int8", "nothing", "matches none")]:
        with pytest.raises(MusiclabError, match=word): adapters.quantize(llama(), method, layers)
    with pytest.raises(MusiclabError, match="already"): adapters.quantize(trained(llama()), "int8")
    for method, package in [("int8", "torchao.quantization"), ("nf4", "bitsandbytes")]:
        monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
        with pytest.raises(MusiclabError, match=r"musiclab\[quant\]"): adapters.quantize(llama(), method)


# ---- saving

def test_saving_never_replaces_what_is_no_adapter(tmp_path):
    (tmp_path/"music").mkdir()
    (tmp_path/"music"/"song.wav").write_bytes(b"my only copy")
    (tmp_path/"file").write_bytes(b"notes")
    for name in ("music", "file"):
        with pytest.raises(MusiclabError, match="not an adapter"): adapters.save(trained(llama()), tmp_path/name)
    assert (tmp_path/"music"/"song.wav").read_bytes() == b"my only copy" and (tmp_path/"file").read_bytes() == b"notes"
    with pytest.raises(MusiclabError, match="safetensors"): adapters.save(trained(llama()), tmp_path/"a.pt")
    adapters.save(trained(llama()), tmp_path/"empty")
    adapters.save(trained(llama(), rank=2), tmp_path/"empty")  # an adapter may be replaced by another
    assert inspect(tmp_path/"empty").rank == 2


@pytest.mark.parametrize("target", ["a.safetensors", "a"])
def test_a_disk_that_fills_up_leaves_the_old_file(target, tmp_path, monkeypatch):
    adapters.save(trained(llama()), tmp_path/target)
    def full(*args, **options): raise OSError(28, "No space left on device")
    monkeypatch.setattr("musiclab.adapter_files.save_file", full)
    with pytest.raises(OSError, match="No space left"): adapters.save(trained(llama(), rank=2), tmp_path/target)
    assert inspect(tmp_path/target).rank == 4 and os.listdir(tmp_path) == [target]


def test_dora_is_not_written_where_it_means_something_else(tmp_path):
    model = trained(llama(), "dora")
    with pytest.raises(MusiclabError, match="no agreed meaning"): adapters.save(model, tmp_path/"a.safetensors", format=COMFYUI)
    assert not os.listdir(tmp_path)


def test_a_format_is_needed_where_the_header_names_one(tmp_path):
    odd = Format("odd", lambda name, tensor: (name, -tensor), lambda name, tensor: (name, -tensor))
    adapters.save(trained(llama()), tmp_path/"a.safetensors", base="tiny/llama", format=odd)
    refused(tmp_path/"a.safetensors", "'odd'", "made for tiny/llama")
    model = llama()
    adapters.load(model, tmp_path/"a.safetensors", formats={"odd": odd})
    assert torch.allclose(output(model), output(trained(llama())), atol=1e-6)
