"""How much memory ACE-Step's codec needs to decode songs of growing length, at once and in pieces, and that both give the same sound.
A random codec with the release's structure at a quarter of its width, on the CPU; each figure comes from a process of its own.
python benchmarks/ace_step_codec.py  (about 2 minutes)"""
import resource
import subprocess
import sys
import time

import numpy as np
import torch

from musiclab.ace_step.codec import Codec, frames_in
from musiclab.ace_step.vocoder import VocoderConfig, random_vocoder
from musiclab.core import prepare_imports

prepare_imports()
from diffusers import AutoencoderDC

SECONDS, STAGES = (15, 30, 60), ["ResBlock"] * 3 + ["EfficientViTBlock"]


def codec(piece: int) -> Codec:
    torch.manual_seed(0)
    sides = {f"{side}_{what}": value for side in ("encoder", "decoder") for what, value in
             (("block_types", STAGES), ("block_out_channels", [32, 64, 128, 256]), ("qkv_multiscales", [[], [], [5], [5]]))}
    dcae = AutoencoderDC(in_channels=2, latent_channels=8, attention_head_dim=32, encoder_layers_per_block=[2, 2, 3, 3], decoder_layers_per_block=[3, 3, 3, 3],
                         downsample_block_type="Conv", upsample_block_type="interpolate", decoder_norm_types="rms_norm", decoder_act_fns="silu", **sides)
    vocoder = random_vocoder(VocoderConfig(dims=(32, 64, 96, 128), upsample_initial_channel=256))
    return Codec(dcae.eval().requires_grad_(False), vocoder, piece)


def measure(seconds: int, piece: int) -> None:
    "Decode, and print peak memory in MB, seconds, and some samples."
    made, latents = codec(piece), torch.randn(8, 16, frames_in(seconds), generator=torch.Generator().manual_seed(1))
    before, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    sound = made.decode(latents).samples
    took = time.perf_counter() - begin
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1000, took, *sound[0, ::sound.shape[1] // 50])


def ask(seconds: int, piece: int) -> tuple[float, float, np.ndarray]:
    run = subprocess.run([sys.executable, __file__, str(seconds), str(piece)], capture_output=True, text=True, check=True)
    memory, took, *samples = map(float, run.stdout.split())
    return memory, took, np.array(samples)


if __name__ == "__main__":
    if len(sys.argv) == 3: measure(*map(int, sys.argv[1:]))
    else:
        for seconds in SECONDS:
            whole, pieces = ask(seconds, 100_000), ask(seconds, 32)
            difference = np.abs(whole[2] - pieces[2]).max()
            print(f"{seconds:4} s of music: at once {whole[0]:6.0f} MB in {whole[1]:5.1f} s, in pieces of 3 s {pieces[0]:6.0f} MB in {pieces[1]:5.1f} s; "
                  f"the sounds differ by {difference:.1e} at most", flush=True)
