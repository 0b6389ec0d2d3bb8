"What tests of HeartMuLa share: a tiny checkpoint in the layout of the release."
import pytest

from musiclab.heartmula.checkpoint import tiny_checkpoint
from musiclab.heartmula.model import open_lm
from musiclab.heartmula.prompts import Reader


@pytest.fixture(scope="session")
def tiny(tmp_path_factory): return tiny_checkpoint(tmp_path_factory.mktemp("heartmula") / "tiny")


@pytest.fixture(scope="session")
def lm(tiny): return open_lm(tiny)


@pytest.fixture(scope="session")
def read(tiny): return Reader(tiny)
