"""A LoRA step of HeartMuLa, its local decoder on every row, on the frames only, and on a part of the frames: the same random weights,
side by side, each way in a process of its own (memory is measured as the process's peak, beside what it holds before the step).
Run it with nothing else on the machine:  python benchmarks/heartmula_train.py  (a few minutes)"""
import argparse
import json
import resource
import subprocess
import sys
import time
from statistics import median

import numpy as np
import torch
from machine import processor
from torch.nn import functional as F

from musiclab import adapters
from musiclab.engine import recompute
from musiclab.heartmula.checkpoint import RELEASE, Config, Stack, random_weights
from musiclab.heartmula.data import collate, example
from musiclab.heartmula.model import LORA_TARGETS, losses, of_release
from musiclab.heartmula.prompts import Prompt
from musiclab.core import Draw

WAYS = ("every row", "frames only", "a quarter of the frames", "an eighth of the frames")


def shrunk(factor: int) -> Config:
    "The release with all widths of its layers divided; the codebooks keep their size, the backbone a quarter of its depth."
    def stack(s, layers): return Stack(layers, s.heads, s.kv_heads, s.width // factor, s.mlp // factor)
    return Config(stack(RELEASE.backbone, 7), stack(RELEASE.decoder, 1), 1024, 8197, 8, 64)


def every_row(lm, batch):
    "The loss as it is usually written: numbers for all rows, then a mask."
    first, rest = lm(batch["tokens"], batch["counts"], batch["slots"])
    targets, frames = batch["tokens"][:, 1:, :-1], batch["frames"][:, 1:]
    leading = F.cross_entropy(first.float().flatten(0, 1), targets[..., 0].flatten(), reduction="none").view(frames.shape)
    others = F.cross_entropy(rest.float().flatten(0, 2), targets[..., 1:].flatten(), reduction="none").view(*frames.shape, -1)
    return (leading * frames).sum() / frames.sum() + (others * frames[..., None]).sum() / frames.sum() / others.shape[-1]


def on_frames(lm, batch):
    "Our loss."
    here, spelled = batch["frames"][:, 1:], batch["spelled"][:, 1:]
    hidden = lm.hidden(batch["tokens"], batch["counts"], batch["slots"])[:, :-1][here]
    sums = losses(lm, hidden, batch["tokens"][:, 1:, :-1][here], spelled[here])
    return sums[0] / here.sum() + sums[1:].mean() / spelled.sum()


def peak() -> float: return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 # MB


def measure(way: str, factor: int, frames: int, rounds: int) -> dict:
    "Time and memory of one way."
    torch.manual_seed(0)
    config = shrunk(factor)
    lm = of_release(random_weights(config), config)
    adapters.attach(lm, LORA_TARGETS, rank=16, dropout=0)
    recompute(lm.backbone.layers)
    rng, share = np.random.default_rng(0), {"a quarter of the frames": 0.25, "an eighth of the frames": 0.125}.get(way, 1.0)
    song = rng.integers(8192, size=(frames, 8))
    prompt = Prompt(rng.integers(1, 1000, 120), 20)
    batch = collate([example(prompt, song, Draw(0, 0, "song"), frames, share=share)])
    loss, times = every_row if way == WAYS[0] else on_frames, []
    before = peak()
    for _ in range(rounds + 1):
        begin = time.perf_counter()
        value = loss(lm.train(), batch)
        value.backward()
        times.append(time.perf_counter() - begin)
    return {"seconds": median(times[1:]), "memory": peak() - before, "loss": value.item()}


def main(factor: int, frames: int, rounds: int) -> None:
    config = shrunk(factor)
    depth = f"{config.backbone.layers} + {config.decoder.layers} layers of width {config.backbone.width}"
    print(f"\n{depth}, a song of {frames} frames ({frames / 12.5:.0f} s) and 120 rows of text")
    found = {}
    for way in WAYS:
        call = [sys.executable, __file__, "--way", way, "--factor", str(factor), "--frames", str(frames), "--rounds", str(rounds)]
        found[way] = json.loads(subprocess.run(call, check=True, capture_output=True, text=True).stdout)
    base = found[WAYS[0]]
    for way, one in found.items():
        print(f"  {way:24} {one['seconds']:7.2f} s per step, {base['seconds'] / one['seconds']:5.2f} x   {one['memory']:7.0f} MB beside the weights, "
              f"{base['memory'] / max(one['memory'], 1):5.1f} x less   loss {one['loss']:.4f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--factor", type=int, default=8, help="divide the release's widths by this: 32, 16, 8 or 4")
    parser.add_argument("--frames", type=int, default=750)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--way", choices=WAYS, help="measure one way and print it as JSON")
    options = parser.parse_args()
    if options.way: print(json.dumps(measure(options.way, options.factor, options.frames, options.rounds)))
    else:
        print(f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}")
        main(options.factor, options.frames, options.rounds)
