"""The explorer's page, driven in Chromium."""

import time
from pathlib import Path

import pytest

from capsjax.viz.explorer import export

CHROMIUM = Path("/usr/bin/chromium")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
if not CHROMIUM.exists():
    pytest.skip(f"needs a browser, {CHROMIUM}", allow_module_level=True)
playwright = pytest.importorskip("playwright.sync_api")


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield started
        started.close()


@pytest.fixture(params=[1280, 390])
def page(browser, request):
    """A page; fails if an error appears on its console."""
    opened = browser.new_page(viewport={"width": request.param, "height": 900})
    errors = []
    opened.on("console", lambda entry: entry.type == "error" and errors.append(entry.text))
    opened.on("pageerror", lambda error: errors.append(str(error)))
    opened.set_default_timeout(120_000)
    yield opened
    opened.close()
    assert errors == []


def pixels(page, selector):
    return page.eval_on_selector(selector, "canvas => canvas.toDataURL()")


def until(page, holds, arg=None):
    """Waits for a condition; Playwright's own wait needs eval, which the page forbids."""
    limit = time.monotonic() + 120
    while not page.evaluate(holds, arg):
        assert time.monotonic() < limit, holds
        page.wait_for_timeout(50)


def changes(page, selector, before):
    """Waits until a canvas has changed."""
    until(
        page,
        "([selector, before]) => document.querySelector(selector).toDataURL() !== before",
        [selector, before],
    )


# A phone's width in the gate: the page as it is exported, below.
@pytest.mark.parametrize("page", [1280, pytest.param(390, marks=pytest.mark.slow)], indirect=True)
def test_the_page(page, address):
    page.goto(address)
    page.wait_for_selector("#diagram img")
    # The page does not scroll sideways.
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    # Everything has a name for those who do not see it.
    unnamed = page.evaluate("""() =>
        [...document.querySelectorAll("button, input, select, img, canvas, section")]
        .filter(e => e.checkVisibility() && !(e.getAttribute("aria-label") || e.alt
            || e.getAttribute("aria-labelledby") || e.labels?.length || e.textContent.trim()))
        .map(e => e.outerHTML)""")
    assert unnamed == []

    lengths = page.inner_text("#lengths")
    page.click("#clear")
    box = page.locator("#draw").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 20)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] - 20, steps=8)
    page.mouse.up()
    until(page, "before => document.querySelector('#lengths').innerText !== before", lengths)

    # From here on, with the keyboard alone.
    before = pixels(page, "#draw")
    page.focus("#draw")
    for key in ("ArrowLeft", "ArrowLeft", "ArrowLeft", "ArrowUp", " "):
        page.keyboard.press(key)
    changes(page, "#draw", before)

    until(page, "seen.pixels.every((value, n) => value === ink[n])")  # the answer is here
    before = pixels(page, "#maps canvas")
    page.focus("#iteration")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    changes(page, "#maps canvas", before)
    assert page.inner_text("#iteration-value") == "1 of 3"

    before = pixels(page, "#reconstruction")
    page.locator("#sliders input").nth(2).focus()
    page.keyboard.press("End")
    changes(page, "#reconstruction", before)
    assert page.locator("#sliders output").nth(2).inner_text() == "+0.25"

    before = pixels(page, "#segments")
    page.focus("#two")
    page.keyboard.press(" ")
    changes(page, "#segments", before)


def test_a_late_answer_erases_no_stroke(browser, address):
    page = browser.new_page()
    page.goto(address)
    page.wait_for_selector("#diagram img")
    page.evaluate("""() => {
        const ask = window.fetch;
        window.held = []; window.answered = 0;
        window.fetch = (...asked) => new Promise(go => held.push(go)).then(() => ask(...asked))
            .then(answer => { answered++; return answer; });
    }""")
    page.focus("#draw")
    page.keyboard.press(" ")
    until(page, "held.length === 1")
    for key in ("ArrowDown", "ArrowDown", "ArrowDown", " "):
        page.keyboard.press(key)
    drawn = pixels(page, "#draw")
    page.evaluate("held[0]()")
    until(page, "answered === 1")
    page.wait_for_timeout(300)  # for the page to use the answer
    assert pixels(page, "#draw") == drawn
    page.close()


def test_an_upload_that_is_no_image_shows_an_error(browser, address, tmp_path):
    wrong = tmp_path / "wrong.png"
    wrong.write_bytes(b"no image")
    page = browser.new_page()
    page.goto(address)
    page.wait_for_selector("#diagram img")
    page.set_input_files("#upload", wrong)
    until(page, "document.querySelector('#error').textContent.includes('must be a PNG')")
    page.close()


@pytest.mark.parametrize("page", [390], indirect=True)
def test_the_exported_page(page, live, tmp_path):
    path = tmp_path / "page.html"
    path.write_text(export(live, (3, 5)), encoding="utf-8")
    page.goto(path.as_uri())
    page.wait_for_selector("#diagram img")
    # The page's decoder computes the same images as the network's.
    page.locator("#sliders input").first.focus()
    before = pixels(page, "#reconstruction")
    page.keyboard.press("ArrowRight")
    changes(page, "#reconstruction", before)
    page.keyboard.press("ArrowLeft")
    furthest = page.evaluate("""() => Math.max(...decodeHere().map((value, n) =>
        Math.abs(value - seen.reconstructions[chosen][n])))""")
    assert furthest <= 1
    page.select_option("#example", "2")
    until(page, "document.querySelectorAll('#example option').length === 3")
