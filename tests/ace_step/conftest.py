"What tests of ACE-Step share: a tiny checkpoint in the layout of the release."
import pytest

from musiclab.ace_step.checkpoint import tiny_checkpoint


@pytest.fixture(scope="session")
def tiny(tmp_path_factory): return tiny_checkpoint(tmp_path_factory.mktemp("ace_step") / "tiny")
