"Features: what the store keeps, finds again and gives out; which work is done, by whom, and how often."
import multiprocessing
import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from musiclab import encode
from musiclab.core import MusiclabError, Stopped
from musiclab.features import cut, prepare
from musiclab.shards import Shard, Shelf, Store, pack, unpack, write_shard
from musiclab.tracks import Source
from tests.small_features import Files, Letters, same, song, texts

DTYPES = ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16", "float32", "float64", "bool"]


@st.composite
def ragged(draw):
    dtype, ndim, n = draw(st.sampled_from(DTYPES)), draw(st.integers(0, 3)), draw(st.integers(1, 6))
    shapes = draw(st.lists(st.tuples(*[st.integers(0, 4)] * ndim), min_size=n, max_size=n))
    return [{"x": draw(arrays.arrays(dtype, shape)), "second": np.arange(i)} for i, shape in enumerate(shapes)]


@given(ragged())
def test_packed_rows_come_back(rows):
    flat = pack(rows)
    for i, row in enumerate(rows):
        back = unpack(flat, i)
        for field in row: assert back[field].dtype == row[field].dtype and back[field].tobytes() == row[field].tobytes()
        assert back["x"].shape == row["x"].shape


@settings(deadline=None, max_examples=40)
@given(ragged())
def test_a_shard_gives_back_its_rows(tmp_path_factory, rows):
    keyed = {f"{i * 7919 % 97:032x}": row for i, row in enumerate(rows)}
    folder = tmp_path_factory.mktemp("shelf")
    path = write_shard(folder, keyed)
    assert write_shard(folder, dict(reversed(keyed.items()))) == path and len(list(folder.iterdir())) == 1
    shelf = Shelf(folder)
    for key, (n, i) in zip(keyed, shelf.find(np.array(list(keyed), "S32"))):
        row = shelf.shards[n].row(i)
        assert row["x"].shape == keyed[key]["x"].shape and row["x"].tobytes() == keyed[key]["x"].tobytes()
        assert not row["x"].flags.writeable or not row["x"].size
    assert (shelf.find(np.array(["f" * 32, "0" * 31 + "x"], "S32")) == -1).all()


@given(st.integers(0, 20_000), st.floats(0, 1, exclude_max=True))
def test_the_work_is_cut_completely(n, begin):
    pieces = cut(np.arange(n), begin)
    assert sorted(k for piece in pieces for k in piece) == list(range(n))
    assert all(len(piece) <= 4096 for piece in pieces) and len(pieces) <= 65
    assert [tuple(p) for p in sorted(pieces, key=lambda p: p[0])] == [tuple(p) for p in cut(np.arange(n))]


def test_equal_inputs_are_encoded_once(tmp_path):
    feature = Letters(log=tmp_path / "log")
    tracks = [song("do", "a"), song("do", "b"), song("re", "c"), song(None, "silence")]
    prepared = prepare([feature], tracks, tmp_path / "store")
    assert sorted(feature.logged()) == ["do", "re"] and prepared.kept == [0, 1, 2, 3]
    assert same(prepared, tracks, [feature]) and prepared.rows(tracks[3]) == {"letters": []}
    prepare([feature], [*tracks, song("mi", "d")], tmp_path / "store")
    assert sorted(feature.logged()) == ["do", "mi", "re"]


def test_the_content_decides_not_the_name(tmp_path):
    feature = Files(log=tmp_path / "log")
    def tracks(): return [song("", path.name, Source.of(path)) for path in sorted(tmp_path.glob("*.txt"))]
    (tmp_path / "a.txt").write_text("do re")
    (tmp_path / "b.txt").write_text("mi fa")
    assert same(prepare([feature], tracks(), tmp_path / "store"), tracks(), [feature])
    (tmp_path / "a.txt").rename(tmp_path / "c.txt")
    prepare([feature], [*tracks(), song("", "bytes", Source.of(b"mi fa"))], tmp_path / "store")
    assert len(feature.logged()) == 2
    (tmp_path / "b.txt").write_text("mi mi")
    assert same(prepare([feature], tracks(), tmp_path / "store"), tracks(), [feature]) and len(feature.logged()) == 3


def test_hashes_are_remembered_between_runs(tmp_path):
    (tmp_path / "a.txt").write_text("do")
    program = """if True:
        import sys
        from musiclab.features import prepare
        from musiclab.tracks import Source
        from tests.small_features import Files, song
        read = []
        Source.digest = lambda self, digest=Source.digest: read.append(self) or digest(self)
        prepare([Files()], [song("", "a", Source.of(sys.argv[1] + "/a.txt"))], sys.argv[1] + "/store")
        print(len(read))"""
    def run(): return subprocess.run([sys.executable, "-c", program, tmp_path], capture_output=True, text=True, check=True).stdout.strip()
    assert run() == "1" and run() == "0"
    (tmp_path / "a.txt").write_text("re")
    assert run() == "1"


def test_other_settings_are_another_shelf(tmp_path):
    first, second = Letters(log=tmp_path / "log"), Letters(log=tmp_path / "log", version=2)
    for feature in (first, second, first, second): prepare([feature], texts(3), tmp_path / "store")
    assert len(first.logged()) == 6
    assert [(stock.name, stock.rows, stock.shards) for stock in Store(tmp_path / "store").ls()] == [("letters", 3, 1)] * 2
    assert sorted(stock.settings["version"] for stock in Store(tmp_path / "store").ls()) == [1, 2]


@pytest.mark.parametrize("batch", [1, 3, 100])
def test_on_demand_and_any_batch_give_equal_rows(tmp_path, batch):
    feature, tracks = Letters(batch=batch), texts(10)
    stored = prepare([feature], tracks, tmp_path)
    with prepare([feature], tracks, None) as fresh:
        for track in tracks:
            [a], [b] = stored.rows(track)["letters"], fresh.rows(track)["letters"]
            assert all(a[f].dtype == b[f].dtype and a[f].tobytes() == b[f].tobytes() and a[f].shape == b[f].shape for f in a)
        assert feature.opened == 1
    assert feature.opened == 0


def test_encoders_are_opened_one_at_a_time_and_only_for_what_is_missing(tmp_path):
    first, second = Letters(), Files()
    now = []
    for feature in (first, second):
        def open(device, feature=feature, before=feature.open):
            now.append((feature.name, first.opened + second.opened))
            return before(device)
        feature.open = open
    tracks = [song(f"{i}", source=Source.of(f"{i}".encode())) for i in range(20)]
    assert same(prepare([first, second], tracks, tmp_path), tracks, [first, second])
    assert now == [("letters", 0), ("files", 0)]
    prepare([first, second], tracks, tmp_path)
    assert len(now) == 2


@pytest.mark.parametrize("where, workers", [("device", None), ("worker", 0), ("worker", 2)])
@pytest.mark.parametrize("batch", [1, 4])
def test_bad_inputs_are_skipped_and_listed(tmp_path, where, workers, batch):
    feature = Letters(where, batch)
    tracks = [song("do"), song("bad one"), song("re"), song("an awful one"), song("nan"), song("mi"), song("bad one", "again")]
    for _ in range(2): # nothing about them is remembered
        prepared = prepare([feature], tracks, tmp_path, workers=workers)
        assert prepared.kept == [0, 2, 5] and same(prepared, [tracks[i] for i in prepared.kept], [feature])
        assert [str(problem) for problem in prepared.problems] == ["bad one: not a song", "an awful one: the encoder cannot take it",
            "nan: the encoder gave wave that are not finite", "bad one: not a song"]
    with pytest.raises(MusiclabError, match="none of the 2 tracks can be used: bad one: not a song; nan: the"):
        prepare([feature], [tracks[1], tracks[4]], tmp_path, workers=workers)


def test_missing_files_and_unreadable_inputs_are_problems_too(tmp_path):
    class Silent(Files):
        def inputs(self, track):
            if track.source is None: raise MusiclabError("has no sound", track.key)
            return [track.source]
    tracks = [song("", "gone", Source.of(tmp_path / "gone.txt")), song("", "text only"), song("", "good", Source.of(b"do"))]
    for store in (tmp_path / "store", None):
        prepared = prepare([Silent()], tracks, store)
        assert "text only: has no sound" in map(str, prepared.problems)
    assert prepare([Silent()], tracks, tmp_path / "store").kept == [2]


def test_a_track_that_failed_once_costs_no_more_work(tmp_path):
    later = Files(log=tmp_path / "log")
    prepare([Letters(), later], [song("bad", source=Source.of(b"x")), song("do", source=Source.of(b"y"))], tmp_path / "store")
    assert later.logged() == ["y"]


def test_mistakes_in_a_program_are_not_taken_for_bad_songs(tmp_path):
    feature = Letters(log=tmp_path / "log")
    feature.row = lambda text, row=feature.row: row(text) if text[:2] != "13" else 1 / 0
    with pytest.raises(ZeroDivisionError): prepare([feature], texts(20), tmp_path / "store")
    done = feature.logged()
    del feature.row
    assert same(prepare([feature], texts(20), tmp_path / "store"), texts(20), [feature])
    assert sorted(feature.logged()) == sorted(track.caption for track in texts(20)) and done # what was made was kept


@pytest.mark.parametrize("where, workers", [("device", None), ("worker", 2)])
def test_a_stop_keeps_what_was_made(tmp_path, where, workers):
    feature, polls = Letters(where, log=tmp_path / "log", slow=0.02), []
    def stop(): polls.append(1); return len(feature.logged()) >= 5
    with pytest.raises(Stopped): prepare([feature], texts(60), tmp_path / "store", workers=workers, stop=stop)
    made = len(feature.logged())
    assert 5 <= made < 40 and len(polls) > 2
    feature.slow = 0
    assert same(prepare([feature], texts(60), tmp_path / "store", workers=workers), texts(60), [feature])
    assert len(feature.logged()) == 60


def test_large_rows_make_several_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(encode, "SHARD_BYTES", 200)
    prepared = prepare([Letters()], texts(8), tmp_path)
    assert Store(tmp_path).ls()[0].shards > 2 and same(prepared, texts(8), [Letters()])


def test_rows_are_views_that_many_may_read(tmp_path):
    feature, tracks = Letters(), texts(50)
    prepared = prepare([feature], tracks, tmp_path)
    assert not prepared.rows(tracks[3])["letters"][0]["wave"].flags.writeable
    with ThreadPoolExecutor(8) as pool: assert all(pool.map(lambda track: same(prepared, [track], [feature]), tracks * 4))
    again = pickle.loads(pickle.dumps(prepared))
    assert same(again, tracks, [feature]) and len(pickle.dumps(prepared)) < 20_000
    with pytest.raises(MusiclabError, match="letters were not prepared"): prepared.rows(song("unknown"))


class Rows:
    "A data set as a DataLoader wants it."
    def __init__(self, prepared, tracks): self.prepared, self.tracks = prepared, tracks
    def __len__(self): return len(self.tracks)
    def __getitem__(self, i): return os.getpid(), self.prepared.rows(self.tracks[i])["letters"][0]["wave"].copy()


def test_loader_workers_read_the_store(tmp_path):
    from torch.utils.data import DataLoader
    feature, tracks = Letters(), texts(12)
    prepared = prepare([feature], tracks, tmp_path)
    prepared.rows(tracks[0]) # opened before the fork
    pids, waves = zip(*DataLoader(Rows(prepared, tracks), batch_size=None, num_workers=2, multiprocessing_context="fork"))
    assert len(set(pids)) == 2 and all(np.array_equal(wave, feature.row(track.caption)["wave"]) for wave, track in zip(waves, tracks))


def test_a_fresh_process_reads_the_store_without_torch(tmp_path):
    prepared = prepare([Letters()], texts(12), tmp_path)
    (tmp_path / "prepared").write_bytes(pickle.dumps(prepared))
    program = """if True:
        import pickle, sys
        from tests.small_features import Letters, same, texts
        with open(sys.argv[1], "rb") as file: print(same(pickle.load(file), texts(12), [Letters()]), "torch" in sys.modules)"""
    run = subprocess.run([sys.executable, "-c", program, tmp_path / "prepared"], capture_output=True, text=True, check=True)
    assert run.stdout == "True False\n"


def in_fork(function):
    pool = multiprocessing.get_context("fork").Pool(1)
    with pool: return pool.apply(function)


def first_row(): return ON_DEMAND.rows(song("do"))["letters"][0]["codes"].tolist()

def test_on_demand_stays_in_its_process_where_it_needs_a_device():
    global ON_DEMAND
    with prepare([Letters()], [song("do")], None) as ON_DEMAND:
        assert not ON_DEMAND.portable and first_row() == [100, 111]
        with pytest.raises(MusiclabError, match="workers=0"): in_fork(first_row)
        with pytest.raises(MusiclabError, match="not a song"): ON_DEMAND.rows(song("bad"))
    with prepare([Letters("worker")], [song("do")], None) as ON_DEMAND:
        assert ON_DEMAND.portable and in_fork(first_row) == [100, 111]


HELPER = """if True:
    import sys
    from musiclab.features import prepare
    from tests.small_features import Letters, same, texts
    folder, rank, world = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    tracks = texts(120)
    tracks[7].caption = "bad seven"
    feature = Letters(log=f"{folder}/log{rank}", slow=0.01)
    sys.stdin.readline()
    prepared = prepare([feature], tracks, f"{folder}/store", rank=rank, world=world)
    assert same(prepared, [tracks[i] for i in prepared.kept], [feature])
    print(prepared.kept == [i for i in range(120) if i != 7], *prepared.problems)"""

def test_processes_share_the_work(tmp_path):
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    helpers = [subprocess.Popen([sys.executable, "-c", HELPER, tmp_path, str(rank), "3"], **pipes) for rank in range(3)]
    for helper in helpers: helper.stdin.write("go\n"); helper.stdin.flush()
    assert [helper.communicate()[0] for helper in helpers] == ["True bad seven: not a song\n"] * 3
    shares = [Letters(log=tmp_path / f"log{rank}").logged() for rank in range(3)]
    assert sum(map(len, shares)) == 119 and all(shares) # every one helped, and nothing was done twice
    assert not Store(tmp_path / "store").verify() and not list((tmp_path / "store").glob("*/.*part*"))


def test_stores_made_apart_are_equal(tmp_path, monkeypatch):
    class Counted(encode.Workers):
        def make(self, *job): handed.append(job); return super().make(*job)
    handed, stores = [], [tmp_path / name for name in ("one", "two", "another störe 歌")]
    monkeypatch.setattr(encode, "Workers", Counted)
    monkeypatch.setattr("musiclab.features.cores", lambda: 2)
    prepare([Letters(batch=3)], texts(40), stores[0])
    prepare([Letters("worker")], texts(40)[::-1], stores[1])
    assert not handed # so little work is done sooner than processes start
    monkeypatch.setattr(encode, "START", -1.0)
    prepare([Letters("worker")], texts(40)[::-1], stores[2])
    assert len(handed) == 4 # and so is the first of five pieces
    content = [{p.relative_to(store): p.read_bytes() for p in store.glob("*/*.safetensors")} for store in stores]
    assert content[0] == content[1] == content[2] and len(content[0]) == 5


def test_processes_start_when_they_save_time(tmp_path, monkeypatch):
    monkeypatch.setattr("musiclab.features.cores", lambda: 4)
    asked = []
    monkeypatch.setattr(encode, "pays", lambda rest, count: bool(asked.append((rest, count))))
    prepare([Letters("worker", slow=0.01)], texts(40), tmp_path / "store")
    assert [count for _, count in asked] == [4] * 5 and asked[-1][0] == 0
    assert all(rest >= 0.01 * left for (rest, _), left in zip(asked, (32, 24, 16, 8))) # measured, file by file
    def workers(count): raise InterruptedError(f"{count} processes")
    monkeypatch.setattr(encode, "Workers", workers)
    feature = Letters("worker", log=tmp_path / "log")
    with pytest.raises(InterruptedError, match="4 processes"): prepare([feature], texts(4200), tmp_path / "many")
    assert not feature.logged() # thousands of inputs are given away untried


def finished(store): return same(prepare([Letters()], texts(9), store), texts(9), [Letters()])

def unfinished(store): return str(pytest.raises(MusiclabError, prepare, [Letters()], texts(10), store).value)

def test_a_finished_store_may_be_read_only(tmp_path, as_nobody):
    store = tmp_path / "store"
    prepare([Letters()], texts(9), store)
    for path in [*store.rglob("*"), store]: path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        assert as_nobody(finished, store)
        assert "cannot be written (Permission denied)" in as_nobody(unfinished, store)
    finally:
        for path in [store, *store.rglob("*")]: path.chmod(0o755)


def test_pruning_removes_what_is_of_no_use(tmp_path):
    prepare([Letters()], texts(9), tmp_path)
    prepare([Letters(version=2)], texts(9), tmp_path)
    old, new = (tmp_path / name for name in sorted(p.name for p in tmp_path.iterdir() if p.is_dir()))
    half = [old / f".0-1.{i}.part.safetensors" for i in range(2)]
    for path in half: path.write_bytes(b"half")
    os.utime(half[0], (0, 0)) # left by a process that is long dead; the other may still be written to
    (new / "0-1.safetensors.damaged").write_bytes(b"bad")
    assert Store(tmp_path).prune() == {half[0]: 4, new / "0-1.safetensors.damaged": 3}
    os.utime(old / "feature.json", (0, 0))
    Store(tmp_path).prune(days=30)
    assert [stock.folder for stock in Store(tmp_path).ls()] == [new] and not list(old.glob("*.safetensors")) and half[1].exists() is False


def test_the_list_of_stock_reads_well(tmp_path):
    prepare([Letters()], texts(9), tmp_path)
    [stock] = Store(tmp_path).ls()
    assert stock.rows == 9 and stock.bytes == sum(p.stat().st_size for p in tmp_path.glob("*/*.safetensors"))
    assert str(stock).startswith("letters            9 rows") and str(stock).endswith(f"  {stock.folder}")
    assert "kB in 2 shards, last used 20" in str(stock)
    assert all(len(Shard(p)) for p in stock.folder.glob("*.safetensors"))
