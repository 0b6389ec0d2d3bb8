"A newcomer's first minute: JupyterLab in a real browser opens a quickstart, shows it in both languages, runs it, and plays its sound."
import re

import pytest

from tests.browser.conftest import ERRORS, open_notebook
from tests.house import notebook, quickstarts, root, source

PLAY = """async player => {
    const within = (ms, promise) => Promise.race([promise, new Promise(done => setTimeout(done, ms))]);
    player.muted = true; player.load();
    await within(5000, new Promise(done => { player.onloadedmetadata = done; player.onerror = done; }));
    try { await within(2000, player.play()); } catch (error) { return String(error); }
    await within(300, new Promise(() => {}));
    return player.currentTime > 0 && player.duration > 0.1 ? "plays" : `stands still, ${player.duration} s`;
}"""


@pytest.mark.parametrize("path", quickstarts, ids=lambda path: path.parent.name)
def test_a_quickstart_opens_runs_and_plays(path, browser, lab):
    cells = notebook(path)["cells"]
    titles = re.findall(r"^## (.*)$", "\n\n".join(source(cell) for cell in cells if cell["cell_type"] == "markdown"), re.MULTILINE)
    page = browser.new_page(viewport={"width": 1400, "height": 1300})
    open_notebook(page, lab(path.relative_to(root / "nbs").as_posix()))
    shown = [title.removesuffix("¶") for title in page.locator(".jp-Notebook h2").all_text_contents()]
    assert shown == titles

    page.evaluate("() => jupyterapp.commands.execute('notebook:run-all-cells')")
    assert page.evaluate(ERRORS) == []
    assert page.locator(".jp-OutputArea img").count(), "no picture is drawn"
    players = page.locator("audio").all()
    assert players and [player.evaluate(PLAY) for player in players] == ["plays"] * len(players)
    page.close()
