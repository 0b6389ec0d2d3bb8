"The smallest task that uses all of the training loop: features, two loss parts, probes, an adapter, dropout."
import multiprocessing
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from musiclab.config import TrainConfig
from musiclab.layers import quantize as quantize_layers
from musiclab.tracks import Track, Tracks
from musiclab.task import Batch, Group, Task


class Letters:
    "A caption as numbers."
    name, where, settings = "letters", "device", {"version": 1}

    def inputs(self, track): return [track.text]

    @contextmanager
    def open(self, device):
        yield lambda texts: [{"ids": np.frombuffer(text.encode(), np.uint8) % 32} for text in texts]


class Net(nn.Module):
    def __init__(self, dropout):
        super().__init__()
        self.embed = nn.Embedding(32, 16)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Dropout(dropout), nn.Linear(32, 16)) for _ in range(2)])
        self.head = nn.Linear(16, 32)

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks: x = x + block(x)
        return self.head(x)


class Toy(Task):
    features = (Letters(),)
    parts = {"next": 1.0, "size": 0.1}
    probes = ({"shift": 0.0}, {"shift": 0.5})

    def __init__(self, config, dropout=0.1): self.config, self.dropout = config, dropout

    def load(self, device, dtype, quantize):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            net = Net(self.dropout).to(device, dtype)
        if quantize: quantize_layers(net, quantize, r"blocks\..+")
        return net

    def groups(self, model):
        if self.config.method == "full": return {"model": Group(modules=("",))}
        return {"adapter": Group(lora=r"blocks\.\d+\.[03]"), "head": Group(modules=("head",), lr=1e-3)}

    def blocks(self, model): return model.blocks

    def example(self, track, rows, draw):
        ids = rows["letters"][0]["ids"]
        start = draw("crop").integers(len(ids) - 8)
        return {"ids": torch.tensor(ids[start:start + 9].astype(np.int64))}

    def collate(self, examples):
        ids = torch.stack([e["ids"] for e in examples])
        return Batch({"ids": ids}, {"next": ids[:, 1:].numel(), "size": len(ids)})

    def loss(self, model, batch, at):
        shift = torch.tensor([draw("shift").random() if at.training else at.probe["shift"] for draw in at.draws])
        logits = model(batch["ids"][:, :-1])
        return {"next": nn.functional.cross_entropy(logits.flatten(0, 1), batch["ids"][:, 1:].flatten(), reduction="sum"),
                "size": ((logits.mean((1, 2)) - shift.to(logits)) ** 2).sum()}

    def sample(self, model, rows, at):
        ids = torch.tensor([[1]] * len(rows))
        for _ in range(int(at.seconds)): ids = torch.cat([ids, model(ids)[:, -1:].argmax(-1)], 1)
        return ids

    def decode(self, raw):
        from musiclab.audio import Audio
        return [Audio(np.sin(np.outer(ids.cpu() + 1, np.arange(800)) / 40).reshape(1, -1).astype(np.float32) / 2, 8000) for ids in raw]


def songs(n=7): # captions long enough for crops
    return Tracks.gather(Track(f"song {i}", caption=f"la la number {i * 37 % 11} and so on {'do re mi'[i % 5:]} la la") for i in range(n))


def settings(output, **changes):
    fields = dict(task="toy", model="toy", data="songs", output=str(output), store=str(output) + "-store", rank=2, alpha=6, batch_size=2, accumulate=2, lr=1e-2,
                  warmup=0, max_steps=6, precision="fp32", device="cpu", workers=0, trackers=[], save_every=2, validate_every=3,
                  gradient_checkpointing=True, save_minutes=None)
    return TrainConfig(**fields | changes)


def server():
    "Child processes that start at once: forked from a process that has imported everything and runs no threads."
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["musiclab.train", "tests.toy"])
    return context
