"""The feature store beside one file per song, and reading ahead beside decoding in turn, in the same run.

    python benchmarks/store.py                     # or: python benchmarks/data.py --part store
"""
import os
import pickle
import tempfile
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from data import best, music # sets the number of threads, so it comes first

import numpy as np
import torch

from musiclab.audio import load
from musiclab.core import atomic_file
from musiclab.dsp import log_mel
from musiclab.encode import encode_all
from musiclab.features import Store, cut, prepare
from musiclab.shards import _intact, human, write_shard
from musiclab.tracks import Source, Track


class Codes:
    "Codes as MusicGen has them: 4 books of 50 frames a second, made without an encoder."
    name, where, settings = "codes", "device", {}
    def inputs(self, track): return [track.caption]
    @contextmanager
    def open(self, device): yield lambda texts: [self.row(text) for text in texts]
    def row(self, text): # 5 to 30 seconds
        return {"codes": np.random.default_rng(int(text)).integers(2048, size=(4, 250 + 5 * int(text) % 1250), dtype=np.int16)}


class Mel:
    "The mel spectrogram of a song: decoding, then work on one thread."
    name, where, settings = "mel", "device", {}
    def inputs(self, track): return [track.source]
    def read(self, source): return torch.from_numpy(load(source.path, rate=32000).samples)
    @contextmanager
    def open(self, device): yield lambda sounds: [{"mel": log_mel(sound, 32000, hop=128).numpy()} for sound in sounds]


def write_shards(folder, rows):
    for piece in cut(np.array(sorted(rows))): write_shard(folder, {str(key): rows[str(key)] for key in piece})

def write_npy(folder, rows):
    for name, row in rows.items(): np.save(folder / f"{name}.npy", row["codes"])

def write_pt(folder, rows):
    for name, row in rows.items(): torch.save({"codes": torch.from_numpy(row["codes"])}, folder / f"{name}.pt")

def write_safely(folder, rows): # beside, fsync, rename: what the store does once for all rows of a shard
    for name, row in rows.items():
        with atomic_file(folder / f"{name}.pt") as beside: torch.save({"codes": torch.from_numpy(row["codes"])}, beside)


def forget(folder):
    "Make the system drop what it holds of these files in memory, so that they are read from the disk."
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def table(title, rates):
    "Rows a second by name, the store first; the ratio says how many times faster it is."
    ours, *_ = rates.values()
    print(f"\n{title}")
    for what, rate in rates.items(): print(f"  {what:28}{rate:12,.0f} rows/s{ours / rate:9.1f}x")


def store_part(sound, repeats, songs=4096):
    "Writing, reading from memory and from the disk, opening, reading ahead."
    tracks = [Track(str(i), caption=str(i)) for i in range(songs)]
    rows = {f"{i:032x}": Codes().row(str(i)) for i in range(songs)}
    order = np.random.default_rng(0).permutation(songs)
    print(f"\n{songs} rows of codes, {human(sum(row['codes'].nbytes for row in rows.values()))}")
    with tempfile.TemporaryDirectory(dir=".") as folder: # on this disk: /tmp may be memory
        folder, numbers = Path(folder), iter(range(10**6))
        def writing(write, rows):
            place = folder / str(next(numbers))
            place.mkdir()
            write(place, rows)
        few = dict(list(rows.items())[:256])
        work = {"store": (write_shards, rows), "npy": (write_npy, rows), "pt": (write_pt, rows),
                "pt, each fsynced and renamed": (write_safely, few)}
        seconds = best([partial(writing, *what) for what in work.values()], repeats)
        table("write", {name: len(what[1]) / s for (name, what), s in zip(work.items(), seconds)})

        places = {name: folder / name for name in ("store", "npy", "pt")}
        prepared = prepare([Codes()], tracks, places["store"])
        for name, write in (("npy", write_npy), ("pt", write_pt)): places[name].mkdir(); write(places[name], rows)
        used = {name: sum(path.stat().st_blocks * 512 for path in place.rglob("*") if path.is_file()) for name, place in places.items()}
        print("\non disk: " + ", ".join(f"{name} {human(size)}" for name, size in used.items()))

        def read_store(prepared): return [prepared.rows(tracks[i])["codes"][0]["codes"].copy() for i in order]
        def read_npy(): return [np.load(places["npy"] / f"{i:032x}.npy") for i in order]
        def read_pt(): return [torch.load(places["pt"] / f"{i:032x}.pt", weights_only=True)["codes"] for i in order]
        seconds = best([partial(read_store, prepared), read_npy, read_pt], repeats)
        table("read in random order, from memory", dict(zip(places, songs / np.array(seconds))))
        closed = pickle.dumps(prepared)
        del prepared # files that are mapped cannot be forgotten
        def cold(read, place):
            forget(place)
            return best([read], 1)[0]
        readers = [lambda: read_store(pickle.loads(closed)), read_npy, read_pt]
        seconds = [min(cold(read, place) for _ in range(repeats)) for read, place in zip(readers, places.values())]
        table("read in random order, from the disk", dict(zip(places, songs / np.array(seconds))))
        def open_anew(): # as in a new process, which checks every shard once
            _intact.cache_clear()
            prepare([Codes()], tracks, places["store"])
        opening = best([open_anew], repeats)[0]
        shards = Store(places["store"]).ls()[0].shards
        print(f"\nprepare, when nothing is missing: {1000 * opening:.0f} ms for {songs} songs in {shards} shards")

        sources = [Source.of(sound.crop(0, 30).save(folder / f"{i}.flac")) for i in range(16)]
        def mels(in_turn):
            feature = Mel()
            with feature.open("cpu") as made:
                return [made([feature.read(source)]) for source in sources] if in_turn else list(encode_all(feature, made, sources))
        turn, ahead = best([partial(mels, True), partial(mels, False)], repeats)
        print(f"mel of 16 songs of 30 s: decoding in turn {turn:.2f} s, reading ahead {ahead:.2f} s: {turn / ahead:.2f}x")


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(f"{os.uname().machine}, {os.cpu_count()} cores, one thread, load {os.getloadavg()[0]:.1f}; "
          f"numpy {np.__version__}, torch {torch.__version__}")
    store_part(music(30), 3)
