"Hands the metadata of settings.ini to setuptools."
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

here = Path(__file__).parent
parser = ConfigParser(delimiters=["="])
parser.read(here / "settings.ini", encoding="utf-8")
settings = parser["DEFAULT"]


def lines(key: str) -> list[str]:
    return [line.strip() for line in settings[key].splitlines() if line.strip()]


name = settings["lib_name"]


class BuildWithConfig(build_py):
    "config/ stands at the top of the repository; in the wheel it is the folder musiclab/config_files."

    def run(self):
        super().run()
        if not self.editable_mode:
            self.copy_tree(str(here / "config"), str(Path(self.build_lib, name, "config_files")))


setup(
    name=name,
    version=settings["version"],
    description=settings["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=settings["author"],
    author_email=settings["author_email"],
    license=settings["license"],
    keywords=settings["keywords"],
    python_requires=">=" + settings["min_python"],
    install_requires=lines("requirements"),
    extras_require={key.removeprefix("extra_"): lines(key) for key in settings if key.startswith("extra_")},
    entry_points={"console_scripts": lines("console_scripts"), "nbdev": [f"{name} = {name}._modidx:d"]},
    packages=find_packages(include=[name, f"{name}.*"]),
    package_dir={"": "."},  # so that an editable install is one plain line in a .pth file
    cmdclass={"build_py": BuildWithConfig},
)
