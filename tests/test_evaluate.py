"Distances against their definitions, tests against chance, and reports against broken input."
import re

import numpy as np
import pytest
from scipy.linalg import sqrtm
from scipy.stats import kstest

from musiclab import audio, evaluate
from musiclab.audio import Audio
from musiclab.core import MusiclabError
from musiclab.tracks import Source, Track
from musiclab.evaluate import compare, frechet, gaussian_distance, kernel, p_value, rescale, shuffled

MIXING = np.random.default_rng(1).standard_normal((30, 116))


def cloud(n, seed, shift=0.0): return np.random.default_rng(seed).standard_normal((n, 30)) @ MIXING + shift


def test_frechet_is_the_formula():
    a, b = np.random.default_rng(0).standard_normal((60, 6)), 1 + 2 * np.random.default_rng(1).standard_normal((50, 6))
    first, second = np.cov(a.T), np.cov(b.T)
    formula = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(first + second - 2 * sqrtm(first @ second).real)
    assert np.isclose(gaussian_distance(a, b), formula, rtol=1e-6) and np.isclose(gaussian_distance(b, a), formula, rtol=1e-6)
    assert gaussian_distance(a, a) < 1e-6
    assert np.isclose(gaussian_distance(a, a + 3), 54)


def test_kernel_is_the_formula():
    a, b = rescale(cloud(9, 0), cloud(7, 1, shift=1))
    width = np.median([((x - y) ** 2).sum() for i, x in enumerate(a) for y in a[:i]])
    k = lambda x, y: np.exp(-((x - y) ** 2).sum() / (2 * width))
    inside = lambda s: np.mean([k(x, y) for i, x in enumerate(s) for j, y in enumerate(s) if i != j])
    formula = 100 * (inside(a) + inside(b) - 2 * np.mean([k(x, y) for x in a for y in b]))
    assert np.isclose(kernel(cloud(9, 0), cloud(7, 1, shift=1)), formula)


def test_a_dead_coordinate_does_not_decide():
    a, b = cloud(40, 0), cloud(40, 1)
    plain = frechet(a, b)
    for points in (a, b): points[:, 3] = 5 + 1e-7 * points[:, 3]
    b[:, 3] += 1e-3
    assert frechet(a, b) < 2 * plain


def test_identical_clips_are_no_trouble():
    same = np.repeat(cloud(1, 0), 20, 0)
    assert frechet(same, same) == 0 and np.isfinite(kernel(same, same)) and np.isfinite(kernel(same, cloud(20, 1)))


@pytest.mark.parametrize("a, b", [(5, 40), (40, 5), (15, 16), (0, 20)])
def test_too_few_clips_are_refused(a, b):
    with pytest.raises(MusiclabError, match="mostly noise.*at least 16"): frechet(cloud(a, 0), cloud(b, 1))


def test_p_values_are_uniform_where_nothing_differs():
    found = []
    for seed in range(80):
        a, b = cloud(10, seed), cloud(14, 1000 + seed)
        found.append(p_value(kernel(a, b), shuffled(kernel, a, b, rounds=39)))
    assert kstest(np.array(found) - 0.0125, "uniform").pvalue > 0.01  # they come in steps of 1/40
    assert np.mean(np.array(found) <= 0.05) <= 0.11


def test_the_floor_holds_where_nothing_differs_and_not_where_something_does():
    def above(shift):
        pairs = [(cloud(16, seed), cloud(20, 1000 + seed, shift)) for seed in range(24)]
        return np.mean([frechet(a, b) > np.quantile(shuffled(frechet, a, b, 40), 0.95) for a, b in pairs])
    assert above(0) <= 0.17 and above(3) >= 0.95


@pytest.fixture(scope="module")
def tracks(music):
    files = sorted((music/"audio"/"tracks").glob("*.mp3"))
    return {p.stem: audio.load(p, rate=22050, channels=1, start=8, seconds=6) for p in files}


def points(tracks, style=""): return np.array([evaluate.embed(track) for name, track in tracks.items() if name.startswith(style)])


def test_styles_differ_and_halves_do_not(tracks):
    rock, piano = ({name: track for name, track in tracks.items() if name.startswith(style)} for style in ("rock", "piano"))
    found = compare(rock, piano, rounds=150)
    assert found.p_value < 0.01 and found.frechet > found.floor and found.verdict.startswith("The two sets differ")
    halves = []
    for clouds in (points(rock), points(piano)):
        for seed in range(10):
            order = np.random.default_rng(seed).permutation(16)
            one, two = clouds[order[:8]], clouds[order[8:]]
            halves.append(p_value(kernel(one, two), shuffled(kernel, one, two, 60)))
    assert np.mean(np.array(halves) < 0.05) <= 0.15 and 0.25 < np.median(halves) < 0.75


def test_a_set_is_nearest_to_itself_and_noise_moves_it_away(tracks):
    rng, clean = np.random.default_rng(0), points(tracks)
    def noisy(level):
        return points({name: Audio(t.samples + level * rng.standard_normal(t.samples.shape), t.rate) for name, t in tracks.items()})
    clouds = [clean, *map(noisy, (0.003, 0.01, 0.03))]
    for distance in (frechet, kernel):
        assert np.all(np.diff([distance(clean, cloud) for cloud in clouds]) > 0)
    assert frechet(clean, clean) < 1e-6


def tone(hertz, seconds=4.0, rate=16000): return Audio(0.3 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate), rate)


def test_five_clips_get_a_reason_not_a_number():
    found = compare([tone(300 + i) for i in range(20)], [tone(400 + i) for i in range(5)])
    assert (found.kernel, found.p_value, found.frechet, found.floor) == (None,) * 4
    assert "20 reference and 5 generated" in found.verdict and str(found).count("Too few clips") == 2


def test_the_same_question_gets_the_same_answer():
    one, two = ([tone(300 * (1 + side) + i) for i in range(8)] for side in (0, 1))
    assert str(compare(one, two, rounds=20)) == str(compare(one, two, rounds=20))


def test_folders_with_broken_files(tmp_path):
    for i in range(3): tone(300 + i, seconds=4 + i).save(tmp_path/"reference"/"deep"/f"{i}.wav")
    for i in range(2): tone(500 + i, seconds=3.5).save(tmp_path/"generated"/f"{i}.flac")
    (tmp_path/"generated"/"page.wav").write_text("<html>gone</html>")
    (tmp_path/"generated"/"empty.mp3").write_bytes(b"")
    tone(400, seconds=1).save(tmp_path/"generated"/"short.wav")
    nan = tone(400)
    nan.samples[0, 30000] = np.nan
    found = compare(tmp_path/"reference", {**{p.name: p for p in (tmp_path/"generated").iterdir()}, "nan": nan})
    assert [clip.name for clip in found.reference] == ["deep/0.wav", "deep/1.wav", "deep/2.wav"] and found.seconds == 3.5
    assert sorted(clip.name for clip in found.generated) == ["0.flac", "1.flac"]
    reasons = {problem.where: problem.reason for problem in found.problems}
    assert set(reasons) == {"page.wav", "empty.mp3", "short.wav", "nan"} and reasons["short.wav"] == "shorter than 3 s"
    assert "not numbers" in reasons["nan"] and all(f"skipped {name}" in str(found) for name in reasons)
    with pytest.raises(MusiclabError, match="generated: no usable clip; short.wav: shorter than 3 s"):
        compare(tmp_path/"reference", [tmp_path/"generated"/"short.wav"])
    with pytest.raises(MusiclabError, match="no such folder"): compare(tmp_path/"nothing", [tone(300)])
    with pytest.raises(MusiclabError, match="reference: no usable clip"): compare([], [tone(300)])


def test_tracks_of_one_song_count_once(tmp_path):
    files = [tone(300 + i).save(tmp_path/f"{i}.wav") for i in range(3)]
    given = [Track(key=f"t{i}", source=Source.of(file), group=song) for i, (file, song) in enumerate(zip(files, ("a", "a", "b")))]
    found = compare([*given, Track(key="notes")], files)
    assert [clip.name for clip in found.reference] == ["t0", "t2"]
    assert [clip.name for clip in found.generated] == ["0.wav", "1.wav", "2.wav"]
    assert list(map(str, found.problems)) == ["t1: another clip of the same song is used already", "notes: the track has no sound"]


def test_a_report_is_one_file(tmp_path):
    names = [f"<b>{i}</b> & 'co'" for i in range(9)]
    bad = {"silent": Audio(np.zeros((1, 64000)), 16000), **{name: tone(500 + 40 * i) for i, name in enumerate(names)}}
    found = evaluate.report([tone(300 + 40 * i) for i in range(9)], bad, tmp_path/"report.html", title="Before & after", rounds=50)
    text = (tmp_path/"report.html").read_text(encoding="utf-8")
    assert found.p_value is not None and found.verdict in text and "Before &amp; after" in text
    assert text.count("<audio") == 6 and text.count("data:image/png") == 2 and "<b>0</b>" not in text
    assert "silent for 100% of the time" in text and "Too few clips for a Frechet distance" in text
    assert not re.findall(r"https?://(?!www\.w3\.org)", text) and not re.findall(r'(?:src|href)="(?!data:)', text)
