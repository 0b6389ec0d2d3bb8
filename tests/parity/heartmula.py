"HeartMuLa's writer against heartlib and SimpleTuner: rotation, prompts, numbers, loss, sampling, greedy songs. Cases of the codec are in `heartmula_codec`."
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from musiclab.core import prepare_imports
from musiclab.heartmula.checkpoint import Config, Stack, write_model
from musiclab.heartmula.fast import FastModel
from musiclab.heartmula.frames import Writing, write
from musiclab.heartmula.model import HeartMuLa, embed, halved, llama, losses, open_lm, our_name, paired, release_weights, to_ours
from musiclab.heartmula.prompts import Prompt, Reader, as_rows
from musiclab.sampling import Sampler
from tests.parity.rows import Case, Row

prepare_imports()
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb


def check(case: Case) -> Iterator[Row]:
    name = case.folder.name
    if name.startswith("codec_"):
        from tests.parity import heartmula_codec
        yield from heartmula_codec.check(case)
        return
    kind = next((kind for kind in CHECKS if name.startswith(kind)), None)
    if kind is None: raise ValueError(f"no check for {name}")
    wanted = case.tensors("outputs")
    with torch.no_grad(): yield from CHECKS[kind](case, wanted)
    for left in wanted:
        if not left.startswith("info."): yield Row(name, f"{left}: not compared", float("nan"), "", False)


def opened(case: Case) -> HeartMuLa:
    "The case's weights through the code that reads a release: written as a checkpoint, then opened."
    with tempfile.TemporaryDirectory() as place:
        write_model(Path(place), case.config | {"model_type": "heartmula"}, case.tensors("weights"))
        return open_lm(place)


def check_names(case: Case, lm: HeartMuLa) -> Row:
    there, back = case.tensors("weights"), release_weights(lm)
    wrong = there.keys() ^ back.keys() | {name for name in there.keys() & back.keys() if not torch.equal(there[name], back[name])}
    return Row(case.folder.name, "weights read and written back", float(len(wrong)), "exact", not wrong)


def check_rope(case: Case, wanted: dict) -> Iterator[Row]:
    inputs = case.tensors("inputs")
    for size in case.config["head_dims"]:
        rotary = llama(Stack(1, 2, 2, 2 * size, 8)).rotary_emb
        yield case.close(f"theta_{size}", rotary.inv_freq, wanted.pop(f"theta_{size}"), 0, rtol=1e-6)
        q, at = inputs[f"q_{size}"], inputs[f"pos_{size}"]
        swap = lambda change, q, size=size: change(q.movedim(-1, 0), size).movedim(0, -1)
        turned, _ = apply_rotary_pos_emb(swap(halved, q), swap(halved, q), *rotary(q, at), unsqueeze_dim=2)
        rotated = wanted.pop(f"rotated_{size}")
        yield case.close(f"rotated_{size}", swap(paired, turned), rotated, 2e-4)
        angles = at[..., None, None] * rotary.inv_freq
        fast = torch.view_as_real(torch.view_as_complex(q.unflatten(-1, (-1, 2)).contiguous()) * torch.polar(torch.ones_like(angles), angles)).flatten(-2)
        yield case.close(f"rotated_{size} (complex)", fast, rotated, 2e-4)


def check_prompts(case: Case, wanted: dict) -> Iterator[Row]:
    read, inputs, rows = Reader(case.folder), case.tensors("inputs"), []
    for i, pair in enumerate(case.config["pairs"]):
        prompt = read(pair["tags"], pair["lyrics"])
        tokens, counts = map(torch.from_numpy, as_rows(prompt, np.zeros((0, 8), int)))
        stripped = read(pair["tags"].strip(), pair["lyrics"].strip())
        st_tokens, st_counts = map(torch.from_numpy, as_rows(stripped, np.zeros((0, 8), int)))
        for name, got in (("tokens", tokens), ("mask", counts), ("muq_idx", torch.tensor(prompt.slot)), ("pos", torch.arange(len(tokens))),
                          ("st_tokens", st_tokens), ("st_mask", st_counts)):
            yield case.same(f"{i}.{name}", got, wanted.pop(f"{i}.{name}"))
        rows.append(stripped)
    yield from check_collate(case, rows, inputs, {name: wanted.pop(name) for name in list(wanted) if name.startswith("collate.")})


def check_collate(case: Case, prompts: list[Prompt], inputs: dict, wanted: dict) -> Iterator[Row]:
    "A batch without the end, as SimpleTuner makes it; tokens are read in either orientation."
    from musiclab.heartmula.data import as_codes, collate
    books = 8
    codes = [as_codes(inputs[name].numpy(), books, 8192, name) for name in sorted(inputs)]
    batch = collate([{"prompt": prompt, "codes": each, "spelled": np.ones(len(each), bool)} for prompt, each in zip(prompts, codes)])
    ours = {"tokens": batch["tokens"], "tokens_mask": batch["counts"], "audio_frame_mask": batch["frames"], "audio_lengths": batch["frames"].sum(1),
            "prompt_lengths": batch["counts"][..., -1].sum(1)}
    for name, tensor in wanted.items(): yield case.same(name, ours[name.removeprefix("collate.")], tensor)


def check_teacher_forced(case: Case, wanted: dict) -> Iterator[Row]:
    lm, inputs = opened(case), case.tensors("inputs")
    yield check_names(case, lm)
    tokens, counts = inputs["tokens"], inputs["tokens_mask"].bool()
    for variant, (slots, muq) in {"official": (inputs["starts"], None), "muq": (inputs["starts"], inputs["muq"]), "simpletuner": (None, None)}.items():
        first, rest = lm(tokens, counts, slots, muq=muq)
        for name, got in (("inputs_embeds", embed(lm, tokens, counts, slots, muq=muq)), ("hidden", lm.hidden(tokens, counts, slots, muq=muq)),
                          ("c0_logits", first), ("rest_logits", rest)):
            yield case.close(f"{variant}.{name}", got, wanted.pop(f"{variant}.{name}"), 2e-4)


@torch.enable_grad()
def check_loss(case: Case, wanted: dict) -> Iterator[Row]:
    lm, inputs = opened(case).requires_grad_(True), case.tensors("inputs")
    tokens, counts, frames = inputs["tokens"], inputs["tokens_mask"].bool(), inputs["audio_frame_mask"].bool()
    books, config = tokens.shape[-1] - 1, lm.config
    for variant, slots in (("official", inputs["starts"]), ("simpletuner_layout", None)):
        lm.zero_grad()
        before = lm.hidden(tokens, counts, slots)[:, :-1][frames[:, 1:]]
        means = losses(lm, before, tokens[:, 1:, :books][frames[:, 1:]]) / len(before)
        loss = means[0] + means[1:].mean()
        loss.backward()
        for name, got in (("loss", loss), ("loss_codebook0", means[0]), ("loss_rest", means[1:].mean()), ("loss_rest_per_codebook", means[1:])):
            yield case.close(f"{variant}.{name}", got.detach(), wanted.pop(f"{variant}.{name}"), 1e-4)
        yield from check_gradients(case, lm, variant, wanted, config)


def check_gradients(case: Case, lm: HeartMuLa, variant: str, wanted: dict, config: Config) -> Iterator[Row]:
    own = dict(lm.named_parameters())
    def gradient(name: str) -> Tensor:
        grad = own[our_name(name)].grad
        return torch.zeros_like(own[our_name(name)]) if grad is None else grad
    for key in [key for key in wanted if key.startswith((f"{variant}.grad.", f"{variant}.gradnorm."))]:
        kind, name = key.removeprefix(variant + ".").split(".", 1)
        theirs = wanted.pop(key)
        if kind == "gradnorm": yield case.close(key, gradient(name).norm(), theirs, 1e-4 * theirs.abs().item() + 1e-6)
        else: yield case.close(key, gradient(name), to_ours(name, theirs, config)[1], 1e-4 * theirs.abs().max().item() + 1e-6)


def check_sampling(case: Case, wanted: dict) -> Iterator[Row]:
    inputs = case.tensors("inputs")
    for name in [name for name in wanted if name.startswith("probs_")]:
        k, t = name.removeprefix("probs_k").split("_t")
        sampler = Sampler([0] * len(inputs["logits"]), float(t), int(k))
        sampler.noise = -inputs["exponential"].log()[:, None, None]
        yield case.close(name, sampler.limited(inputs["logits"]).softmax(-1), wanted.pop(name), 1e-6)
        yield case.same(name.replace("probs", "sample"), sampler.choose(inputs["logits"][:, None], 0)[:, 0], wanted.pop(name.replace("probs", "sample")))


class Watched(Sampler):
    "Takes the best, and keeps what it chose from."
    def __init__(self): super().__init__([0], temperature=0); self.seen = []

    def choose(self, logits, step, first=0):
        self.seen.append(logits[0, 0].clone())
        return super().choose(logits, step, first)


def check_greedy(case: Case, wanted: dict) -> Iterator[Row]:
    lm, inputs = opened(case), case.tensors("inputs")
    fast, books, prompt = FastModel(lm), lm.config.codebooks, Prompt(inputs["prompt_tokens"][:, -1].numpy(), case.config["muq_index"])
    def song(frames, guidance, muq=None, end=None, fixed=False):
        sampler = Watched()
        writing = Writing(fast, [prompt], frames, sampler, guidance, muq=muq, end=lm.config.audio_vocab if end is None else end)
        return write(writing, fixed=fixed)[0].T, torch.stack(sampler.seen).unflatten(0, (-1, books))
    yield check_names(case, lm)
    for name in [name for name in wanted if name.startswith("frames_cfg")]:
        frames, muq = wanted.pop(name), inputs["muq"][None] if name.endswith("_muq") else None
        guidance = float(name.removeprefix("frames_cfg").removesuffix("_muq"))
        got, logits = song(frames.shape[1], guidance, muq)
        yield case.same(name, got, frames)
        if (key := name.replace("frames", "logits")) in wanted: yield case.close(key, logits, wanted.pop(key), 3e-4)
        yield case.same(f"{name} (frames of fixed shape)", song(frames.shape[1], guidance, muq, fixed=True)[0], frames)
    got, _ = song(case.config["frames"], inputs["eos_cfg"].item(), end=inputs["eos_id"].item())
    yield case.same("frames_eos", got, wanted.pop("frames_eos"))


CHECKS = {"rope": check_rope, "prompts": check_prompts, "lm_teacher_forced": check_teacher_forced, "train_loss": check_loss,
          "sampling": check_sampling, "generate_greedy": check_greedy}
