"ACE-Step trained: every way learns, nothing is lost by a kill, what is kept is what is heard, and the traps of other trainers are closed."
import multiprocessing
import os
import signal
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from musiclab import adapters, compose, data, recipes
from musiclab.ace_step import train as training
from musiclab.ace_step.data import Latents
from musiclab.ace_step.objective import mix
from musiclab.ace_step.settings import AceStepConfig
from musiclab.ace_step.train import AceStepTask, losses
from musiclab.ace_step.transformer import open_transformer
from musiclab.audio import load
from musiclab.core import Draw, MusiclabError
from musiclab.engine import Engine, update
from musiclab.features import prepare
from musiclab.log import read_log
from musiclab.synth import render
from musiclab.task import At
from musiclab.train import fit


@pytest.fixture(scope="module")
def songs(tmp_path_factory): return compose.dataset(tmp_path_factory.mktemp("songs"), 4, seconds=4)


@pytest.fixture(scope="module")
def work(tmp_path_factory): return tmp_path_factory.mktemp("training")


def settings(work, tiny, songs, name="run", **changes):
    fields = dict(data=str(songs), model=str(tiny), output=str(work / name), store=str(work / "features"), max_steps=4, batch_size=2, crop_seconds=2,
                  lr=0.01, warmup=0, workers=0, validate_every=4, save_minutes=None, device="cpu", trackers=[], gradient_checkpointing=False,
                  dropout=0.0, sample_steps=2)
    return AceStepConfig(**fields | changes)


def train(config): return fit(AceStepTask(config), *recipes.read_data(config), config)


def trained(config, step): return load_file(f"{config.output}/checkpoints/step-{step:08d}/trained.safetensors")


def equal(a, b): return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def batch_of(config, tracks=None):
    task, tracks = AceStepTask(config), tracks or data.read(config.data)[:2]
    with prepare(task.features, tracks, config.store if config.cache else None) as prepared:
        return task.collate([task.example(track, prepared.rows(track), Draw(0, 0, track.key)) for track in tracks])


AT = At(draws=[Draw(0, 0, "a"), Draw(0, 0, "b")], training=True)


WAYS = [dict(precision="bf16", method="rslora"), dict(quantize="int8", ema=0.5), dict(quantize="nf4", precision="bf16"), dict(method="full", lr=1e-3),
        dict(rollout=1.0, rollout_offset=200, bucket=True, gradient_checkpointing=True), dict(lyrics_embedder_train=True, caption_variants=2)]


@pytest.mark.parametrize("changes", WAYS, ids=lambda changes: "-".join(map(str, changes.values())))
def test_every_way_of_training_learns(work, tiny, songs, tmp_path, changes):
    if changes.get("quantize"): pytest.importorskip("torchao" if changes["quantize"] == "int8" else "bitsandbytes")
    run = train(settings(work, tiny, songs, **{"max_steps": 6, "validate_every": 6, "lr": 0.02, "output": str(tmp_path), **changes}))
    seen = [record["valid"] for record in run.history if "valid" in record]
    assert seen[-1]["loss"] < seen[0]["loss"] and len(seen[0]["probes"]) == 5
    kinds = {p.dtype for p in run.engine.params.values()}
    assert kinds == {torch.float32}, "what is trained has 32 bits, whatever the base has"
    blocks = run.engine.model.transformer_blocks[0]
    if changes.get("quantize"):
        assert type(blocks.attn.to_q.get_base_layer().weight) is not torch.nn.Parameter and type(run.engine.model.lyric_proj.weight) is torch.nn.Parameter
    elif changes.get("method") == "full":
        whole = open_transformer(recipes.export(tmp_path, tmp_path / "whole", "merged"))
        ours, theirs = run.engine.model.state_dict(), whole.state_dict()
        assert all(torch.equal(ours[name].bfloat16(), theirs[name].bfloat16()) for name in theirs), "in the numbers of the release"
    elif "precision" in changes: assert blocks.attn.to_q.get_base_layer().weight.dtype == torch.bfloat16


def test_a_killed_run_ends_with_the_same_bits_and_the_same_reader(work, tiny, songs, tmp_path):
    "SIGKILL, resume, and the lyrics embedder with its own optimizer and schedule is as if nothing had happened."
    changes = dict(max_steps=8, save_every=2, validate_every=8, dropout=0.1, lyrics_embedder_train=True, lyrics_embedder_lr=5e-3,
                   lyrics_embedder_schedule="cosine_with_restarts")
    straight, killed = (settings(work, tiny, songs, output=str(tmp_path / name), **changes) for name in ("straight", "killed"))
    run = train(straight)
    assert set(run.engine.optimizers) == {"adapter", "lyrics_embedder"}
    process = multiprocessing.get_context("fork").Process(target=train, args=(killed,))
    process.start()
    deadline = time.monotonic() + 60
    while max((record["step"] for record in read_log(tmp_path / "killed/logs/log.jsonl")), default=0) < 3 and time.monotonic() < deadline: time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL and train(killed).step == 8
    ends = trained(straight, 8), trained(killed, 8)
    assert equal(*ends) and {name.split(".")[0] for name in ends[0] if ".lora_" not in name} == set(training.EMBEDDER)
    assert not any("lyric_" in name and ".lora_" in name for name in ends[0]), "what is trained whole needs no adapter"

    begun = open_transformer(tiny)
    adapters.load(begun, tmp_path / "killed/adapter")
    assert torch.equal(begun.lyric_embs.weight, ends[1]["lyric_embs.weight"]), "it comes back with the adapter"
    after = settings(work, tiny, songs, init_adapter=str(tmp_path / "killed/adapter"), lyrics_embedder_train=True)
    went_on = Engine(AceStepTask(after), after, torch.device("cpu"))
    assert torch.equal(went_on.model.lyric_embs.weight, ends[1]["lyric_embs.weight"]) and went_on.model.lyric_embs.weight.requires_grad
    with pytest.raises(MusiclabError, match="lyrics_embedder_train"):
        Engine(AceStepTask(other := after.model_copy(update={"lyrics_embedder_train": False})), other, torch.device("cpu"))


def test_two_processes_learn_what_one_learns(work, tiny, songs, tmp_path):
    config = settings(work, tiny, songs, output=str(tmp_path / "alone"), lyric_encoder_dropout=0.0, max_steps=2, validate_every=2, batch_size=4)
    train(config)
    fork = multiprocessing.get_context("fork")
    half = config.model_copy(update={"output": str(tmp_path / "two"), "batch_size": 2})
    both = [fork.Process(target=one_of_two, args=(rank, half, tmp_path / "port")) for rank in range(2)]
    for process in both: process.start()
    for process in both: process.join(120)
    assert [process.exitcode for process in both] == [0, 0]
    alone, together = trained(config, 2), load_file(tmp_path / "two/checkpoints/step-00000002/trained.safetensors")
    assert alone.keys() == together.keys() and all(torch.allclose(alone[key], together[key], atol=1e-4) for key in alone)  # a hundredth of a move
    found = [[record["loss"] for record in read_log(tmp_path / f"{name}/logs/log.jsonl") if "grad_norm" in record] for name in ("alone", "two")]
    assert len(found[0]) == 2 and found[0] == pytest.approx(found[1], abs=1e-6)


def one_of_two(rank, config, place):
    import accelerate
    accelerate.PartialState._reset_state()
    torch.distributed.init_process_group("gloo", init_method=f"file://{place}", rank=rank, world_size=2)
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT="1", ACCELERATE_USE_CPU="true")
    try: train(config)
    finally: torch.distributed.destroy_process_group()


def test_while_it_trains_no_encoder_is_open(work, tiny, songs, tmp_path, monkeypatch):
    batch_of(config := settings(work, tiny, songs, output=str(tmp_path)), data.read(songs))  # now all is in the store
    def never(*args, **kwargs): raise AssertionError("an encoder was opened")
    for opener in ("data.open_codec", "data.open_text_encoder", "train.open_codec"): monkeypatch.setattr(f"musiclab.ace_step.{opener}", never)
    assert train(config).step == 4


def test_on_demand_gives_the_same_batch(work, tiny, songs):
    stored, fresh = batch_of(config := settings(work, tiny, songs)), batch_of(config.model_copy(update={"cache": False}))
    assert all(torch.equal(stored[name], fresh[name]) for name in stored.data)


def test_validation_sounds_are_on_disk_and_in_tensorboard(work, tiny, songs, tmp_path):
    prompts = [{"caption": "calm piano", "lyrics": "[verse]\nA line"}]
    train(settings(work, tiny, songs, output=str(tmp_path), max_steps=1, validate_every=1, trackers=["tensorboard"], sample_prompts=prompts,
                   sample_seconds=1.5))
    sounds = [load(tmp_path / f"samples/step-{step:08d}/00.wav") for step in (0, 1)]
    assert all(sound.rate == 44_100 and 1.3 < sound.seconds < 1.6 for sound in sounds) and not np.array_equal(*(sound.samples for sound in sounds))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(next((tmp_path / "logs").rglob("events.*"))), size_guidance={"audio": 0}).Reload()
    assert events.Tags()["audio"] and len(events.Audio(events.Tags()["audio"][0])) == 2


# The traps of other trainers

def test_a_mono_file_is_heard_like_its_stereo_copy(tmp_path, tiny):
    "Another rate is resampled, one channel becomes two."
    mono = render(compose.compose("808 hip hop", 1, seconds=2).song).mono().crop(0, 2)
    copies = {"mono": mono, "stereo": mono.with_channels(2).resample(48_000), "fast": replace(mono, rate=48_000)}
    for name, sound in copies.items(): sound.save(tmp_path / f"{name}.wav")
    feature = Latents(tiny)
    with feature.open("cpu") as encode:
        rows = encode([feature.read(data.Source.of(tmp_path / f"{name}.wav")) for name in copies])
    one, same, fast = (row["latents"].astype(np.float32) for row in rows)
    assert np.abs(one - same)[..., :-1].mean() < 0.01 * one.std()
    assert np.abs(one[..., :fast.shape[-1]] - fast).mean() > 0.1 * one.std(), "a file that is taken for 48 kHz is another song"


def test_latents_of_a_minute_weigh_what_they_weigh(work, tiny, songs):
    rows = prepare(AceStepTask(settings(work, tiny, songs)).features, tracks := data.read(songs), work / "features").rows(tracks[0])
    latents = rows["latents"][0]["latents"]
    assert latents.dtype == np.float16 and latents.nbytes / latents.shape[-1] * 645 < 200_000
    assert set(rows) == {"latents", "text", "lyrics"}


def test_unequal_captions_make_a_batch_and_neighbours_do_not_matter(work, tiny, songs):
    "Padding is heard by nobody: a song's loss beside a longer text and longer lyrics is its loss alone."
    config = settings(work, tiny, songs, lyric_encoder_dropout=0.0)
    tracks = list(data.read(songs)[:2])
    tracks = [replace(tracks[0], caption="pop", tags=(), lyrics="[verse]\nOne"),
              replace(tracks[1], caption="a very long sentence about slow jazz, a piano and a flute", tags=(), lyrics="[verse]\nOne\nand two\nand three")]
    batch, alone = batch_of(config, tracks), batch_of(config, tracks[:1])
    assert batch["text_mask"].sum(1).unique().numel() == 2 and batch["lyrics_mask"].sum(1).unique().numel() == 2
    model, at = open_transformer(tiny), At(draws=AT.draws, probe={"sigma": 0.7})
    both = losses(model, replace(batch, data={name: tensor[:1] for name, tensor in batch.data.items()}), replace(at, draws=at.draws[:1]), config)["denoise"]
    assert torch.allclose(both, losses(model, alone, replace(at, draws=at.draws[:1]), config)["denoise"], rtol=1e-4)


def test_edited_lyrics_change_the_batch_and_missing_ones_are_silent(work, tiny, songs):
    config, track = settings(work, tiny, songs), data.read(songs)[0]
    before, after, none = (batch_of(config, [replace(track, lyrics=text)]) for text in ("[verse]\nOne line", "[verse]\nOne lime", None))
    assert not torch.equal(before["lyrics"], after["lyrics"]) and torch.equal(before["latents"], after["latents"])
    assert not none["lyrics_mask"].any() and not none["lyrics"].any()
    model, at = open_transformer(tiny), At(draws=AT.draws[:1], probe={"sigma": 0.7})
    dropped = replace(before, data=before.data | {"lyrics": torch.zeros_like(before["lyrics"]), "lyrics_mask": torch.zeros_like(before["lyrics_mask"])})
    loss = {name: losses(model, batch, at, config)["denoise"] for name, batch in (("none", none), ("dropped", dropped), ("sung", before))}
    assert torch.allclose(loss["none"], loss["dropped"], rtol=1e-5) and not torch.allclose(loss["none"], loss["sung"], rtol=1e-5)


def test_a_rollout_changes_the_input_and_without_offset_nothing(work, tiny, songs, monkeypatch):
    plain = settings(work, tiny, songs)
    rolled, idle = plain.model_copy(update=dict(rollout=1.0, rollout_offset=100)), plain.model_copy(update=dict(rollout=1.0, rollout_offset=0))
    batch, seen = batch_of(plain), []
    monkeypatch.setattr(training, "look", lambda model, noisy, *args, real=training.look: seen.append(noisy) or real(model, noisy, *args))
    def step(config):
        engine = Engine(AceStepTask(config), config, torch.device("cpu"))
        engine.task.loss, kept = (lambda model, batch, at: losses(model, batch, at, config)), {}
        for name, p in engine.params.items(): p.register_hook(lambda grad, name=name: kept.__setitem__(name, grad.clone()))
        return update(engine, 0, [(batch, AT)])["loss"], kept
    (loss, gradients), (same_loss, same_gradients), (other_loss, _) = step(plain), step(idle), step(rolled)
    assert loss == same_loss and equal(gradients, same_gradients) and torch.equal(seen[0], seen[1])
    assert other_loss != loss and not torch.allclose(seen[2], seen[0]) and all((new - old).abs().max() > 1e-3 for new, old in zip(seen[2], seen[0]))


def test_activations_computed_twice_give_the_same_gradients(work, tiny, songs):
    batch, found = batch_of(plain := settings(work, tiny, songs)), []
    for twice in (False, True):
        config = plain.model_copy(update={"gradient_checkpointing": twice})
        engine = Engine(AceStepTask(config), config, torch.device("cpu"))
        found.append(update(engine, 0, [(batch, AT)]) | {name: p.detach() for name, p in engine.params.items()})
    assert found[0]["loss"] == found[1]["loss"] and found[0]["grad_norm"] == pytest.approx(found[1]["grad_norm"], rel=1e-5)


def test_two_listeners_are_imitated_when_asked_for(work, tiny, songs, tmp_path, capsys):
    "Their states are a feature of their own, whose size is said before it is made, and two loss parts."
    from transformers import HubertConfig, HubertModel
    places = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for name, width in (("mert", 12), ("mhubert", 8)):
            sizes = dict(hidden_size=width, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, conv_dim=[8] * 7, num_conv_pos_embeddings=16)
            HubertModel(HubertConfig(**sizes, num_conv_pos_embedding_groups=2)).save_pretrained(tmp_path / name)
            places[name] = str(tmp_path / name)
    config = settings(work, tiny, songs, output=str(tmp_path / "run"), max_steps=4, lr=0.03, ssl_weight=1.0, store=str(tmp_path / "store"), **places)
    run = train(config)
    said = capsys.readouterr().out
    assert "mert: about" in said and "GB for 4 songs" in said and said.index("mert: about") < said.index("step 0/4")
    first, last = (record["valid"]["parts"] for record in run.history if "valid" in record)
    assert set(first) == {"denoise", "mert", "mhubert"} and 0.5 < first["mert"] < 1.5 and last["denoise"] < first["denoise"]
    valid = next(record["valid"] for record in run.history if "valid" in record)
    assert valid["loss"] == pytest.approx(first["denoise"] + (first["mert"] + first["mhubert"]) / 2, rel=1e-5)


def test_lost_conditions_are_drawn_apart_and_never_in_validation(work, tiny, songs, monkeypatch):
    told = []
    monkeypatch.setattr(training, "forget", lambda *args, real=training.forget: told.append(args[-2:]) or real(*args))
    config, model = settings(work, tiny, songs), open_transformer(tiny)
    batch = batch_of(config)
    for epoch in range(60): losses(model, batch, At(draws=[Draw(0, epoch, "a"), Draw(0, epoch, "b")], training=True), config)
    text, lyrics = (torch.cat([pair[i] for pair in told]).float() for i in range(2))
    assert 0.05 < text.mean() < 0.28 and 0.05 < lyrics.mean() < 0.28 and not torch.equal(text, lyrics)
    losses(model, batch, At(draws=AT.draws, probe={"sigma": 0.5}), config)
    assert not told[-1][0].any() and not told[-1][1].any()


def test_noise_is_fixed_by_song_and_level(tiny):
    latents, real = torch.zeros(2, 8, 16, 30), torch.ones(2, 30, dtype=torch.bool)
    noise = training.noise_for(latents, real, AT)
    assert torch.equal(noise, training.noise_for(latents, real, AT)) and not torch.allclose(noise[0], noise[1])
    assert torch.equal(mix(noise, noise, torch.ones(2)), noise) and 0.9 < noise.std() < 1.1
