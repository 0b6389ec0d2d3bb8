"The transformer of ACE-Step: every part of a forward pass, conditions once and often, the lyric encoder, a step of training."
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from musiclab.ace_step.block import time_waves
from musiclab.ace_step.checkpoint import fill
from musiclab.ace_step.lyric_encoder import distances
from musiclab.ace_step.objective import denoising_loss, imitation_loss, look, mix, noise_levels
from musiclab.ace_step.transformer import Conditions, Config, Listener, Transformer
from tests.parity.rows import Case, Row

CLOSE = {"atol": 2e-5, "rtol": 1e-4}


def open_model(case: Case) -> Transformer:
    model = Transformer(Config.of(case.config), projectors=True, unused=True)
    fill(model, case.tensors("weights", torch.float32), case.folder)
    return model.eval().requires_grad_(False)


def told_by(model: Transformer, inputs: dict) -> Conditions:
    return model.encode(*(inputs[name] for name in (
        "encoder_text_hidden_states", "text_attention_mask", "lyric_token_idx", "lyric_mask", "speaker_embeds")))


def left_over(case: Case, wanted: dict) -> Iterator[Row]:
    for name in wanted: yield Row(case.folder.name, f"{name}: not compared", float("nan"), "", False)


def watched(model: Transformer, names: dict[str, str]) -> dict[str, Tensor]:
    "What the modules of these names give, under other names; filled by the next forward pass."
    seen = {}
    for path, name in names.items():
        model.get_submodule(path).register_forward_hook(lambda _, __, out, name=name: seen.__setitem__(name, out))
    return seen


def transformer_forward(case: Case) -> Iterator[Row]:
    model, inputs, wanted = open_model(case), case.tensors("inputs"), case.tensors("outputs", torch.float32)
    names = {name: name for name in ("timestep_embedder", "t_block", "proj_in")}
    for number in range(len(model.transformer_blocks)):
        block = f"transformer_blocks.{number}"
        names |= {block: f"block_{number}"} | {f"{block}.{ours}": f"block_{number}.{theirs}" for ours, theirs in
                                              (("attn", "self_attn"), ("cross_attn", "cross_attn"), ("ff", "ff"))}
    seen, told = watched(model, names), told_by(model, inputs)
    yield case.close("time_proj", time_waves(inputs["timestep"]), wanted.pop("time_proj"), **CLOSE)
    sample = model.decode(inputs["hidden_states"], inputs["timestep"], told, inputs["attention_mask"])
    for name, got in seen.items(): yield case.close(name, got, wanted.pop(name), **CLOSE)
    yield case.close("sample", sample, wanted.pop("sample"), **CLOSE)
    for name in [name for name in wanted if name.startswith("sample_")]:
        frames, result = inputs[name.replace("sample", "attention_mask")], wanted.pop(name)
        for how, conditions in (("", told), (" (remembered)", model.remember(told))):
            got = model.decode(inputs["hidden_states"], inputs["timestep"], conditions, frames)
            there = frames.bool()[:, None, None].expand_as(got)
            yield case.close(name + how, got[there], result[there], **CLOSE)
    yield from left_over(case, wanted)


def encode_decode(case: Case) -> Iterator[Row]:
    model, inputs, wanted = open_model(case), case.tensors("inputs"), case.tensors("outputs", torch.float32)
    told = told_by(model, inputs)
    yield case.same("encoder_hidden_mask", told.mask, wanted.pop("encoder_hidden_mask"))
    yield case.close("encoder_hidden_states", told.states[told.mask], wanted.pop("encoder_hidden_states")[told.mask], **CLOSE)
    for how, conditions in (("", told), (" (remembered)", model.remember(told))):
        got = model.decode(inputs["hidden_states"], inputs["decode_timestep"], conditions, inputs["attention_mask"])
        for name, result in wanted.items():  # the reference pads with zeros or cuts when another length is asked for
            yield case.close(name + how, F.pad(got, (0, result.shape[-1] - got.shape[-1])), result, **CLOSE)


def lyric_encoder(case: Case) -> Iterator[Row]:
    sizes, inputs, wanted = case.config, case.tensors("inputs"), case.tensors("outputs", torch.float32)
    weights = case.tensors("weights", torch.float32)
    inner = {name: sizes[name] for name in ("output_size", "attention_heads", "linear_units", "num_blocks")}
    listener = Listener(Config.of(sizes | {"num_attention_heads": 1, "attention_head_dim": sizes["inner_dim"], "lyric_encoder": inner}))
    fill(listener, weights | {name: value for name, value in listener.state_dict().items() if name.startswith(("speaker", "genre"))}, case.folder)
    encoder, ids, mask = listener.eval().requires_grad_(False).lyric_encoder, inputs["lyric_token_idx"], inputs["lyric_mask"].bool()
    seen = watched(encoder, {"embed": "embed"} | {f"encoders.{number}": f"layer_{number}" for number in range(len(encoder.encoders))})
    seen["encoder"] = encoder(listener.lyric_embs(ids), mask)
    seen["projected"] = listener.lyric_proj(seen["encoder"])
    yield case.close("pos_emb", distances(ids.shape[1], sizes["output_size"])[None], wanted.pop("pos_emb"), **CLOSE)
    compared = mask | ~mask.any(1, keepdim=True)  # padding has no meaning, but a row without lyrics does
    for name in list(wanted): yield case.close(name, seen[name][compared], wanted.pop(name)[compared], **CLOSE)


def training_step(case: Case) -> Iterator[Row]:
    "Noise levels, velocity, losses and gradients, by the functions that train."
    model, inputs, wanted = open_model(case), case.tensors("inputs"), case.tensors("outputs", torch.float32)
    assert case.config["num_train_timesteps"] == 1000
    sigmas, names = noise_levels(inputs["u"], case.config["shift"]), case.config["ssl_names"]
    yield case.close("sigmas", sigmas, wanted.pop("sigmas"), **CLOSE)
    yield case.close("timesteps", 1000 * sigmas, wanted.pop("timesteps"), **CLOSE)
    music = inputs["latents"]
    noisy = mix(music, inputs["noise"], sigmas)
    for variant in sorted({name.split("/")[0] for name in wanted}):
        goal = {name.removeprefix(variant + "/"): wanted.pop(name) for name in list(wanted) if name.startswith(variant + "/")}
        frames = inputs[f"attention_mask_{variant}"]
        model.requires_grad_(True).zero_grad()
        seen = look(model, noisy, sigmas, told_by(model, inputs), frames, model.config.ssl_encoder_depths)
        there, share = frames.bool()[:, None, None].expand_as(music), frames.float().mean(1)
        got = {"noisy": noisy, "velocity": seen.velocity, "x0_pred": seen.music}
        for name, tensor in got.items(): yield case.close(f"{variant}/{name}", tensor.detach()[there], goal.pop(name)[there], **CLOSE)
        each = denoising_loss(seen.music, music, frames.bool()) * share  # the case divides by the padded length
        losses = {"denoising_per_sample": each, "denoising_loss": (each * share).mean()}  # and weighs with the real share
        for head, inner, name in zip(model.projectors, seen.inner, names):
            losses[f"{name}_loss"] = torch.stack([imitation_loss(head, h, inputs[f"ssl/{name}/{row}"]) for row, h in enumerate(inner)]).mean()
        ssl = torch.stack([losses[f"{name}_loss"] for name in names]).mean()
        for name in [name for name in goal if name.startswith("loss_ssl_coeff_")]:
            losses[name] = losses["denoising_loss"] + float(name.rpartition("_")[2]) * ssl
        for name, value in losses.items():
            if name in goal: yield case.close(f"{variant}/{name}", value.detach(), goal.pop(name), atol=1e-8, rtol=1e-5)
        (losses["denoising_loss"] + ssl).backward()
        weights = dict(model.named_parameters())
        for name in [name for name in goal if name.startswith("grad/")]:
            path = name.removeprefix("grad/")
            yield case.close(f"{variant}/{name}", weights[path].grad.view_as(goal[name]), goal.pop(name), atol=1e-6, rtol=1e-3)
        yield from left_over(case, {f"{variant}/{name}": value for name, value in goal.items()})
    yield from left_over(case, wanted)
