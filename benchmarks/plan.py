"""What `musiclab plan` forecasts for the memory of a training, against the peak of steps that were really made, in a process of their own.
Run it:  python benchmarks/plan.py  (a few minutes, 3 GB of memory)"""
import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from machine import processor

from musiclab import plan
from musiclab.recipes import family, look_up

ROOT = Path(__file__).parent.parent


def settings(name: str, **changes):
    return look_up(family(name).config)(data="none", precision="fp32", device="cpu", **changes)


def musicgen(folder: Path, mid: bool):
    from musiclab.musicgen.checkpoint import tiny_checkpoint
    tiny_checkpoint(folder, **({"hidden": 512, "layers": 8, "card": 1024} if mid else {}))
    return {"frames": 1500 if mid else 300, "batch_size": 2}


def museformer(folder: Path, mid: bool):
    return {"model": "small", "max_seq_len": 3072 if mid else 512, "batch_size": 1, "attention": "chunked"}


def ace_step(folder: Path, mid: bool):
    from musiclab.ace_step.checkpoint import TINY, tiny_checkpoint, write_part
    from musiclab.ace_step.transformer import Config, Transformer
    tiny_checkpoint(folder)
    if mid:
        sizes = TINY["transformer"] | {"num_layers": 8, "num_attention_heads": 8, "attention_head_dim": 64, "inner_dim": 512}
        write_part(folder, "transformer", sizes, {name: weight.bfloat16() for name, weight in Transformer(Config.of(sizes), projectors=True,
            unused=True).state_dict().items()})
    return {"crop_seconds": 120 if mid else 20, "batch_size": 2}


def heartmula(folder: Path, mid: bool):
    from musiclab.heartmula.checkpoint import PARTS, Config, random_weights, tiny_checkpoint, write_model
    tiny_checkpoint(folder)
    if mid:
        place = folder / PARTS["model"].folder
        told = json.loads((place / "config.json").read_text()) | {"audio_vocab_size": 1029}
        stack = {"num_heads": 8, "num_kv_heads": 4, "embed_dim": 512, "intermediate_dim": 1408}
        told |= {"backbone": {"num_layers": 8, **stack}, "decoder": {"num_layers": 3, **stack}}
        write_model(place, told, random_weights(Config.of(told)))
    return {"crop_seconds": 120 if mid else 20, "batch_size": 1}


FAMILIES = {"musicgen": musicgen, "ace_step": ace_step, "heartmula": heartmula, "museformer": museformer}


def rows_of(name: str, task, length: float) -> dict:
    "Feature rows of a song of a length (frames, seconds or tokens), with nothing in them that has a meaning."
    chance = np.random.default_rng(0)
    if name == "musicgen":
        from musiclab.musicgen.checkpoint import read_config
        sizes = read_config(task.folder)
        return {"codes": [{"codes": chance.integers(0, sizes.decoder.vocab_size, (sizes.decoder.num_codebooks, int(length))).astype(np.int16)}],
                "text": [{"states": np.zeros((20, sizes.text_encoder.d_model), np.float32)}]}
    if name == "ace_step":
        from musiclab.ace_step.checkpoint import read_config
        width = read_config(task.folder, "transformer")["text_embedding_dim"]
        return {"latents": [{"latents": chance.normal(size=(8, 16, int(length * 44_100 / 4096))).astype(np.float16)}], "text": [{"states": np.zeros((20,
            width), np.float32)}],
                "lyrics": [{"ids": np.ones(50, np.int16)}]}
    if name == "heartmula": return heart_rows(task, length, chance)
    from musiclab import compose
    from musiclab.museformer.tokenizer import HIDTokenizerV2
    ids = np.concatenate([HIDTokenizerV2().encode(compose.compose("techno", seed, seconds=40).song) for seed in range(8)])
    return {"tokens": [{"ids": ids[:int(length)].astype(np.int16)}]}


def heart_rows(task, length, chance):
    codes = chance.integers(0, task.sizes.card, (task.sizes.codebooks, int(length * 12.5))).astype(np.int16)
    return {"prompt": [{"ids": np.arange(1, 200) % 100, "slot": np.array([20])}], "codes": [{"tokens": codes}], "tokens": []}


def child(name: str, told: dict) -> None:
    "Two steps; prints the peak of memory above what was there before."
    import torch
    from musiclab.core import Draw
    from musiclab.engine import Engine, update
    from musiclab.task import At
    from musiclab.tracks import Track
    torch.set_num_threads(1)
    config = settings(name, **told)
    task = look_up(family(name).task)(config)
    length = next(getattr(config, key) for key in ("frames", "crop_seconds", "max_seq_len") if hasattr(config, key))
    draws = [Draw(0, 0, str(i)) for i in range(config.batch_size)]
    examples = [task.example(Track(str(i), lyrics=""), rows_of(name, task, length), draw) for i, draw in enumerate(draws)]
    batch = task.collate(examples)
    torch.ones(64, 64) @ torch.ones(64, 64)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    before = int(next(line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS")))
    engine = Engine(task, config, torch.device("cpu"), total=2)
    for step in range(2): update(engine, step, [(batch, At(step, draws, training=True))])
    peak = int(next(line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")))
    print(json.dumps({"peak": 1024 * (peak - before), "ru_maxrss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}))


def main(names: list[str], shapes: list[str]) -> None:
    print(f"{processor()}, memory above what the process had before, forecast against measured")
    errors = []
    for name in names:
        for shape in shapes:
            for saving in (False, True):
                with tempfile.TemporaryDirectory() as place:
                    folder = Path(place) / "model"
                    made = FAMILIES[name](folder, shape == "mid")
                    told = {"model": str(folder), "gradient_checkpointing": saving, "output": f"{place}/out"} | made
                    guess = sum(plan.memory(settings(name, **told)).values())
                    run = subprocess.run([sys.executable, __file__, "--child", name, json.dumps(told)], capture_output=True, text=True, check=False,
                                         env=os.environ | {"PYTHONPATH": str(ROOT), "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"})
                    if run.returncode: raise SystemExit(run.stderr)
                    true = json.loads(run.stdout.splitlines()[-1])["peak"]
                    if shape == "mid": errors.append(guess / true - 1)
                    print(f"{name:10} {shape:4} checkpointing {'on ' if saving else 'off'}: forecast {guess / 1e6:8.1f} MB, "
                          f"measured {true / 1e6:8.1f} MB, {guess / true - 1:+.0%}", flush=True)
    if errors: print(f"mid shapes: the forecast is off by {np.mean(np.abs(errors)):.0%} on average, {max(errors, key=abs):+.0%} at most")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--families", nargs="*", default=list(FAMILIES))
    parser.add_argument("--shapes", nargs="*", default=["tiny", "mid"])
    parser.add_argument("--child", nargs=2)
    chosen = parser.parse_args()
    if chosen.child: child(chosen.child[0], json.loads(chosen.child[1]))
    else: main(chosen.families, chosen.shapes)
