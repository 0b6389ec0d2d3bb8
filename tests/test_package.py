"The package as pip sees it: one version everywhere, pinned requirements, and a wheel that stands by itself."
import os
import re
import subprocess
import sys
import venv
import zipfile
from configparser import ConfigParser
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import musiclab
from tests.house import package, root

if sys.version_info >= (3, 11): import tomllib
else: import tomli as tomllib

settings = ConfigParser(delimiters=["="])
settings.read(root / "settings.ini", encoding="utf-8")
settings = settings["DEFAULT"]
pyproject = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))


def requirements(key: str) -> list[Requirement]: return [Requirement(line) for line in settings[key].split("\n") if line.strip()]


def test_the_version_and_settings_agree_everywhere():
    assert settings["version"] == musiclab.__version__ == version("musiclab")
    assert f"\n## {settings['version']}" in (root / "CHANGELOG.md").read_text(encoding="utf-8")
    assert pyproject["project"]["name"] == settings["lib_name"]
    assert pyproject["project"]["requires-python"] == ">=" + settings["min_python"]
    assert pyproject["project"]["urls"]["Repository"] == settings["git_url"]
    assert {key: pyproject["tool"]["nbdev"][key] for key in ("nbs_path", "lib_path", "tst_flags")} == {
        key: settings[key] for key in ("nbs_path", "lib_path", "tst_flags")}


def test_what_ci_installs_is_pinned_within_the_bounds():
    pins = {}
    for line in (root / "constraints.txt").read_text(encoding="utf-8").splitlines():
        name, pinned = line.split("==")
        pins[canonicalize_name(name)] = pinned
    extras = re.search(r"^EXTRAS := (.*)$", (root / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)[1].split(",")
    wanted = [need for key in ["requirements", *(f"extra_{name}" for name in extras)] for need in requirements(key)]
    assert not [str(need) for need in wanted if pins.get(canonicalize_name(need.name), "") not in need.specifier]


def test_torchaudio_is_never_required():
    names = {need.name for key in settings if key == "requirements" or key.startswith("extra_") for need in requirements(key)
             if key != "extra_torchaudio"}
    assert not names & {"torchaudio", "torchvision", "torchcodec"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    "The wheel, built from the source archive, which is built from what git would commit."
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "source"
    copy.mkdir()
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    known = subprocess.run(command, cwd=root, capture_output=True, check=True)
    for name in filter(None, known.stdout.decode().split("\0")):
        if not (root / name).is_file(): continue
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes((root / name).read_bytes())
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist"]
    run = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return next((folder / "dist").glob("*.whl"))


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    code = {path.relative_to(root).as_posix() for path in package.rglob("*.py")}
    files = [path.relative_to(root / "config") for path in (root / "config").rglob("*") if path.is_file()]
    config = {f"musiclab/config_files/{path.as_posix()}" for path in files}
    assert config and inside == code | config


def test_the_wheel_works_in_an_empty_environment(wheel, tmp_path):
    venv.create(tmp_path, with_pip=False)
    programs = tmp_path / ("Scripts" if sys.platform == "win32" else "bin")
    pip = [sys.executable, "-m", "pip", "--python", programs / "python"]
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # it may lead pip to this checkout
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "--no-index", wheel], check=True, env=clean)
    ask = ("import musiclab, importlib.resources as r, importlib.metadata as m; print(musiclab.__file__);"
           "print(musiclab.__version__, *sorted(p.name for p in (r.files('musiclab') / 'config_files').iterdir()));"
           "print(*(e.value for e in m.entry_points(group='console_scripts')))")
    run = subprocess.run([programs / "python", "-I", "-c", ask], cwd=tmp_path, capture_output=True, text=True, check=True)
    where, files, scripts = run.stdout.splitlines()
    assert Path(where).is_relative_to(tmp_path)
    assert files.split() == [musiclab.__version__, *sorted(path.name for path in (root / "config").iterdir())]
    assert "musiclab.cli:main" in scripts.split() and (programs / "musiclab").exists()
