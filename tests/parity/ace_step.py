"ACE-Step against the original: the case's name says which part it is about."
from collections.abc import Callable, Iterator

from tests.parity.ace_step_lyrics import lyric_tokenizer
from tests.parity.ace_step_model import encode_decode, lyric_encoder, training_step, transformer_forward
from tests.parity.ace_step_sound import CHECKS as SOUND
from tests.parity.rows import Case, Row

CHECKS: dict[str, Callable[[Case], Iterator[Row]]] = {
    "encode_decode": encode_decode, "lyric_encoder": lyric_encoder, "lyric_tokenizer": lyric_tokenizer,
    "training_step": training_step, "transformer_forward": transformer_forward, **SOUND,
}


def check(case: Case) -> Iterator[Row]:
    if case.folder.name not in CHECKS: yield Row(case.folder.name, "unknown case", float("nan"), "", False)
    else: yield from CHECKS[case.folder.name](case)
