"Random pieces by the grammar: they have nothing to do with music."
import numpy as np


def stream(tokens: int, seed: int = 0, per_bar: int = 60, parts: int = 4, fill: bool = False) -> np.ndarray:
    "A piece of about `tokens` tokens, cut to exactly so many; with `fill`, its first players are missing in some bars and given at the end."
    rng, ids, hidden, bar = np.random.default_rng(seed), [1], [], 0
    while len(ids) < tokens * (0.7 if fill else 1):
        ids += [3] + ([10, 20, 29, 47] if bar == 0 else []) + [393 + int(rng.integers(12)), 405, 4]
        for part in range(parts):
            drums = part == parts - 1
            segment = [120] if drums else [104 + part, 121]
            for place in np.sort(rng.choice(48, max(1, int(rng.normal(per_bar / parts / 4, 2))), replace=False)):
                pitched = [132 + int(rng.integers(40, 80)), 341, 353 + int(rng.integers(12))]
                segment += [55 + int(place)] + ([268, 341 + int(rng.integers(8))] if drums else pitched)
            if fill and part == 0 and rng.random() < 0.3:
                ids.append(5)
                hidden.append([6, *segment, 4])
            else: ids += [*segment, 4]
        bar += 1
    return np.array((ids + sum(hidden, []) + [2] * tokens)[:tokens])
