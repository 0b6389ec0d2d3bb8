"""The best that counting can do: an interpolated Kneser-Ney n-gram over the tokens of songs, as a baseline for models.

    python benchmarks/kneser_ney.py TOKENS --order 5        # a folder that `musiclab museformer preprocess` wrote

In a program: `KneserNey(5).fit(train)`, then `losses(ids)` gives the surprise at every token after the first [nats].
Kneser and Ney 1995; the formulas as in Chen and Goodman 1999, with one discount for each order.
"""
import argparse

import numpy as np

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
    from musiclab.museformer.metrics import nats_per_note
    from musiclab.museformer.preprocess import read_tokens
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokens", help="a folder of tokens")
    parser.add_argument("--order", type=int, default=5)
    parser.add_argument("--valid", type=int, default=10, help="every n-th song validates")
    options = parser.parse_args()
    songs = [track.source.array() for track in read_tokens(options.tokens)]
    train = [ids for i, ids in enumerate(songs) if i % options.valid]
    valid = songs[::options.valid]
    for order in range(1, options.order + 1):
        model = KneserNey(order).fit(train)
        losses = [model.losses(ids) for ids in valid]
        print(f"{order}-gram: {np.concatenate(losses).mean():.3f} nats a token, "
              f"{nats_per_note(np.concatenate(losses), np.concatenate([ids[1:] for ids in valid])):.3f} nats a note")


if __name__ == "__main__": main()
