"Every case of the repository, and every case of `$MUSICLAB_PARITY`."
import importlib
import os
from pathlib import Path

import pytest

from tests.parity.rows import rows_of
from tests.parity.runner import built, cases, families, run

own = Path(__file__).parent / "cases"
places = [own, *(Path(place) for place in [os.environ.get("MUSICLAB_PARITY")] if place)]
found = [case for place in places for family in families if (place / family).is_dir() for case in cases(place / family)]


@pytest.mark.parametrize("case", found, ids=lambda case: f"{case.parent.parent.name}/{case.parent.name}/{case.name}")
def test_numbers_of_the_original(case):
    if not built(case.parent.name): pytest.skip(f"{case.parent.name} is not built yet")
    rows = list(rows_of(importlib.import_module(f"tests.parity.{case.parent.name}"), case))
    assert rows and all(row.ok for row in rows), "\n" + "\n".join(str(row) for row in rows if not row.ok)


def test_a_damaged_case_fails(tmp_path, capsys):
    from shutil import copytree
    from safetensors.torch import load_file, save_file
    case = copytree(own / "musicgen" / "mono_padded_text", tmp_path / "musicgen" / "case")
    outputs = load_file(case / "outputs.safetensors")
    outputs["logits"] += 2e-4
    save_file(outputs | {"surprise": outputs["loss"].clone()}, case / "outputs.safetensors")
    assert not run([tmp_path / "musicgen"])
    printed = capsys.readouterr().out
    assert [line.split()[1] for line in printed.splitlines() if line.endswith("FAILED")] == ["logits", "surprise:"]
    assert printed.strip().endswith("2 failed")


def test_the_unknown_fails(tmp_path, capsys):
    (tmp_path / "musicgen" / "no_case").mkdir(parents=True)
    (tmp_path / "polka" / "case").mkdir(parents=True)
    assert not run([tmp_path / "musicgen", tmp_path / "polka", tmp_path / "nowhere"])
    printed = capsys.readouterr().out
    assert "FileNotFoundError" in printed and "unknown family" in printed and "no such folder" in printed and printed.strip().endswith("0 passed, 3 failed")
