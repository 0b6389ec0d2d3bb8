"""The best that counting can do: an interpolated Kneser-Ney n-gram over the tokens of songs, beside a trained HID-MuseFormer.
Both learn from the same songs and are judged by the same tokens.

    musiclab train museformer_small data=my_midi_files output=run
    python benchmarks/kneser_ney.py run

In a program: `KneserNey(5).fit(train)`, then `losses(ids)` gives the surprise at every token after the first [nats].
Kneser and Ney 1995; the formulas as in Chen and Goodman 1999, with one discount for each order.
"""
import argparse
import json
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from musiclab.museformer.flex import plan_attention
from musiclab.museformer.vocabulary import is_kind

VOCABULARY = 415


class KneserNey:
    "Probabilities of the next token, from counts of what followed the last few."

    def __init__(self, order: int = 5):
        self.order, self.base = order, VOCABULARY + 1  # one more symbol fills the place before the beginning
        if order * np.log2(self.base) > 63: raise ValueError(f"{order}-grams do not fit into 63 bits")

    def grams(self, ids) -> np.ndarray:  # int64 [tokens - 1, order]: every token but the first, behind those before it
        padded = np.concatenate([np.full(self.order - 1, VOCABULARY), np.asarray(ids, np.int64)])
        return np.lib.stride_tricks.sliding_window_view(padded, self.order)[1:]

    def pack(self, grams: np.ndarray) -> np.ndarray:  # rows of tokens as one number each
        number = np.zeros(len(grams), np.int64)
        for column in grams.T: number = number * self.base + column
        return number

    def fit(self, songs) -> "KneserNey":
        packed = self.pack(np.concatenate([self.grams(ids) for ids in songs]))
        self.tables = []
        for order in range(self.order, 0, -1):  # below the highest, a gram counts as often as it has different predecessors
            grams, counts = np.unique(packed, return_counts=True)
            contexts, first = np.unique(grams // self.base, return_index=True)
            once, twice = (counts == 1).sum(), (counts == 2).sum()
            discount = once / (once + 2 * twice) if once else 0.5
            self.tables.append((grams, counts, contexts, np.add.reduceat(counts, first), np.diff(first, append=len(grams)), discount))
            packed = grams % self.base ** (order - 1)
        return self

    def probabilities(self, grams: np.ndarray) -> np.ndarray:  # [n, order] tokens -> chance of the last of each row
        chance = np.full(len(grams), 1 / VOCABULARY)
        for order, (known, counts, contexts, totals, kinds, discount) in enumerate(reversed(self.tables), 1):
            packed = self.pack(grams[:, self.order - order:])
            at = np.minimum(np.searchsorted(known, packed), len(known) - 1)
            count = np.where(known[at] == packed, counts[at], 0)
            at = np.minimum(np.searchsorted(contexts, packed // self.base), len(contexts) - 1)
            seen = contexts[at] == packed // self.base
            total = np.where(seen, totals[at], 1)
            chance = np.where(seen, (np.maximum(count - discount, 0) + discount * kinds[at] * chance) / total, chance)
        return chance

    def losses(self, ids) -> np.ndarray:  # [tokens - 1] nats
        return -np.log(self.probabilities(self.grams(ids)))


def main():
    from musiclab import recipes
    from musiclab.batches import Row
    from musiclab.checkpoints import Checkpoints
    from musiclab.features import prepare
    from musiclab.museformer.data import transpose
    from musiclab.museformer.metrics import nats_per_note
    from musiclab.museformer.train import MuseFormerConfig, MuseFormerTask, open_model
    from musiclab.train import store_of
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the output folder of a training")
    parser.add_argument("--order", type=int, default=5)
    options = parser.parse_args()
    config = MuseFormerConfig(**json.loads((Checkpoints(options.run / "checkpoints").newest() / "state.json").read_text())["config"])
    task, (train, valid) = MuseFormerTask(config), recipes.read_data(config)
    prepared = prepare(task.features, train + valid, store_of(config), torch.device("cpu"))
    songs = [prepared.rows(track)["tokens"][0]["ids"].astype(np.int64) for track in train]
    draws = [Row(0, -1).draw(config.seed, track.key) for track in valid]  # as in the training's own validation
    held_out = [task.example(track, prepared.rows(track), draw) for track, draw in zip(valid, draws)]
    ids = [each["ids"].numpy() for each in held_out]
    after = np.concatenate([each[1:] for each in ids])
    print(f"{len(songs)} songs with {sum(map(len, songs)):,} tokens to learn from; {len(ids)} stretches to judge by, "
          f"with {len(after):,} tokens and {int(is_kind(after, 'PITCH', 'DRUM').sum()):,} notes")
    found = {}

    def judge(name, losses):
        found[name] = nats_per_note(losses, after)
        print(f"{name}: {losses.mean():.3f} nats a token, {found[name]:.3f} nats a note", flush=True)
    for keys in (0, config.transpose):  # as they are, and in all keys that the model may have met
        copies = [transpose(song, steps) for song in songs for steps in range(-keys, keys + 1)]
        for order in range(1, options.order + 1):
            counts = KneserNey(order).fit(copies)
            judge(f"{order}-gram" + f", each song in {2 * keys + 1} keys" * bool(keys), np.concatenate([counts.losses(each) for each in ids]))
    five, best = found[f"{options.order}-gram"], min(found.values())
    model = open_model(options.run)
    with torch.inference_mode():
        scores = [model(each["ids"], each["at"], plan_attention(each["at"], model.fine, "cpu", "auto")) for each in held_out]
        losses = [F.cross_entropy(score[:-1], each["ids"][1:], reduction="none").numpy() for score, each in zip(scores, held_out)]
    judge("HID-MuseFormer", np.concatenate(losses))
    nats = found["HID-MuseFormer"]
    print(f"{1 - nats / five:.1%} below the {options.order}-gram, {1 - nats / best:.1%} below the best of them")


if __name__ == "__main__": main()
