"Small features for tests. They stand in a module of their own because worker processes must be able to import them."
import os
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from musiclab.core import MusiclabError


def song(caption, key=None, source=None, **more): return SimpleNamespace(key=key or str(caption), caption=caption, source=source, **more)


class Letters:
    "A text as numbers and as a float matrix. `log`, a file, gets a line for each text that is encoded."
    name, where = "letters", "device"

    def __init__(self, where="device", batch=1, log=None, slow=0.0, version=1):
        self.where, self.batch, self.log, self.slow, self.settings = where, batch, log, slow, {"version": version}
        self.opened = 0

    def inputs(self, track): return [] if track.caption is None else [track.caption]

    def read(self, text):
        if "bad" in text: raise MusiclabError("not a song", text)
        return text

    @contextmanager
    def open(self, device):
        self.opened += 1
        try: yield lambda texts: [self.row(text) for text in texts]
        finally: self.opened -= 1

    def row(self, text):
        if "awful" in text: raise MusiclabError("the encoder cannot take it", text)
        if "deadly" in text: os._exit(9)
        if self.log:
            with open(self.log, "a") as file: file.write(text + "\n")
        time.sleep(self.slow)
        codes = np.frombuffer(text.encode(), np.uint8).astype(np.int16)
        wave = np.sin(np.outer(np.arange(3), codes)).astype(np.float32)
        if "nan" in text: wave[0, 0] = np.nan
        return {"codes": codes, "wave": wave}

    def logged(self): return Path(self.log).read_text().split("\n")[:-1] if Path(self.log).exists() else []


class Files(Letters):
    "The same for the content of a track's source."
    name = "files"

    def inputs(self, track): return [track.source]
    def read(self, source): return super().read(source.read().decode())


def texts(n): return [song(f"{i} " + "la" * (i % 7)) for i in range(n)]


def same(prepared, tracks, features):
    "Whether all rows are what such features make of the tracks now."
    for track in tracks:
        rows = prepared.rows(track)
        for feature in features:
            maker = type(feature)() # leaves no trace in the log
            assert len(rows[feature.name]) == len(feature.inputs(track))
            for row, input in zip(rows[feature.name], feature.inputs(track)):
                fresh = maker.row(maker.read(input))
                assert row.keys() == fresh.keys()
                assert all(row[f].dtype == fresh[f].dtype and np.array_equal(row[f], fresh[f]) for f in fresh)
    return True
