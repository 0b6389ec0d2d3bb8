"ACE-Step's songs: seeds, neighbours, changes, adapters of every kind, the command line, and what cannot be done."
import gc
import json
import shutil
import weakref

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from musiclab import adapters
from musiclab.ace_step.changes import Edit, Extend, How, Repaint, Resemble, Retake
from musiclab.ace_step.codec import FRAME, open_codec
from musiclab.ace_step.generate import generate, open_model
from musiclab.ace_step.guidance import Guidance
from musiclab.audio import Audio, load
from musiclab.core import MusiclabError
from tests.test_cli import run

QUICK = How(steps=3, guidance=Guidance(4.0))
PLAIN = How(steps=3, guidance=Guidance(1.0))
LYRICS = "[verse]\nneon lights they flicker bright"


def play(model, prompt="upbeat pop", lyrics="", seconds=1.5, **more): return generate(model, prompt, lyrics, seconds, **{"how": PLAIN, "device": "cpu"} | more)


def apart(a: Audio, b: Audio) -> float: return float(np.abs(a.samples - b.samples).max())


@pytest.fixture(scope="module")
def tone(): return Audio(0.3 * np.sin(np.arange(3 * 44_100) * 2 * np.pi * 220 / 44_100).astype(np.float32), 44_100)


def test_a_song_depends_on_its_seed_alone(tiny):
    "Not on its neighbours, though their tags and lyrics are longer, nor on the way in which it is computed."
    pair = play(tiny, ["pop", "a calm and warm piano ballad in a minor key"], ["", LYRICS], seed=[5, 9], how=QUICK)
    for low_vram in (False, True):
        alone, = play(tiny, "pop", seed=5, how=QUICK, low_vram=low_vram)
        assert apart(alone, pair[0]) < 2e-3
    other, = play(tiny, "pop", seed=6, how=QUICK)
    assert apart(other, pair[0]) > 0.05
    assert pair[0].rate == 44_100 and pair[0].channels == 2 and pair[0].seconds == 16 * FRAME / 44_100


@pytest.mark.parametrize("how", [
    How(2, "heun"), How(3, "pingpong", Guidance(4.0, "cfg_star", interval=1.0)), How(oss=(1, 3), guidance=Guidance(3.0, "cfg")),
    How(3, guidance=Guidance(tags=4.0, lyrics=2.0, interval=1.0, decay=1.0)), How(3, guidance=Guidance(weak_lyrics=False, as_trained=True))])
def test_every_dial_makes_a_song(tiny, how):
    song, = play(tiny, lyrics=LYRICS, how=how)
    assert np.isfinite(song.samples).all() and song.peak > 0.01


def test_half_precision_makes_nearly_the_same_song(tiny):
    exact, half = (play(tiny, lyrics=LYRICS, how=QUICK, dtype=dtype)[0] for dtype in ("fp32", "bf16"))
    assert 0 < apart(exact, half) and np.corrcoef(exact.samples[0], half.samples[0])[0, 1] > 0.95


def test_changes_keep_what_they_should(tiny, tone):
    new, = play(tiny, change=Repaint(tone, 1, 2))
    assert np.array_equal(new.samples[:, :41_000], tone.with_channels(2).samples[:, :41_000])
    assert np.abs(new.samples[0, 60_000:70_000] - tone.samples[0, 60_000:70_000]).max() > 0.05
    longer, = play(tiny, change=Extend(tone, left=1, right=2))
    left = 10 * FRAME
    assert np.array_equal(longer.samples[0, left + 3000:left + 100_000], tone.samples[0, 3000:100_000])
    assert longer.samples.shape[1] == left + 33 * FRAME + 21 * FRAME
    for change in (Resemble(tone, 0.6), Edit(tone, "calm piano", until=0.7, average=2)):
        assert play(tiny, change=change)[0].samples.shape == (2, 33 * FRAME)


def test_a_retake_goes_from_the_same_song_to_another(tiny):
    song, = play(tiny)
    steps = [apart(play(tiny, change=Retake(variance))[0], song) for variance in (0.0, 0.1, 1.0)]
    assert steps[0] < 1e-4 < steps[1] and steps[2] > 0.05


@pytest.mark.parametrize("seconds, change, words", [
    (0, None, "1 to 240 s"), (-3, None, "1 to 240 s"), (1000, None, "1 to 240 s"), (1, lambda t: Repaint(t, 2, 9), "no part of a song of 3.0 s"),
    (1, lambda t: Repaint(t, -1, 2), "no part"), (1, lambda t: Repaint(t, 2, 2), "no part"), (1, lambda t: Extend(t), "extend"),
    (1, lambda t: Extend(t, 0, 9999), "3600"),
    (1, lambda t: Edit(Audio(np.zeros((1, 250 * 8000), np.float32), 8000), ""), "crop"), (1, lambda t: Retake(1.5), "variance")])
def test_what_cannot_be_done_is_said_in_one_line(tmp_path, tone, seconds, change, words):
    "Before anything is loaded: the model's folder is empty."
    with pytest.raises(MusiclabError, match=words) as error: play(tmp_path, seconds=seconds, change=change and change(tone))
    assert "\n" not in str(error.value)


def test_no_tags_no_lyrics_and_far_too_many_lyrics_are_songs(tiny):
    assert play(tiny, "", "")[0].peak > 0.01
    with pytest.warns(UserWarning, match="cut off"): song, = play(tiny, "pop", ("la la la " * 12 + "\n") * 100)
    assert song.peak > 0.01
    with pytest.raises(MusiclabError, match="does not know this language"): play(tiny, lyrics="[lang:xx]\nla la")
    with pytest.raises(MusiclabError, match="2 lyrics"): play(tiny, "pop", ["a", "b"])


@pytest.fixture(scope="module")
def adapter(tiny, tmp_path_factory):
    "A small adapter with alpha ≠ rank, saved in every way; and what the model says with it."
    folder, model = tmp_path_factory.mktemp("adapters"), open_model(tiny)
    adapters.attach(model, r"transformer_blocks\.\d+\.(attn|cross_attn)\.to_(q|k|v)|lyric_encoder.*linear_q|speaker_embedder", rank=4, alpha=8, dropout=0)
    with torch.no_grad():
        for name, weight in adapters.adapter_state(model).items():
            if "lora_B" in name: weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(name))) * 0.3)
    adapters.save(model, folder / "peft")
    adapters.save(model, folder / "diffusers" / "pytorch_lora_weights.safetensors")
    adapters.save(model, folder / "comfy.safetensors", format=adapters.COMFYUI)
    bare = load_file(folder / "diffusers" / "pytorch_lora_weights.safetensors")
    save_file(bare, folder / "upstream.safetensors")  # as the original trainer writes it: no alpha anywhere
    return folder


def test_adapters_of_every_kind_play_the_same(tiny, adapter):
    base, = play(tiny, lyrics=LYRICS)
    songs = {name: play(tiny, lyrics=LYRICS, adapter=adapter / name)[0] for name in ("peft", "diffusers", "comfy.safetensors")}
    songs["upstream"] = play(tiny, lyrics=LYRICS, adapter=adapter / "upstream.safetensors", strength=2.0)[0]  # alpha / rank is for the user to know
    for name, song in songs.items():
        assert apart(song, base) > 0.02, name
        assert apart(song, songs["peft"]) < 2e-3, name
    assert apart(play(tiny, lyrics=LYRICS, adapter=adapter / "peft", strength=0.0)[0], base) < 1e-4


def test_what_is_dropped_is_gone_at_once(tiny, adapter):
    "A model of gigabytes must not wait for the garbage collector."
    gc.disable()
    try: assert [weakref.ref(open())() for open in (lambda: open_model(tiny, adapter / "peft"), lambda: open_codec(tiny).vocoder)] == [None, None]
    finally: gc.enable()


def test_an_adapter_of_another_model_is_refused(tiny, adapter, tmp_path):
    other = {name.replace("transformer_blocks", "decoder.layers"): weight for name, weight in load_file(adapter / "upstream.safetensors").items()}
    save_file(other, tmp_path / "other.safetensors")
    with pytest.raises(MusiclabError, match="have no place in this model"): play(tiny, adapter=tmp_path / "other.safetensors")


def test_the_codec_wants_its_own_weights(tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "copy")
    file = folder / "music_vocoder" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    save_file({name: weight for name, weight in weights.items() if name != "head.conv_pre.bias"}, file)
    with pytest.raises(MusiclabError, match="head.conv_pre.bias is missing"): open_codec(folder)
    save_file(weights | {"head.extra": torch.zeros(1)}, file)
    with pytest.raises(MusiclabError, match="head.extra is unexpected"): open_codec(folder)


def test_sounds_of_any_rate_and_length(tiny):
    codec = open_codec(tiny)
    for rate, samples, channels in ((8000, 9000, 1), (48_000, 1, 2), (44_100, 4097, 6)):
        latents = codec.encode(Audio(np.random.default_rng(0).normal(0, 0.1, (channels, samples)).astype(np.float32), rate))
        assert latents.shape == (8, 16, max(1, -(-round(samples * 44_100 / rate) // FRAME))) and latents.isfinite().all()
        assert codec.decode(latents).samples.shape == (2, latents.shape[-1] * FRAME)


def test_the_command_line_writes_songs_and_their_settings(tiny, tmp_path):
    (tmp_path / "song.txt").write_text(LYRICS)
    def command(*more, out="a.wav"): return run("generate", "--model", tiny, "--steps", 2, "--device", "cpu", "--out", tmp_path / out, *more)
    assert command("--prompt", "pop", "--lyrics", tmp_path / "song.txt", "--seconds", 1.5, "--low-vram")[0] == 0
    made_by = json.loads((tmp_path / "a.json").read_text())
    assert made_by["steps"] == 2 and made_by["prompt"] == "pop" and made_by["low_vram"] and load(tmp_path / "a.wav").seconds > 1.4
    assert command("--prompt", "piano", "--continue", tmp_path / "a.wav", "--extend", "0:1", out="b.wav")[0] == 0
    assert load(tmp_path / "b.wav").seconds > load(tmp_path / "a.wav").seconds + 0.9
    for wrong, words in ((["--temperature", 1], "--temperature"), (["--repaint", "1:2"], "needs a song"), (["--sampler", "eule"], "Choose euler"),
                         (["--continue", tmp_path / "a.wav", "--repaint", "9:12"], "no part")):
        status, text = command(*wrong, out="c.wav")
        assert status == 1 and words in text and text.count("\n") == 1, text


def test_every_dial_is_reached_from_the_shell(tiny, tmp_path):
    common = ["generate", "--model", str(tiny), "--prompt", "pop", "--seconds", "1.5", "--device", "cpu", "--out", str(tmp_path / "song.wav")]
    def sound(*dials):
        assert run(*common, *(word for dial in dials for word in ("--set", dial)))[0] == 0
        return load(tmp_path / "song.wav")
    plain = sound("guidance_kind=cfg", "guidance=4", "interval=1", "oss=2,4,6")
    for dial in ("guidance_kind=cfg_star", "omega=-20", "oss=1,2,6", "tag_guidance=3"):
        dials = [dial] + ["lyric_guidance=2"] * dial.startswith("tag")
        assert apart(plain, sound("guidance_kind=cfg", "guidance=4", "interval=1", "oss=2,4,6", *dials)) > 1e-5, dial
