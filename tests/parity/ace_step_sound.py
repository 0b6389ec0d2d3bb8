"The sound of ACE-Step: schedules and samplers, guidance, whole walks, mel, vocoder, codec."
import re
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from musiclab.ace_step.checkpoint import fill
from musiclab.ace_step.codec import SCALE, SHIFT, Codec, decode_mel, frames_in
from musiclab.ace_step.guidance import Guidance, Momentum, apg, cfg, cfg_star, double
from musiclab.ace_step.sampling import Guide, Prompt, blend, morph, paint_over, sample
from musiclab.ace_step.schedule import chosen_levels, levels, make_sampler, shift, training_levels
from musiclab.ace_step.transformer import Config, Transformer
from musiclab.ace_step.vocoder import HOP, MEL, Vocoder, VocoderConfig, folded
from musiclab.audio import Audio
from musiclab.core import prepare_imports
from musiclab.dsp import log_mel as mel_of, mel_filterbank, resample
from tests.parity.rows import Case, Row

prepare_imports()
from diffusers import AutoencoderDC

FINE, WALK = {"atol": 1e-5, "rtol": 1e-5}, {"atol": 1e-3, "rtol": 1e-3}


def left_over(case: Case, wanted: dict) -> Iterator[Row]:
    for name in wanted: yield Row(case.folder.name, f"{name}: not compared", float("nan"), "", False)


def beside(case: Case, name: str) -> Case: return Case(case.folder.parent / name)


def whole_number(name: str, pattern: str) -> int: return int(re.search(pattern, name)[1])


def schedulers(case: Case) -> Iterator[Row]:
    inputs, wanted, by = case.tensors("inputs"), case.tensors("outputs"), case.config["shift"]
    for name in [name for name in wanted if name.endswith("/timesteps")]:
        kind, middle, _ = name.split("/") if name.count("/") == 2 else (name.split("/")[0], "", "")
        if kind == "train": at, looks = training_levels(by), training_levels(by)
        elif kind == "oss": at = chosen_levels(case.config["oss_steps"], by); looks = at[:-1]
        elif kind == "audio2audio":
            top = float(middle.rpartition("_")[2])
            at = levels(len(wanted[name]), top, by)
            looks = at[:-1]
            begin = name.replace("timesteps", "start_sigma")
            yield case.close(begin, torch.tensor(shift(top, by)), wanted.pop(begin), **FINE)
        else:
            sampler = make_sampler(kind, levels(int(middle[1:]), by=by))
            looks = torch.tensor(sampler.looks)
            at = torch.cat([looks, torch.zeros(1)])
        sigmas = name.replace("timesteps", "sigmas")
        yield case.close(sigmas, at, wanted.pop(sigmas), **FINE)
        yield case.close(name, 1000 * looks, wanted.pop(name), **FINE)
    if (name := "oss/picked_before_second_shift") in wanted:
        yield case.close(name, 1000 * chosen_levels(case.config["oss_steps"], by, again=False)[:-1], wanted.pop(name), **FINE)
    for name in [name for name in wanted if name.endswith("/trajectory")]:
        kind, omega, _ = name.split("/")
        steps = case.config["num_inference_steps"]
        sampler = make_sampler(kind, levels(steps, by=by), float(omega.removeprefix("omega")),
                               lambda x, step: inputs[f"pingpong_noise/{step}"], whole_batch=True)
        way = [inputs["x_init"]]
        for look, sigma in enumerate(sampler.looks):
            velocity = 0.5 * way[-1] + torch.sin(2 * torch.pi * torch.tensor(sigma)) * inputs["c"]
            way.append(sampler.step(way[-1], velocity, look))
        yield case.close(name, torch.stack(way), wanted.pop(name), **FINE)
    yield from left_over(case, wanted)


def guidance(case: Case) -> Iterator[Row]:
    inputs, wanted, c = case.tensors("inputs"), case.tensors("outputs"), case.config
    scales, memory = c["guidance_scale"], {}
    for name in sorted(wanted):
        kind, step = name.split("/")
        told, untold, tags = (inputs[f"{which}/{step}"] for which in ("cond", "uncond", "text"))
        if kind == "cfg": got = cfg(told, untold, scales["others"])
        elif kind == "double": got = double(told, tags, untold, c["double"]["text"], c["double"]["lyric"])
        elif kind.startswith("cfg_zero_star"): got = cfg_star(told, untold, scales["others"], still="no_zero_init" not in kind and int(step) <= 1)
        else:
            momentum = memory.setdefault(kind, Momentum(c["momentum"])) if kind == "apg_momentum" else None
            eta, longest = re.search(r"eta_([\d.]+)", kind), re.search(r"thr_([\d.]+)", kind)
            got = apg(told, untold, scales.get(kind, scales["others"]), momentum, float(eta[1]) if eta else c["eta"],
                      float(longest[1]) if longest else c["norm_threshold"])
        yield case.close(name, got, wanted.pop(name), **FINE)
    yield from left_over(case, wanted)


def open_model(case: Case) -> Transformer:
    model = Transformer(Config.of(case.config), projectors=True, unused=True)
    fill(model, case.tensors("weights", torch.float32), case.folder)
    return model.eval().requires_grad_(False)


def prompt_of(inputs: dict, which: str = "") -> Prompt:
    speaker = inputs.get("target_speaker_embeds" if which else "speaker_embds")
    return Prompt(inputs[f"{which}encoder_text_hidden_states"], inputs[f"{which}text_attention_mask"].bool(), inputs[f"{which}lyric_token_ids"],
                  inputs[f"{which}lyric_mask"].bool(), inputs.get("encoder_text_hidden_states_null"), speaker)


def dials(v: dict) -> Guidance:
    return Guidance(v["guidance_scale"], v.get("cfg_type", "apg"), v.get("guidance_scale_text", 0.0), v.get("guidance_scale_lyric", 0.0),
                    v.get("guidance_interval", 0.5), v.get("guidance_interval_decay", 0.0), v.get("min_guidance_scale", 3.0),
                    v.get("use_erg_tag", True), v.get("use_erg_lyric", False), v.get("use_erg_diffusion", False))


@torch.inference_mode()
def denoise(case: Case) -> Iterator[Row]:
    model, inputs, wanted = open_model(case), case.tensors("inputs", torch.float32), case.tensors("outputs")
    for name, variant in case.config["variants"].items():
        prompt = prompt_of(inputs)
        if name == "erg_lyric_only": prompt = replace(prompt, weak_tags=None)  # see the case's README
        at = chosen_levels(variant["oss_steps"]) if "oss_steps" in variant else levels(variant["infer_steps"])
        sampler = make_sampler(variant["scheduler_type"], at, variant.get("omega_scale", 10.0),
                               lambda x, step, name=name: inputs[f"{name}/step_noise/{step}"], whole_batch=True)
        close = WALK if dials(variant).on else {"atol": 1e-4, "rtol": 1e-3}
        target = wanted.pop(f"{name}/latents")
        for together in (True, False):
            guide = Guide(model, [prompt], dials(variant), len(at) - 1, together=together)
            got = sample(guide, sampler, inputs[f"{name}/init_noise"])
            yield case.close(f"{name}/latents" + ("" if together else " (asked one by one)"), got, target, **close)
    yield from left_over(case, wanted)


@torch.inference_mode()
def denoise_tasks(case: Case) -> Iterator[Row]:
    model, inputs, wanted = open_model(beside(case, "denoise")), case.tensors("inputs", torch.float32), case.tensors("outputs")
    settings = case.config["sampler"]
    for name, task in case.config["tasks"].items():
        walk = again if task.get("audio2audio_enable") else painted if task["src_latents"] else retaken
        yield case.close(f"{name}/latents", walk(model, inputs, name, task, settings), wanted.pop(f"{name}/latents"), **WALK)
    for name, task in case.config["edit"].items():
        if not isinstance(task, dict): continue
        yield case.close(f"{name}/latents", edited(model, inputs, name, task, case.config["edit"]), wanted.pop(f"{name}/latents"), **WALK)
    yield from left_over(case, wanted)


def walk_to(model: Transformer, inputs: dict, settings: dict, at: Tensor, x: Tensor) -> Tensor:
    sampler = make_sampler(settings["scheduler_type"], at, settings["omega_scale"], whole_batch=True)
    return sample(Guide(model, [prompt_of(inputs)], dials(settings), len(at) - 1), sampler, x)


def retaken(model: Transformer, inputs: dict, name: str, task: dict, settings: dict) -> Tensor:
    noise = blend(inputs[f"{name}/init_noise"], inputs[f"{name}/extra_noise/0"], task["retake_variance"])
    return walk_to(model, inputs, settings, levels(settings["infer_steps"]), noise)


def again(model: Transformer, inputs: dict, name: str, task: dict, settings: dict) -> Tensor:
    top = 1 - task["ref_audio_strength"]
    at, begin = levels(int(top * settings["infer_steps"]), top), shift(top)
    return walk_to(model, inputs, settings, at, (1 - begin) * inputs[task["ref_latents"]] + begin * inputs[f"{name}/init_noise"])


def painted(model: Transformer, inputs: dict, name: str, task: dict, settings: dict) -> Tensor:
    song, noise, other = inputs[task["src_latents"]], inputs[f"{name}/init_noise"], inputs[f"{name}/extra_noise/0"]
    start, end, frames = frames_in(task["repaint_start"]), frames_in(task["repaint_end"]), song.shape[-1]
    before, after = max(0, -start), max(0, end - frames)
    place = torch.arange(before + frames + after)
    if before or after:
        mask = (place < before) | (place >= before + frames)
        noise = torch.cat([other[..., :before], noise, other[..., frames - after:]], -1)
    else:
        mask = (place >= start) & (place < end)
        noise = torch.where(mask, blend(noise, other, task["retake_variance"]), noise)
    at = levels(settings["infer_steps"])
    guide = Guide(model, [prompt_of(inputs)], dials(settings), len(at) - 1)
    return paint_over(guide, at, F.pad(song, (before, after)), noise, mask, task["retake_variance"])


def edited(model: Transformer, inputs: dict, name: str, task: dict, settings: dict) -> Tensor:
    given = iter([inputs[f"{name}/init_noise"], *(inputs[key] for key in sorted((key for key in inputs if key.startswith(f"{name}/extra_noise/")),
                                                                              key=lambda key: whole_number(key, r"(\d+)$")))])
    at, how = levels(settings["infer_steps"]), Guidance(settings["guidance_scale"], settings["cfg_type"], weak_lyrics=False, weak_model=False, as_trained=True)
    here, there = (Guide(model, [prompt_of(inputs, which)], how, len(at) - 1, always=True) for which in ("", "target_"))
    return morph(here, there, at, inputs["src_latents"], lambda song: next(given), task["n_min"], task["n_max"], task["n_avg"])


def log_mel(case: Case) -> Iterator[Row]:
    inputs, wanted, c = case.tensors("inputs"), case.tensors("outputs"), case.config
    sound = inputs["wav_int16"].float() / 32767
    mel = mel_of(F.pad(sound, (0, -sound.shape[-1] % c["pad_multiple"])), c["sample_rate"], **MEL)
    yield case.close("mel", mel, wanted.pop("mel"), 1e-3)
    yield case.close("mel_normalised", 2 * (mel - c["min_mel"]) / (c["max_mel"] - c["min_mel"]) - 1, wanted.pop("mel_normalised"), 1e-3)
    bank = torch.from_numpy(mel_filterbank(c["sample_rate"], c["n_fft"], c["n_mels"], c["f_min"], c["f_max"]))
    yield case.close("mel_filterbank", bank.T, wanted.pop("mel_filterbank"), 1e-6)
    other = next(value for name, value in inputs.items() if name != "wav_int16").float() / 32767
    for name in [name for name in wanted if re.fullmatch(r"resample_\d+_to_\d+", name)]:
        yield case.close(name, resample(other, *map(int, re.findall(r"\d+", name)), "sinc"), wanted.pop(name), 1e-5)
    yield from left_over(case, wanted)


def open_vocoder(case: Case) -> Vocoder:
    model = Vocoder(VocoderConfig.of(case.config.get("vocoder", case.config)))
    fill(model, folded(case.tensors("weights", torch.float32)), case.folder)
    return model.eval().requires_grad_(False)


@torch.inference_mode()
def vocoder(case: Case) -> Iterator[Row]:
    model, mel, wanted = open_vocoder(case), case.tensors("inputs", torch.float32)["mel"], case.tensors("outputs")
    yield case.close("backbone", model.backbone(mel), wanted.pop("backbone"), 1e-4, 1e-3)
    target = wanted.pop("wav")[:, 0]
    yield case.close("wav", model(mel), target, 1e-4, 1e-3)
    yield case.close("wav (in pieces)", model(mel, piece=max(1, mel.shape[-1] // 3)), target, 1e-4, 1e-3)
    yield from left_over(case, wanted)


def open_codec(case: Case) -> Codec:
    dcae = AutoencoderDC(**case.config["dcae"]).eval().requires_grad_(False)
    weights = {name.removeprefix("dcae."): weight for name, weight in case.tensors("weights", torch.float32).items() if name.startswith("dcae.")}
    fill(dcae, weights, case.folder)
    return Codec(dcae, open_vocoder(beside(case, "vocoder")))


@torch.inference_mode()
def music_dcae(case: Case) -> Iterator[Row]:
    codec, inputs, wanted, close = open_codec(case), case.tensors("inputs"), case.tensors("outputs"), {"atol": 1e-3, "rtol": 1e-3}
    for name, rate, end in (("wav_44100", 44_100, ""), ("wav_48000", 48_000, "_from_48k")):
        sound = Audio(inputs[name][0].numpy(), rate)
        yield case.close(f"latents{end}", codec.encode(sound)[None], wanted[f"latents{end}"], **close)
        yield case.close(f"latents{end} (in pieces)", replace(codec, piece=2).encode(sound)[None], wanted[f"latents{end}"], **close)
        yield case.same(f"latent_lengths{end}", torch.tensor([frames_in(sound.seconds)]), wanted.pop(f"latent_lengths{end}"))
    first = wanted["latents"][..., :wanted["decoder_mel"].shape[-1] // 8]
    picture = decode_mel(codec.dcae.decoder, first / SCALE + SHIFT)
    yield case.close("decoder_mel_normalised", picture, wanted.pop("decoder_mel_normalised"), **close)
    yield case.close("decoder_mel", (picture * 0.5 + 0.5) * 14 - 11, wanted.pop("decoder_mel"), **close)
    sound = replace(codec, piece=2).decode(first[0])
    yield case.close("decoded_44100", torch.from_numpy(sound.samples), wanted.pop("decoded_44100"), **close)
    yield case.close("decoded_48000", torch.from_numpy(sound.resample(48_000, "sinc").samples), wanted.pop("decoded_48000"), **close)
    yield from left_over(case, {name: value for name, value in wanted.items() if not name.startswith("latents")})


def dcae_overlap_decode(case: Case) -> Iterator[Row]:
    "Away from the seams of the original's vocoder windows, where it blends; at the end it fills its last window with zeros, which are loud."
    codec, c = open_codec(beside(case, "music_dcae")), case.config
    wanted, latents = case.tensors("outputs"), case.tensors("inputs", torch.float32)["latents"][0]
    place, close = wanted.pop("sample_index").long(), {"atol": 2e-3, "rtol": 1e-3}
    sound = torch.from_numpy(codec.decode(latents, window=c["win_latent"]).samples)
    yield case.same("length", torch.tensor(sound.shape[1]), wanted.pop("length").view(()))
    hop, reach = c["vocoder_win_samples"] - 2 * c["vocoder_overlap"], codec.vocoder.reach * HOP
    into = place % hop  # samples since the last seam
    clear = (place < hop - reach) | ((into > reach + 2 * c["vocoder_overlap"]) & (into < hop - reach))
    clear &= place < sound.shape[1] - reach
    target = wanted.pop("samples").reshape(2, -1)
    yield case.close(f"samples ({int(clear.sum())} of {len(place)}, away from seams)", sound[:, place[clear]], target[:, clear], **close)
    whole = torch.from_numpy(codec.decode(latents).samples)
    yield case.close("full_decode_samples", whole[:, place], wanted.pop("full_decode_samples").reshape(2, -1), **close)
    yield from left_over(case, wanted)


CHECKS: dict[str, Callable[[Case], Iterator[Row]]] = {
    "dcae_overlap_decode": dcae_overlap_decode, "denoise": denoise, "denoise_erg": denoise, "denoise_tasks": denoise_tasks, "guidance": guidance,
    "log_mel": log_mel, "music_dcae": music_dcae, "schedulers": schedulers, "vocoder": vocoder,
}
