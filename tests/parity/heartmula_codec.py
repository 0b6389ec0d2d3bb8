"HeartCodec: codes to sound (quantiser, estimator, flow, scalar codec, windows), and sound to codes (resampling, four listeners, reader)."
from collections.abc import Callable, Iterator, Mapping
from math import gcd

import numpy as np
import torch
from torch import Tensor, nn

from musiclab.audio import Audio
from musiclab.dsp import resample, sinc_weights
from musiclab.heartmula.codec import STEP, UNIT, Codec, Stream
from musiclab.heartmula.codec_files import RENAMED
from musiclab.heartmula.encoder import AudioTokenizer, Encoder, QueryEncoder
from musiclab.heartmula.estimator import Estimator
from musiclab.heartmula.flow import Flow
from musiclab.heartmula.quantizer import CodecConfig, Quantizer, stacked
from musiclab.heartmula.scalar_codec import ScalarCodec, rounded
from musiclab.heartmula.streams import LOW, RATE, SPOKEN, TAIL, Listeners, whisper_mel
from musiclab.weights import fill, folded
from tests.parity.rows import Case, Row

LEARNED = {there.removeprefix("feature_extractors."): here.removeprefix("feature_extractors.") for here, there in RENAMED.items()}


def left_over(case: Case, wanted: dict) -> Iterator[Row]:
    for name in wanted: yield Row(case.folder.name, f"{name}: not compared", float("nan"), "", False)


def below(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    "The weights whose names begin so, without it."
    return {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}


def filled(module: nn.Module, weights: Mapping[str, Tensor], case: Case) -> nn.Module:
    fill(module, weights, case.folder)
    return module.eval().requires_grad_(False)


def open_quantizer(case: Case, c: CodecConfig) -> Quantizer:
    return filled(Quantizer(c), stacked(below(case.tensors("weights", torch.float32), "flow_matching.vq_embed.")), case)


def open_flow(case: Case) -> Flow:
    c, weights = CodecConfig.of(case.config), case.tensors("weights", torch.float32)
    tables = {f"vq_embed.{name}": weight for name, weight in open_quantizer(case, c).state_dict().items()}
    return filled(Flow(c), {name: weight for name, weight in below(weights, "flow_matching.").items() if not name.startswith("vq_embed.")} | tables, case)


def open_scalar(case: Case) -> ScalarCodec:
    weights = case.tensors("weights", torch.float32)
    scalar, own = ScalarCodec(CodecConfig.of(case.config)), folded(below(weights, "scalar_model."))
    if not any(name.startswith("encoder.") for name in own): del scalar.encoder
    return filled(scalar, own, case)


def open_streams(case: Case, values: dict, weights: Mapping[str, Tensor]) -> Listeners:
    streams, spare = Listeners(values), Listeners(values, unused=True).state_dict().keys() - Listeners(values).state_dict().keys()
    named = {LEARNED.get(name, name): weight for name, weight in weights.items()}
    return filled(streams, {name: weight for name, weight in named.items() if name not in spare}, case)


@torch.inference_mode()
def codec_rvq(case: Case) -> Iterator[Row]:
    quantizer, inputs, wanted = open_quantizer(case, CodecConfig.of(case.config)), case.tensors("inputs"), case.tensors("outputs")
    yield case.close("decoded", quantizer.decode(inputs["codes"].mT), wanted.pop("decoded"), 1e-5)
    codes = quantizer.encode(inputs["features"])
    yield case.same("indices", codes, wanted.pop("indices"))
    for name in [name for name in wanted if name.startswith("quantized")]: yield case.close(name, quantizer.decode(codes), wanted.pop(name), 1e-5)
    yield from left_over(case, wanted)


@torch.inference_mode()
def codec_estimator(case: Case) -> Iterator[Row]:
    weights, inputs, wanted = case.tensors("weights", torch.float32), case.tensors("inputs"), case.tensors("outputs")
    estimator = filled(Estimator(CodecConfig.of(case.config)), below(weights, "flow_matching.estimator."), case)
    yield case.close("out", estimator(inputs["hidden_states"], inputs["timestep"]), wanted.pop("out"), 2e-4)
    yield case.close("out_t0_first", estimator(inputs["hidden_states"][:1], torch.zeros(1)), wanted.pop("out_t0_first"), 2e-4)
    yield from left_over(case, wanted)


@torch.inference_mode()
def codec_flow(case: Case) -> Iterator[Row]:
    flow, inputs, wanted = open_flow(case), case.tensors("inputs"), case.tensors("outputs")
    for name, how in case.config["cases"].items():
        before = inputs[f"{name}.true_latents"][:, :how["incontext"]] if how["incontext"] else None
        got = flow.latents(inputs[f"{name}.codes"], inputs[f"{name}.noise"], before, how["steps"], how["guidance"], how["latent_length"])
        yield case.close(f"{name}.latents", got, wanted.pop(f"{name}.latents"), 5e-4)
    yield from left_over(case, wanted)


@torch.inference_mode()
def codec_sq(case: Case) -> Iterator[Row]:
    scalar, inputs, wanted = open_scalar(case), case.tensors("inputs"), case.tensors("outputs")
    target = wanted.pop("decoded")[:, 0]
    for piece in (inputs["latents"].shape[-1], 5): yield case.close(f"decoded (pieces of {piece})", scalar.decode(inputs["latents"], piece), target, 2e-4)
    encoded = scalar.encode(inputs["wav"][:, 0])
    yield case.close("encoded", encoded, wanted.pop("encoded"), 2e-4)
    yield case.close("encoded_quantized", rounded(encoded), wanted.pop("encoded_quantized"), 2e-4)
    yield case.close("reconstructed", scalar.decode(encoded)[:, None], wanted.pop("reconstructed"), 2e-4)
    yield from left_over(case, wanted)


@torch.inference_mode()
def codec_detokenize(case: Case) -> Iterator[Row]:
    "A song that the original cuts short is compared as far as it decodes it in the same way: one step of its windows."
    codec, inputs, wanted, c = Codec(open_flow(case), open_scalar(case), piece=64), case.tensors("inputs", torch.float32), case.tensors("outputs"), case.config
    window, frame = int(c["duration"] * 12.5), 2 * codec.config.hop
    for name in c["cases"]:
        def noise(number, shape, name=name): return inputs.get(f"{name}.noise{number}", torch.zeros(shape))
        codes, target = inputs[f"{name}.codes"], wanted.pop(f"{name}.wav")
        for many in (codes.shape[1], 17):
            stream = Stream(codec, window, c["num_steps"], c["guidance_scale"], noise)
            pieces = [piece.samples for some in codes.split(many, 1) for piece in stream.push(some)] + [piece.samples for piece in stream.finish()]
            got = torch.from_numpy(np.concatenate(pieces, 1))
            yield case.same(f"{name}: length", torch.tensor(got.shape[1]), torch.tensor(codes.shape[1] * frame))
            end = target.shape[1] if got.shape[1] == target.shape[1] else window // UNIT * STEP * frame
            yield case.close(f"{name}.wav (codes {many} at a time)", got[:, :end], target[:, :end], 1e-3)
    yield from left_over(case, wanted)


@torch.inference_mode()
def codec_query_encoder(case: Case) -> Iterator[Row]:
    weights, inputs, wanted = case.tensors("weights", torch.float32), case.tensors("inputs", torch.float32), case.tensors("outputs")
    query = QueryEncoder(case.config, {name: stream.shape[-1] for name, stream in inputs.items()})
    own = folded(below(weights, "encoder.query."))
    yield case.close("out", filled(query, own, case)(inputs), wanted.pop("out"), 2e-4)
    yield from left_over(case, wanted)


def codec_resample(case: Case) -> Iterator[Row]:
    inputs, wanted = case.tensors("inputs", torch.float32), case.tensors("outputs")
    for name in list(wanted):
        old, new = (int(part) for part in name.removeprefix("kernel_").split("_to_"))
        target = wanted.pop(name)
        if not name.startswith("kernel_"): yield case.close(name, resample(inputs[f"wav_{old}"], old, new, "sinc"), target, 1e-5)
        else: yield case.close(name, kernel(old, new, target.shape[-1]), target, 1e-5)
    yield from left_over(case, wanted)


def kernel(old: int, new: int, taps: int) -> Tensor: # [phases, 1, taps]
    "Our sparse rows of weights, laid out as the original has them: all phases begin at the same sample."
    step, phases = old // gcd(old, new), new // gcd(old, new)
    first, weights, reach = sinc_weights(step, phases)
    rows = torch.zeros(phases, taps + 2 * weights.shape[1])
    width = (taps - step) // 2  # samples before the period, in the original
    for row, at, own in zip(rows, first, weights): row[weights.shape[1] + at - reach + width:][:len(own)] = torch.from_numpy(own)
    return rows[:, None, weights.shape[1]:weights.shape[1] + taps]


@torch.inference_mode()
def codec_features(case: Case) -> Iterator[Row]:
    weights, wanted = case.tensors("weights", torch.float32), case.tensors("outputs")
    streams = open_streams(case, case.config["feature_extractors"], below(weights, "encoder.feature_extractors."))
    clips = case.tensors("inputs", torch.float32)["audio_24k"]
    for name, stream in streams(clips).items(): yield case.close(name, stream, wanted.pop(name), 2e-4)
    rows, mu, wavlm = clips.flatten(0, 1), streams.muencoder, streams.wavlm_encoder
    yield case.close("mu_mel_normalised", mu.mel(rows[:, :-TAIL]), wanted.pop("mu_mel_normalised"), 1e-4)
    music, low = mu(rows[:, :-TAIL]), resample(rows, RATE, LOW, "sinc")
    yield case.close("mu_conv_out", music[0], wanted.pop("mu_conv_out"), 2e-4)
    yield case.close("wav_16k", low, wanted.pop("wav_16k"), 1e-4)
    yield case.close("wavlm_conv_out", wavlm.feature_extractor(low), wanted.pop("wavlm_conv_out"), 2e-4)
    voice, mel = wavlm(low, output_hidden_states=True).hidden_states, whisper_mel(low)
    words = streams.whisper_encoder(mel).last_hidden_state
    for name in list(wanted):
        what, _, which = name.rpartition("_")
        target = wanted[name]
        if what == "mu_hidden": got = music[int(which)]
        elif what == "wavlm_hidden" and int(which) <= max(SPOKEN): got = voice[int(which)]
        elif what == "whisper_mel": got = mel[..., :target.shape[-1]] if which == "head" else mel[..., -target.shape[-1]:]
        elif what == "whisper_last_hidden": got = words[:, :target.shape[1]] if which == "head" else words[:, -target.shape[1]:]
        else: continue
        yield case.close(name, got, wanted.pop(name), 1e-4 if "mel" in name else 2e-4)
    yield from left_over(case, wanted)


@torch.inference_mode()
def codec_encode(case: Case) -> Iterator[Row]:
    values, weights = case.config["encoder_config"], case.tensors("weights", torch.float32)
    encoder = Encoder(values)
    encoder.feature_extractors = open_streams(case, values["feature_extractors"], below(weights, "encoder.feature_extractors."))
    filled(encoder.query, folded(below(weights, "encoder.query.")), case)
    tokenizer = AudioTokenizer(encoder.eval(), open_quantizer(case, CodecConfig(dim=values["query"]["dim"], **case.config["rvq"])))
    inputs, wanted = case.tensors("inputs", torch.float32), case.tensors("outputs")
    for variant in case.config["variants"]:
        name, audio = variant["name"], Audio(inputs[variant["name"]].numpy(), variant["sample_rate"])
        if f"{name}/wav_24k" in wanted:
            yield case.close(f"{name}/wav_24k", torch.from_numpy(audio.with_channels(2).resample(RATE, "sinc").samples), wanted.pop(f"{name}/wav_24k"), 1e-4)
        yield case.close(f"{name}/query", tokenizer.vectors(audio), wanted.pop(f"{name}/query").flatten(0, 1), 2e-4)
        yield case.same(f"{name}/codes", tokenizer.encode(audio), wanted.pop(f"{name}/codes"))
    yield from left_over(case, wanted)


CHECKS: dict[str, Callable[[Case], Iterator[Row]]] = {
    "codec_detokenize": codec_detokenize, "codec_encode": codec_encode, "codec_estimator": codec_estimator, "codec_features": codec_features,
    "codec_flow": codec_flow, "codec_query_encoder": codec_query_encoder, "codec_resample": codec_resample, "codec_rvq": codec_rvq, "codec_sq": codec_sq,
}


def check(case: Case) -> Iterator[Row]:
    if case.folder.name not in CHECKS: yield Row(case.folder.name, "unknown case", float("nan"), "", False)
    else: yield from CHECKS[case.folder.name](case)
