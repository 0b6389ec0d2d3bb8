"A real browser, a JupyterLab server, and an ear: what goes to the loudspeakers is also measured."
import base64
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from urllib.error import URLError
from urllib.request import urlopen

import numpy as np
import pytest

from tests.house import root


@pytest.fixture(scope="session")
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


def offline(route):
    "Nothing but this machine answers."
    local = route.request.url.startswith(("file:", "data:", "blob:", "http://127.0.0.1:"))
    route.continue_() if local else route.abort()


@pytest.fixture(scope="session")
def lab(tmp_path_factory):
    "A JupyterLab server over a copy of the notebooks. `lab(name)` is the address of a notebook, `lab.folder` is where it runs."
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
    def address(name): return f"http://127.0.0.1:{port}/lab/workspaces/{secrets.token_hex(4)}/tree/{name}?token={token}"
    address.folder = folder / "nbs"
    try:
        for _ in range(240):
            try: urlopen(f"http://127.0.0.1:{port}/api/status?token={token}").close()
            except URLError: time.sleep(0.25)
            else: break
        else: pytest.fail("JupyterLab did not start: " + (folder / "server.log").read_text()[-2000:])
        yield address
    finally:
        server.terminate()
        server.wait(30)


ERRORS = """() => [...jupyterapp.shell.currentWidget.content.model.cells].flatMap(cell => cell.type == "code" ? cell.outputs.toJSON() : [])
    .filter(output => output.output_type == "error").map(output => output.ename + ": " + output.evalue)"""

def open_notebook(page, address: str) -> None:
    "Open a notebook in JupyterLab and wait for its kernel."
    page.goto(address)
    page.wait_for_selector(".jp-NotebookPanel .jp-Notebook h2", state="attached", timeout=90_000)
    page.wait_for_function("() => window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status == 'idle'", timeout=90_000)


EAR = """() => {
    const connect = AudioNode.prototype.connect;
    let meter, frames = null;
    AudioNode.prototype.connect = function (node, ...rest) {
        if (node instanceof AudioDestinationNode && this != meter) {
            meter ??= new AnalyserNode(node.context, {fftSize: 8192, smoothingTimeConstant: 0});
            connect.call(this, meter);
        }
        return connect.call(this, node, ...rest);
    };
    window.heard = () => {  // the loudest frequency of the last fifth of a second
        if (!meter) return {hertz: 0, decibels: -Infinity};
        const levels = new Float32Array(meter.frequencyBinCount);
        meter.getFloatFrequencyData(levels);
        const top = levels.indexOf(Math.max(...levels));
        return {hertz: top * meter.context.sampleRate / 8192, decibels: levels[top]};
    };
    const code = `registerProcessor('tape', class extends AudioWorkletProcessor {
        process([[samples]]) { this.port.postMessage([currentFrame, samples ? samples.slice() : new Float32Array(128)]); return true } })`;
    window.tape = async () => {  // records what is heard, each block with the time of the audio clock
        const context = meter.context;
        await context.audioWorklet.addModule('data:text/javascript,' + encodeURIComponent(code));
        const node = new AudioWorkletNode(context, 'tape', {channelCount: 1, channelCountMode: 'explicit'}), blocks = [];
        node.port.onmessage = ({data}) => blocks.push(data);
        connect.call(meter, node); connect.call(node, context.destination);
        return () => { node.disconnect(); return {
            rate: context.sampleRate, starts: blocks.map(([frame]) => frame), samples: blocks.map(([, block]) => [...block].map(s => +s.toFixed(5)))} };
    };
    window.sleep = seconds => new Promise(done => setTimeout(done, 1000 * seconds));
}"""

def on_tape(recorded: dict) -> tuple[np.ndarray, float, int]:
    "The samples of a recording, the time of the first, and the rate. What lies before a gap, as when the recorder begins, is left out."
    starts, rate = np.array(recorded["starts"]), recorded["rate"]
    whole = int((np.flatnonzero(np.diff(starts) != 128) + 1).max(initial=0))
    return np.concatenate(recorded["samples"][whole:]), starts[whole] / rate, int(rate)


def sounds_in(html: str) -> list[tuple[np.ndarray, int]]:
    "Every sound that a page carries, decoded to one channel."
    import io
    import re

    import soundfile
    return [(samples.mean(1), rate) for samples, rate in (
        soundfile.read(io.BytesIO(base64.b64decode(code)), always_2d=True) for code in re.findall(r'src="data:audio/mpeg;base64,([^"]+)"', html))]
