"""How fast sound is read, in times real time, beside librosa in the same run; with `--part store` how fast features are (store.py).

    python benchmarks/data.py                      # everything
    python benchmarks/data.py --part decode --seconds 60
"""
import argparse
import os
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"): os.environ.setdefault(name, "1") # one core, as in a loader

import librosa
import numpy as np
import soundfile
import soxr
import torch
from scipy.signal import resample_poly

from musiclab.audio import Audio, load, probe
from musiclab.dsp import has_torchaudio, log_mel, resample


def best(functions, repeats):
    "Seconds of each function: the fastest of `repeats` rounds, taken in turn so that all meet the same moments of the machine."
    seconds = [float("inf")] * len(functions)
    for _ in range(repeats):
        for i, function in enumerate(functions):
            began = time.perf_counter()
            function()
            seconds[i] = min(seconds[i], time.perf_counter() - began)
    return seconds


def music(seconds, rate=44100):
    "Plucked notes over a little noise: takes about as many bits as a song."
    rng, t = np.random.default_rng(0), np.arange(seconds * rate) / rate
    beat = (2 * t).astype(int)
    envelope = np.exp(-3 * (2 * t - beat))
    samples = rng.normal(scale=0.01, size=(2, len(t)))
    for sides in rng.uniform(0.3, 1, (6, 2, 1)):
        hz = 110 * 2 ** (rng.integers(0, 36, 2 * seconds) / 12)
        samples += 0.08 * sides * envelope * np.sin(2 * np.pi * np.cumsum(hz[beat]) / rate)
    return Audio(samples, rate)


def write_with_av(sound, path, codec):
    "Formats that musiclab reads and does not write."
    import av
    with av.open(str(path), "w") as file:
        stream = file.add_stream(codec, rate=sound.rate, layout="stereo", bit_rate=160_000)
        frame = av.AudioFrame.from_ndarray(sound.samples, format="fltp", layout="stereo")
        frame.rate, frame.pts = sound.rate, 0
        for part in (frame, None): file.mux(stream.encode(part))


def table(title, rows, seconds=None):
    "Rows of (what, our time, their time), shown as times real time where the sound's `seconds` are given; above 1 musiclab is faster."
    print(f"\n{title:28}{'musiclab':>12}{'librosa':>12}{'ratio':>9}")
    def shown(time): return f"{seconds / time:,.0f}x" if seconds else f"{1000 * time:.1f} ms"
    for what, ours, theirs in rows: print(f"{what:28}{shown(ours):>12}{shown(theirs):>12}{theirs / ours:8.2f}x")


def decode_part(sound, repeats):
    "Whole files, whole files at a model's rate, and 3 s out of the last fifth."
    whole, model, part = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        paths = [sound.save(Path(folder, "song" + suffix)) for suffix in (".wav", ".flac", ".aiff", ".mp3", ".ogg", ".opus")]
        for name, codec in {"song.m4a": "aac", "song.aac": "aac", "alac.m4a": "alac", "song.wma": "wmav2"}.items():
            paths.append(Path(folder, name))
            write_with_av(sound, paths[-1], codec)
        for path in paths:
            info, at = probe(path), 0.8 * sound.seconds
            what, theirs = f"{info.format} ({path.suffix}, {info.decoder})", partial(librosa.load, path, mono=False)
            whole.append((what, *best([partial(load, path), partial(theirs, sr=None)], repeats)))
            model.append((what, *best([partial(load, path, rate=32000), partial(theirs, sr=32000)], repeats)))
            pair = partial(load, path, start=at, seconds=3), partial(theirs, sr=None, offset=at, duration=3)
            part.append((what, *best(pair, 10 * repeats)))
    table("decode", whole, sound.seconds)
    table("decode + resample to 32 kHz", model, sound.seconds)
    table("3 s out of the last fifth", part)


def resample_part(sound, repeats):
    "Rates that the models need, then mel."
    samples, tensor = sound.samples, torch.from_numpy(sound.samples)
    names = ["soxr", "sinc", "librosa", "resample_poly", *(["torchaudio"] if has_torchaudio() else [])]
    print(f"\n{'resample':20}" + "".join(f"{name:>15}" for name in names) + f"{'soxr : librosa':>17}")
    for orig, new in ((44100, 32000), (44100, 48000), (48000, 44100), (48000, 24000), (24000, 16000)):
        common = np.gcd(orig, new)
        functions = [partial(resample, samples, orig, new), partial(resample, tensor, orig, new, "sinc"),
                     partial(librosa.resample, samples, orig_sr=orig, target_sr=new),
                     partial(resample_poly, samples, new // common, orig // common, axis=1)]
        if has_torchaudio():
            import torchaudio
            functions.append(partial(torchaudio.functional.resample, tensor, orig, new))
        seconds = best(functions, repeats)
        speeds = "".join(f"{samples.shape[1] / orig / s:14,.0f}x" for s in seconds)
        print(f"{f'{orig} -> {new}':20}{speeds}{seconds[2] / seconds[0]:16.2f}x")
    theirs = partial(librosa.feature.melspectrogram, y=samples, sr=44100)
    table("mel, 128 bands", [("n_fft 2048, hop 512", *best([partial(log_mel, samples, 44100), theirs], repeats))], sound.seconds)


def store_part(sound, repeats):
    "Encoded songs, written and read."
    import store
    store.store_part(sound, repeats)


PARTS = {"decode": decode_part, "resample": resample_part, "store": store_part}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, action="append", help="what to measure; may be given several times; without it all parts")
    parser.add_argument("--seconds", type=int, default=180, help="length of the song")
    parser.add_argument("--repeats", type=int, default=3, help="the fastest of so many rounds counts")
    given = parser.parse_args()
    warnings.filterwarnings("ignore") # librosa warns for every file that it hands to its older reader
    torch.set_num_threads(1)
    print(f"{os.uname().machine}, {os.cpu_count()} cores, one thread, load {os.getloadavg()[0]:.1f}; soundfile {soundfile.__version__}, "
          f"soxr {soxr.__version__}, librosa {librosa.__version__}, torch {torch.__version__}; {given.seconds} s of stereo at 44.1 kHz")
    song = music(given.seconds)
    for part in given.part or PARTS: PARTS[part](song, given.repeats)
