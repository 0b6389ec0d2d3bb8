"HeartCodec: every tensor of the release, songs in windows without loss or seam, folders of songs to tokens and back, and what goes wrong on the way."
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from musiclab import audio, data
from musiclab.audio import Audio
from musiclab.commands_heartmula import heartmula_app
from musiclab.compose import compose
from musiclab.core import MusiclabError, Problem
from musiclab.features import prepare
from musiclab.heartmula import tokenize
from musiclab.heartmula.codec import UNIT, Codec, Stream, seeded, windows
from musiclab.heartmula.checkpoint import local_part
from musiclab.heartmula.codec_files import codec_config, codec_names, encoder_names, find_part, identity, open_codec, open_tokenizer, tiny_codec
from musiclab.heartmula.encoder import Encoder
from musiclab.heartmula.flow import Flow
from musiclab.heartmula.quantizer import CodecConfig
from musiclab.heartmula.scalar_codec import ScalarCodec
from musiclab.synth import render

FRAME, RATE = 3840, 48_000
QUICK = dict(window=UNIT, steps=1, guidance=1.0)


@pytest.fixture(scope="module")
def pair(tmp_path_factory): return tiny_codec(tmp_path_factory.mktemp("heartcodec") / "tiny")


@pytest.fixture(scope="module")
def codec(pair) -> Codec: return open_codec(pair)


@pytest.fixture(scope="module")
def tokenizer(pair): return open_tokenizer(pair)


def tones(seconds: float, rate: int = RATE, channels: int = 2, seed: int = 0) -> Audio:
    "A new chord every quarter of a second."
    rng, time = np.random.default_rng(seed), np.arange(int(seconds * rate)) / rate
    pitch = 110 * 2 ** (rng.integers(0, 36, (channels, int(seconds * 4) + 1)) / 12)
    return Audio((0.3 * np.sin(2 * np.pi * np.repeat(pitch, rate // 4, 1)[:, :len(time)] * time)).astype(np.float32), rate)


def codes_of(frames: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(64, (8, frames), generator=torch.Generator().manual_seed(seed))


def sizes(part: str) -> dict[str, tuple]:
    listed = json.loads((Path(__file__).parent / "codec_shapes.json").read_text())[part]
    found = {}
    for name, size, places in listed["shapes"]:
        for place in places:
            parts = name.split("*")
            found["".join(a + b for a, b in zip(parts, [*place.split(), ""]))] = tuple(size)
    assert len(found) == listed["n_tensors"]
    return found


def test_every_tensor_of_the_release_has_its_place():
    config = json.loads((Path(__file__).parent / "codec_shapes.json").read_text())["encoder"]["config"]
    with torch.device("meta"): flow, scalar, encoder = Flow(CodecConfig()), ScalarCodec(CodecConfig()), Encoder(config, unused=True)
    for part, names, count in (("codec", codec_names(flow, scalar), 818), ("encoder", encoder_names(encoder), 1006)):
        assert {name: tuple(weight.shape) for name, weight in names.items()} == sizes(part) and len(names) == count
    with torch.device("meta"): used = Encoder(config).state_dict().keys()
    assert len(encoder.state_dict().keys() - used) == 114 - 17  # 17 of 18 counters of batches are read, though nothing depends on them


def test_a_song_is_as_long_as_its_tokens_and_loses_nothing(codec):
    "Lengths around each border of the windows; those of 26 more than a whole number of steps are where the original drops the end."
    for frames in (1, 40, 92, 93, 94, 106, 173, 186, 200):
        sound = codec.decode(codes_of(frames), **QUICK)
        assert sound.samples.shape == (2, frames * FRAME) and sound.rate == RATE and np.isfinite(sound.samples).all()
        assert np.abs(sound.samples[:, -FRAME:]).max() > 1e-3  # there is sound to the end
    assert [windows(frames) for frames in (1, 372, 373, 424, 692, 693)] == [1, 1, 2, 2, 2, 3]


@pytest.mark.parametrize("many", [1, 7, 80, 93, 200])
def test_pieces_are_the_whole_to_the_bit(codec, many):
    codes = codes_of(200)
    stream, given = Stream(codec, **QUICK, noise=seeded(0)), []
    for some in codes.split(many, 1):
        given += stream.push(some)
        known, played = stream.codes.shape[1], sum(piece.samples.shape[1] for piece in given) // FRAME
        assert played <= known and (known < UNIT or played >= known - UNIT)  # never further than known, never a window behind
    given += stream.finish()
    assert np.array_equal(np.concatenate([piece.samples for piece in given], 1), codec.decode(codes, **QUICK).samples)
    assert all(piece.samples.shape[1] for piece in given)


def test_the_beginning_does_not_depend_on_what_follows(codec):
    one, other = codes_of(173), codes_of(173, seed=1)
    other[:, :UNIT] = one[:, :UNIT]
    first, second = (codec.decode(codes, **QUICK).samples for codes in (one, other))
    assert np.array_equal(first[:, :80 * FRAME], second[:, :80 * FRAME]) and not np.array_equal(first, second)


def test_a_window_begins_as_the_last_one_ended(codec):
    codes, noise = codes_of(173), seeded(0)
    _, one = codec.decode_window(codes[:, :93], noise(0, (1, 186, 32)), None, 2, 1.25)
    _, two = codec.decode_window(codes[:, 80:], noise(1, (1, 186, 32)), one[:, 160:], 2, 1.25)
    assert torch.equal(one[:, 160:], two[:, :26])


def test_memory_is_a_choice_and_seeds_decide(codec):
    codes = codes_of(60)
    whole = codec.decode(codes, **QUICK)
    small = Codec(codec.flow, codec.scalar, piece=16).decode(codes, **QUICK)
    assert np.abs(small.samples - whole.samples).max() < 1e-5
    assert np.array_equal(codec.decode(codes, seed=0, **QUICK).samples, whole.samples)
    assert not np.allclose(codec.decode(codes, seed=1, **QUICK).samples, whole.samples, atol=1e-3)
    assert not Stream(codec).finish()


def test_half_precision_is_close_and_bfloat16_refused(pair, codec):
    half, codes = open_codec(pair, torch.float16), codes_of(30)
    assert half.flow.cond_feature_emb.weight.dtype == torch.float16 and half.scalar.decoder[0].weight.dtype == torch.float32
    noise = seeded(0)(0, (1, 60, 32))
    (_, exact), (_, near) = (one.decode_window(codes, noise, None, 2, 1.25) for one in (codec, half))
    assert (exact - near.float()).abs().max() < 0.05
    with pytest.raises(MusiclabError, match="does not sound right in bfloat16"): open_codec(pair, torch.bfloat16)


@pytest.mark.parametrize("wrong, complaint", [
    (torch.full((8, 9), 64), "codebooks have entries 0 to 63"), (torch.full((8, 9), -1), "tokens from -1"), (torch.zeros(9, 8).long(), "Transpose"),
    (torch.zeros(4, 9).long(), r"shape \[4, 9\]"), (torch.zeros(8, 0).long(), "shape"), (torch.zeros(8, 9), "whole numbers"),
    (torch.zeros(1, 8, 9).long(), "shape")])
def test_tokens_that_cannot_be_played_are_refused(codec, wrong, complaint):
    with pytest.raises(MusiclabError, match=complaint): codec.decode(wrong)


def test_windows_of_another_length_are_refused(codec):
    for window in (0, -93, 100): pytest.raises(MusiclabError, Stream, codec, window).match("multiple of 93")


@pytest.mark.parametrize("rate, channels", [(44_100, 2), (8000, 1), (48_000, 6)])
def test_any_rate_and_any_channels_become_tokens(tokenizer, rate, channels):
    codes = tokenizer.encode(tones(2.0, rate, channels))
    assert codes.shape == (8, 26) and 0 <= codes.min() and codes.max() < 64


def test_tokens_follow_the_sound_and_mono_is_heard_once(tokenizer):
    songs = [render(compose(style, seconds=6).song, RATE).crop(0, 5.12) for style in ("techno", "waltz")]
    codes, other = map(tokenizer.encode, songs)
    assert len(codes.unique(dim=1).T) > 20 and (codes == other).float().mean() < 0.5
    mono = songs[0].samples.mean(0, keepdims=True)
    assert torch.equal(tokenizer.encode(Audio(mono, RATE)), tokenizer.encode(Audio(mono.repeat(2, 0), RATE)))


@pytest.fixture
def songs(tmp_path) -> Path:
    folder = tmp_path / "songs"
    (folder / "more").mkdir(parents=True)
    for i, name in enumerate(("a.wav", "b.flac", "c.ogg", "more/d.mp3")): audio.write(folder / name, tones(2.0, seed=i).samples, RATE)
    return folder


def test_a_folder_in_any_format_gets_its_tokens_once(songs, tokenizer, codec):
    first = tokenize.tokenize_folder(songs, lambda: tokenizer, codec.config)
    assert [path.name for path in first.made] == [f"{name}.tokens.npy" for name in "abcd"] and not first.problems
    assert all(np.load(path).shape == (26, 8) and np.load(path).dtype == np.int16 for path in first.made)
    assert "4 songs tokenised" in str(first)
    (songs / "page.mp3").write_text("<html>")  # a song that cannot be read is no reason to open the encoder either
    again = tokenize.tokenize_folder(songs, lambda: pytest.fail("nothing is to be done"), codec.config)
    assert len(again.kept) == 4 and len(again.problems) == 1 and "0 songs tokenised" in str(again) and "4 were up to date, 1 left out" in str(again)
    (songs / "page.mp3").unlink()
    assert all(track.tokens for track in data.read(songs))


def test_a_changed_song_and_broken_tokens_are_made_again(songs, tokenizer, codec):
    made = tokenize.tokenize_folder(songs, lambda: tokenizer, codec.config).made
    later = made[0].stat().st_mtime + 5
    os.utime(songs / "a.wav", (later, later))
    made[1].write_bytes(made[1].read_bytes()[:50])
    np.save(made[2], np.full((26, 8), 99))
    report = tokenize.tokenize_folder(songs, lambda: tokenizer, codec.config, maker="m" * 16)
    assert [path.name[0] for path in report.made] == ["a", "b", "c"] and "anew: 1 changed, 2 damaged" in str(report)
    assert tokenize.maker_of(made[0]) == "m" * 16 and np.load(made[0]).shape == (26, 8)
    assert [path.name[0] for path in tokenize.tokenize_folder(songs, lambda: tokenizer, codec.config, maker="n" * 16).made] == ["a", "b", "c"]
    assert len(tokenize.tokenize_folder(songs, lambda: tokenizer, codec.config, again=True).made) == 4


def test_what_is_stopped_goes_on_where_it_was(songs, tokenizer, codec, monkeypatch):
    encode, done = tokenizer.__class__.encode, []
    def stopped(self, sound):
        if len(done) == 2: raise KeyboardInterrupt
        done.append(sound)
        return encode(self, sound)
    with monkeypatch.context() as patch:
        patch.setattr(tokenizer.__class__, "encode", stopped)
        with pytest.raises(KeyboardInterrupt): tokenize.tokenize_folder(songs, lambda: tokenizer, codec.config)
    assert sorted(path.name for path in songs.rglob("*.npy")) == ["a.tokens.npy", "b.tokens.npy"] and not list(songs.rglob("*.part*"))
    assert [path.name[0] for path in tokenize.tokenize_folder(songs, lambda: tokenizer, codec.config).made] == ["c", "d"]


def test_a_full_disk_and_a_bad_encoder_stop_at_once(songs, tokenizer, codec, monkeypatch):
    done, write = [], tokenize.atomic_file
    def full(path):
        if done: raise OSError(28, "No space left on device")
        done.append(path)
        return write(path)
    with monkeypatch.context() as patch:
        patch.setattr(tokenize, "atomic_file", full)
        with pytest.raises(MusiclabError, match=r"b.tokens.npy: cannot be written \(No space left"):
            tokenize.tokenize_folder(songs, lambda: tokenizer, codec.config)
    assert [path.name for path in songs.rglob("*.npy")] == ["a.tokens.npy"]
    def broken(): raise MusiclabError("the file is damaged", "encoder.safetensors")
    with pytest.raises(MusiclabError, match="encoder.safetensors"): tokenize.tokenize_folder(songs, broken, codec.config)
    monkeypatch.setattr(tokenize.os, "access", lambda place, how: place != songs)
    report = tokenize.tokenize_folder(songs, lambda: tokenizer, codec.config)
    assert [path.name for path in report.made] == ["d.tokens.npy"] and "nothing can be written beside it" in str(report.problems[0])


def test_bad_songs_do_not_stop_the_others(songs, tokenizer, codec, tmp_path):
    (songs / "page.mp3").write_text("<html>")
    (songs / "nothing.wav").touch()
    audio.write(songs / "a.flac", tones(1.0).samples, RATE)
    audio.write(songs / "square.wav", tones(0.6).samples, RATE)
    report = tokenize.tokenize_folder(songs, lambda: tokenizer, codec.config)
    assert len(report.made) == 4 and sorted(Path(problem.where).name for problem in report.problems) == ["a.wav", "nothing.wav", "page.mp3", "square.wav"]
    assert "8 × 8 tokens could be read both ways: make it longer than 0.64 s" in str(report.problems[-1])
    assert "another file there has the name a" in str([problem for problem in report.problems if problem.where.endswith("a.wav")][0])
    mistakes = {"nowhere": "no such folder", "empty": "no sound in it", "bad": "none of the 1 songs can be used"}
    for where, complaint in ((tmp_path / name, complaint) for name, complaint in mistakes.items()):
        if where.name != "nowhere": where.mkdir()
        if where.name == "bad": shutil.copy(songs / "page.mp3", where)
        with pytest.raises(MusiclabError, match=complaint): tokenize.tokenize_folder(where, lambda: tokenizer, codec.config)


def test_a_data_set_gets_a_column_of_tokens(songs, pair, tmp_path):
    (songs / "a.txt").write_text("techno, dark")
    (songs / "a.lyrics").write_text("[Verse]\nla la")
    (songs / "page.mp3").write_text("<html>")
    count, problems = tokenize.tokenize_data(songs, tmp_path / "out", tokenize.Tokens(pair), tmp_path / "store")
    assert count == 4 and [Path(problem.where).stem for problem in problems] == ["page"]
    first = {track.key: track for track in data.read(tmp_path / "out")}["a"]
    assert first.tags == ("techno", "dark") and first.lyrics == "[Verse]\nla la" and first.source is None
    assert first.tokens.array().shape == (26, 8)
    track = next(track for track in data.read(songs) if track.key == "a")
    (rows,) = prepare([tokenize.Tokens(pair)], [track], tmp_path / "store").rows(track)["tokens"]
    assert np.array_equal(rows["tokens"].T, first.tokens.array())  # from the store: nothing is computed twice


def test_tokens_come_back_as_sound(songs, tokenizer, codec, tmp_path):
    tokenize.tokenize_folder(songs, lambda: tokenizer, codec.config)
    np.savez(songs / "e.npz", tokens=np.load(songs / "a.tokens.npy").T)
    np.save(songs / "square.npy", np.zeros((8, 8), int))
    np.save(songs / ".half.part.npy", np.zeros((30, 8), int))  # what a killed run may leave behind
    np.save(songs / "fractions.npy", np.zeros((8, 30)))
    made = list(tokenize.decode_files(tokenize.token_files([songs]), tmp_path / "out", codec, ".flac", **QUICK))
    sounds = [item for item in made if isinstance(item, Path)]
    problems = [str(item) for item in made if isinstance(item, Problem)]
    assert [path.name for path in sounds] == ["a.flac", "b.flac", "c.flac", "e.flac", "d.flac"]
    assert all(abs(audio.load(path).seconds - 2.08) < 1e-6 for path in sounds) and "both ways" in problems[1] and "whole numbers" in problems[0]
    assert np.array_equal(audio.load(sounds[0]).samples, audio.load(sounds[3]).samples)
    with pytest.raises(MusiclabError, match="there are no tokens"): tokenize.token_files([tmp_path / "out"])
    with pytest.raises(MusiclabError, match="no such file"): tokenize.token_files([tmp_path / "nowhere"])


def test_the_commands_do_the_same(songs, pair, tmp_path):
    def run(*arguments): return CliRunner().invoke(heartmula_app, list(map(str, arguments)))
    assert "4 songs tokenised" in run("tokenize", songs, "--encoder", pair, "--device", "cpu").output
    quick = ("--steps", 1, "--guidance", 1, "--seconds", 7.44, "--device", "cpu")
    done = run("decode", songs / "a.tokens.npy", "--codec", pair, "--out", tmp_path / "out", *quick)
    assert done.exit_code == 0 and json.loads((tmp_path / "out" / "a.json").read_text())["steps"] == 1
    for mistake, complaint in ((("tokenize", tmp_path / "out2"), "no such folder"),
                               (("tokenize", songs, "--encoder", tmp_path), "no HeartCodec-oss-encoder"),
                               (("tokenize", songs / "a.wav"), "is a file, not a folder"),
                               (("tokenize", songs, "--encoder", pair, "--out", songs), "not empty"),
                               (("decode", songs, "--format", "xyz"), "cannot be written. Choose one of wav"),
                               (("decode", songs / "a.wav", "--codec", pair), "none of the 1 files"),
                               (("decode", songs, "--codec", songs), "no HeartCodec-oss"),
                               (("decode", songs, "--codec", pair, "--seconds", 5), "multiple of 93")):
        error = run(*mistake).exception
        assert isinstance(error, MusiclabError) and complaint in str(error), error


@pytest.mark.parametrize("part, file, change, complaint", [
    ("codec", "config.json", lambda values: values | {"causal": False}, "another kind"),
    ("codec", "config.json", lambda values: values | {"model_type": "heartmula"}, "no HeartCodec-oss in it"),
    ("codec", "config.json", lambda values: values | {"num_layers": 3}, "is missing"),
    ("encoder", "encoder_config.json", lambda values: values | {"query": values["query"] | {"num_layers": 1}}, "is unexpected"),
    ("encoder", "encoder_config.json", lambda values: values | {"query": values["query"] | {"dim": 48, "head_dim": 24}},
     "gives 48 numbers a frame, its codec takes 32")])
def test_a_config_that_does_not_fit_is_refused(pair, tmp_path, part, file, change, complaint):
    copy = shutil.copytree(pair, tmp_path / "copy")
    path = next(copy.glob(f"*/{file}"))
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(MusiclabError, match=complaint): (open_codec if part == "codec" else open_tokenizer)(copy)


def test_weights_that_do_not_fit_are_refused_by_name(pair, tmp_path):
    copy = shutil.copytree(pair, tmp_path / "copy")
    file = copy / "HeartCodec-oss-encoder" / "encoder.safetensors"
    weights = load_file(file)
    save_file({name: weight for name, weight in weights.items() if name != "encoder.query.cls_token"}, file)
    with pytest.raises(MusiclabError, match="query.cls_token is missing"): open_tokenizer(copy)
    save_file(weights | {"encoder.extra": torch.ones(1)}, file)
    with pytest.raises(MusiclabError, match="extra is unexpected"): open_tokenizer(copy)
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(MusiclabError, match="damaged"): open_tokenizer(copy)
    shard = next((copy / "HeartCodec-oss").glob("*-00001-*"))
    shard.unlink()
    with pytest.raises(MusiclabError, match=f"{shard.name} is missing"): open_codec(copy)


def test_parts_are_found_beside_each_other_and_named_by_their_content(pair, tmp_path):
    copy = shutil.copytree(pair, tmp_path / "copy")
    assert identity(copy) == identity(copy / "HeartCodec-oss-encoder") == identity(copy / "HeartCodec-oss-encoder", copy / "HeartCodec-oss") == identity(pair)
    shutil.copytree(copy / "HeartCodec-oss", copy / "HeartCodec-oss-20260123")
    assert {place.name for place in (find_part(copy, "codec"), *(local_part(copy / name, "codec") for name in (".", "HeartCodec-oss-encoder")))} == {
        "HeartCodec-oss-20260123"}  # the newest, whoever asks
    shutil.rmtree(copy / "HeartCodec-oss")
    assert codec_config(copy) == codec_config(pair)
    state = torch.random.get_rng_state()
    assert identity(tiny_codec(tmp_path / "again")) == identity(pair) and torch.equal(state, torch.random.get_rng_state())
    table = copy / "HeartCodec-oss-20260123" / "model-00002-of-00002.safetensors"
    weights = load_file(table)
    name = next(name for name in weights if name.endswith("_codebook.embed"))
    save_file(weights | {name: weights[name] + 1}, table)
    assert identity(copy) != identity(pair)


@pytest.mark.skipif("MUSICLAB_TEST_DATA" not in os.environ, reason="needs $MUSICLAB_TEST_DATA")
def test_real_music_there_and_back(tokenizer, codec, tmp_path):
    folder = Path(os.environ["MUSICLAB_TEST_DATA"]) / "audio" / "tracks"
    for file in sorted(folder.glob("*.mp3"))[:2]: shutil.copy(file, tmp_path)
    report = tokenize.tokenize_folder(tmp_path, lambda: tokenizer, codec.config)
    tables = [np.load(path) for path in report.made]
    assert len(tables) == 2 and all(abs(len(table) - audio.load(path.with_name(path.name.replace(".tokens.npy", ".mp3"))).seconds * 12.5) <= 1
                                    for table, path in zip(tables, report.made))
    assert all(len(np.unique(table, axis=0)) > 100 for table in tables) and not np.array_equal(*(table[:100] for table in tables))
