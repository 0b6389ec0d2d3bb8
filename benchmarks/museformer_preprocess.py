"""How many MIDI files a second and core become tokens with chords, in shards, beside miditok's REMI (pip install miditok) on the same files, in the same run.

    python benchmarks/museformer_preprocess.py FOLDER [FOLDER …]      # --copies 4: transposed copies, so that shards are as large as in a real library
"""
import argparse
import tempfile
import time
from pathlib import Path

from musiclab.midi import read
from musiclab.museformer.preprocess import preprocess


def transposed(folders: list[str], copies: int, out: Path) -> int:
    "Write every file in several keys; how many there are."
    count = 0
    for path in sorted(path for folder in folders for path in Path(folder).rglob("*.mid")):
        song = read(path)
        for shift in range(copies):
            for part in song.parts:
                if shift and not part.drums: part.notes["pitch"] += 1 if part.notes["pitch"].max(initial=0) < 127 else 0
            song.save(out / f"{count:06d}.mid")
            count += 1
    return count


def remi(folder: Path, most: int) -> float | None:
    "Processor seconds for each file with miditok's REMI: programs, tempos, signatures, chords, 12 positions a quarter. None when it is absent."
    try: from miditok import REMI, TokenizerConfig
    except ImportError: return None
    tokenizer = REMI(TokenizerConfig(use_programs=True, use_tempos=True, use_time_signatures=True, use_chords=True, beat_res={(0, 4): 12, (4, 12): 6}))
    files = sorted(folder.glob("*.mid"))[::max(1, len(list(folder.glob("*.mid"))) // most)]
    tokenizer(files[0])
    begin = time.process_time()
    for path in files: tokenizer(path)
    return (time.process_time() - begin) / len(files)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+")
    parser.add_argument("--copies", type=int, default=4)
    parser.add_argument("--remi", type=int, default=100, help="how many of the files miditok gets")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        songs = Path(folder, "songs")
        songs.mkdir()
        count = transposed(options.folders, options.copies, songs)
        preprocess(songs, Path(folder, "warm"), workers=0, limit=8)
        wall, cpu = time.perf_counter(), time.process_time()
        summary = preprocess(songs, Path(folder, "tokens"), workers=0)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        print(summary)
        print(f"musiclab: {count / cpu:.0f} files a second of processor time, {count / wall:.0f} by the clock, with chords and shards")
        theirs = remi(songs, options.remi)
        if theirs is None: print("miditok is not installed: pip install miditok")
        else: print(f"miditok REMI: {1 / theirs:.0f} files a second of processor time, tokens only; musiclab is {theirs * count / cpu:.1f} times as fast")


if __name__ == "__main__": main()
