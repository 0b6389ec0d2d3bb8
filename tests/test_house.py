"The laws of the house. Each test lists every place that breaks its law."
import ast
import subprocess
import sys

import pytest

from tests.house import (
    code_cells, flagged, imports, lessons, makes, module_name, modules, notebooks, package, python_sources, root, trespass)


def test_every_module_comes_from_one_notebook():
    made = sorted(name for name in map(makes, lessons) if name)
    assert made == sorted(map(module_name, modules))
    assert not [path.name for path in notebooks if any(flagged(cell, r"exports?[ \t]+\w") for cell in code_cells(path))], "another module"


def test_modules_import_only_what_stands_below_them():
    wrong = []
    for path in modules:
        name = module_name(path)
        for other in imports(path.read_text(encoding="utf-8"), name):
            if reason := trespass(name, other): wrong.append(f"{name} imports {other}: {reason}")
    assert not wrong, "\n".join(wrong)


@pytest.fixture
def small_house(monkeypatch):
    "A few modules at known places, so that the laws themselves can be tested."
    house = {"core": "00", "audio": "01", "train": "11", "show": "12", "evaluate": "13", "report": "13a"}
    monkeypatch.setattr("tests.house.places", {name: ("0_shared", number) for name, number in house.items()} |
                        {"musicgen.codes": ("1_musicgen", "01"), "musicgen.data": ("1_musicgen", "02"), "cli": ("5_tools", "01")})
    monkeypatch.setattr("tests.house.families", {"musicgen", "ace_step"})


@pytest.mark.parametrize("text", [
    "import musiclab.train", "from musiclab.train import fit", "from musiclab import train", "from . import train",
    "from .train import fit",
    "def f():\n    if True:\n        from musiclab.train import fit", "import importlib\nimportlib.import_module('musiclab.train')"])
def test_every_way_to_import_is_seen(text, small_house):
    assert imports(text, "core") == {"train"}


def test_relative_imports_inside_a_family_are_seen(small_house):
    text = "from .codes import delay\nfrom ..audio import load\nfrom .. import core"
    assert imports(text, "musicgen.data") == {"musicgen.codes", "audio", "core"}


@pytest.mark.parametrize("importer, imported, allowed", [
    ("audio", "core", True), ("core", "audio", False), ("audio", "musicgen.codes", False), ("audio", "musicgen", False),
    ("musicgen.codes", "audio", True), ("musicgen.data", "musicgen.codes", True), ("musicgen.codes", "ace_step.codec", False),
    ("musicgen.codes", "show", False), ("train", "show", False), ("evaluate", "show", False), ("report", "show", True), ("cli", "show", True),
    ("train", "cli", False), ("musicgen.codes", "cli", False), ("cli", "musicgen.codes", True)])
def test_the_import_law_itself(importer, imported, allowed, small_house):
    assert (trespass(importer, imported) is None) == allowed


HEAVY = {"torch", "transformers", "peft", "diffusers", "accelerate", "datasets", "librosa", "matplotlib", "IPython", "ipywidgets",
         "tensorboard"}

LIGHT = {"": HEAVY | {"numpy"}, "core": HEAVY | {"numpy"}, "cli": HEAVY | {"numpy"},
         **dict.fromkeys(["audio", "midi", "synth", "compose", "data", "config", "show"], HEAVY), "heartmula.tokenize": HEAVY - {"torch"}}

@pytest.mark.parametrize("name, without", LIGHT.items())
def test_light_modules_load_nothing_heavy(name, without):
    ask = f"import sys; import musiclab{'.' * bool(name)}{name}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", ask], cwd=root, capture_output=True, text=True, check=True).stdout.split()
    found = without & set(loaded)
    assert not found


def test_modules_and_cells_stay_small():
    wrong = [f"{module_name(path)}: {n} lines want a second notebook" for path in modules
             if (n := len(path.read_text(encoding="utf-8").splitlines())) > 350]
    wrong += [f"{path.name}, {cell.splitlines()[1]} {n} lines want a second cell" for path in lessons for cell in code_cells(path)
              if flagged(cell, "export") and (n := len(cell.splitlines())) > 48]
    assert not wrong, "\n".join(wrong)


def classes(text: str): return [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ClassDef)]

def undocumented(node: ast.AST, where: str, contracts: set[str]):
    "Public functions, classes and methods below `node` without a docstring; methods that a contract documents need no second one."
    for child in node.body:
        if not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) or child.name.startswith("_"): continue
        if not ast.get_docstring(child) and not (isinstance(node, ast.ClassDef) and child.name in contracts): yield f"{where}.{child.name}"
        if isinstance(child, ast.ClassDef): yield from undocumented(child, f"{where}.{child.name}", contracts)


def test_everything_public_has_a_docstring():
    texts = {module_name(path): path.read_text(encoding="utf-8") for path in modules}
    protocols = [node for text in texts.values() for node in classes(text) if "Protocol" in map(ast.unparse, node.bases)]
    contracts = {part.name for node in protocols for part in node.body if isinstance(part, ast.FunctionDef) and ast.get_docstring(part)}
    wrong = [name for module, text in texts.items() for name in undocumented(ast.parse(text), module, contracts)]
    assert not wrong, "\n".join(wrong)


DANGEROUS = {"eval", "exec", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load", "pickle.load", "joblib.load", "dill.load"}

def dangers(text: str):
    "Calls that run code out of data, or hand a string to a shell."
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Call): continue
        name = ast.unparse(node.func)
        given = {keyword.arg: keyword.value.value for keyword in node.keywords if isinstance(keyword.value, ast.Constant)}
        if name in DANGEROUS: yield name
        if name == "torch.load" and given.get("weights_only") is not True: yield "torch.load without weights_only=True"
        for key, bad in {"shell": True, "allow_pickle": True, "trust_remote_code": True, "weights_only": False}.items():
            if given.get(key) is bad: yield f"{key}={bad}"


def test_nothing_runs_code_out_of_data():
    wrong = [f"{where}: {danger}" for where, text in python_sources().items() for danger in dangers(text)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("text", ["eval(x)", "yaml.load(f)", "torch.load(f)", "torch.load(f, weights_only=False)", "run(x, shell=True)",
                                  "np.load(f, allow_pickle=True)", "Model.from_pretrained(x, trust_remote_code=True)"])
def test_dangers_are_seen(text):
    assert list(dangers(text))

def test_safe_calls_are_no_dangers():
    assert not list(dangers("model.eval(); yaml.safe_load(f); torch.load(f, weights_only=True); run(x, shell=False)"))


def test_only_the_makefile_knows_what_lies_beside_the_repository():
    sources = [path for path in root.rglob("*") if path.suffix in (".py", ".ipynb", ".md", ".toml", ".yml", ".yaml", ".json", ".ini") and
               not {".venv", "node_modules"} & set(path.parts) and path.is_file() and path.name != "test_house.py"]
    beside = "../" + "shared/"
    assert package / "__init__.py" in sources
    assert not [str(path.relative_to(root)) for path in sources if beside in path.read_text(encoding="utf-8", errors="replace")]


def test_ruff_is_content():
    command = [sys.executable, "-m", "ruff", "check", "--output-format", "concise"]
    run = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout
