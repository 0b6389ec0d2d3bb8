"MusicGen against AudioCraft: pattern, loss, logits, gradients, greedy tokens with guidance, names of weights."
import re
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from musiclab.core import prepare_imports
from musiclab.musicgen.codes import delay, trained, training_pair, undelay
from musiclab.musicgen.convert import from_audiocraft, to_audiocraft
from musiclab.musicgen.decoder import Decoding, FastDecoder
from musiclab.musicgen.model import MusicGenLM
from musiclab.musicgen.sampling import generate_tokens
from musiclab.sampling import Sampler
from tests.parity.rows import Case, Row

prepare_imports()
from transformers import MusicgenDecoderConfig, MusicgenForCausalLM, T5Config, T5EncoderModel


def part(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}


def open_case(case: Case) -> tuple[MusicGenLM, nn.Module]:
    "The case's decoder with its projection, and its T5."
    weights = case.tensors("weights", torch.float32)
    decoder = MusicgenForCausalLM(MusicgenDecoderConfig(**case.config["decoder"] | {"dropout": 0.0}))
    lm = MusicGenLM(decoder, nn.Linear(*reversed(weights["enc_to_dec_proj.weight"].shape)))
    lm.load_state_dict({name: weight for name, weight in weights.items() if not name.startswith("text_encoder.")})
    encoder = T5EncoderModel(T5Config(**case.config["text_encoder"]))
    missing, unexpected = encoder.load_state_dict(part(weights, "text_encoder."), strict=False)
    assert set(missing) <= {"encoder.embed_tokens.weight"} and not unexpected, (missing, unexpected)
    return lm.eval(), encoder.eval().requires_grad_(False)


def check(case: Case) -> Iterator[Row]:
    lm, encoder = open_case(case)
    inputs, wanted = case.tensors("inputs"), case.tensors("outputs", torch.float32)
    mask, valid = inputs["attention_mask"].bool(), inputs["token_valid"].bool()
    states = encoder(input_ids=inputs["input_ids"], attention_mask=mask.long()).last_hidden_state
    yield Row(case.folder.name, "delays", float(sum(a != b for a, b in zip(lm.late, case.config["delays"]))), "exact",
              list(lm.late) == case.config["delays"])
    yield case.close("cross_attention_src", lm.project(states, mask).detach(), wanted.pop("cross_attention_src"), 1e-5)
    yield from check_pattern(case, lm, inputs, valid, wanted)
    yield from check_loss(case, lm, (inputs["codes"], valid, states, mask, "audiocraft"), wanted)
    yield from check_greedy(case, lm, inputs["codes"], states, mask, wanted)
    yield from check_names(case, lm, (inputs["codes"], valid, states, mask, "audiocraft"))
    for name in wanted: yield Row(case.folder.name, f"{name}: not compared", float("nan"), "", False)


def check_pattern(case: Case, lm: MusicGenLM, inputs: dict, valid: Tensor, wanted: dict) -> Iterator[Row]:
    codes, frames = inputs["codes_padded"], inputs["codes"].shape[-1]
    seen, _ = training_pair(inputs["codes"], valid, lm.late, lm.special)
    yield case.same("pattern_tokens_valid_steps", seen, wanted.pop("pattern_tokens_valid_steps")[..., :frames])
    full = delay(codes, lm.late, lm.special)
    yield case.same("pattern_tokens_full", full, wanted.pop("pattern_tokens_full")[..., 1:])
    yield case.same("reverted", undelay(full, lm.late), wanted.pop("reverted"))


def check_loss(case: Case, lm: MusicGenLM, batch: tuple, wanted: dict) -> Iterator[Row]:
    lm.requires_grad_(True)
    sums, counts = lm.losses(*batch)
    loss = sums / counts
    loss.mean().backward()
    yield case.close("loss_per_codebook", loss.detach(), wanted.pop("loss_per_codebook"), 1e-5)
    yield case.close("loss", loss.mean().detach()[None], wanted.pop("loss"), 1e-5)
    weights = dict(lm.named_parameters())
    for name in [name for name in wanted if name.startswith("grad.")]:
        yield case.close(name, weights[name.removeprefix("grad.")].grad, wanted.pop(name), 1e-5)
    lm.requires_grad_(False)
    logits, counted = lm(*batch)
    there = wanted.pop("logits_mask").bool()  # the pattern alone: padded frames have logits too, but no loss
    yield case.same("logits_mask", trained(torch.ones_like(batch[1]), lm.late), there)
    yield case.same("logits_mask and valid", counted, there & batch[1])
    yield case.close("logits", logits[there], wanted.pop("logits")[there], 1e-4)


def check_greedy(case: Case, lm: MusicGenLM, codes: Tensor, states: Tensor, mask: Tensor, wanted: dict) -> Iterator[Row]:
    fast, sampler = FastDecoder(lm), Sampler([0] * len(codes), temperature=0)
    for name in [name for name in wanted if name.startswith("greedy_")]:
        tokens = wanted.pop(name)
        frames, given = tokens.shape[-1], re.search(r"prompt(\d+)", name)
        prompt = codes[..., :min(int(given[1]), codes.shape[-1] - 2)] if given else None
        for fixed in (False, True):
            decoding = Decoding(fast, states, mask, frames, case.config["cfg_coef"], "audiocraft")
            got = generate_tokens(decoding, sampler, frames, prompt, fixed=fixed)
            yield case.same(name + " (step of fixed shape)" * fixed, got, tokens)


def check_names(case: Case, lm: MusicGenLM, batch: tuple) -> Iterator[Row]:
    theirs = case.tensors("audiocraft_lm")
    ours = {name: weight for name, weight in case.tensors("weights").items() if not name.startswith("text_encoder.")}
    for quantity, got, wanted in (("to_audiocraft", to_audiocraft(ours), theirs), ("from_audiocraft", from_audiocraft(theirs), ours),
                                  ("there and back", from_audiocraft(to_audiocraft(ours)), ours)):
        wrong = got.keys() ^ wanted.keys() | {name for name in got.keys() & wanted.keys() if not torch.equal(got[name], wanted[name])}
        yield Row(case.folder.name, quantity, float(len(wrong)), "exact", not wrong)
    before = lm(*batch)[0]
    lm.load_state_dict({name: torch.full_like(weight, torch.nan) for name, weight in lm.state_dict().items()})
    lm.load_state_dict(from_audiocraft(theirs))
    yield case.same("logits of the converted weights", lm(*batch)[0], before)
