"""How long HeartCodec takes for songs of growing length, in how much memory, and when the first sound comes: our decoder against the same modules
arranged like the reference (weight normalisation computed anew at each use, every window's sound in one go, all kept until the end).
A random codec with the release's structure in small proportions, on the CPU; each figure comes from a process of its own.
Times are processor times on one thread, so that a neighbour does not count.
python benchmarks/heartmula_codec.py  (about 4 minutes; --limit 1 for a trial of one)"""
import argparse
import resource
import subprocess
import sys
import time

import numpy as np
import torch
from machine import processor
from torch import Tensor, nn

from musiclab.audio import Audio
from musiclab.heartmula.codec import STEP, UNIT, WINDOW, Codec, Stream, seeded, windows
from musiclab.heartmula.codec_files import TINY, set_loudness
from musiclab.heartmula.encoder import AudioTokenizer, Encoder
from musiclab.heartmula.flow import Flow
from musiclab.heartmula.quantizer import CodecConfig, Quantizer
from musiclab.heartmula.scalar_codec import ScalarCodec

SIZES = CodecConfig(dim=128, codebook_size=1024, num_attention_heads=4, num_layers=4, num_layers_2=1, init_channel=8)
STEPS = 10  # of the walk


def make() -> Codec:
    torch.manual_seed(0)
    codec = Codec(Flow(SIZES).eval().requires_grad_(False), ScalarCodec(SIZES).eval().requires_grad_(False))
    set_loudness(codec)
    return codec


def normalised(scalar: ScalarCodec) -> ScalarCodec:
    "Direction and length instead of each weight, as in the checkpoint."
    for layer in [*scalar.decoder.modules()]:
        if isinstance(layer, (nn.Conv1d, nn.ConvTranspose1d)): nn.utils.parametrizations.weight_norm(layer)
    return scalar.requires_grad_(False)


@torch.inference_mode()
def plainly(codec: Codec, codes: Tensor) -> np.ndarray:
    "All latents, then all sounds, then all joints."
    frames, step, frame = codes.shape[1], WINDOW // UNIT * STEP, 2 * codec.config.hop
    latents, before, sound = [], None, None
    for number in range(windows(frames)):
        part = codes[:, torch.arange(number * step, number * step + WINDOW) % frames]
        latents.append(codec.flow.latents(part[None], seeded(0)(number, (1, 2 * WINDOW, codec.config.out_channels)), before, STEPS))
        before = latents[-1][:, 2 * step:]
    parts = [codec.scalar.decode(window[0].unflatten(-1, (2, -1)).permute(1, 2, 0), piece=2 * WINDOW) for window in latents]
    for part in parts:
        if sound is None: sound = part; continue
        common = (WINDOW - step) * frame
        ramp = torch.linspace(0, 1, common)
        sound = torch.cat([sound[:, :-common], sound[:, -common:] * (1 - ramp) + part[:, :common] * ramp, part[:, common:]], 1)
    return sound[:, :frames * frame].numpy()


def codes_of(seconds: float) -> Tensor:
    return torch.randint(SIZES.codebook_size, (8, int(seconds * 12.5)), generator=torch.Generator().manual_seed(1))


def decode(way: str, seconds: float) -> None:
    "Print peak memory in MB, seconds, and some samples."
    codec = make()
    if way == "plain": codec = Codec(codec.flow, normalised(codec.scalar))
    before, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    sound = plainly(codec, codes_of(seconds)) if way == "plain" else codec.decode(codes_of(seconds), steps=STEPS).samples
    took = time.process_time() - begin
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1000, took, *sound[0, ::sound.shape[1] // 50])


def first_sound(window: int) -> None:
    "Print how many seconds must have been composed before the first sound, and how long its decoding takes."
    stream, codes = Stream(make(), window, STEPS), codes_of(60)
    for known in range(codes.shape[1]):
        begin = time.process_time()
        if stream.push(codes[:, known:known + 1]): return print((known + 1) / 12.5, time.process_time() - begin)


def encode(channels: int) -> None:
    "Print how long a minute takes to become tokens, in mono or stereo."
    torch.manual_seed(0)
    values = TINY["encoder"] | {"chunk_samples": 714_240}
    tokenizer = AudioTokenizer(Encoder(values).eval().requires_grad_(False), Quantizer(CodecConfig.of(TINY["codec"])).requires_grad_(False))
    sound = Audio(np.random.default_rng(0).normal(0, 0.1, (channels, 60 * 24_000)).astype(np.float32), 24_000)
    tokenizer.encode(sound.crop(0, 1))
    begin = time.process_time()
    tokenizer.encode(sound)
    print(time.process_time() - begin)


def ask(*arguments) -> list[float]:
    run = subprocess.run([sys.executable, __file__, *map(str, arguments)], capture_output=True, text=True, check=True)
    return [float(number) for number in run.stdout.split()]


def compare(lengths: list[float]) -> None:
    for seconds in lengths:
        (plain_memory, plain, *theirs), (memory, took, *ours) = ask("decode", "plain", seconds), ask("decode", "ours", seconds)
        print(f"{seconds:6.1f} s of music: like the reference {plain:5.1f} s in {plain_memory:5.0f} MB, ours {took:5.1f} s in {memory:5.0f} MB "
              f"({plain / took:.2f} times as fast, {plain_memory / memory:.1f} times less memory); "
              f"the sounds differ by {np.abs(np.subtract(theirs, ours)).max():.1e} at most", flush=True)
    for window in (WINDOW, UNIT):
        composed, took = ask("first", window)
        print(f"windows of {window / 12.5:5.2f} s: the first sound comes {took:4.1f} s after {composed:5.2f} s have been composed", flush=True)
    stereo, mono = ask("encode", 2)[0], ask("encode", 1)[0]
    print(f"a minute to tokens (tiny encoder): stereo {stereo:.1f} s, mono {mono:.1f} s", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser()
    parser.add_argument("one", nargs="*")
    parser.add_argument("--limit", type=int, default=3, help="how many lengths")
    given = parser.parse_args()
    if given.one:
        what, *rest = given.one
        if what == "decode": decode(rest[0], float(rest[1]))
        else: {"first": first_sound, "encode": encode}[what](int(rest[0]))
    else:
        print(f"{processor()}, torch {torch.__version__}, 1 thread")
        compare([29.76, 55.36, 106.56][:given.limit])
