"Distances against their definitions, tests against chance, and reports against broken input."
import re

import numpy as np
import pytest
from scipy.linalg import sqrtm
from scipy.stats import kstest

from musiclab import audio, copying, evaluate
from musiclab.audio import Audio
from musiclab.core import MusiclabError
from musiclab.report import report
from musiclab.tracks import Source, Track
from musiclab.embed import Memory, choose, tiny_clap
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
    found = report([tone(300 + 40 * i) for i in range(9)], bad, tmp_path/"report.html", title="Before & after", rounds=50)
    text = (tmp_path/"report.html").read_text(encoding="utf-8")
    assert found.p_value is not None and found.verdict in text and "Before &amp; after" in text
    assert text.count("<audio") == 6 and text.count("data:image/png") == 2 and "<b>0</b>" not in text
    assert "silent for 100% of the time" in text and "Too few clips for a Frechet distance" in text
    assert not re.findall(r"https?://(?!www\.w3\.org)", text) and not re.findall(r'(?:src|href)="(?!data:)', text)


def test_a_copied_song_is_caught_and_a_held_back_one_is_not(tracks):
    names = list(tracks)
    train = {name: tracks[name] for name in names[::2]}
    unseen = {name: tracks[name] for name in names[1::4]}
    rest = {name: tracks[name] for name in names[3::4]}
    rng = np.random.default_rng(0)
    def changed(sound): return Audio(0.5 * sound.crop(0.7, 5).samples + 0.002 * rng.standard_normal(sound.crop(0.7, 5).samples.shape), sound.rate)
    copies = {f"copy of {name}": changed(train[name]) for name in list(train)[::4]}
    faster = {f"faster {name}": Audio(train[name].samples, round(train[name].rate * 1.02)) for name in list(train)[1::5]}
    found = copying.copying({**copies, **rest, **faster}, train, unseen)
    assert set(copies) | set(faster) == set(found.caught) and found.recordings.keys() == set(copies), (found.limit, found.clips)
    alone = copying.copying({**copies, **rest}, train)  # training songs are compared with each other
    assert set(copies) <= set(alone.caught) and not set(rest) & set(alone.caught)
    leaky = copying.copying(copies, train, {**unseen, **copies})
    assert len(leaky.usual) == len(unseen)  # what is known from training is no unseen song


def test_pairs_before_and_after():
    reference = [tone(900 + 5 * i) for i in range(10)]
    before = {f"{i}.wav": tone(300 + 20 * i) for i in range(8)}
    after = {f"{i}.flac": tone(800 + 20 * i) for i in range(8)}
    found = compare(reference, after, before=before, rounds=20).pairs
    assert found.closeness.mean > 0 and found.closeness.low > 0 and found.closeness.p_value < 0.05 and found.closeness.share == 1
    assert found.figures["centroid"].low > 0 and "closer to" in found.verdict
    same = compare(reference, before, before=before, rounds=20).pairs
    assert same.closeness.p_value == 1 and same.verdict.startswith("No change")
    few = compare(reference, {"0.wav": tone(300)}, before=before, rounds=20).pairs
    assert few.closeness is None and "Too few pairs" in few.verdict
    with pytest.raises(MusiclabError, match="no clip has the same name"): compare(reference, {"x.wav": tone(300)}, before=before, rounds=2)


def test_the_interval_covers_the_truth_and_p_is_uniform():
    rng = np.random.default_rng(0)
    found = [evaluate.change(0.3 + rng.standard_normal(12), rounds=400, seed=i) for i in range(150)]
    assert 0.85 <= np.mean([one.low <= 0.3 <= one.high for one in found]) <= 0.99
    null = [evaluate.change(rng.standard_normal(12), rounds=400, seed=i).p_value for i in range(150)]
    assert kstest(null, "uniform").pvalue > 0.01


def test_what_was_asked_for(tracks):
    name = "piano_pop_001"
    right, wrong = (Track(text, Source.of(b"x"), caption=text) for text in ("piano, 90 bpm, F# key", "piano, 63 bpm, C major"))
    clips = [evaluate.Clip(track.key, tracks[name], 6, track.text, evaluate.figures(tracks[name])) for track in (right, wrong)]
    said = evaluate.against_texts(clips)
    assert [row["octaves"] for row in said["rows"]] == [True, False] and [row["key"] for row in said["rows"]] == [True, False]
    assert said["tempo"].startswith("Tempo as asked: 1 of 2") and said["key"].startswith("Key as asked: 1 of 2")
    assert evaluate.against_texts([evaluate.Clip("x", tracks[name], 6, "no wishes", clips[0].figures)]) == {}


def test_measurements_are_remembered(tmp_path):
    for side, hertz in (("a", 300), ("b", 500)):
        for i in range(8): tone(hertz + 9 * i).save(tmp_path/side/f"{i}.wav", params={"prompt": "waltz, 90 bpm"})
    asked = []
    def see(sound):
        asked.append(1)
        return evaluate.embed(sound)
    listener = evaluate.Embedder("mine", "mine-1", see)
    first = compare(tmp_path/"a", tmp_path/"b", see=listener, memory=tmp_path/"m.npz", rounds=10)
    again = compare(tmp_path/"a", tmp_path/"b", see=listener, memory=tmp_path/"m.npz", rounds=10)
    assert len(asked) == 16 and str(first) == str(again)
    tone(700).save(tmp_path/"b"/"0.wav")
    compare(tmp_path/"a", tmp_path/"b", see=listener, memory=tmp_path/"m.npz", rounds=10)
    assert len(asked) == 17
    (tmp_path/"m.npz").write_bytes(b"broken")
    assert Memory(tmp_path/"m.npz").arrays == {}


def test_clap_in_the_hubs_layout_and_clap_out_of_reach(tmp_path):
    folder, lines = tiny_clap(tmp_path/"clap"), []
    listener = choose("clap", folder, lines.append)
    found = compare([tone(300 + 9 * i) for i in range(8)], [tone(600 + 9 * i) for i in range(8)], see=listener, rounds=10)
    assert listener.name == "clap" and found.embedder.startswith("clap") and found.kernel is not None and not lines
    assert choose("clap", "nobody/nothing", lines.append).name == "logmel" and len(lines) == 1 and "nobody/nothing" in lines[0]
    with pytest.raises(MusiclabError, match="unknown embedder 'ear'"): choose("ear")
