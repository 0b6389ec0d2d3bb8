"The store under attack: kills, damage, a full disk, dying workers. What was finished is kept, and what is wrong is said."
import errno
import logging
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest

from musiclab import shards
from musiclab.core import MusiclabError
from musiclab.features import prepare
from musiclab.shards import Shelf, Store, intact, write_shard
from tests.small_features import Letters, same, song, texts

PROGRAM = """if True:
    import sys
    from musiclab.features import prepare
    from tests.small_features import Letters, texts
    folder, where, n, slow = sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
    print("ready", flush=True)
    prepare([Letters(where, log=f"{folder}/log", slow=slow)], texts(n), f"{folder}/store", workers=2)
    print("done", flush=True)"""


@contextmanager
def program(folder, where, n, slow):
    "A process that prepares texts; killed at the end if it still runs."
    with subprocess.Popen([sys.executable, "-c", PROGRAM, folder, where, str(n), str(slow)], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "ready\n"
            yield process
        finally: process.kill()


def until(condition, seconds=30):
    "Wait for something to become true."
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.005)


def rows_in(store): return sum(stock.rows for stock in Store(store).ls())


@pytest.mark.parametrize("seed", range(2))
def test_kills_at_any_moment_lose_only_the_shard_at_hand(tmp_path, seed):
    moments, log, store, kept = random.Random(seed), Letters(log=tmp_path / "log"), tmp_path / "store", 0
    for _ in range(3):
        before = len(log.logged())
        with program(tmp_path, "device", 100, 0.004) as process:
            until(lambda: len(log.logged()) > before or process.poll() is not None) # noqa: B023
            time.sleep(moments.uniform(0, 0.2))
        assert not Store(store).verify() and rows_in(store) >= kept # every shard with a name is whole, and none was lost
        kept = rows_in(store)
        assert kept >= len(set(log.logged())) - 9 # at most the shard at hand, of 8 rows, and one line of the log
    assert same(prepare([log], texts(100), store), texts(100), [log])
    assert len(log.logged()) <= 100 + 3 * 9 and len(set(log.logged())) == 100


def test_a_kill_while_writing_leaves_nothing_that_counts(tmp_path, monkeypatch):
    rows = {f"{i:032x}": {"x": np.arange(1000) + i} for i in range(4)}
    data = write_shard(tmp_path / "whole", rows).read_bytes()
    for name in ("replace", "fsync"): # the process dies just before it does this
        with monkeypatch.context() as patch:
            def die(*_): raise KeyboardInterrupt
            patch.setattr(os, name, die)
            with pytest.raises(KeyboardInterrupt): write_shard(tmp_path / name, rows)
        (tmp_path / name / ".0-1.77.part.safetensors").write_bytes(data[:500]) # and this is how a kill leaves it
        assert len(Shelf(tmp_path / name).keys) == 0
        assert intact(write_shard(tmp_path / name, rows)) and len(Shelf(tmp_path / name).keys) == 4


def test_two_that_start_together_and_one_is_killed(tmp_path):
    log = Letters(log=tmp_path / "log")
    with program(tmp_path, "device", 80, 0.005) as first, program(tmp_path, "device", 80, 0.005) as second:
        until(lambda: len(log.logged()) > 20)
        first.kill() # what it had claimed is free again
        assert second.stdout.read() == "done\n"
    assert same(prepare([log], texts(80), tmp_path / "store"), texts(80), [log])
    assert 80 <= len(log.logged()) <= 80 + 9


def test_workers_end_with_their_killed_parent(tmp_path):
    log = Letters(log=tmp_path / "log")
    with program(tmp_path, "worker", 1000, 0.01): until(lambda: len(log.logged()) > 3)
    def growing(): before = len(log.logged()); time.sleep(0.3); return len(log.logged()) > before
    until(lambda: not growing(), 10)
    assert len(log.logged()) < 500 and not Store(tmp_path / "store").verify()


def test_control_c_keeps_what_the_workers_have_made(tmp_path):
    log = Letters(log=tmp_path / "log")
    command = [sys.executable, "-c", PROGRAM, tmp_path, "worker", "1000", "0.01"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
                          preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)) as process: # a shell may have switched it off
        until(lambda: len(log.logged()) > 3)
        os.killpg(process.pid, signal.SIGINT) # as a terminal does: to all of them
        process.communicate(timeout=20)
    assert process.returncode == -signal.SIGINT
    assert rows_in(tmp_path / "store") == len(log.logged()) < 500


def test_an_input_that_kills_its_process_is_found(tmp_path):
    feature, tracks = Letters("worker"), [*texts(2), song("deadly"), *texts(5)[2:]]
    prepared = prepare([feature], tracks, tmp_path, workers=2)
    assert [str(problem) for problem in prepared.problems] == ["deadly: its process died: out of memory, or a crash in a library"]
    assert len(prepared.kept) == 5 and same(prepared, [tracks[i] for i in prepared.kept], [feature])


def test_workers_that_cannot_start_are_not_the_fault_of_the_songs(tmp_path):
    program = tmp_path / "script.py" # a script without `if __name__ == "__main__":`
    program.write_text("import sys\nfrom musiclab.features import prepare\nfrom tests.small_features import Letters, texts\n"
                       "prepare([Letters('worker')], texts(3), sys.argv[1], workers=1)")
    run = subprocess.run([sys.executable, program, tmp_path / "store"], capture_output=True, text=True, timeout=60)
    assert run.returncode == 1 and 'put the code under `if __name__ == "__main__":`' in run.stderr.splitlines()[-1]


def flip(data, at): return data[:at] + bytes([data[at] ^ 1]) + data[at + 1:]

DAMAGE = {
    "header length": lambda d: flip(d, 0), "header": lambda d: flip(d, 40), "name": lambda d: flip(d, d.index(b"keys") + 2),
    "last bit": lambda d: flip(d, len(d) - 1), "middle": lambda d: flip(d, len(d) // 2), "zeros": lambda d: bytes(len(d)),
    "truncated": lambda d: d[:len(d) // 2], "one byte less": lambda d: d[:-1], "one more": lambda d: d + b"\0",
    "empty": lambda d: b"", "another file": lambda d: b"<html>not found</html>"}

@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_found_named_set_aside_and_repaired(tmp_path, kind, caplog):
    feature, tracks = Letters(log=tmp_path / "log"), texts(20)
    prepare([feature], tracks, tmp_path / "store")
    victim, *others = sorted((tmp_path / "store").glob("*/*.safetensors"))
    data = victim.read_bytes()
    victim.write_bytes(DAMAGE[kind](data))
    assert [(p.where, p.reason) for p in Store(tmp_path / "store").verify()] == [(str(victim), "its sha256 has changed")]
    assert Store(tmp_path / "store").ls()[0].shards == 3 # listing survives it
    with caplog.at_level(logging.WARNING, "musiclab"): prepared = prepare([feature], tracks, tmp_path / "store")
    assert str(victim) in caplog.text and "is damaged" in caplog.text
    assert same(prepared, tracks, [feature]) and not Store(tmp_path / "store").verify()
    assert victim.read_bytes() == data and victim.with_name(victim.name + ".damaged").exists()
    assert 20 < len(feature.logged()) <= 28 # only its own rows were made again
    assert all(intact(path) for path in others) and Store(tmp_path / "store").ls()[0].damaged == 1


def test_a_shard_under_anothers_name_is_refused(tmp_path, caplog):
    feature, tracks = Letters(), texts(20)
    prepare([feature], tracks, tmp_path)
    one, two, _ = sorted(tmp_path.glob("*/*.safetensors"))
    shutil.copy(one, two)
    assert same(prepare([feature], tracks, tmp_path), tracks, [feature]) and caplog.text.count("is damaged") == 1


def test_a_deleted_shard_is_made_again_and_named_when_it_is_read(tmp_path):
    feature, tracks = Letters(), texts(20)
    prepared = pickle.loads(pickle.dumps(prepare([feature], tracks, tmp_path))) # as a loader worker gets it: nothing open yet
    for path in tmp_path.glob("*/*.safetensors"): path.unlink()
    with pytest.raises(MusiclabError, match=r"\.safetensors: is gone from the store"): prepared.rows(tracks[0])
    assert same(prepare([feature], tracks, tmp_path), tracks, [feature])


@pytest.mark.parametrize("content", [b"", b"{", b"[1, 2]", b"\xff\xfe", b'{"a:1:2": "00"}'])
def test_a_damaged_memory_of_hashes_costs_only_time(tmp_path, content):
    prepare([Letters()], texts(3), tmp_path)
    (tmp_path / "digests.json").write_bytes(content)
    assert same(prepare([Letters()], texts(5), tmp_path), texts(5), [Letters()])


def disk_with(room):
    "A disk that has `room` bytes left: what is written beyond them raises, as the system does."
    def write(path, data):
        nonlocal room
        if len(data) > room: raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        room -= len(data)
        shards_write(path, data)
    shards_write = shards.atomic_write
    return write

@pytest.mark.parametrize("preflight", [True, False])
def test_a_full_disk_keeps_what_was_written(tmp_path, monkeypatch, preflight):
    feature, tracks = Letters(log=tmp_path / "log"), texts(40)
    with monkeypatch.context() as patch:
        if preflight: # the system tells before, when there are two shards
            def usage(folder): return SimpleNamespace(free=10**9 if len(list(folder.glob("*.safetensors"))) < 2 else 100)
            patch.setattr(shutil, "disk_usage", usage)
        else: patch.setattr(shards, "atomic_write", disk_with(6000))
        with pytest.raises(MusiclabError, match=r"disk full: [\d.]+ k?B needed, .*B free\. Free some space") as error:
            prepare([feature], tracks, tmp_path / "store")
    assert str(tmp_path / "store") in str(error.value)
    assert not Store(tmp_path / "store").verify() and not list(tmp_path.glob("store/*/.*part*"))
    kept = rows_in(tmp_path / "store")
    assert kept >= 8
    assert same(prepare([feature], tracks, tmp_path / "store"), tracks, [feature])
    assert len(feature.logged()) <= 48 and rows_in(tmp_path / "store") == 40 # only the shard at hand was lost


def test_a_disk_that_is_really_full(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True)
    if mounted.returncode: pytest.skip("mounting a small disk needs root")
    try:
        tracks = [song(f"{i} " + "la" * 500) for i in range(40)] # about 16 kB each
        with pytest.raises(MusiclabError, match="disk full: .* needed"): prepare([Letters()], tracks, disk / "store")
        assert not Store(disk / "store").verify() and not list(disk.glob("store/*/.*part*"))
        assert same(prepare([Letters()], tracks[:2], tmp_path / "elsewhere"), tracks[:2], [Letters()])
    finally: subprocess.run(["umount", disk], check=True)
