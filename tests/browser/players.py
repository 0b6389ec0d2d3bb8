"What the browser listens to: the same players for every place."
import numpy as np

from musiclab import show
from musiclab.audio import Audio
from musiclab.midi import Part, Song, notes


def tone(hertz, seconds=10): return Audio(0.3 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * 32000)) / 32000), 32000)


def noise(low, high, seed):
    "Ten seconds between two frequencies, no two moments alike."
    spectrum, hertz = np.fft.rfft(np.random.default_rng(seed).standard_normal(320000)), np.fft.rfftfreq(320000, 1 / 32000)
    sound = np.fft.irfft(spectrum * ((hertz > low) & (hertz < high)))
    return Audio(0.1 * sound / sound.std(), 32000)


def views(path=None) -> dict:
    "By title."
    flute = Part("flute", 73, False, notes([(0, 3840, 69, 100), (3840, 3840, 81, 100)]))
    kit = Part("kit", 0, True, notes([(7680 + 240 * i, 60, pitch, 110) for i, pitch in enumerate((36, 42, 38, 42, 36, 42, 38, 46))]))
    song = Song([flute, kit], lyrics=[(0, "la"), (3840, "lu")], markers=[(0, "verse")])
    trials = {"first": {"a": tone(300, 3), "b": tone(700, 3)}, "second": {"a": tone(500, 3), "b": tone(900, 3)}}
    return {"Noises": show.compare({"low": noise(300, 1500, 1), "high": noise(3000, 6000, 2)}, "Noises"),
            "Tones": show.compare({"low": tone(400), "high": tone(1600)}, "Tones"), "Alone": show.player(tone(600), "Alone"),
            "Steps": show.timelapse({0: tone(500, 1.5), 50: tone(1000, 1.5)}, "Steps"), "Song": show.roll(song, "Song"),
            "Blind": show.blind(trials, path, "Blind")}
