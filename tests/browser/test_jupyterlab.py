"A newcomer's first minute: JupyterLab in a real browser opens a quickstart, shows it in both languages, runs it, and plays its sound."
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
from urllib.error import URLError
from urllib.request import urlopen

import pytest

from tests.house import notebook, quickstarts, root, source


@pytest.fixture(scope="module")
def browser():
    "Chromium, driven by playwright; `$CHROMIUM` names another binary."
    sync_api = pytest.importorskip("playwright.sync_api", reason="a browser is driven by playwright, which is not installed")
    binary = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if not binary: pytest.skip("no Chromium on this machine: install chromium, or name its binary in CHROMIUM")
    with sync_api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=binary, args=[
            "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--autoplay-policy=no-user-gesture-required"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "A JupyterLab server over a copy of the notebooks; gives the address of a notebook."
    folder, token = tmp_path_factory.mktemp("lab"), secrets.token_hex(8)
    shutil.copytree(root / "nbs", folder / "nbs")
    settings = folder / "settings" / "@jupyterlab" / "notebook-extension"
    settings.mkdir(parents=True)
    (settings / "tracker.jupyterlab-settings").write_text(json.dumps({"windowingMode": "none"}))  # draw every cell, also those out of sight
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "jupyterlab", "--allow-root", "--no-browser", "--ip=127.0.0.1", f"--port={port}",
         f"--IdentityProvider.token={token}", "--LabApp.expose_app_in_browser=True", "--LabApp.news_url=None",
         "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"],
        cwd=folder / "nbs", stdout=subprocess.DEVNULL, stderr=(folder / "server.log").open("wb"),
        env={**os.environ, "PYTHONPATH": str(root), "MUSICLAB_HOME": str(folder / "home"), "JUPYTER_CONFIG_DIR": str(folder / "config"),
             "JUPYTER_RUNTIME_DIR": str(folder / "runtime"), "JUPYTERLAB_SETTINGS_DIR": str(folder / "settings")})
    try:
        for _ in range(240):
            try: urlopen(f"http://127.0.0.1:{port}/api/status?token={token}").close()
            except URLError: time.sleep(0.25)
            else: break
        else: pytest.fail("JupyterLab did not start: " + (folder / "server.log").read_text()[-2000:])
        yield lambda name: f"http://127.0.0.1:{port}/lab/workspaces/{secrets.token_hex(4)}/tree/{name}?token={token}"
    finally:
        server.terminate()
        server.wait(30)


PLAY = """async player => {
    const within = (ms, promise) => Promise.race([promise, new Promise(done => setTimeout(done, ms))]);
    player.muted = true; player.load();
    await within(5000, new Promise(done => { player.onloadedmetadata = done; player.onerror = done; }));
    try { await within(2000, player.play()); } catch (error) { return String(error); }
    await within(300, new Promise(() => {}));
    return player.currentTime > 0 && player.duration > 0.1 ? "plays" : `stands still, ${player.duration} s`;
}"""
ERRORS = """() => [...jupyterapp.shell.currentWidget.content.model.cells].flatMap(cell => cell.type == "code" ? cell.outputs.toJSON() : [])
    .filter(output => output.output_type == "error").map(output => output.ename + ": " + output.evalue)"""


@pytest.mark.parametrize("path", quickstarts, ids=lambda path: path.parent.name)
def test_a_quickstart_opens_runs_and_plays(path, browser, lab):
    cells = notebook(path)["cells"]
    titles = re.findall(r"^## (.*)$", "\n\n".join(source(cell) for cell in cells if cell["cell_type"] == "markdown"), re.MULTILINE)
    page = browser.new_page(viewport={"width": 1400, "height": 1300})
    page.goto(lab(path.relative_to(root / "nbs").as_posix()))
    page.wait_for_selector(".jp-NotebookPanel .jp-Notebook h2", state="attached", timeout=60_000)
    kernel = "window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel"
    page.wait_for_function(f"() => {kernel}?.status == 'idle'", timeout=60_000)
    shown = [title.removesuffix("¶") for title in page.locator(".jp-Notebook h2").all_text_contents()]
    assert shown == titles

    page.evaluate("() => jupyterapp.commands.execute('notebook:run-all-cells')")
    assert page.evaluate(ERRORS) == []
    assert page.locator(".jp-OutputArea img").count(), "no picture is drawn"
    players = page.locator("audio").all()
    assert players and [player.evaluate(PLAY) for player in players] == ["plays"] * len(players)
