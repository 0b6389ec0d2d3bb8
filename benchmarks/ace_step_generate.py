"""What each lever of ACE-Step's transformer is worth: seconds per guided step, one lever after the other, on one random model, in one run.
The first way does everything at each step as one would write it down; each further way adds a lever to the ones before, and must give the same velocity.
Run it with nothing else on the machine:  python benchmarks/ace_step_generate.py  (about 3 minutes; --shape real wants a GPU with 16 GB)"""
import argparse
import ctypes
import time
from collections.abc import Callable
from contextlib import contextmanager
from copy import copy, deepcopy
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from musiclab.ace_step.transformer import Conditions, Config, Transformer
from machine import processor

SHAPES = {  # the release, and a quarter of its width and of its depth
    "real": Config(),
    "mid": Config(num_layers=6, num_attention_heads=5, speaker_embedding_dim=128, text_embedding_dim=192, lyric_hidden_size=256,
                  lyric_encoder=dict(output_size=256, attention_heads=4, linear_units=1024, num_blocks=2)),
}
FRAMES_PER_SECOND = 44100 / 512 / 8
GUIDANCE = 5.0


def random_model(config: Config, device: str, dtype: torch.dtype) -> Transformer:
    with torch.device("meta"): model = Transformer(config)
    model.to_empty(device=device).to(dtype).eval().requires_grad_(False)
    generator = torch.Generator(device).manual_seed(0)
    for name, weight in model.named_parameters():
        if name.endswith("bias"): weight.zero_()
        elif weight.dim() == 1: weight.fill_(1)
        else: weight.normal_(0, (weight[0].numel() ** -0.5) * 0.7, generator=generator)
    return model


class Song:
    "Two songs of one length whose tags and lyrics differ in length, so that there is padding, and their null conditions."
    def __init__(self, model: Transformer, seconds: float, tags: int, lyrics: int):
        device, dtype, c = model.t_block[1].weight.device, model.t_block[1].weight.dtype, model.config
        generator = torch.Generator(device).manual_seed(1)
        self.x = torch.randn(2, c.in_channels, c.patch_size[0], int(seconds * FRAMES_PER_SECOND), generator=generator, device=device).to(dtype)
        self.time = torch.tensor(700.0, device=device)
        text = torch.randn(2, tags, c.text_embedding_dim, generator=generator, device=device).to(dtype)
        ids = torch.randint(c.lyric_encoder_vocab_size, (2, lyrics), generator=generator, device=device)
        shorter = [torch.arange(n, device=device) < torch.tensor([[n], [2 * n // 3]], device=device) for n in (tags, lyrics)]
        self.inputs = text, shorter[0], ids, shorter[1]
        self.nothing = torch.zeros_like(text), shorter[0], torch.zeros_like(ids), shorter[1]

    def half(self) -> "Song":
        "The same songs in bfloat16."
        other = copy(self)
        other.x = self.x.bfloat16()
        other.inputs, other.nothing = ([t.bfloat16() if t.is_floating_point() else t for t in each] for each in (self.inputs, self.nothing))
        return other

    def told(self, model: Transformer) -> list[Conditions]: return [model.encode(*self.inputs), model.encode(*self.nothing)]


def apart(model: Transformer, song: Song, told: list[Conditions]) -> Tensor:
    "Guidance with a look for each of the two conditions."
    yes, no = (model.decode(song.x, song.time, each) for each in told)
    return no + GUIDANCE * (yes - no)


def together(model: Transformer, song: Song, told: Conditions) -> Tensor:
    "Guidance with one look at both."
    yes, no = model.decode(torch.cat([song.x, song.x]), song.time, told).chunk(2)
    return no + GUIDANCE * (yes - no)


@contextmanager
def wide_masks(model: Transformer):
    "A number for each head, frame and token, as masks are usually made."
    def widen(attention, args):
        x, table, memory, mask, *rest = args
        if mask is not None: mask = x.new_zeros(len(x), attention.heads, x.shape[1], mask.shape[-1]).masked_fill_(~mask, -torch.inf)
        return x, table, memory, mask, *rest
    hooks = [block.cross_attn.register_forward_pre_hook(widen) for block in model.transformer_blocks]
    try: yield
    finally: [hook.remove() for hook in hooks]


def ways(model: Transformer, song: Song, half: Transformer | None, compile: bool) -> dict[str, Callable[[], Tensor]]:
    told, memories = song.told(model), [model.remember(each) for each in song.told(model)]
    def written_down():
        with wide_masks(model): return apart(model, song, song.told(model))
    def widely(told):
        with wide_masks(model): return apart(model, song, told)
    found = {"as written down": written_down, "+ conditions once": partial(widely, told), "+ keys and values once": partial(widely, memories),
             "+ masks of keys only": partial(apart, model, song, memories)}
    fastest = model, song, memories
    if compile:
        fastest = compiled(deepcopy(model)), song, memories
        found["+ compiled blocks"] = partial(apart, *fastest)
    if half is not None:
        same = song.half()
        fastest = compiled(half) if compile else half, same, [half.remember(each) for each in same.told(half)]
        found["+ bfloat16"] = partial(apart, *fastest)
    found["+ both looks in one"] = partial(together, *fastest[:2], Conditions.join(fastest[2]))
    return found


def compiled(model: Transformer) -> Transformer:
    for block in model.transformer_blocks: block.compile()
    return model


def peak_begin(device: str) -> float | None: # bytes in use now; from here the peak counts
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what earlier steps left in reserve would hide what this one needs
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError): return None
    return kilobytes("VmRSS") * 1024

def peak_end(device: str) -> float: return torch.cuda.max_memory_allocated() if device != "cpu" else kilobytes("VmHWM") * 1024

def kilobytes(field: str) -> int:
    return int(next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field)).split()[1])


@torch.inference_mode()
def race(ways: dict, device: str, rounds: int) -> dict[str, tuple[float, float, Tensor]]: # seconds, megabytes beside the weights, velocity
    "All ways in turn, several times: whatever else slows the machine down meets all of them. The median of each."
    def wait(): return torch.cuda.synchronize() if device != "cpu" else None
    first, extra, times = {}, {}, {name: [] for name in ways}
    for name, step in ways.items():
        step()  # compiles, and fills caches
        before = peak_begin(device)
        first[name] = step().float()
        extra[name] = float("nan") if before is None else (peak_end(device) - before) / 1e6
    for _ in range(rounds):
        for name, step in ways.items():
            wait(); begin = time.perf_counter()
            step()
            wait(); times[name].append(time.perf_counter() - begin)
    return {name: (median(times[name]), extra[name], first[name]) for name in ways}


def report(results: dict, half: bool) -> bool: # whether all of it was computed in bfloat16
    reference, (slowest, _, wanted) = next(iter(results)), next(iter(results.values()))
    print(f"  {'':24} {'s per step':>10} {'lever':>7} {'in all':>7} {'extra MB':>9} {'off by':>8}")
    before, fine = slowest, True
    for name, (seconds, megabytes, velocity) in results.items():
        error = ((velocity - wanted).norm() / wanted.norm()).item()
        half |= name == "+ bfloat16"
        allowed = 0.05 if half else 1e-4
        fine &= error <= allowed
        print(f"  {name:24} {seconds:10.3f} {before / seconds:6.2f}x {slowest / seconds:6.2f}x {megabytes:9.0f} {error:8.0e}"
              + " DIFFERENT" * (error > allowed))
        before = seconds
    print(f"  velocities equal to '{reference}' within 1e-4 (bfloat16: 0.05) of its norm: {fine}")
    return fine


def weights(config: Config) -> None:
    print("the release's weights in bfloat16:")
    for what, more in (("all", (True, True)), ("without the unused ones", (True, False)), ("and without projectors", (False, False))):
        with torch.device("meta"): size = sum(p.numel() for p in Transformer(config, *more).parameters())
        print(f"  {what:24} {2 * size / 1e9:.2f} GB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="mid")
    parser.add_argument("--seconds", type=float, nargs="+", default=[30.0], help="lengths of the song")
    parser.add_argument("--tags", type=int, default=40)
    parser.add_argument("--lyrics", type=int, default=400, help="ids")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-compile", action="store_true")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    machine = torch.cuda.get_device_name() if device == "cuda" else processor()
    print(f"{machine}, {torch.get_num_threads()} threads, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}")
    config = SHAPES[options.shape]
    print(f"{options.shape} shape: {config.num_layers} blocks of width {config.width}, two songs, {options.tags} + {options.lyrics} tokens for the longer one")
    weights(SHAPES["real"])
    only_half = options.shape == "real"  # in fp32 twice the memory
    fine = True
    for seconds in options.seconds:
        torch._dynamo.reset()
        model = random_model(config, device, torch.bfloat16 if only_half else torch.float32)
        half = None if only_half else deepcopy(model).bfloat16()
        print(f"\n{seconds:g} s, {int(seconds * FRAMES_PER_SECOND)} frames{', all in bfloat16' * only_half}")
        with torch.inference_mode():
            song = Song(model, seconds, options.tags, options.lyrics)
            fine &= report(race(ways(model, song, half, not options.no_compile), device, options.rounds), only_half)
    raise SystemExit(0 if fine else 1)
