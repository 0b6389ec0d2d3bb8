"""A LoRA step of ACE-Step the original trainer's way — all encoders in the step, everything in float32 — against the same step with a store
of features, with a bf16 base, with compiled blocks: each alone, then together. The same losses on all sides; each way in a process of its own,
so that its peak of memory is its own.
Run it with nothing else on the machine:  python benchmarks/ace_step_train.py  (about ten minutes)"""
import argparse
import ctypes
import gc
import platform
import tempfile
import time
from dataclasses import dataclass
from datetime import date
from math import ceil
from multiprocessing import get_context
from statistics import median

import torch
from torch.utils.flop_counter import FlopCounterMode

from machine import processor
from musiclab import adapters
from musiclab.ace_step.checkpoint import TINY
from musiclab.ace_step.codec import frames_in
from musiclab.ace_step.data import Ragged
from musiclab.ace_step.listeners import hear
from musiclab.ace_step.settings import TARGETS, AceStepConfig
from musiclab.ace_step.train import losses
from musiclab.ace_step.transformer import Config, Transformer
from musiclab.core import Draw
from musiclab.engine import recompute
from musiclab.task import At, Batch

SHARE = 26 / 63  # of a step's floating-point operations go to the encoders, for 240 s in the release's shape


@dataclass(frozen=True)
class Way:
    name: str
    store: bool = False  # features from the store
    bf16: bool = False  # frozen weights and products in bf16
    compiled: bool = False  # torch.compile of each block
    kept: bool = False  # activations are kept, not computed twice


WAYS = [Way("everything in the step, fp32"), Way("with the store", store=True), Way("with bf16", bf16=True), Way("with compiled blocks", compiled=True),
        Way("together", store=True, bf16=True, compiled=True), Way("together, activations kept", store=True, bf16=True, compiled=True, kept=True)]


def shape(size: str) -> dict:
    if size == "tiny": return TINY["transformer"] | {"num_layers": 2}
    return dict(num_layers=8, num_attention_heads=8, attention_head_dim=128, text_embedding_dim=512, lyric_hidden_size=512, speaker_embedding_dim=64,
                lyric_encoder=dict(output_size=512, attention_heads=8, linear_units=2048, num_blocks=3), ssl_encoder_depths=[3, 3], ssl_latent_dims=[512, 384])


def make_encoders(config: Config, layers: int) -> dict:
    "Random encoders of the real kinds: codec, text encoder, and two listeners with so many layers."
    from diffusers import AutoencoderDC
    from transformers import HubertConfig, HubertModel, UMT5Config, UMT5EncoderModel
    torch.manual_seed(1)
    wide = config.width > 64
    channels = [32, 64, 128, 256] if wide else [8, 16, 32, 32]
    def listener(width): return HubertModel(HubertConfig(hidden_size=width, num_hidden_layers=layers, num_attention_heads=4, intermediate_size=4 * width,
                                                         conv_dim=[64 if wide else 8] * 7, num_conv_pos_embedding_groups=4, num_conv_pos_embeddings=16))
    text = UMT5Config(vocab_size=256, d_model=config.text_embedding_dim, d_kv=32, d_ff=1024, num_layers=6, num_heads=8,
                      feed_forward_proj="gated-gelu", use_cache=False)
    made = {"codec": AutoencoderDC(**TINY["codec"] | {"encoder_block_out_channels": channels, "decoder_block_out_channels": channels}).encoder,
            "text": UMT5EncoderModel(text), "mert": listener(config.ssl_latent_dims[0]), "mhubert": listener(config.ssl_latent_dims[1])}
    return {name: module.eval().requires_grad_(False) for name, module in made.items()}


@torch.no_grad()
def encode(encoders: dict, seconds: float) -> dict:
    "What a step of the original trainer computes before it begins; the sound is noise, the words are numbers."
    chance = torch.Generator().manual_seed(0)
    mel = torch.randn(1, 2, 128, 8 * frames_in(seconds), generator=chance)
    words = torch.randint(3, 256, (1, 40), generator=chance)
    heard = {name: Ragged([hear(encoders[name], torch.randn(int(rate * seconds), generator=chance), int(rate * piece))])
             for name, rate, piece in (("mert", 24_000, 5), ("mhubert", 16_000, 30))}
    return {"latents": encoders["codec"](mel), "text": encoders["text"](input_ids=words).last_hidden_state} | heard


def make_model(config: Config, way: Way) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(config, projectors=True, unused=True)
    weights = {name: weight.bfloat16().float() for name, weight in model.state_dict().items()}  # all ways have the same
    if way.store: model = Transformer(config, projectors=True)
    model.load_state_dict({name: weights[name] for name in model.state_dict()})
    model.requires_grad_(False)
    if way.bf16: model = model.bfloat16()
    for module in model.lyric_encoder.modules():
        if isinstance(module, torch.nn.Dropout): module.p = 0.0
    adapters.attach(model, TARGETS["attn_qkv+linear_qkv+speech_embedder"], rank=16, alpha=16, dropout=0.0)
    if not way.kept: recompute(model.transformer_blocks)
    if way.compiled: [block.compile() for block in model.transformer_blocks]
    return model.train()


class Trainer:
    "One way, ready to step."
    def __init__(self, way: Way, size: str, seconds: float, layers: int, made: dict | None):
        self.way, self.config, self.seconds, self.made = way, Config.of(shape(size)), seconds, made
        if not way.store: self.encoders = make_encoders(self.config, layers)
        self.model, self.settings = make_model(self.config, way), AceStepConfig(data="", ssl_weight=1.0, lyrics_dropout=0, text_dropout=0)
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-3)

    def forward(self, number: int):
        made = self.made if self.way.store else encode(self.encoders, self.seconds)
        frames, ids = made["latents"].shape[-1], torch.randint(300, 6000, (1, 200), generator=torch.Generator().manual_seed(0))
        masks = {"frames": torch.ones(1, frames, dtype=torch.bool), "text_mask": torch.ones(made["text"].shape[:2], dtype=torch.bool)}
        batch = Batch(made | masks | {"lyrics": ids, "lyrics_mask": torch.ones_like(ids, dtype=torch.bool)}, {})
        with torch.autocast("cpu", torch.bfloat16, enabled=self.way.bf16):
            parts = losses(self.model, batch, At(step=number, draws=[Draw(0, number, "song")], training=True), self.settings, ["mert", "mhubert"])
        return parts["denoise"] + (parts["mert"] + parts["mhubert"]) / 2

    def step(self, number: int) -> float:
        loss = self.forward(number)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()


def counted(run) -> float:
    with FlopCounterMode(display=False) as counter: run()
    return counter.get_total_flops()


def enough_layers(size: str, seconds: float) -> tuple[int, float]:
    "How many layers the listeners need for the encoders' share to be the release's; and the share. Counted, not measured."
    trainer = Trainer(Way("", store=True), size, seconds, 1, encode(make_encoders(Config.of(shape(size)), 1), seconds))
    step = counted(lambda: trainer.forward(0).backward())
    one, two = (counted(lambda n=n: encode(make_encoders(trainer.config, n), seconds)) for n in (1, 2))
    layers = max(1, ceil(1 + (SHARE / (1 - SHARE) * step - one) / (two - one)))
    encoders = one + (layers - 1) * (two - one)
    return layers, encoders / (encoders + step)


def memory() -> float:
    "The most memory since the last call, in GB."
    with open("/proc/self/status", encoding="utf-8") as status:
        peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    with open("/proc/self/clear_refs", "w", encoding="utf-8") as reset: reset.write("5")
    return peak * 1024 / 1e9


def work(way: Way, size: str, seconds: float, layers: int, made: dict | None, threads: int, pipe) -> None:
    "Make the steps that are asked for, and say what each took."
    torch.set_num_threads(threads)
    trainer = Trainer(way, size, seconds, layers, made)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    memory()
    for number in iter(pipe.recv, None):
        began, used = time.perf_counter(), time.process_time()
        loss = trainer.step(number)
        pipe.send((time.perf_counter() - began, time.process_time() - used, memory(), loss))


def main(size: str, seconds: float, steps: int, threads: int) -> None:
    "All ways in turn, step by step: whatever else slows the machine down meets all of them."
    (layers, share), spawn, pipes = enough_layers(size, seconds), get_context("spawn"), {}
    print(f"{processor()}, {threads} threads, torch {torch.__version__}, Python {platform.python_version()}, {date.today()}")
    print(f"{size} shape, {seconds:g} s in each step, LoRA r=16; of the operations the encoders make {share:.0%} (release, 240 s: {SHARE:.0%})", flush=True)
    stored = encode(make_encoders(Config.of(shape(size)), layers), seconds)
    for way in WAYS:
        pipes[way], theirs = spawn.Pipe()
        made = stored if way.store else None
        spawn.Process(target=work, args=(way, size, seconds, layers, made, threads, theirs), daemon=True).start()
        theirs.close()
    found = {way: [] for way in WAYS}
    for number in range(steps + 2):  # the first two compile
        for way in WAYS:
            pipes[way].send(number)
            found[way].append(pipes[way].recv())
    for pipe in pipes.values(): pipe.send(None)
    first = found[WAYS[0]]
    for way, rows in found.items():
        apart = max(abs(row[3] - other[3]) / other[3] for row, other in zip(rows, first))
        assert apart < (0.02 if way.bf16 else 1e-4), f"{way.name}: losses differ by {apart:.1e}"
        wall, used, most = median(row[0] for row in rows[2:]), median(row[1] for row in rows[2:]), max(row[2] for row in rows[2:])
        ratio = median(row[1] for row in first[2:]) / used
        took = f"{1 / wall:7.3f} steps/s {used:8.2f} s of processor time {ratio:6.2f}x"
        print(f"{way.name:30} {took} {most:6.2f} GB  losses apart by {apart:.0e}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="mid", choices=["tiny", "mid"])
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        import os
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder  # a killed compilation leaves nothing behind
        main(**vars(options))
