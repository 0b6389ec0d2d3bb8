"`python -m tests.parity FOLDER…`: the last part of each folder is a family, each folder in it a case."
import importlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path

from tests.parity.rows import Row, failure, rows_of

families = ("ace_step", "heartmula", "musicgen")


def built(family: str) -> bool: return family in families and importlib.util.find_spec(f"tests.parity.{family}") is not None


def cases(folder: Path) -> list[Path]: return sorted(path for path in folder.iterdir() if path.is_dir())


def rows(folder: Path) -> Iterator[Row]:
    "The rows of all cases of a family."
    folder = folder.resolve()
    if not folder.is_dir(): yield failure(folder, "no such folder")
    elif not built(folder.name): yield failure(folder, "unknown family")
    elif not cases(folder): yield failure(folder, "no case in it")
    else:
        family = importlib.import_module(f"tests.parity.{folder.name}")
        for case in cases(folder): yield from rows_of(family, case)


def run(folders: list[Path]) -> bool:
    "Print a row per quantity, then the sum. Whether all passed."
    passed = failed = 0
    for folder in folders:
        for row in rows(folder):
            print(row, flush=True)
            passed, failed = passed + row.ok, failed + (not row.ok)
    print(f"{passed} passed, {failed} failed")
    return not failed
