"""How fast songs become sound, in times real time on one core, beside FluidSynth where it is installed.

    python benchmarks/synth.py                     # composed songs of every style
    python benchmarks/synth.py song.mid …          # and these
"""
import argparse
import os
import resource
import shutil

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"): os.environ.setdefault(name, "1") # one core

from musiclab.compose import STYLES, compose
from musiclab.drums import drum
from musiclab.midi import read
from musiclab.synth import render
from musiclab.voices import table


def spent():
    "Processor seconds so far, those of other programs included."
    return sum(usage.ru_utime + usage.ru_stime for usage in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))


def fastest(function, repeats):
    "The best of several processor times in seconds, each with empty caches; and what the function gave."
    best = float("inf")
    for _ in range(repeats):
        for cached in (table, drum): cached.cache_clear()
        began = spent()
        result = function()
        best = min(best, spent() - began)
    return best, result


def main():
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("files", nargs="*", help="MIDI files")
    options.add_argument("--seconds", type=float, default=60, help="length of the composed songs")
    options.add_argument("--rate", type=int, default=44100)
    options.add_argument("--repeats", type=int, default=3)
    given = options.parse_args()
    songs = {style: fastest(lambda style=style: compose(style, 0, given.seconds).song, given.repeats) for style in STYLES}
    songs |= {os.path.basename(path): fastest(lambda path=path: read(path), given.repeats) for path in given.files}
    rival = shutil.which("fluidsynth")
    render(compose("techno", 0, 4).song) # what is loaded once is not measured
    print(f"{'song':24} {'seconds':>8} {'notes':>6} {'made in ms':>10} {'numpy':>9}" + (f" {'fluidsynth':>11}" if rival else ""))
    for name, (made, song) in songs.items():
        seconds, sound = fastest(lambda song=song: render(song, given.rate), given.repeats)
        count = sum(len(part.notes) for part in song.parts)
        line = f"{name[:24]:24} {sound.seconds:8.1f} {count:6} {1000 * made:10.1f} {sound.seconds / seconds:8.0f}x"
        if rival:
            seconds, sound = fastest(lambda song=song: render(song, given.rate, "fluidsynth"), given.repeats)
            line += f" {sound.seconds / seconds:10.0f}x"
        print(line)


if __name__ == "__main__": main()
