"A collection of real music with planted faults: every fault is found, no clean track is accused, and copies stay on one side of the split."
import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from musiclab import audio, check, data
from musiclab.audio import Audio


def reencode(source: Path, target: Path, *options: str) -> None:
    subprocess.run(["ffmpeg", "-v", "error", "-y", "-i", source, *options, target], check=True)


COPIES = {  # name: options of ffmpeg
    "again.mp3": ("-b:a", "64k"), "mono.ogg": ("-ac", "1", "-q:a", "1"), "phone.aac": ("-b:a", "64k", "-ar", "22050"), "soft.flac": ("-af", "volume=-11dB"),
    "trimmed.mp3": ("-ss", "0.137", "-b:a", "128k"), "excerpt.wav": ("-ss", "7.3", "-t", "12", "-ac", "1", "-ar", "16000")}


@pytest.fixture(scope="module")
def planted(music, tmp_path_factory):
    "The shared tracks with faults among them: the folder, and for each faulty file what should be said of it."
    if not shutil.which("ffmpeg"): pytest.skip("ffmpeg is needed to encode copies")
    folder, expected = tmp_path_factory.mktemp("planted") / "tracks", {}
    shutil.copytree(music / "audio/tracks", folder)
    rock, piano = sorted(folder.glob("rock*.mp3")), sorted(folder.glob("piano*.mp3"))
    whole = rock[0].read_bytes()
    (folder / "cut.mp3").write_bytes(whole[: len(whole) // 2]), (folder / "noise.mp3").write_bytes(np.random.default_rng(0).bytes(50000))
    (folder / "page.mp3").write_text("<html>gone</html>"), (folder / "empty.mp3").write_bytes(b"")
    expected |= {"cut.mp3": "breaks off", "noise.mp3": "cannot be decoded", "page.mp3": "web page", "empty.mp3": "empty"}
    Audio(np.zeros((2, 441000)), 44100).save(folder / "silence.wav")
    second = audio.load(rock[1])
    Audio(np.clip(8 * second.samples, -1, 1), second.rate).save(folder / "clipped.flac")
    Audio(second.samples[:, :20000], second.rate).save(folder / "blip.wav")
    expected |= {"silence.wav": "silent", "clipped.flac": "clipped", "blip.wav": "too short"}
    for (name, options), source in zip(COPIES.items(), [*rock[2:5], *piano[2:5]]):
        reencode(source, folder / name, *options)
        expected[name] = expected[source.name] = "the same music"
    for name in (*COPIES, "cut.mp3", "clipped.flac"): (folder / name).with_name(f"{Path(name).stem}_prompt.txt").write_text("pop, live")
    (folder / f"{piano[6].stem}_prompt.txt").unlink()
    (folder / f"{piano[7].stem}_lyrics.txt").unlink()
    sung = piano[9].with_name(f"{piano[9].stem}_lyrics.txt")
    sung.write_text(piano[9].with_name(f"{piano[9].stem}_prompt.txt").read_text())
    expected |= {piano[6].name: "no caption", piano[7].name: "no lyrics", piano[9].name: "repeat the caption"}
    for one, other in (rock[8], piano[10]), (rock[11], rock[13]):
        one, other = (file.with_name(f"{file.stem}_prompt.txt") for file in (one, other))
        texts = one.read_text(), other.read_text()
        one.write_text(texts[1]), other.write_text(texts[0])
    expected |= {file.name: "does not fit" for file in (rock[8], piano[10])}
    return folder, expected


@pytest.fixture(scope="module")
def report(planted): return data.check(data.read(planted[0]), decode=True)


def test_every_planted_fault_is_found_and_no_clean_track_is_accused(planted, report):
    folder, expected = planted
    said = {}
    for problem in report.problems + report.remarks: said.setdefault(Path(problem.where).name, []).append(problem.reason)
    told = "\n".join(f"{name}: {reasons}" for name, reasons in said.items())
    for name, word in expected.items():
        if word == "the same music": assert any(word in reason for reason in said.get(name, [])) or name in told, f"{name}\n{told}"
        else: assert any(word in reason for reason in said.get(name, [])), f"{name} should be told: {word}\n{told}"
    swapped = {name for name, reasons in said.items() if any("does not fit" in reason for reason in reasons)}
    near = {file.name for file in (sorted(folder.glob("rock*.mp3"))[11], sorted(folder.glob("rock*.mp3"))[13])}
    assert swapped - near == {name for name, word in expected.items() if word == "does not fit"}, told
    twins = {sorted(folder.glob("rock*.mp3"))[i].name for i in (0, 1)}  # of the cut and the clipped one
    assert set(said) <= set(expected) | near | twins, told


def test_copies_land_on_one_side_of_the_split(planted, report):
    _, expected = planted
    groups = {Path(track.source.name).name: track.group for track in report.tracks}
    rock, piano = (sorted(name for name in groups if name.startswith(style) and name.endswith("mp3")) for style in ("rock", "piano"))
    pairs = list(zip(COPIES, [*rock[2:5], *piano[2:5]])) + [("cut.mp3", rock[0])]
    for copy, source in pairs: assert groups[copy] == groups[source]
    for seed in range(20):
        train, valid = data.split(report.tracks, 0.3, seed)
        sides = {Path(track.source.name).name: "train" for track in train} | {Path(track.source.name).name: "valid" for track in valid}
        assert all(sides[copy] == sides[source] for copy, source in pairs)


def test_a_table_a_json_and_suggestions(planted, report, tmp_path):
    folder, expected = planted
    rows = json.loads(check.save_json(report, tmp_path / "check.json").read_text())["tracks"]
    assert {row["status"] for row in rows} == {"unusable", "remark", "fine"}
    assert len(rows) == len(check.rows(report)) == len(check.text_table(report).splitlines())
    before = {path: path.read_bytes() for path in folder.glob("*.txt")}
    written = check.save_suggestions(report)
    assert len(written) == len(report.tracks) and all(path.read_bytes() == content for path, content in before.items())
    read = {track.key: track.text for track in data.read(folder, text="{filename}_suggested.txt")}
    assert all(read[path.stem.removesuffix("_suggested")] == path.read_text().strip() for path in written) and "bpm" in written[0].read_text()
    for path in written: path.unlink()
