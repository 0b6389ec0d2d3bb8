"What the READMEs say is true: links lead somewhere, commands exist, the example runs, both languages say the same."
import re
import shlex
import subprocess
import sys

import pytest

from tests.house import lessons, notebook, root, source

READMES = ["README.md", "README.zh-CN.md"]
PAGES = [*READMES, "CONTRIBUTING.md"]


def text(name: str) -> str: return (root / name).read_text(encoding="utf-8")

def blocks(name: str, language: str) -> list[str]: return re.findall(rf"^```{language}\n(.*?)^```", text(name), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    links = re.findall(r"\]\(([^)#]+)\)", text(name))
    ours = "https://colab.research.google.com/github/musiclab-course/musiclab/blob/main/"
    files = [link.removeprefix(ours) for link in links if link.startswith(ours) or "://" not in link]
    assert not [file for file in files if not (root / file).exists()]


@pytest.mark.parametrize("name", READMES)
def test_every_notebook_is_listed_by_its_title(name):
    rows = re.findall(r"^\| \[(.+)\]\((nbs/.+?\.ipynb)\) \|.*/blob/main/(.+?)\) \|$", text(name), re.MULTILINE)
    titles = {str(path.relative_to(root)): source(notebook(path)["cells"][0]).split("\n")[0].removeprefix("# ") for path in lessons}
    assert {path: title for title, path, _ in rows} == titles
    assert all(path == colab for _, path, colab in rows)
    order = [path.removesuffix(".ipynb") for _, path, _ in rows]
    assert order == sorted(order, key=lambda path: ("123405".index(path[4]), path)), "chapters in the order of their numbers"


def test_both_languages_show_the_same_code():
    def code(name): return [re.sub(r"\s*#.*", "", block) for language in ("bash", "python") for block in blocks(name, language)]
    assert code(READMES[0]) == code(READMES[1])


@pytest.mark.parametrize("name", PAGES)
def test_commands_are_understood(name):
    import typer.main

    from musiclab.cli import app
    for line in "\n".join(blocks(name, "bash")).split("\n"):
        if not line.startswith("musiclab "): continue
        command, args = typer.main.get_command(app), shlex.split(line, comments=True)[1:]
        while hasattr(command, "commands"): command = command.commands[args.pop(0)]
        command.make_context("musiclab", args)  # an unknown option or a missing argument raises


def test_the_python_example_runs(tmp_path):
    (example,) = blocks(READMES[0], "python")
    run = subprocess.run([sys.executable, "-c", example], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert {"before.wav", "after.wav"} <= {path.name for path in tmp_path.iterdir()}
