"""Players in a real browser: what is heard is what was chosen, at the same place. In JupyterLab with a kernel, in the report that `show.save` writes,
in a notebook exported to HTML, and in a sandboxed frame as Colab uses them: no network in any of them."""
import html
import json
import time

import numpy as np
import pytest

from musiclab import show
from musiclab.dsp import resample
from tests.browser import players
from tests.browser.conftest import EAR, ERRORS, offline, on_tape, open_notebook, sounds_in

BUILD = "from musiclab import show\nfrom tests.browser.players import views\nshown = views('votes.jsonl')"
LIVE = """
import json, pathlib, time
log = pathlib.Path("run/logs/log.jsonl")
with show.live("run", "Live", every=0.2):
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text("")
    for step in range(1, 81):
        with log.open("a") as file: file.write(json.dumps({"step": step, "loss": 4 / step}) + "\\n")
        time.sleep(0.1)"""


@pytest.fixture(scope="module")
def views(): return players.views()


def exported(views) -> str:
    "A notebook with these outputs, as nbconvert writes it."
    from nbconvert import HTMLExporter
    from nbformat import v4
    cells = [v4.new_code_cell(name, outputs=[v4.new_output("display_data", {"text/html": view.html})]) for name, view in views.items()]
    return HTMLExporter().from_notebook_node(v4.new_notebook(cells=cells))[0]


def start_lab(page, lab, names):
    import nbformat
    cells = [nbformat.v4.new_markdown_cell("## Players"), *map(nbformat.v4.new_code_cell, [BUILD, *(f"shown[{name!r}]" for name in names), LIVE])]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), lab.folder / "players.ipynb")
    open_notebook(page, lab("players.ipynb"))
    page.evaluate("() => { jupyterapp.commands.execute('notebook:run-all-cells') }")
    page.wait_for_function("() => document.querySelectorAll('.ml-box.ml-on').length >= 8", timeout=90_000)


@pytest.fixture(scope="module", params=["report", "export", "frame", "lab"])
def frame(request, browser, views, tmp_path_factory):
    "The frame with the players in it."
    page = browser.new_page(viewport={"width": 1200, "height": 1000})
    page.add_init_script(f"({EAR})()")
    page.route("**/*", offline)
    problems, place, file = [], request.param, tmp_path_factory.mktemp("page") / "page.html"
    page.on("pageerror", lambda error: problems.append(error))
    if place == "lab": start_lab(page, request.getfixturevalue("lab"), views)
    else:
        text = exported(views) if place == "export" else show.page("Report", list(views.values()))
        if place == "frame": text = f'<iframe sandbox="allow-scripts" width="1000" height="900" srcdoc="{html.escape(text)}"></iframe>'
        file.write_text(text, encoding="utf-8")
        page.goto(file.as_uri())
    frame = page.frames[1] if place == "frame" else page.main_frame
    frame.wait_for_selector(".ml-box.ml-on")
    frame.place = place
    yield frame
    page.close()
    assert place == "lab" or not problems


@pytest.fixture
def box(frame):
    "`box(title)` finds a player; the one of the test before falls silent."
    frame.evaluate("() => musiclabStage.hush?.()")
    return lambda title: frame.locator(f'.ml-box[aria-label^="{title}"]')


def hears(frame, hertz):
    "Wait until this tone is the loudest."
    frame.wait_for_function(f"() => Math.abs(heard().hertz - {hertz}) < 10 && heard().decibels > -60", timeout=15_000)

def hears_nothing(frame): frame.wait_for_function("() => heard().decibels < -90", timeout=15_000)


def place_in(part, whole, rate):
    "Where in a sound a piece of it was cut from [s], and how alike they are."
    size = 1 << (len(whole) + len(part)).bit_length()
    alike = np.fft.irfft(np.fft.rfft(whole, size) * np.fft.rfft(part, size).conj(), size)[:len(whole) - len(part)]
    at = int(alike.argmax())
    return at / rate, alike[at] / np.linalg.norm(part) / np.linalg.norm(whole[at:at + len(part)])


@pytest.mark.parametrize("how", ["box.dispatchEvent(new KeyboardEvent('keydown', {key: '2'}))", "box.querySelectorAll('.ml-track button')[1].click()"])
def test_a_switch_takes_less_than_50_ms_and_keeps_the_place(frame, box, views, how):
    tape = box("Noises").evaluate(f"""async box => {{
        const player = box.player
        player.choose(0); player.seek(2); await player.play()
        const stop = await tape()
        while (player.position() < 3) await sleep(.05)
        const place = player.position(), clock = musiclabStage.context.currentTime
        {how}
        const after = player.position()
        await sleep(.6)
        const recorded = stop()
        player.pause()
        return {{...recorded, place, clock, after}}
    }}""")
    heard, began, rate = on_tape(tape)
    assert began < tape["clock"] - 0.3 and began + len(heard) / rate > tape["clock"] + 0.4
    low, high = (resample(sound, found, rate) for sound, found in sounds_in(views["Noises"].html))
    spectrum, split = np.fft.rfft(heard), np.fft.rfftfreq(len(heard), 1 / rate) > 2200
    loud = np.sqrt(np.convolve(np.fft.irfft(spectrum * split, len(heard)) ** 2, np.ones(rate // 200) / (rate // 200), "same"))
    moment = np.argmax(loud > 0.5 * np.median(loud[-rate // 4:])) / rate + began
    assert -0.01 < moment - tape["clock"] < 0.05, "the other sound is heard at once"
    def cut(start, stop): return heard[round((start - began) * rate):round((stop - began) * rate)]
    before, alike_before = place_in(cut(moment - 0.25, moment - 0.05), low, rate)
    after, alike_after = place_in(cut(moment + 0.05, moment + 0.25), high, rate)
    assert alike_before > 0.9 and alike_after > 0.9, "only one of them is heard"
    assert abs(after - before - 0.3) < 0.002, "and it goes on at the same place"
    assert abs(before - (tape["place"] - (tape["clock"] - moment + 0.25))) < 0.05, "which is the one that is shown"
    assert 0 <= tape["after"] - tape["place"] < 0.05


def test_seeking_pausing_and_the_others_falling_silent(frame, box):
    first, third = box("Tones"), box("Alone")
    assert frame.locator(".ml-box:not(.ml-on)").count() == 0 and not frame.locator("audio").first.is_visible()
    first.locator(".ml-strip").click(position={"x": first.locator(".ml-strip").bounding_box()["width"] / 2, "y": 10})
    assert abs(first.evaluate("box => box.player.position()") - 5) < 0.1
    first.press(" ")
    hears(frame, 400)
    first.press("2")
    hears(frame, 1600)
    third.locator(".ml-play").click()
    hears(frame, 600)
    assert not first.evaluate("box => box.matches('.ml-playing')") and third.evaluate("box => box.matches('.ml-playing')")
    place = first.evaluate("box => box.player.position()")
    assert 5 <= place <= 10
    third.locator(".ml-play").click()
    hears_nothing(frame)
    third.press("ArrowLeft")
    assert first.evaluate("box => box.player.position()") == place, "keys reach only the player that has the focus"


def test_a_marked_stretch_repeats(frame, box):
    strip = box("Alone").locator(".ml-strip")
    strip.scroll_into_view_if_needed()
    edge = strip.bounding_box()
    mouse, y = frame.page.mouse, edge["y"] + edge["height"] / 2
    mouse.move(edge["x"] + 0.3 * edge["width"], y)
    mouse.down()
    mouse.move(edge["x"] + 0.35 * edge["width"], y)
    mouse.move(edge["x"] + 0.36 * edge["width"], y)
    mouse.up()
    assert box("Alone").locator(".ml-loop").get_attribute("aria-pressed") == "true"
    places = box("Alone").evaluate("""async box => {
        await box.player.play()
        const places = []
        for (let i = 0; i < 15; i++) { await sleep(.1); places.push(box.player.position()) }
        return places }""")
    assert 2.9 < min(places) and max(places) < 3.7 and min(np.diff(places)) < 0
    hears(frame, 600)
    box("Alone").press("l")
    assert box("Alone").locator(".ml-loop").get_attribute("aria-pressed") == "false"


def test_a_time_lapse_goes_from_step_to_step(frame, box):
    steps = box("Steps")
    steps.evaluate("box => { box.player.choose(0); box.player.seek(0); box.player.play() }")
    hears(frame, 500)
    hears(frame, 1000)
    frame.wait_for_function("box => !box.matches('.ml-playing')", arg=steps.element_handle(), timeout=15_000)
    knob = steps.locator(".ml-knob")
    assert knob.get_attribute("aria-valuetext") == "0"
    knob.press("ArrowRight")
    assert steps.evaluate("box => box.player.chosen()") == 1 and knob.get_attribute("aria-valuetext") == "50"


def test_the_piano_roll_sounds(frame, box):
    roll = box("Song")
    roll.locator(".ml-play").click()
    hears(frame, 440)
    assert roll.locator(".ml-words").text_content() == "la"
    painted = "box => { const c = box.querySelector('canvas'); return c.getContext('2d').getImageData(0, 0, c.width, c.height).data.filter(v => v).length }"
    assert roll.evaluate(painted) > 5000
    roll.evaluate("box => box.player.seek(5)")
    hears(frame, 880)
    assert roll.locator(".ml-words").text_content() == "lu"
    roll.press("1")
    hears_nothing(frame)
    roll.press("1")
    hears(frame, 880)
    roll.press(" ")
    hears_nothing(frame)
    roll.evaluate("box => { box.player.seek(8); box.player.play() }")
    frame.wait_for_function("() => heard().decibels > -70", timeout=15_000)
    roll.press(" ")


def test_the_blind_test_records_choices(frame, box, request):
    blind = frame.locator(".ml-blind")
    for key in ("Enter", "0"):
        trial = blind.locator(".ml-trial:not([hidden]) .ml-box")
        assert trial.locator(".ml-track button").all_text_contents() == ["1A", "2B"]
        trial.locator(".ml-play").click()
        trial.press("Enter")
        assert blind.evaluate("box => box.test.votes.length") == (key == "0"), "nobody votes before having heard both"
        for sound in ("1", "2"):
            trial.press(sound)
            frame.wait_for_function(f"box => box.player.heard[{sound} - 1] >= 1", arg=trial.element_handle(), timeout=15_000)
        trial.press(key)
    votes = blind.evaluate("box => box.test.votes")
    assert [vote["choice"] for vote in votes] == [votes[0]["order"][1], None] and {vote["item"] for vote in votes} == {"first", "second"}
    assert all(min(vote["heard"]) >= 1 for vote in votes)
    assert blind.locator(".ml-result tr").count() == 3 and not blind.locator(".ml-vote").is_visible()
    saved = blind.evaluate("box => fetch(box.querySelector('.ml-save').href).then(answer => answer.text())")
    assert [json.loads(line) for line in saved.splitlines()] == votes
    counted, ours = blind.evaluate("box => box.test.tally()"), {row["sound"]: row for row in show.tally(votes)}
    assert all(row == pytest.approx(ours[row["sound"]]) for row in counted)
    if frame.place != "lab": return
    file = request.getfixturevalue("lab").folder / "votes.jsonl"
    for _ in range(100):
        if show.votes(file) == votes: break
        time.sleep(0.1)
    assert show.votes(file) == votes
    frame.wait_for_selector("text=2 choices are saved in votes.jsonl")


def test_the_curve_follows_the_run(frame):
    if frame.place != "lab": pytest.skip("a page without a kernel has no run to follow")
    curve = ".jp-OutputArea img[src^='data:image/png']"
    frame.wait_for_selector(curve, timeout=60_000)
    frame.evaluate(f"""() => {{
        window.drawn = new Set(); setInterval(() => {{ for (const image of document.querySelectorAll("{curve}")) drawn.add(image.src) }}, 50)
        const notebook = jupyterapp.shell.currentWidget.content
        notebook.activeCellIndex = notebook.widgets.length - 1
        jupyterapp.commands.execute('notebook:run-cell') }}""")
    frame.wait_for_function("() => drawn.size >= 3", timeout=30_000)
    assert frame.evaluate(ERRORS) == []


def test_the_page_counts_as_python_does(browser):
    page = browser.new_page()
    count = "votes => { const {test} = document.querySelector('.ml-blind'); test.votes.splice(0, 1000, ...votes); return test.tally() }"
    for sounds in (2, 3):
        trial = {"abc"[i]: players.tone(300 + 100 * i, 0.5) for i in range(sounds)}
        page.set_content(show.blind({"x": trial}).html)
        for asked in (0, 1, 2, 7, 10, 50, 400):
            for wins in {0, asked // 3, asked // 2, int(0.7 * asked), asked}:
                votes = [{"order": list(trial), "choice": "a" if i < wins else "b"} for i in range(asked)] + [{"order": list(trial), "choice": None}]
                counted = page.evaluate(count, votes)
                assert {row["sound"]: row for row in counted} == {row["sound"]: pytest.approx(row) for row in show.tally(votes)}
    page.close()


def test_a_cleared_cell_is_silent(browser, views):
    page = browser.new_page()
    page.add_init_script(f"({EAR})()")
    page.goto("about:blank")
    page.set_content(views["Tones"].html)
    page.locator(".ml-play").click()
    hears(page, 400)
    page.locator(".ml-box").evaluate("box => box.remove()")
    hears_nothing(page)
    page.close()


def test_without_javascript_the_ordinary_players_remain(browser, views, tmp_path):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(show.save(tmp_path / "report.html", "Report", [views["Tones"], views["Alone"]]).as_uri())
    assert [player.is_visible() for player in page.locator("audio").all()] == [True] * 3
    assert not page.locator(".ml-play").first.is_visible()
    context.close()
