"Tiny random checkpoints, and transformers' own generation as the referee."
from types import SimpleNamespace

import pytest
import torch

from musiclab.musicgen.checkpoint import no_bars, open_tokenizer, tiny_checkpoint


@pytest.fixture(scope="session")
def tiny(tmp_path_factory): return tiny_checkpoint(tmp_path_factory.mktemp("musicgen") / "mono")


@pytest.fixture(scope="session")
def wide(tmp_path_factory): return tiny_checkpoint(tmp_path_factory.mktemp("musicgen") / "stereo", stereo=True)


def open_whole(folder):
    "The checkpoint as transformers opens it."
    from transformers import MusicgenForConditionalGeneration
    with no_bars(): return MusicgenForConditionalGeneration.from_pretrained(folder).eval()


def transformers_tokens(whole, folder, captions, frames, prompt=None, guidance=3.0):
    "Greedy tokens [batch, codebooks, frames], caught on their way to the codec."
    caught, stereo = [], whole.decoder.config.audio_channels == 2
    whole.audio_encoder.decode = lambda codes, *_, **__: caught.append(codes[0]) or SimpleNamespace(audio_values=torch.zeros(len(captions), 1, 1))
    text = open_tokenizer(folder)(captions, padding=True, return_tensors="pt")
    given = {} if prompt is None else {"decoder_input_ids": prompt.flatten(0, 1)}
    new = frames + 3 - (0 if prompt is None else prompt.shape[-1])  # three more than frames: the delay
    whole.generate(**text, **given, max_new_tokens=new, do_sample=False, guidance_scale=guidance)
    return torch.stack(caught, 2).flatten(1, 2) if stereo else caught[0]
