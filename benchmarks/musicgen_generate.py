"""Our decode loop against transformers' `generate`: the same random weights, side by side, greedy, guidance 3, one song.
Run it with nothing else on the machine:  python benchmarks/musicgen_generate.py  (about 3 minutes, 7 GB of memory for the real shape)"""
import argparse
import time
from copy import deepcopy
from statistics import median
from types import SimpleNamespace

import torch

from musiclab.core import prepare_imports
from musiclab.musicgen.checkpoint import tiny_config
from musiclab.musicgen.decoder import Decoding, FastDecoder
from musiclab.musicgen.model import MusicGenLM
from musiclab.musicgen.sampling import generate_tokens
from musiclab.sampling import Sampler

prepare_imports()
from transformers import MusicgenDecoderConfig, MusicgenForConditionalGeneration, T5Config
from machine import processor


def random_model(shape: str) -> MusicgenForConditionalGeneration:
    "A random MusicGen: tiny, or with the decoder of musicgen-small (its text encoder and codec take no part here and stay tiny)."
    config = tiny_config(hidden=64)
    if shape == "small":
        config.decoder = MusicgenDecoderConfig()
        config.text_encoder = T5Config(vocab_size=512, d_model=768, d_kv=8, d_ff=64, num_layers=1, num_heads=4, is_encoder_decoder=False)
    torch.manual_seed(0)
    model = MusicgenForConditionalGeneration(config).eval()
    special = config.decoder.pad_token_id
    model.generation_config.update(pad_token_id=special, bos_token_id=special, decoder_start_token_id=special)
    return model


words = torch.randint(3, 500, (1, 12), generator=torch.Generator().manual_seed(0))


def transformers_way(model):
    "Frames -> tokens, by `generate`; they are caught on their way to the codec."
    caught = []
    model.audio_encoder.decode = lambda codes, *_, **__: caught.append(codes[0]) or SimpleNamespace(audio_values=torch.zeros(1, 1, 1))
    def write(frames):
        model.generate(input_ids=words, attention_mask=torch.ones_like(words), max_new_tokens=frames + 3, do_sample=False, guidance_scale=3.0)
        return caught.pop()
    return write


def our_way(model, **how):
    "Frames -> tokens, by our loop."
    fast = FastDecoder(MusicGenLM(model.decoder, model.enc_to_dec_proj), **how)
    with torch.inference_mode(): states = model.text_encoder(input_ids=words).last_hidden_state
    mask = torch.ones_like(words, dtype=torch.bool)
    return lambda frames: generate_tokens(Decoding(fast, states, mask, frames), Sampler([0], temperature=0), frames)


def race(ways: dict, frames: int, rounds: int) -> dict[str, float]: # ms per frame
    "All ways in turn, several times: whatever else slows the machine down meets all of them. The median of each."
    for write in ways.values(): write(8)
    times = {name: [] for name in ways}
    for _ in range(rounds):
        for name, write in ways.items():
            begin = time.perf_counter()
            write(frames)
            times[name].append(1000 * (time.perf_counter() - begin) / frames)
    return {name: median(each) for name, each in times.items()}


def report(title: str, times: dict[str, float], goals: dict[tuple[str, str], float]) -> None:
    print(f"\n{title}")
    for name, ms in times.items(): print(f"  {name:22} {ms:8.2f} ms per frame  {1000 / ms:7.1f} frames/s  {20 / ms:5.2f} x real time")
    for (ours, theirs), goal in goals.items():
        ratio = times[theirs] / times[ours]
        print(f"  {ours} is {ratio:.2f} times as fast as {theirs} (goal {goal:g}): {'reached' if ratio >= goal else 'MISSED'}")


def tiny(rounds: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = random_model("tiny").to(dtype)
        ways = {"transformers": transformers_way(model), "ours": our_way(model)}
        title = f"tiny shape (2 layers, width 64), {str(dtype).removeprefix('torch.')}"
        report(title, race(ways, 200, 3 * rounds), {("ours", "transformers"): 5} if dtype == torch.float32 else {})
        if dtype == torch.float32: print(f"  greedy tokens equal: {torch.equal(ways['ours'](200), ways['transformers'](200))}")


def small(frames: int, rounds: int) -> None:
    model = random_model("small")
    print(f"\nthe decoder of musicgen-small has {sum(p.numel() for p in model.decoder.parameters()) / 1e6:.1f} M weights")
    half = deepcopy(model).bfloat16()
    ways = {"transformers fp32": transformers_way(model), "transformers bf16": transformers_way(half), "ours fp32": our_way(model),
            "ours bf16": our_way(model, dtype=torch.bfloat16), "ours int8": our_way(model, int8=True)}
    report("musicgen-small, random weights", race(ways, frames, rounds), {
        ("ours bf16", "transformers fp32"): 3, ("ours bf16", "transformers bf16"): 1, ("ours int8", "transformers fp32"): 6})
    print(f"  greedy tokens equal (fp32): {torch.equal(ways['ours fp32'](frames), ways['transformers fp32'](frames))}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=["tiny", "small", "both"], default="both")
    parser.add_argument("--frames", type=int, default=30, help="per repetition of the real shape")
    parser.add_argument("--rounds", type=int, default=3, help="repetitions of the real shape; the tiny one gets three times as many")
    options = parser.parse_args()
    print(f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}")
    if options.shape != "small": tiny(options.rounds)
    if options.shape != "tiny": small(options.frames, options.rounds)
