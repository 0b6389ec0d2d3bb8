"The house as the tests see it: which notebook makes which module, and what every source file says."
import ast
import json
import re
from functools import lru_cache
from importlib.util import resolve_name
from pathlib import Path

from IPython.core.inputtransformer2 import TransformerManager

root = Path(__file__).parents[1]
package = root / "musiclab"
notebooks = sorted(path for path in (root / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts)
solutions = [path for path in notebooks if path.is_relative_to(root / "nbs" / "solutions")]
lessons = [path for path in notebooks if path not in solutions]
quickstarts = [path for path in lessons if path.stem.endswith("quickstart")]
modules = sorted(path for path in package.rglob("*.py") if not path.name.startswith("_"))


@lru_cache(maxsize=None)
def notebook(path: Path) -> dict: return json.loads(path.read_text(encoding="utf-8"))

def source(cell: dict) -> str: return "".join(cell["source"])

def code_cells(path: Path) -> list[str]: return [source(cell) for cell in notebook(path)["cells"] if cell["cell_type"] == "code"]

def flagged(cell: str, flag: str) -> bool: return bool(re.search(rf"^#\|\s*{flag}\b", cell, re.MULTILINE))

def makes(path: Path) -> str | None:
    "The module that a notebook exports: `musicgen.codes`; None for one that exports nothing."
    found = [name for cell in code_cells(path) for name in re.findall(r"^#\|\s*default_exp\s+(\S+)", cell, re.MULTILINE)]
    return found[0] if found else None

def place(path: Path) -> tuple[str, str]:
    "Storey and number of a notebook: `0_shared/10a_task.ipynb` is ('0_shared', '10a'). As texts they sort in the order of reading."
    return path.parent.name, path.name.partition("_")[0]

# module -> (storey, number) of its notebook
places = {makes(path): place(path) for path in lessons if makes(path)}
families = {path.parent.name.partition("_")[2] for path in lessons} - {"shared", "tools"}


def module_name(path: Path) -> str:
    "`musiclab/musicgen/codes.py` is `musicgen.codes`."
    return ".".join(path.relative_to(package).with_suffix("").parts)

def imports(text: str, importer: str) -> set[str]:
    "Our modules and families that a module's source imports: absolute, relative, inside functions, or by name through importlib."
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import): found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = resolve_name("." * node.level + (node.module or ""), f"musiclab.{importer}".rpartition(".")[0])
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            found |= {arg.value for arg in node.args if isinstance(arg, ast.Constant)}
    ours = {name.removeprefix("musiclab.") for name in found if name.startswith("musiclab.")}
    return {name for name in ours if name in places or name in families}

def trespass(importer: str, imported: str) -> str | None:
    "Why `importer` may not import `imported`; None when it may."
    storey, number = places[importer]
    if storey == "5_tools" or imported == importer: return None
    if imported == "show": return None if importer == "report" else "only report and 5_tools draw"
    family = imported.partition(".")[0]
    if family in families: return None if storey.endswith("_" + family) else f"{family} is another family's"
    theirs, their_number = places[imported]
    if theirs == "5_tools": return "nothing stands on the tools"
    return "it stands higher in the house" if storey == "0_shared" and their_number >= number else None


def python_sources() -> dict[str, str]:
    "Every piece of Python in the project by where it is: modules, tests, scripts, benchmarks, and the code cells of notebooks."
    files = [path for folder in ("musiclab", "tests", "scripts", "benchmarks") for path in sorted((root / folder).rglob("*.py"))]
    texts = {str(path.relative_to(root)): path.read_text(encoding="utf-8") for path in [*files, root / "setup.py", root / "conftest.py"]}
    plain = TransformerManager().transform_cell  # turns %magics into Python
    for path in notebooks:
        for number, cell in enumerate(code_cells(path)): texts[f"{path.relative_to(root)} code cell {number}"] = plain(cell)
    return texts
