"What every notebook owes its reader: the same opening, both languages, an exercise with a solution, and a small clean file."
import re
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import musiclab
from musiclab.recipes import FAMILIES
from tests.house import code_cells, flagged, lessons, makes, notebook, notebooks, package, quickstarts, root, solutions, source

INSTALL = f'''#| hide
# On Colab or AutoDL: install the release that matches this notebook (torch and numpy stay as they are).
import importlib.util
if importlib.util.find_spec("musiclab") is None:
    %pip install -q "musiclab=={musiclab.__version__}"'''
# a title; two lines in English; two lines in Chinese
TITLE = re.compile(r"\A# .+\n\n.+\n.+\n\n\*\*中文提要\*\* .*[一-鿿].*\n.*[一-鿿].*\Z")
SOLUTIONS = re.compile(r"\A# .+\n\n.+")
TRY_IT = "## Try it · 动手试试"
chapters = [path for path in lessons if makes(path)]
taught = [path for path in chapters if not makes(path).startswith("exercises.")]  # the checks have no exercises of their own


def listed(wrong) -> str: return "\n".join(wrong)

def short(path: Path) -> str: return str(path.relative_to(root / "nbs"))

def headings(path: Path) -> list[str]:
    "The second-level headings, in order."
    text = "\n\n".join(source(cell) for cell in notebook(path)["cells"] if cell["cell_type"] == "markdown")
    return re.findall(r"^## .*$", text, re.MULTILINE)

def checks(path: Path) -> set[str]:
    "The exercise checks that a notebook calls, by module: `sound.core_1`."
    text = "\n".join(code_cells(path))
    modules = set(re.findall(r"^import musiclab\.exercises\.(\w+) as exercises$", text, re.MULTILINE))
    return {f"{module}.{name}" for module in modules for name in re.findall(r"exercises\.(\w+)\(", text)}


def test_notebooks_open_alike():
    wrong = []
    for path in notebooks:
        title, *rest = [source(cell) for cell in notebook(path)["cells"][:3]]
        if not (SOLUTIONS if path in solutions else TITLE).match(title): wrong.append(f"{short(path)}: {title!r} is not a proper title")
        if flagged(rest[0], "default_exp") != (path in chapters): wrong.append(f"{short(path)}: default_exp belongs into the second cell")
        if rest[path in chapters] != INSTALL: wrong.append(f"{short(path)}: the install cell is missing or differs")
    assert not wrong, listed(wrong)


def test_every_family_that_can_play_has_a_quickstart_that_exports_nothing():
    assert {path.parent.name.partition("_")[2] for path in quickstarts} == set(FAMILIES)
    assert not [short(path) for path in quickstarts if makes(path)]
    assert not [short(path) for path in lessons if path not in [*chapters, *quickstarts]]


def test_headings_speak_both_languages():
    wrong = [f"{short(path)}: {line}" for path in notebooks for line in headings(path) if not re.match(r"## .*\w.* · .*[一-鿿]", line)]
    assert not wrong, listed(wrong)


def test_chapters_end_with_exercises_that_have_solutions():
    wrong = []
    for path in taught:
        solved = root / "nbs" / "solutions" / path.relative_to(root / "nbs")
        exercises = [cell for cell in code_cells(path) if flagged(cell, "exercise")]
        if headings(path)[-1:] != [TRY_IT]: wrong.append(f"{short(path)}: does not end with {TRY_IT!r}")
        if not 1 <= len(exercises) <= 3: wrong.append(f"{short(path)}: {len(exercises)} exercises, one to three are wanted")
        if not all("exercises." in cell for cell in exercises): wrong.append(f"{short(path)}: an exercise without a check")
        if solved not in solutions: wrong.append(f"{short(path)}: no solutions notebook")
        elif checks(solved) != checks(path): wrong.append(f"{short(path)}: exercises and solutions call different checks")
    wrong += [f"{short(path)}: solutions export nothing" for path in solutions
              if any(flagged(cell, "export|default_exp") for cell in code_cells(path))]
    assert not wrong, listed(wrong)


def test_every_exercise_check_is_used():
    modules = [makes(path) for path in chapters if path not in taught]
    exported = {f"{name.removeprefix('exercises.')}.{check}" for name in modules for check in import_module(f"musiclab.{name}").__all__}
    assert set().union(*map(checks, lessons)) == exported


def test_what_is_exported_is_tried():
    "In every chapter, examples with an assertion: at least one for every six cells that export something."
    wrong = []
    for path in taught:
        cells = code_cells(path)
        public = [cell for cell in cells if flagged(cell, "export") and re.search(r"^(?:def|class) [a-zA-Z]", cell, re.MULTILINE)]
        tried = [cell for cell in cells if not flagged(cell, "export") and re.search(r"\bassert\b|\btest_\w+\(", cell)]
        if len(tried) * 6 < len(public): wrong.append(f"{short(path)}: {len(public)} exported, {len(tried)} tried")
    assert not wrong, listed(wrong)


def test_files_are_small_and_show_no_trouble():
    wrong = []
    for path in notebooks:
        outputs = [output for cell in notebook(path)["cells"] for output in cell.get("outputs", [])]
        if path.stat().st_size >= 300_000: wrong.append(f"{short(path)}: {path.stat().st_size // 1000} kB")
        if "widgets" in notebook(path)["metadata"]: wrong.append(f"{short(path)}: metadata.widgets breaks the view on GitHub")
        if any(output["output_type"] == "error" for output in outputs): wrong.append(f"{short(path)}: an error among the outputs")
        if re.search(f"{root}|{Path.home()}", str(outputs)): wrong.append(f"{short(path)}: shows a path of the machine that ran it")
    assert not wrong, listed(wrong)


@pytest.fixture(scope="module")
def fresh_export(tmp_path_factory) -> Path:
    "A copy of the project whose modules are exported anew and whose notebooks are cleaned."
    copy = tmp_path_factory.mktemp("export")
    for name in ("settings.ini", "pyproject.toml"): shutil.copy(root / name, copy)
    shutil.copytree(root / "nbs", copy / "nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    (copy / "musiclab").mkdir()
    shutil.copy(package / "__init__.py", copy / "musiclab")
    for command in ("nbdev-export", "nbdev-clean"):
        run = subprocess.run([Path(sys.executable).with_name(command)], cwd=copy, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
    return copy


def test_modules_are_in_step_with_their_notebooks(fresh_export):
    def texts(folder): return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.py")}
    exported, committed = texts(fresh_export / "musiclab"), texts(package)
    wrong = sorted(name for name in exported.keys() | committed.keys() if exported.get(name) != committed.get(name))
    assert not wrong, "run `make export`: " + ", ".join(wrong)


def test_notebooks_are_clean(fresh_export):
    wrong = [short(path) for path in notebooks if path.read_bytes() != (fresh_export / path.relative_to(root)).read_bytes()]
    assert not wrong, "run `make export`: " + ", ".join(wrong)
