"""Attention of HID-MuseFormer, forward and backward, one layer of the small model (4 heads of 64) on one thread: bar by bar in blocks,
against the same mask written out, and against plain causal attention (PyTorch's flash kernel). Every case in a process of its own, for its peak of memory.
Run it with nothing else on the machine:  python benchmarks/museformer_attention.py  (about 3 minutes, 6 GB of memory)"""
import argparse
import resource
import subprocess
import sys
import time

import numpy as np
import torch
from torch.nn import functional as F

from musiclab import compose
from musiclab.museformer.attention import PRESETS, Chunked, Dense
from musiclab.museformer.layout import lay_out
from musiclab.museformer.tokenizer import HIDTokenizerV2
from machine import processor


def stream(tokens: int) -> np.ndarray:
    "Composed songs end to end, as one piece."
    ids, number = [], 0
    while len(ids) < tokens:
        styles = list(compose.STYLES)
        ids += HIDTokenizerV2().encode(compose.compose(styles[number % len(styles)], number, seconds=180).song)[1:-1].tolist()
        number += 1
    return np.array([1, *ids][:tokens])


def causal(q, k, v): return F.scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in (q, k, v)), is_causal=True)[0].transpose(0, 1)


def measure(way: str, preset: str, tokens: int) -> None:
    "One case: seconds, and the peak of memory above what was there before [MB]."
    torch.set_num_threads(1)
    torch.manual_seed(0)
    at = lay_out(stream(tokens))
    q, k, v, grad = (torch.randn(tokens, 4, 64, requires_grad=True) for _ in range(4))
    def once(tokens, attend): return torch.autograd.grad(attend(q[:tokens], k[:tokens], v[:tokens]), (q, k, v), grad[:tokens])
    once(512, causal)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    attend = {"causal": lambda at, fine: causal, "dense": Dense, "blocks": Chunked.plan}[way](at, PRESETS[preset])
    begin = time.perf_counter()
    once(tokens, attend)
    print(time.perf_counter() - begin, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


def ask(way: str, preset: str, tokens: int) -> tuple[float, float]:
    answer = subprocess.run([sys.executable, __file__, "--case", way, preset, str(tokens)], capture_output=True, text=True, check=True).stdout.split()
    return float(answer[-2]), float(answer[-1])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs=3, help="way, preset, tokens: one measurement")
    options = parser.parse_args()
    if options.case: measure(options.case[0], options.case[1], int(options.case[2]))
    else:
        print(f"{processor()}, 1 thread, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}")
        for tokens, rival, goals in ((16384, "dense", {"hid": 4, "window": 5}), (24576, "causal", {"hid": 2.5, "window": 3})):
            for preset, goal in goals.items():
                (theirs, memory), (ours, little) = ask(rival, preset, tokens), ask("blocks", preset, tokens)
                print(f"{tokens} tokens, {preset:6}: {rival} {theirs:6.2f} s {memory:6.0f} MB, in blocks {ours:6.2f} s {little:6.0f} MB: "
                      f"{theirs / ours:.1f} times as fast (goal {goal}: {'reached' if theirs / ours >= goal else 'MISSED'}), "
                      f"{little / memory:.0%} of the memory" +
                      (f" (goal 25%: {'reached' if little <= memory / 4 else 'MISSED'})" if rival == "dense" else ""))
