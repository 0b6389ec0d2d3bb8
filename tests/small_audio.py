"Small sound files for tests."
from pathlib import Path

import numpy as np

from musiclab.audio import Audio


def write_songs(folder: Path, n: int, seconds: float = 1.0, text: str = "noise", rate: int = 32000) -> Path:
    "A folder of soft noise with a text for each file."
    folder.mkdir(parents=True)
    for i in range(n):
        noise = 0.1 * np.random.default_rng(i).standard_normal((1, round(seconds * rate)))
        Audio(noise.astype(np.float32), rate).save(folder / f"song_{chr(97 + i)}.flac")
        (folder / f"song_{chr(97 + i)}.txt").write_text(text)
    return folder
