"HeartMuLa trained: on tokens and on sound, resumed to the bit, adapters that keep their effect, and a model that learns to stop."
import json
import os
import shutil
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from musiclab import adapters, audio, data, recipes
from musiclab.audio import Audio
from musiclab.cli import main
from musiclab.core import Draw, MusiclabError
from musiclab.features import prepare
from musiclab.heartmula.checkpoint import read_weights
from musiclab.heartmula.data import GivenCodes, as_prompt, collate, example
from musiclab.heartmula.fast import FastModel
from musiclab.heartmula.frames import Writing, write
from musiclab.heartmula.model import LORA_TARGETS, embed, formats, of_release, open_lm
from musiclab.heartmula.settings import HeartMulaConfig
from musiclab.heartmula.train import HeartMulaTask, batch_losses, merge
from musiclab.sampling import Sampler
from musiclab.task import At
from musiclab.train import fit


def melody(number, frames):
    "A song that a tiny model can learn: each codebook steps along."
    return (np.arange(frames)[:, None] * np.arange(1, 9) * 3 + 17 * number) % 64


@pytest.fixture(scope="module")
def songs(tmp_path_factory):
    "A folder as of the other tool's second option: sound, NAME.txt, NAME.lyrics (one of them empty), NAME.tokens.npy."
    folder = tmp_path_factory.mktemp("songs")
    for number, frames in enumerate((24, 30, 36, 27)):
        name = folder / f"track_{number:02d}"
        Audio(np.random.default_rng(number).uniform(-1, 1, (1, 800)), 8000).save(name.with_suffix(".wav"))
        name.with_suffix(".txt").write_text(f"tag{number}, jazz")
        name.with_suffix(".lyrics").write_text("" if number == 0 else f"[verse]\nla {number}")
        np.save(folder / f"track_{number:02d}.tokens.npy", melody(number, frames) if number % 2 else melody(number, frames).T)
    return folder


def settings(tiny, songs, out, **changes):
    fields = dict(data=str(songs), model=str(tiny), output=str(out), store=str(out) + "_store", max_steps=4, batch_size=2, lr=5e-3, warmup=0,
                  rank=4, alpha=12, dropout=0.0, workers=0, validate_every=4, save_every=2, save_minutes=None, device="cpu", trackers=[],
                  decoder_frames=0.5, valid_fraction=0.25, gradient_checkpointing=False)
    return HeartMulaConfig(**fields | changes)


def train(config): return fit(HeartMulaTask(config), *recipes.read_data(config), config)


def prepared_batch(tiny, songs, out, **how):
    "All songs as one batch, and their draws."
    config = settings(tiny, songs, out)
    task, tracks = HeartMulaTask(config), data.read(songs)
    rows, draws = prepare(task.features, tracks, None), [Draw(0, 0, track.key) for track in tracks]
    found = [rows.rows(track) for track in tracks]
    made = [example(as_prompt(row["prompt"][0]), row["codes"][0]["tokens"].T, draw, **how) for row, draw in zip(found, draws)]
    return collate(made), draws


def test_a_local_folder_with_sidecars_and_an_empty_lyrics_file(tiny, songs, tmp_path):
    batch, _ = prepared_batch(tiny, songs, tmp_path, end=65)
    assert batch.counts["codebook_0"] == sum((24, 30, 36, 27)) + 4
    ends = (batch["tokens"][..., :8] == 65).all(-1)
    assert ends.sum(1).tolist() == [1] * 4 and (ends <= batch["frames"]).all()
    assert torch.equal(batch["tokens"][0][batch["frames"][0]][:24, :8], torch.from_numpy(melody(0, 24)))


def test_no_end_where_the_stretch_does_not_reach_it(tiny, songs, tmp_path):
    batch = prepared_batch(tiny, songs, tmp_path, end=65, frames=10, crop="beginning")[0]
    assert not (batch["tokens"][..., :8] == 65).any() and batch.counts["codebook_0"] == 40


def test_songs_that_are_told_nothing_get_the_vector_learned_for_it(tiny, lm, songs, tmp_path):
    batch, draws = prepared_batch(tiny, songs, tmp_path)
    x = embed(lm, batch["tokens"], batch["counts"], batch["slots"], torch.tensor([True, False, False, False]))
    same = (x == lm.unconditional_text_embedding.weight[0]).all(-1)
    assert same[0][batch["counts"][0, :, -1]].all() and not same[1:].any()
    def loss(part): return batch_losses(lm, batch, At(draws=draws, training=True), settings(tiny, songs, tmp_path, condition_dropout=part))
    with torch.no_grad(): assert not torch.equal(loss(0.0), loss(1.0))


def test_rollout_changes_the_input_and_without_it_nothing_changes(tiny, lm, songs, tmp_path, monkeypatch):
    batch, draws = prepared_batch(tiny, songs, tmp_path)
    seen, hidden = [], lm.hidden
    monkeypatch.setattr(lm, "hidden", lambda tokens, *rest: seen.append(tokens) or hidden(tokens, *rest))
    def loss(**how):
        seen.clear()
        config = settings(tiny, songs, tmp_path, condition_dropout=0.0, **how)
        with torch.no_grad(): return batch_losses(lm, batch, At(step=10, draws=draws, training=True), config)
    plain = loss()
    assert len(seen) == 1 and torch.equal(seen[0], batch["tokens"])
    for none in (dict(rollout=0.0), dict(rollout=0.5, rollout_start=11)): assert torch.equal(loss(**none), plain) and len(seen) == 1
    rolled = loss(rollout=1.0)
    assert len(seen) == 2 and not torch.equal(rolled, plain)
    changed = (seen[1] != batch["tokens"]).any(-1)
    assert (changed <= batch["frames"]).all() and changed.sum() > 0.9 * batch["frames"].sum() and (seen[1] < 64).all(-1)[batch["frames"]].all()
    assert torch.equal(loss(rollout=1.0), rolled)


@pytest.mark.parametrize("changes", [dict(rollout=0.3), dict(quantize="int8", precision="bf16"), dict(method="full"),
                                     dict(crop_seconds=1.0, crop="end", bucket=True, cache=False)], ids=["rollout", "int8-bf16", "full", "crop"])
def test_every_way_of_training_learns_and_resumes_to_the_bit(tiny, songs, tmp_path, changes):
    if changes.get("quantize"): pytest.importorskip("torchao")
    changes = changes | dict(max_steps=6, valid_data=str(songs))
    straight = train(settings(tiny, songs, tmp_path / "straight", **changes))
    valid = [record["valid"] for record in straight.history if "valid" in record]
    assert valid[-1]["loss"] < valid[0]["loss"] and len(valid[0]["parts"]) == 8
    assert len(valid[0].get("probes", [])) == (2 if changes.get("rollout") else 0)
    config = settings(tiny, songs, tmp_path / "parts", **changes)
    stop_after(3, config)
    train(config)
    ends = [load_file(tmp_path / f"{name}/checkpoints/step-00000006/trained.safetensors") for name in ("straight", "parts")]
    assert ends[0].keys() == ends[1].keys() and all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])


def stop_after(steps, config):
    "A run that is stopped from outside after some steps."
    task, asked = HeartMulaTask(config), []
    loss = task.loss
    def counted(model, batch, at):
        if at.training:
            asked.append(at.step)
            if at.step == steps: os.kill(os.getpid(), signal.SIGTERM)
        return loss(model, batch, at)
    task.loss = counted
    assert fit(task, *recipes.read_data(config), config).stopped == "SIGTERM"


@pytest.mark.parametrize("method", ["lora", "rslora", "dora"])
def test_adapters_keep_their_effect_in_every_form(tiny, tmp_path, method, capsys):
    def numbers(lm):
        with torch.no_grad(): return lm(tokens, torch.ones_like(tokens, dtype=torch.bool), torch.tensor([3]))[1]
    tokens = torch.randint(64, (1, 12, 9), generator=torch.Generator().manual_seed(0))
    lm, plain = open_lm(tiny), numbers(open_lm(tiny))
    adapters.attach(lm, LORA_TARGETS, rank=4, alpha=14, dropout=0, method=method)
    for name, p in lm.named_parameters():
        if ".lora_B." in name: p.data.normal_(std=0.2, generator=torch.Generator().manual_seed(1))
    wanted = numbers(lm)
    assert not torch.allclose(wanted, plain, atol=0.1)
    for path, format in (("peft", None), ("file.safetensors", None), ("heartlib.safetensors", "heartlib"), ("heartlib_peft", "heartlib")):
        saved = adapters.save(lm, tmp_path / path, str(tiny), format=formats(tiny)[format] if format else None)
        keys = adapters.inspect(saved).tensors
        assert all((".attn." in key or ".mlp.w" in key) == bool(format) for key in keys)
        other = open_lm(tiny)
        adapters.load(other, saved, formats=formats(tiny))
        assert torch.allclose(numbers(other), wanted, atol=1e-4), path
    assert "note" not in capsys.readouterr().err
    for other in (tmp_path / "peft", recipes.export(tmp_path / "heartlib.safetensors", tmp_path / "again", "peft", str(tiny))): # peft knows nothing of us
        assert torch.allclose(numbers(PeftModel.from_pretrained(open_lm(tiny), other).base_model.model), wanted, atol=1e-4)
    if method == "lora": # and somebody who adds up by hand knows the release only
        release, file = read_weights(tiny), load_file(recipes.export(tmp_path / "heartlib.safetensors", tmp_path / "twice.safetensors", "heartlib", str(tiny)))
        for name in release.keys() & {key.replace("lora_A.", "") for key in file}:
            a, b = (file[name.replace("weight", f"lora_{side}.weight")] for side in "AB")
            release[name] = release[name] + 14 / 4 * b @ a
        assert torch.allclose(numbers(of_release(release, lm.config)), wanted, atol=1e-4)
    whole = merge(tiny, tmp_path / "peft", tmp_path / "whole")
    assert torch.allclose(numbers(open_lm(whole)), wanted, atol=1e-4)
    with pytest.raises(MusiclabError, match="not empty"): merge(tiny, tmp_path / "peft", tmp_path / "whole")


def test_an_adapter_of_the_garbled_model_is_known_by_its_settings(tiny, tmp_path, capsys):
    lm = open_lm(tiny)
    adapters.attach(lm, LORA_TARGETS, rank=4, alpha=4)
    made = adapters.save(lm, tmp_path / "theirs", str(tiny))
    save_file(load_file(made / "adapter_model.safetensors"), made / "adapter_model.safetensors") # peft's own files have no word of us
    about = json.loads((made / "adapter_config.json").read_text()) | {"auto_mapping": {"parent_library": "simpletuner.helpers.models.heartmula"}}
    (made / "adapter_config.json").write_text(json.dumps(about))
    shutil.copy(made / "adapter_model.safetensors", tmp_path / "bare.safetensors")
    for file, said in ((made, "it was trained by SimpleTuner on"), (tmp_path / "bare.safetensors", "if SimpleTuner did, then on")):
        adapters.load(open_lm(tiny), file, formats(tiny))
        assert said in (told := capsys.readouterr().err) and told.count("cannot be converted") == 1
    assert "by simpletuner" in str(adapters.inspect(made))


def test_an_adapter_that_matches_nothing_is_an_error(tiny, songs, tmp_path):
    strange = tmp_path / "strange.safetensors"
    save_file({f"base_model.model.transformer.h.0.to_q.lora_{side}.weight": torch.ones(4, 4) for side in "AB"}, strange)
    with pytest.raises(MusiclabError, match="1 of its 1 layers have no place"):
        train(settings(tiny, songs, tmp_path / "run", init_adapter=str(strange)))


@pytest.mark.parametrize("tokens, complaint", [
    (melody(0, 8), "both ways"), (melody(0, 20)[:, :5], "8 codebooks"), (melody(0, 20) + 64, "token 64"),
    (np.full((9, 8), 65), "the token for the end"), (melody(0, 20) / 3, "no whole numbers"), (np.zeros((0, 8), int), "shape")])
def test_bad_tokens_are_left_out_with_a_reason(tiny, songs, tmp_path, tokens, complaint):
    copy = shutil.copytree(songs, tmp_path / "songs")
    np.save(copy / "track_01.tokens.npy", tokens)
    task, tracks = HeartMulaTask(settings(tiny, copy, tmp_path / "run")), data.read(copy)
    prepared = prepare(task.features[:2], tracks, None)
    for track in tracks:
        if track.key != "track_01": prepared.rows(track)
    with pytest.raises(MusiclabError, match=f"track_01.tokens.npy.*{complaint}"): prepared.rows(tracks[1])


def test_missing_lyrics_and_empty_folders_say_what_is_missing(tiny, songs, tmp_path):
    copy = shutil.copytree(songs, tmp_path / "songs")
    for file in copy.glob("*.lyrics"): file.unlink()
    with pytest.raises(MusiclabError, match="none of the 4 tracks can be used.*no track_00.lyrics beside it"):
        train(settings(tiny, copy, tmp_path / "run"))
    for file in copy.glob("*.txt"): file.write_text("jazz, instrumental")
    assert train(settings(tiny, copy, tmp_path / "run", max_steps=1)).step == 1
    (tmp_path / "empty").mkdir()
    with pytest.raises(MusiclabError, match="no audio"): train(settings(tiny, tmp_path / "empty", tmp_path / "other"))
    with pytest.raises(MusiclabError, match="has neither tokens nor sound"):
        task = HeartMulaTask(settings(tiny, songs, tmp_path / "run"))
        track = replace(data.read(songs)[0], source=None, tokens=None)
        task.example(track, prepare(task.features, [track], None).rows(track), Draw(0, 0, "x"))


def test_rows_of_a_data_set_bring_tokens(tiny, songs, tmp_path):
    import datasets
    np.save(tmp_path / "b.npy", melody(1, 30))
    rows = {"tags": ["jazz", "rock"], "lyrics": ["", "la"], "audio_tokens": [melody(0, 24).T.tolist(), None],
            "audio_tokens_path": [None, str(tmp_path / "b.npy")]}
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "set")
    tracks = data.read(tmp_path / "set")
    feature = GivenCodes(HeartMulaTask(settings(tiny, songs, tmp_path / "run")).sizes)
    prepared = prepare([feature], tracks, None)
    assert [prepared.rows(track)["codes"][0]["tokens"].shape for track in tracks] == [(8, 24), (8, 30)]


def test_a_tiny_model_learns_to_stop(tiny, songs, tmp_path):
    "Fitted to four short songs, it ends each within a tenth of its true length."
    config = settings(tiny, songs, tmp_path / "run", method="full", max_steps=100, batch_size=4, lr=8e-3, validate_every=100, save_every=100,
                      valid_fraction=0.0, decoder_frames=1.0, condition_dropout=0.0)
    run = train(config)
    task, tracks = HeartMulaTask(config), data.read(songs)
    rows = prepare(task.features[:2], tracks, None)
    prompts = [as_prompt(rows.rows(track)["prompt"][0]) for track in tracks]
    written = write(Writing(FastModel(run.engine.model.eval()), prompts, 200, Sampler([0] * 4, temperature=0), guidance=1.0))
    lengths, wanted = [len(song) for song in written], [24, 30, 36, 27]
    assert all(abs(length - true) <= 0.1 * true for length, true in zip(lengths, wanted)), (lengths, wanted)
    assert np.mean([(song.numpy()[:20] == melody(number, 20)).mean() for number, song in enumerate(written)]) > 0.9


def command(*args):
    "Run a command; its exit status must be 0."
    try: main([str(arg) for arg in args])
    except SystemExit as end: assert not end.code, end.code


def test_the_command_line_knows_heartmula(tiny, songs, tmp_path, capsys):
    out, style, whole = tmp_path / "run", tmp_path / "style.safetensors", tmp_path / "whole"
    command("train", "heartmula_lora", f"data={songs}", f"model={tiny}", f"output={out}", f"store={tmp_path / 'store'}", "max_steps=4", "accumulate=1",
            "lr=5e-3", "workers=0", "rank=4", "device=cpu", "quantize=none", "save_minutes=none", "trackers=none", "sample_seconds=1", "validate_every=4")
    assert list((out / "samples").rglob("*.wav"))
    shutil.rmtree(out / "adapter") # as if it had been killed before the end: the newest checkpoint has it, too
    command("inspect", out)
    for form, name in (("heartlib", style), ("peft", tmp_path / "style"), ("merged", whole)): command("export", out, name, "--to", form)
    sung = ["--prompt", "tag1,jazz", "--lyrics", "la", "--seconds", 1, "--seed", 3, "--device", "cpu"]
    command("generate", "--model", tiny, "--adapter", style, *sung, "--out", tmp_path / "a.wav")
    command("generate", "--model", whole, *sung, "--out", tmp_path / "b.wav")
    assert "35 layers" in capsys.readouterr().out
    assert np.allclose(*(audio.load(tmp_path / f"{name}.wav").samples for name in "ab"), atol=2e-3)
