"Pictures and pages: every picture draws odd input too, and a page is one file that carries all it shows."
import io
import json
import re

import matplotlib
import numpy as np
import pytest
from PIL import Image

from musiclab import show
from musiclab.audio import Audio
from musiclab.core import MusiclabError
from musiclab.midi import Part, Song, notes

CHORD = Audio(0.2 * np.sin(2 * np.pi * np.outer([440, 554], np.arange(64000) / 32000)), 32000)
SONG = Song([Part("piano", 0, False, notes([(0, 480, 60, 100), (480, 480, 72, 30)])), Part("kit", 0, True, notes([(0, 10, 36, 90)]))])


def pixels(picture): return np.asarray(Image.open(io.BytesIO(picture.png())).convert("RGBA"))


@pytest.mark.parametrize("draw", [
    lambda: show.waveform(CHORD), lambda: show.spectrogram(CHORD), lambda: show.mel(CHORD), lambda: show.pianoroll(SONG),
    lambda: show.tokens(np.arange(40).reshape(4, 10)), lambda: show.losses([{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}])])
def test_every_picture_is_small_and_leaves_no_trace(draw):
    before = dict(matplotlib.rcParams)
    picture = draw()
    assert len(picture._repr_png_()) < 60_000 and pixels(picture)[..., 3].any()
    assert 'alt="' in picture.html and "data:image/png" in picture.html
    assert dict(matplotlib.rcParams) == before
    assert "pyplot" not in show.__dict__


@pytest.mark.parametrize("samples", [np.zeros((1, 1)), np.zeros((2, 32000)), np.ones((1, 100))])
def test_odd_sounds_are_drawn(samples):
    for draw in (show.waveform, show.spectrogram): assert pixels(draw(Audio(samples, 32000))).size


@pytest.mark.parametrize("song", [Song(), Song([Part("empty")]), Song([SONG.parts[1]]), Song([SONG.parts[0]] * 12)])
def test_odd_songs_are_drawn(song): assert pixels(show.pianoroll(song)).size


def test_a_high_tone_is_drawn_higher():
    def row(hertz):
        rgb = pixels(show.spectrogram(Audio(np.sin(2 * np.pi * hertz * np.arange(32000) / 32000), 32000)))[:, 100:-100].astype(int)
        return int((rgb[..., 0] * (rgb[..., 3] > 250)).sum(1).argmax())
    assert row(4000) < row(1000) < row(250)
    assert abs((row(1000) - row(4000)) - (row(250) - row(1000))) < 8, "octaves are equally high"


def test_equal_tokens_have_equal_colours():
    import torch
    codes = torch.tensor([[5, 9, 5, -1], [9, 5, 7, 7]])
    image = show.tokens(codes).figure.axes[0].images[0].get_array()
    assert (image[0, 0] == image[0, 2]).all() and (image[0, 0] == image[1, 1]).all() and (image[0, 0] != image[0, 1]).any()
    assert np.allclose(image[0, 3, :3], 0.5)
    assert show.tokens(np.arange(7)).text
    with pytest.raises(MusiclabError, match="one row of the batch"): show.tokens(np.zeros((2, 4, 10), int))


def curves(picture):
    lines = picture.figure.axes[0].lines
    return {line.get_label(): line.get_xydata() for line in lines if not line.get_label().startswith("_")}


def test_losses_from_everything_that_holds_a_log(tmp_path):
    records = [{"step": s, "loss": 4.0 / s, "lr": 1e-4} for s in range(1, 7)]
    for record in records[1::2]: record["valid"] = {"loss": 5.0 / record["step"], "codes": {"k0": 1.0}}
    (tmp_path/"run"/"logs").mkdir(parents=True)
    log = tmp_path/"run"/"logs"/"log.jsonl"
    log.write_text("".join(json.dumps(r) + "\n" for r in records) + '{"step": 7, "lo')  # a run that is writing
    run = type("Run", (), {"history": records})()
    drawn = [curves(show.losses(given)) for given in (records, log, str(log), tmp_path/"run", run)]
    assert set(drawn[0]) == {"training", "valid/loss", "valid/codes/k0"}
    assert drawn[0]["valid/loss"].tolist() == [[2, 2.5], [4, 1.25], [6, 5 / 6]]
    for other in drawn[1:]: assert all((other[name] == drawn[0][name]).all() for name in drawn[0])
    assert curves(show.losses([{"step": 1, "valid": 2.0}]))["valid"].tolist() == [[1, 2]]
    assert show.losses([]).text and not curves(show.losses([{"step": 1, "loss": float("nan")}]))
    skipped = [{"step": s, "loss": float("nan") if s == 3 else 1.0} for s in range(1, 6)]
    assert curves(show.losses(skipped))["training"].tolist() == [[1, 1], [2, 1], [4, 1], [5, 1]]
    with pytest.raises(MusiclabError, match="no training log"): show.losses(tmp_path/"nothing")


def test_a_page_is_one_file(tmp_path):
    player = show.compare({"a": CHORD, "b": CHORD})
    path = show.save(tmp_path/"page.html", "音乐 & <music>", [
        "## One", "> Two\nlines", "a paragraph <i>", show.columns(player, show.player(CHORD)), show.waveform(CHORD),
        show.table([{"name": "x<y", "value": 1.23456, "count": 12345}, {"name": None, "value": float("nan")}])])
    text = path.read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>") and '<meta charset="utf-8">' in text and "<title>音乐 &amp; &lt;music&gt;</title>" in text
    assert "<h2>One</h2>" in text and "<blockquote>Two\nlines</blockquote>" in text and "<p>a paragraph &lt;i&gt;</p>" in text
    assert "x&lt;y" in text and "1.23<" in text and "12,345" in text and text.count("<td class=num>–</td>") == 2
    assert not re.findall(r"https?://(?!www\.w3\.org)", text) and not re.findall(r'(?:src|href)="(?!data:)', text)


def test_smoothing_is_right_from_the_start():
    assert np.allclose(show.smooth(np.full(20, 3.0)), 3)
    noisy = 2 + np.random.default_rng(0).standard_normal(2000)
    assert abs(show.smooth(noisy, 0.99)[-1] - 2) < 0.3 and show.smooth(noisy, 0.99).std() < 0.3
