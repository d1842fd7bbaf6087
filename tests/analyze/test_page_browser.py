"""The page in a real browser: it runs from a file, loads nothing, and redraws on selection."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.analyses import TOKENS, analysis_of
from support.browser import NAMES, Browser, browsing, find_browser

from kvexport.analyze import Analysis, render

PROGRAM = find_browser()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PROGRAM is None, reason=f"no browser: none of {', '.join(NAMES)} is on PATH"),
]

Show = Callable[[str], None]

_PIXEL = """(() => {
  const canvas = document.getElementById("%s"), cell = canvas.width / %d;
  const data = canvas.getContext("2d").getImageData((%d + 0.5) * cell, (%d + 0.5) * cell, 1, 1).data;
  return Array.from(data);
})()"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    assert PROGRAM is not None
    with browsing(PROGRAM, tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture(scope="module")
def analysis() -> Analysis:
    records = [{"layer": i, "key": 0.01 * i, "value": 0.002} for i in range(3)]
    return analysis_of(pairs=[(3, 1)], sensitivity=records)


@pytest.fixture
def show(browser: Browser, tmp_path: Path) -> Show:
    def open_page(page: str) -> None:
        (tmp_path / "page.html").write_text(page, encoding="utf-8")
        browser.resize(1280)
        browser.open((tmp_path / "page.html").as_uri())

    return open_page


def weight(analysis: Analysis, model: str, layer: int, head: int, query: int, key: int) -> float:
    """A weight as the page has it."""
    codes = base64.b64decode(analysis.to_json()["attention"][model][layer][head])
    return (codes[query * (query + 1) // 2 + key] / 255) ** 2


def readout(analysis: Analysis, layer: int, head: int, query: int, key: int) -> str:
    a, b = (weight(analysis, model, layer, head, query, key) for model in ("original", "compressed"))
    return f"original {a:.3f}, compressed {b:.3f}"


def pixel(browser: Browser, canvas: str, size: int, row: int, column: int) -> list[int]:
    return browser.run(_PIXEL % (canvas, size, column, row))


def test_runs_from_a_file_without_other_requests(browser: Browser, show: Show, analysis: Analysis) -> None:
    show(render(analysis))
    assert browser.errors() == []
    assert [Path(address).name for address in browser.requests()] == ["page.html"]
    assert browser.run("document.title") == "tiny <model>: KV cache analysis"
    assert browser.run("document.querySelectorAll('#spectra-lines .chosen').length") == 3


def test_selecting_a_layer_redraws_all_views(browser: Browser, show: Show, analysis: Analysis) -> None:
    show(render(analysis))
    before = browser.run("document.getElementById('attention-original').toDataURL()")
    similar = browser.run("document.getElementById('similarity-key').toDataURL()")
    browser.run("document.getElementById('spectra-layer').focus()")
    browser.press("ArrowDown")
    browser.press("ArrowDown")
    assert (
        browser.run("Array.from(document.querySelectorAll('[data-choice=layer]'), each => each.value)")
        == ["2"] * 3
    )
    chosen = browser.run(
        "Array.from(document.querySelectorAll('#spectra-lines .chosen'), each => each.dataset.layer)"
    )
    assert chosen == ["2"] * 3
    assert browser.run("document.getElementById('attention-original').toDataURL()") != before
    assert browser.run("document.getElementById('similarity-key').toDataURL()") != similar
    last = len(TOKENS) - 1
    assert readout(analysis, 2, 0, last, 0) in browser.run(
        "document.getElementById('attention-readout').textContent"
    )
    browser.run("document.getElementById('attention-head').focus()")
    browser.press("ArrowDown")
    assert readout(analysis, 2, 1, last, 0) in browser.run(
        "document.getElementById('attention-readout').textContent"
    )
    wanted = f"rows differ by {analysis.maps.distance()[2][1]:.4f} "
    assert wanted in browser.run("document.getElementById('attention-distance').textContent")
    assert browser.errors() == []


def test_cells_are_coloured_by_their_weights(browser: Browser, show: Show, analysis: Analysis) -> None:
    show(render(analysis))
    size = len(TOKENS)
    cells = [(6, key) for key in range(7)]
    weights = [weight(analysis, "original", 0, 0, *cell) for cell in cells]
    brightness = [sum(pixel(browser, "attention-original", size, *cell)[:3]) for cell in cells]
    by_weight = [value for _, value in sorted(zip(weights, brightness, strict=True))]
    assert by_weight == sorted(brightness, reverse=True)  # the darker the heavier
    assert pixel(browser, "attention-original", size, 3, 5) == [0, 0, 0, 0]  # unseen: nothing is drawn


def test_keys_and_pointer_move_the_chosen_cell(browser: Browser, show: Show, analysis: Analysis) -> None:
    show(render(analysis))
    browser.run("document.getElementById('attention-compressed').focus()")
    for key in ("ArrowUp", "ArrowRight", "ArrowRight"):
        browser.press(key)
    last = len(TOKENS) - 1
    readout_text = browser.run("document.getElementById('attention-readout').textContent")
    assert readout_text.startswith(f"Query {last - 1} “ was” on key 2 “ upon”")
    assert readout(analysis, 0, 0, last - 1, 2) in readout_text
    assert browser.run("document.querySelector('.is-key').textContent") == "2·upon"
    browser.run("document.getElementById('similarity-value').scrollIntoView()")
    box = browser.run(
        "(box => [box.x, box.y, box.width])"
        "(document.getElementById('similarity-value').getBoundingClientRect())"
    )
    at = {"x": box[0] + box[2] * 0.6, "y": box[1] + box[2] * 0.3}  # of 4 heads: column 2, row 1
    browser.call("Input.dispatchMouseEvent", type="mouseMoved", **at)
    matrix = analysis.layers[0].spectra.similarity
    wanted = f"KV heads 1 and 2: keys {matrix['key'][1, 2]:.3f}, values {matrix['value'][1, 2]:.3f}"
    assert browser.run("document.getElementById('similarity-readout').textContent") == wanted


@pytest.mark.parametrize("width", [1280, 700, 400])
def test_fits_the_window(browser: Browser, show: Show, analysis: Analysis, width: int) -> None:
    show(render(analysis))
    browser.resize(width)
    assert browser.run("document.documentElement.scrollWidth") <= width


def test_follows_light_and_dark(browser: Browser, show: Show, analysis: Analysis) -> None:
    show(render(analysis))
    size = len(TOKENS)  # query 0 sees key 0 alone, so there is no difference
    light = sum(pixel(browser, "attention-difference", size, 0, 0)[:3])
    browser.resize(1280, dark=True)
    browser.run(
        "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done())))"
    )  # until it is redrawn
    assert browser.run("getComputedStyle(document.body).backgroundColor") == "rgb(18, 22, 28)"
    assert sum(pixel(browser, "attention-difference", size, 0, 0)[:3]) < light
    assert browser.errors() == []


def test_checks_fail_for_a_broken_page(browser: Browser, show: Show, analysis: Analysis) -> None:
    """Negative controls: broken data, a script that the policy does not name, and a page that loads
    something.
    """
    page = render(analysis)
    show(
        page.replace(
            '<script type="application/json" id="data">{', '<script type="application/json" id="data">'
        )
    )
    assert any("JSON" in error or "Uncaught" in error for error in browser.errors())
    show(page.replace("drawAll();\n</script>", "drawAll(); \n</script>"))
    assert any("Content Security Policy" in error for error in browser.errors())
    show(page.replace("default-src 'none'", "default-src *").replace("<main>", '<main><img src="other.png">'))
    assert [Path(address).name for address in browser.requests()] == ["page.html", "other.png"]
