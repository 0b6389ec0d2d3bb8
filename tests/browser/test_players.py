"Players in a real browser: what is heard is what was chosen, at the same place, also without a server, and even without JavaScript."
import numpy as np
import pytest

from musiclab import show
from musiclab.audio import Audio
from tests.browser.test_jupyterlab import browser  # noqa: F401 (a fixture)

LISTEN = """() => {  // everything that goes to the loudspeakers also goes through a meter
    const connect = AudioNode.prototype.connect;
    AudioNode.prototype.connect = function (node, ...rest) {
        if (node instanceof AudioDestinationNode) {
            window.meter ??= new AnalyserNode(node.context, {fftSize: 8192, smoothingTimeConstant: 0});
            connect.call(this, window.meter);
        }
        return connect.call(this, node, ...rest);
    };
    window.heard = () => {
        if (!window.meter) return {decibels: -Infinity};
        const levels = new Float32Array(window.meter.frequencyBinCount);
        window.meter.getFloatFrequencyData(levels);
        const top = levels.indexOf(Math.max(...levels));
        return {hertz: top * window.meter.context.sampleRate / 8192, decibels: levels[top]};
    };
}"""


def tone(hertz): return Audio(0.3 * np.sin(2 * np.pi * hertz * np.arange(10 * 32000) / 32000), 32000)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return show.save(tmp_path_factory.mktemp("page")/"report.html", "Report", [
        show.compare({"low": tone(400), "high": tone(1600)}, "first"), show.compare({"a": tone(800), "b": tone(800)}, "second"),
        show.player(tone(600), "third")])


@pytest.fixture
def page(browser, report):  # noqa: F811
    page = browser.new_page()
    page.add_init_script(f"({LISTEN})()")
    problems = []
    page.on("pageerror", lambda error: problems.append(error))
    page.goto(report.as_uri())
    yield page
    page.close()
    assert not problems


def heard(page, hertz):
    "Wait until this tone is the loudest."
    page.wait_for_function(f"() => Math.abs(heard().hertz - {hertz}) < 10 && heard().decibels > -60", timeout=10_000)


def test_switching_keeps_the_place(page):
    box = page.locator(".ml-box").first
    assert page.locator(".ml-box.ml-on").count() == 3 and not page.locator("audio").first.is_visible()
    box.locator(".ml-play").click()
    heard(page, 400)
    for choose, hertz in (("box.querySelectorAll('.ml-track button')[1].click()", 1600),
                          ("box.dispatchEvent(new KeyboardEvent('keydown', {key: '1'}))", 400)):
        before, after, playing = box.evaluate(f"""box => {{
            const before = box.player.position(); {choose}; return [before, box.player.position(), box.matches('.ml-playing')] }}""")
        assert playing and 0 < before <= after < before + 0.05
        heard(page, hertz)
        assert box.evaluate("box => box.player.position()") > after


def test_seeking_pausing_and_the_others_falling_silent(page):
    first, second, third = page.locator(".ml-box").all()
    first.locator(".ml-strip").click(position={"x": first.locator(".ml-strip").bounding_box()["width"] / 2, "y": 10})
    assert abs(first.evaluate("box => box.player.position()") - 5) < 0.1
    page.keyboard.press(" ")
    heard(page, 400)
    third.locator(".ml-play").click()
    heard(page, 600)
    assert not first.evaluate("box => box.matches('.ml-playing')") and third.evaluate("box => box.matches('.ml-playing')")
    place = first.evaluate("box => box.player.position()")
    assert 5 <= place < 10
    third.locator(".ml-play").click()
    page.wait_for_function("() => heard().decibels < -90")
    page.keyboard.press("ArrowLeft")
    assert first.evaluate("box => box.player.position()") == place, "keys reach only the player that has the focus"


def test_without_javascript_the_ordinary_players_remain(browser, report):  # noqa: F811
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(report.as_uri())
    assert [player.is_visible() for player in page.locator("audio").all()] == [True] * 5
    assert not page.locator(".ml-play").first.is_visible()
    context.close()
