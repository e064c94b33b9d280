"""The page in a browser: offline, its slider colours, its tables sort, and nothing complains."""

import json
import shutil

import pytest

from moeadapt.report.render import render
from tests.report_render.sample import sample

pytestmark = pytest.mark.browser

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")


@pytest.fixture(scope="module")
def browser():
    selenium = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    if not CHROMIUM or not DRIVER:
        pytest.skip("chromium and chromedriver are not installed")
    options = selenium.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in (
        "headless=new",
        "no-sandbox",
        "disable-gpu",
        "disable-dev-shm-usage",
        "force-prefers-reduced-motion",
    ):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = selenium.Chrome(options=options, service=selenium.ChromeService(DRIVER))
    driver.set_window_size(1200, 900)
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    out = tmp_path_factory.mktemp("report") / "run.html"
    render(sample(layers=3, hostile=True, tokens=40), out)
    return out.as_uri()


@pytest.fixture
def opened(browser, address):
    browser.get_log("performance")
    browser.get(address)
    yield browser
    assert browser.get_log("browser") == []


def colors(browser):
    script = "return [...document.querySelectorAll('.t')].map(t => getComputedStyle(t).background)"
    return browser.execute_script(script)


def press(browser, *keys):
    from selenium.webdriver.common.action_chains import ActionChains

    ActionChains(browser).send_keys(*keys).perform()


def test_a_page_asks_for_nothing_but_itself(opened, address):
    messages = [json.loads(entry["message"])["message"] for entry in opened.get_log("performance")]
    asked = [
        message["params"]["request"]["url"]
        for message in messages
        if message["method"] == "Network.requestWillBeSent"
    ]
    assert asked == [address]


def test_the_slider_moves_by_key_and_changes_the_colours(opened):
    from selenium.webdriver.common.keys import Keys

    before = colors(opened)
    slider = opened.find_element("id", "layer")
    slider.send_keys(Keys.ARROW_RIGHT)
    opened.execute_script("document.getAnimations().forEach(a => a.finish())")
    assert slider.get_attribute("value") == "2"
    assert slider.get_attribute("aria-valuetext") != "layer 1"
    changed = sum(a != b for a, b in zip(before, colors(opened), strict=True))
    assert changed > len(before) / 2


def test_colours_are_the_same_before_and_after_the_script(opened):
    classes = "return [...document.querySelectorAll('.t')].map(t => [...t.classList].sort().join())"
    after = opened.execute_script(classes)
    source = (
        "const d = new DOMParser().parseFromString(arguments[0], 'text/html');"
        "return [...d.querySelectorAll('.t')].map(t => [...t.classList].sort().join())"
    )
    from pathlib import Path
    from urllib.parse import unquote, urlparse

    text = Path(unquote(urlparse(opened.current_url).path)).read_text()
    assert opened.execute_script(source, text) == after


def test_arrow_keys_reach_every_token_and_the_tip_names_its_experts(opened):
    from selenium.webdriver.common.keys import Keys

    opened.execute_script("document.querySelector('.t').focus()")
    press(opened, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    focused = opened.execute_script(
        "return [...document.querySelectorAll('.t')].indexOf(document.activeElement)"
    )
    tip = opened.find_element("id", "tip")
    expert, other = sample(layers=3, hostile=True, tokens=40).texts[0].experts[1][2]
    assert focused == 2
    assert tip.is_displayed()
    first, second = tip.text.split("\n")
    assert first.startswith(f"expert {expert}: ")
    assert second.startswith(f"expert {other}: ")
    press(opened, Keys.ARROW_UP)
    expert, _ = sample(layers=3, hostile=True, tokens=40).texts[0].experts[2][2]
    assert tip.text.startswith(f"expert {expert}: ")
    press(opened, Keys.ESCAPE)
    assert not tip.is_displayed()


def test_a_heading_sorts_up_and_then_down(opened):
    head = opened.find_elements("css selector", "table.sortable")[1].find_elements("tag name", "th")
    shown = (
        "return [...document.querySelectorAll('table.sortable')[1].tBodies[0].rows]"
        ".map(row => Number(row.cells[2].dataset.value))"
    )
    loads = sorted(load for layer in sample(layers=3, hostile=True).layers for load in layer.load)
    button = head[2].find_element("tag name", "button")
    button.click()
    assert opened.execute_script(shown) == pytest.approx(loads)
    assert head[2].get_attribute("aria-sort") == "ascending"
    button.click()
    assert opened.execute_script(shown) == pytest.approx(loads[::-1])
    assert head[2].get_attribute("aria-sort") == "descending"
    assert head[0].get_attribute("aria-sort") == "none"


def test_a_heading_sorts_by_key(opened):
    from selenium.webdriver.common.keys import Keys

    head = opened.find_elements("css selector", "table.sortable")[1].find_elements("tag name", "th")
    opened.execute_script("arguments[0].focus()", head[2].find_element("tag name", "button"))
    press(opened, Keys.ENTER)
    assert head[2].get_attribute("aria-sort") == "ascending"
    press(opened, Keys.SPACE)
    assert head[2].get_attribute("aria-sort") == "descending"


def test_the_tab_key_reaches_slider_texts_and_headings_in_order(opened):
    from selenium.webdriver.common.keys import Keys

    what = (
        "const e = document.activeElement; return e.id === 'layer' ? 'slider' :"
        "e.classList.contains('t') ? 'token' : e.closest('th') ? 'heading' : e.localName"
    )
    opened.execute_script("document.body.focus()")
    seen = []
    for _ in range(400):
        press(opened, Keys.TAB)
        here = opened.execute_script(what)
        if here == "body":
            break
        seen.append(here)
    first = list(dict.fromkeys(seen))
    assert [one for one in first if one in ("slider", "token", "heading")] == [
        "slider", "token", "heading"
    ]  # fmt: skip
    # One stop for each text: its other tokens are reached by arrow keys.
    texts = opened.execute_script("return document.querySelectorAll('.tokens').length")
    assert seen.count("token") == texts


def test_a_pointer_over_a_token_shows_its_experts(opened):
    from selenium.webdriver.common.action_chains import ActionChains

    token = opened.find_elements("css selector", ".t")[3]
    opened.execute_script("arguments[0].scrollIntoView({block: 'center'})", token)
    ActionChains(opened).move_to_element(token).perform()
    tip = opened.find_element("id", "tip")
    assert tip.is_displayed()
    expert, _ = sample(layers=3, hostile=True, tokens=40).texts[0].experts[1][3]
    assert tip.text.startswith(f"expert {expert}: ")
    ActionChains(opened).move_to_element(opened.find_element("tag name", "h1")).perform()
    assert not tip.is_displayed()


def test_nothing_hostile_ran(opened):
    assert opened.execute_script("return document.images.length") == 0
    assert opened.execute_script("return document.querySelectorAll('script').length") == 2


@pytest.mark.parametrize("width", [1200, 900, 500])
def test_a_page_never_scrolls_sideways(browser, address, width):
    browser.set_window_size(width, 900)
    browser.get(address)
    sizes = "return [document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    scroll, client = browser.execute_script(sizes)
    browser.set_window_size(1200, 900)
    assert scroll <= client


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_text_on_the_page_can_be_read_in_both_modes(opened, mode):
    feature = {"features": [{"name": "prefers-color-scheme", "value": mode}]}
    opened.execute_cdp_cmd("Emulation.setEmulatedMedia", feature)
    style = "const s = getComputedStyle(document.body); return [s.color, s.backgroundColor]"
    ink, paper = opened.execute_script(style)
    picture = "return getComputedStyle(document.querySelector('#load svg text')).fill"
    assert contrast(ink, paper) > 7
    assert contrast(opened.execute_script(picture), paper) > 7
    opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def contrast(one, other):
    """Contrast of two colours, WCAG 2.2, from 1 to 21."""
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def luminance(color):
    parts = [int(part) / 255 for part in color[color.index("(") + 1 : -1].split(",")[:3]]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
