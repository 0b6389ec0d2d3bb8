"""A LoRA training step of MusicGen with cached codes and text states, against the same step that encodes them: same weights, side by side.
Run it with nothing else on the machine:  python benchmarks/musicgen_train.py  (some minutes, 5 GB of memory for the real shape)"""
import argparse
import platform
import time
from statistics import median

import numpy as np
import torch

from musiclab import adapters
from musiclab.audio import Audio
from musiclab.core import prepare_imports
from musiclab.musicgen.checkpoint import tiny_config
from musiclab.musicgen.codes import encode
from musiclab.musicgen.model import LORA_TARGETS, MusicGenLM, pad_states

prepare_imports()
from transformers import EncodecConfig, EncodecModel, MusicgenDecoderConfig, MusicgenForCausalLM, T5Config, T5EncoderModel


def models(shape: str):
    "Random weights: the decoder with its adapter, the codec, the text encoder."
    torch.manual_seed(0)
    config = tiny_config()
    if shape == "small": # the sizes of facebook/musicgen-small
        config.decoder = MusicgenDecoderConfig()
        config.audio_encoder = EncodecConfig(sampling_rate=32000, target_bandwidths=[2.2], upsampling_ratios=[8, 5, 4, 4], num_filters=64, hidden_size=128,
                                             codebook_size=2048, codebook_dim=128, use_causal_conv=False, use_conv_shortcut=False, norm_type="weight_norm")
        config.text_encoder = T5Config(d_model=768, d_ff=3072, num_layers=12, num_heads=12, is_encoder_decoder=False, use_cache=False)
    dtype = torch.bfloat16 if shape == "small" else torch.float32
    decoder = MusicgenForCausalLM(config.decoder).to(dtype)
    lm = MusicGenLM(decoder, torch.nn.Linear(config.text_encoder.d_model, config.decoder.hidden_size, dtype=dtype)).requires_grad_(False)
    adapters.attach(lm, LORA_TARGETS)
    return lm.train(), EncodecModel(config.audio_encoder).eval(), T5EncoderModel(config.text_encoder).eval()


def main(shape: str, seconds: float, rounds: int) -> None:
    lm, codec, text_encoder = models(shape)
    songs = [Audio(np.random.default_rng(i).normal(0, 0.1, int(32000 * seconds)).astype(np.float32), 32000) for i in range(2)]
    words = torch.randint(3, 500, (2, 24), generator=torch.Generator().manual_seed(0))

    def encoded():
        with torch.inference_mode():
            states = text_encoder(input_ids=words).last_hidden_state
            return torch.stack([encode(codec, song) for song in songs]).clone(), [s.clone() for s in states]

    def step(codes, states):
        padded, mask = pad_states(states)
        with torch.autocast("cpu", torch.bfloat16, enabled=shape == "small"):
            sums, counts = lm.losses(codes, torch.ones(2, codes.shape[-1], dtype=torch.bool), padded, mask)
        (sums / counts).mean().backward()

    cached = encoded()
    ways = {"cached": lambda: step(*cached), "encoded in the step": lambda: step(*encoded())}
    times = {name: [] for name in ways}
    for way in ways.values(): way()
    for _ in range(rounds):
        for name, way in ways.items():
            begin = time.perf_counter()
            way()
            times[name].append(time.perf_counter() - begin)
    middle = {name: median(each) for name, each in times.items()}
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    print(f"\n{shape} shape, 2 songs of {seconds:g} s ({cached[0].shape[-1]} frames), {machine}")
    for name, value in middle.items(): print(f"  {name:20} {value:8.3f} s per step")
    print(f"  cached codes make the step {middle['encoded in the step'] / middle['cached']:.2f}x as fast")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=["tiny", "small"], action="append", help="may be given twice; default: both")
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    for shape in args.shape or ["tiny", "small"]: main(shape, args.seconds, args.rounds)
