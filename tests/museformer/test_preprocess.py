"Preprocessing: the same bytes however it is done, files that are broken, hang or kill, and going on after a kill."
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from musiclab import compose
from musiclab.core import MusiclabError
from musiclab.museformer.preprocess import Rows, Tokens, find_files, preprocess, read_tokens
from musiclab.museformer.tokenizer import HIDTokenizerV2
from tests.house import root


@pytest.fixture(scope="module")
def songs(tmp_path_factory) -> Path:
    "Twenty short songs, one twice, and two files that are none."
    folder = tmp_path_factory.mktemp("songs")
    compose.dataset(folder, 20, seconds=6, format="mid")
    first = sorted(folder.glob("*.mid"))[0]
    (folder/"below").mkdir()
    (folder/"below/twin.MID").write_bytes(first.read_bytes())
    (folder/"empty.mid").write_bytes(b"")
    (folder/"page.mid").write_bytes(b"<html>not found</html>")
    return folder


def contents(folder: Path) -> dict[str, str]:
    "Every file of tokens and its hash."
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.rglob("*"))
            if path.is_file() and not path.name.startswith(".") and path.name != "digests.json"}


@pytest.fixture(scope="module")
def reference(songs, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("reference")/"tokens"
    preprocess(songs, folder, workers=0)
    return folder


@pytest.mark.parametrize("workers", [1, 8])
def test_the_number_of_workers_changes_no_byte(songs, reference, tmp_path, workers):
    preprocess(songs, tmp_path/"tokens", workers=workers)
    assert contents(tmp_path/"tokens") == contents(reference)


def test_ray_changes_no_byte(songs, reference, tmp_path):
    ray = pytest.importorskip("ray", reason="ray is an extra: pip install musiclab[ray]")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try: preprocess(songs, tmp_path/"tokens", workers="ray")
    finally: ray.shutdown()
    assert contents(tmp_path/"tokens") == contents(reference)


def test_lists_say_what_happened(songs, reference):
    meta = json.loads((reference/"meta.json").read_text())
    assert (meta["files"], meta["failed"], meta["twins"], meta["vocab_size"], meta["max_seq_len"]) == (20, 2, 1, 415, 24576)
    failed = dict(line.split("\t") for line in (reference/"failed.txt").read_text().splitlines())
    assert {Path(name).name for name in failed} == {"empty.mid", "page.mid"} and "too short" in failed[str(songs/"empty.mid")]
    tracks, tokenizer = read_tokens(reference), HIDTokenizerV2()
    assert meta["tokens"] == sum(len(track.source.array()) for track in tracks)
    for track in tracks[::7]: assert track.source.array().tolist() == tokenizer.encode_with_info(songs/track.key)[0]


def test_one_file_a_song(songs, reference, tmp_path):
    summary = preprocess(songs, tmp_path/"pt", workers=2, format="pt")
    names = (tmp_path/"pt/train_files.txt").read_text().split("\n")[:-1]
    assert len(names) == summary.files == 20 and all((tmp_path/"pt"/name).is_file() for name in names)
    assert torch.load(tmp_path/"pt"/names[0], weights_only=True)["ids"].dtype == torch.int16
    assert sorted(row.tolist() for row in Rows(tmp_path/"pt")) == sorted(row.tolist() for row in Rows(reference))
    preprocess(songs, tmp_path/"again", workers=0, format="pt")
    assert all((tmp_path/"pt"/name).read_bytes() == (tmp_path/"again"/name).read_bytes() for name in names)


def test_long_songs_are_cut_at_a_bar(songs, tmp_path):
    summary = preprocess(songs, tmp_path/"tokens", workers=0, max_seq_len=200)
    assert summary.cut > 10
    for ids in Rows(tmp_path/"tokens"): assert len(ids) <= 200 and ids[-1] in (2, 4)


def test_several_machines_share_the_work(songs, reference, tmp_path):
    for shard in range(3): preprocess(songs, tmp_path/"tokens", workers=0, shard=shard, num_shards=3)
    assert sorted(row.tolist() for row in Rows(tmp_path/"tokens")) == sorted(row.tolist() for row in Rows(reference))


def test_wrong_wishes_are_named(songs, tmp_path):
    for wrong in (dict(input=tmp_path/"nothing"), dict(format="zip"), dict(shard=3, num_shards=3), dict(max_seq_len=3)):
        with pytest.raises(MusiclabError): preprocess(**dict(input=songs, output=tmp_path/"tokens") | wrong)
    (tmp_path/"list.txt").write_text("gone.mid\n" + "\n".join(str(track.source.name) for track in find_files(songs, limit=3)))
    assert preprocess(tmp_path/"list.txt", tmp_path/"tokens", workers=0).failed == 1


TRAPS = '''
import itertools, os
import symusic
from musiclab.museformer import preprocess
honest, preprocess.PATIENCE = preprocess.encode_file, 1.0
def encode_file(tokenizer, name, data):
    with preprocess.within(preprocess.PATIENCE):
        if "endless" in name:
            while True: pass
        if "deaf" in name: sum(itertools.repeat(0, 10**15)) # inside a library, where Python cannot interrupt
        if "deadly" in name: os._exit(1)
    return honest(tokenizer, name, data)
preprocess.encode_file = encode_file
class Traps(preprocess.Tokens): pass
'''

def test_a_file_that_hangs_or_kills_costs_only_itself(songs, tmp_path, monkeypatch):
    folder = tmp_path/"songs"
    compose.dataset(folder, 3, seconds=4, format="mid")
    data = sorted(songs.glob("0*.mid"))[0].read_bytes()
    for i, name in enumerate(("endless", "deadly", "deaf")): (folder/f"{name}.mid").write_bytes(data + bytes(i + 1))
    (tmp_path/"traps.py").write_text(TRAPS)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{root}")
    import traps
    from musiclab.museformer.preprocess import make_rows
    monkeypatch.setattr("musiclab.museformer.preprocess.encode_file", traps.honest) # the traps are for the workers only
    prepared = make_rows(find_files(folder), traps.Traps(), tmp_path/"store", 2, lambda: False)
    problems = {Path(problem.where).name: problem.reason for problem in prepared.problems}
    assert len(prepared.kept) == 3 and set(problems) == {"endless.mid", "deadly.mid", "deaf.mid"}
    assert "takes longer" in problems["endless.mid"] and "died" in problems["deadly.mid"] and "died" in problems["deaf.mid"]


def test_a_killed_run_goes_on(songs, reference, tmp_path):
    command = [sys.executable, "scripts/preprocess_data.py", "--input", str(songs), "--output", str(tmp_path/"tokens"), "--workers", "1", "--format", "shard"]
    run = subprocess.Popen(command, cwd=root, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 60
    while not list((tmp_path/"tokens").glob("*/*.safetensors")) and run.poll() is None and time.monotonic() < deadline: time.sleep(0.005)
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path/"tokens").glob("*/*.safetensors")}
    subprocess.run(command, cwd=root, check=True, capture_output=True)
    assert contents(tmp_path/"tokens") == contents(reference)
    assert before and all(path.stat().st_mtime_ns == when for path, when in before.items()) # what was there was not made again


def test_tokens_say_all_that_their_numbers_depend_on():
    assert Tokens(24576).settings == {"tokenizer": "HIDTokenizerV2", "grid": 12, "longest": 24576, "chords": True, "version": 1}
