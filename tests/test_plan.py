"Forecasts against what really was: exact where they claim to be, near where they estimate."
import numpy as np
import pytest
import torch

from musiclab import compose, plan
from musiclab.batches import Plan
from musiclab.core import Draw, MusiclabError
from musiclab.engine import Engine
from musiclab.features import prepare
from musiclab.layers import weight_bytes
from musiclab.recipes import FAMILIES, family, look_up, read_data
from musiclab.task import At
from musiclab.tracks import Track
from musiclab.train import store_of
from tests.test_cli import run


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan")
    compose.dataset(folder / "songs", 3, seconds=3)
    compose.dataset(folder / "notes", 3, seconds=3, format="mid")
    return folder


def settings(name, place, **changes):
    "A tiny configuration of a family."
    config = look_up(family(name).config)
    short = {"frames": 60, "crop_seconds": 2, "max_seq_len": 64}
    told = {"data": str(place / ("notes" if name == "museformer" else "songs")), "batch_size": 1, "accumulate": 1, "precision": "fp32", "device": "cpu",
        "trackers": [],
            "output": str(place / f"{name}-out"), "store": str(place / "store"), **{key: value for key, value in short.items() if key in config.model_fields}}
    if name == "museformer": told["model"] = "small"
    else:
        if not (place / name).exists(): look_up(family(name).tiny)(place / name)
        told["model"] = str(place / name)
    return config(**told | changes)


@pytest.mark.parametrize("name", list(FAMILIES))
def test_weights_gradients_and_memory_of_the_optimizer_are_exact(name, place):
    config = settings(name, place)
    parts = plan.memory(config)
    engine = Engine(look_up(family(name).task)(config), config, torch.device("cpu"))
    trained = sum(p.nbytes for p in engine.params.values())
    buffers = sum(b.nbytes for b in engine.model.buffers())
    assert parts["trained weights"] == parts["gradients"] == trained
    assert parts["frozen weights"] == pytest.approx(weight_bytes(engine.model) - trained - buffers, abs=1)
    for p in engine.params.values(): p.grad = torch.zeros_like(p)
    for optimizer in engine.optimizers.values(): optimizer.step()
    states = [value for optimizer in engine.optimizers.values() for state in optimizer.state.values() for key, value in state.items() if key != "step"]
    assert parts["optimizer"] == sum(value.nbytes for value in states)
    assert parts["activations"] > 0


@pytest.mark.parametrize("saving", [False, True])
def test_what_a_step_keeps_is_near_what_torch_keeps(place, saving):
    config = settings("musicgen", place, frames=500, gradient_checkpointing=saving)
    task = look_up(family("musicgen").task)(config)
    engine = Engine(task, config, torch.device("cpu"))
    rows = {"codes": [{"codes": np.zeros((4, 500), np.int16)}], "text": [{"states": np.zeros((20, 32), np.float32)}]}
    batch, kept, weights = task.collate([task.example(Track("a"), rows, Draw(0, 0,
        "a"))]), {}, {p.untyped_storage().data_ptr() for p in engine.model.parameters()}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in weights: kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor
    engine.door.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        engine.door(task.loss, batch, At(0, [Draw(0, 0, "a")], training=True))
    skeleton = plan.skeleton_of(config)
    _, blocks = plan.trained_shapes(skeleton, config)
    if not saving: assert sum(kept.values()) == pytest.approx(skeleton.tokens * sum(plan.inside(block, 4) for block in blocks), rel=0.4)
    assert plan.memory(config)["activations"] > sum(kept.values()) * 0.7  # never far too little


def test_steps_and_disk(place):
    config = settings("musicgen", place, epochs=3, accumulate=2, valid_fraction=0.0)
    said = plan.forecast(config)
    assert (said.tracks, said.epoch, said.steps, said.measured) == (3, 2, 6, None)
    task = look_up(family("musicgen").task)(config)
    tracks, _ = read_data(config)
    prepared = prepare(task.features, tracks, store_of(config), torch.device("cpu"))
    assert Plan(task.weights(tracks, prepared), 1, 2).steps(1) == said.epoch
    numbers = sum(array.nbytes for track in tracks for rows in prepared.rows(track).values() for row in rows for array in row.values())
    assert said.disk == pytest.approx(numbers, rel=0.5)


def test_songs_that_are_not_here_are_said_to_be_unknown(place):
    lines = plan.forecast(settings("musicgen", place, data="nowhere")).lines()
    assert any("not on this machine" in line for line in lines) and not any("time:" in line for line in lines)


def test_the_release_is_known_without_a_download():
    status, text = run("plan", "musicgen_lora", "model=facebook/musicgen-small", "data=nowhere", "precision=bf16", "quantize=int8", "--memory", "12")
    assert status == 0 and "fits into 12 GB" in text
    status, text = run("plan", "musicgen_lora", "model=facebook/musicgen-large", "data=nowhere", "method=full", "--memory", "8")
    assert status == 1 and "gradient_checkpointing" not in text and "batch_size=1" in text and "method=lora" in text
    with pytest.raises(MusiclabError, match="sizes are not known"): plan.memory(look_up(family("musicgen").config)(data="x", model="someone/else"))


def test_advice_names_what_helps_and_what_it_leads_to():
    config = look_up(family("musicgen").config)(data="x", model="facebook/musicgen-medium", batch_size=8, gradient_checkpointing=False, precision="bf16",
        device="cpu")
    lines = plan.advice(config, 8e9)
    assert lines[0].startswith("does not fit") and "gradient_checkpointing=true" in lines[1] and lines[-1].endswith("(fits)")
    assert plan.advice(config.model_copy(update={"gradient_checkpointing": True, "batch_size": 1, "quantize": "int8"}), 8e9) == []


def test_a_card_that_is_not_here_counts_as_one_with_bf16():
    config = look_up(family("musicgen").config)(data="nowhere", model="facebook/musicgen-small", device="cuda")
    if torch.cuda.is_available(): pytest.skip("there is one")
    asked = plan.forecast(config, card=True).parts
    assert asked == plan.memory(config.model_copy(update={"device": "cpu", "precision": "bf16"}))
    status, text = run("plan", "musicgen_lora", "data=nowhere", "device=cuda")
    assert status == 0 and "no graphics card" in text
