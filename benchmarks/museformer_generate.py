"""Writing with HID-MuseFormer, small, one piece, one thread: the compacted cache of the default preset
against a cache that keeps everything (the same model with the preset full).
Run it with nothing else on the machine:  python benchmarks/museformer_generate.py  (about 3 minutes)"""
import argparse
import time
from statistics import median

import torch

from museformer_attention import processor, stream
from musiclab.museformer.attention import PRESETS
from musiclab.museformer.cache import Cache
from musiclab.museformer.model import create_model

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=80, help="written per round")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"{processor()}, 1 thread, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}")
    model, ids, ms = create_model().eval(), stream(20000), {}
    for length in (2048, 8192, 16384):
        caches = {}
        for preset in ("hid", "full"):
            model.fine = PRESETS[preset]
            caches[preset] = Cache(model, [torch.from_numpy(ids[:length])])
        times = {preset: [] for preset in caches}
        for number in range(options.rounds): # both in turn: whatever slows the machine down meets both
            for preset, cache in caches.items():
                model.fine = PRESETS[preset]
                start, begin = length + number * options.tokens, time.perf_counter()
                for token in ids[start:start + options.tokens].tolist(): cache.step([token])
                times[preset].append(1000 * (time.perf_counter() - begin) / options.tokens)
        ms[length] = {preset: median(each) for preset, each in times.items()}
        held = {preset: cache.buffer.rows.shape[4] for preset, cache in caches.items()}
        goal = {8192: 2, 16384: 3}.get(length)
        ratio = ms[length]["full"] / ms[length]["hid"]
        print(f"after {length:5} tokens: everything kept {ms[length]['full']:6.2f} ms per token, compacted {ms[length]['hid']:6.2f} ms "
              f"({1000 / ms[length]['hid']:.0f} tokens/s): {ratio:.1f} times as fast"
              + (f" (goal {goal}: {'reached' if ratio >= goal else 'MISSED'})" if goal else "") + f"; slots {held}")
    growth = ms[16384]["hid"] / ms[2048]["hid"]
    print(f"a token after 16,384 takes {growth:.2f} times as long as one after 2,048 (goal at most 1.5: {'reached' if growth <= 1.5 else 'MISSED'})")
