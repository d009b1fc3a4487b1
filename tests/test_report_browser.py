"""The page in a browser: it renders without complaint, sorts, filters, switches pictures, and prints.

Skipped where there is no Chromium: `apt-get install chromium` brings it, and CHROMIUM names another program.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import Browser, find_chromium
from report_sample import draw_pictures, hostile_results, sample_results

from moebius_edge.report import html as page

pytestmark = pytest.mark.skipif(find_chromium() is None, reason="no Chromium here: apt-get install chromium")

ROWS = "[...document.querySelectorAll('#comparison tbody tr')]"
ENTER = ("Enter", 13)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(find_chromium() or "", tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    draw_pictures(sample_results(), folder)
    return page.write(sample_results(), folder)


@pytest.fixture
def opened(browser: Browser, report: Path) -> Iterator[Browser]:
    browser.open(report)
    yield browser
    assert browser.problems == []


def numbers(browser: Browser) -> list[int]:
    """The numbers of the rows shown, from the top."""
    found = browser.evaluate(f"{ROWS}.filter(r => !r.hidden).map(r => Number(r.cells[0].textContent))")
    return list(found)


def sort_by(browser: Browser, heading: str) -> str | None:
    """Focus a heading's button, press Enter, and return the heading's aria-sort."""
    find = f"[...document.querySelectorAll('#comparison th')].find(h => h.textContent.startsWith('{heading}'))"
    browser.evaluate(f"{find}.querySelector('button').focus()")
    browser.press(*ENTER)
    order: str | None = browser.evaluate(f"{find}.getAttribute('aria-sort')")
    return order


def fill(browser: Browser, name: str, value: str, event: str) -> None:
    browser.evaluate(
        f"(() => {{ const e = document.getElementById('filter-{name}'); e.value = '{value}';"
        f" e.dispatchEvent(new Event('{event}')); }})()"
    )


def by_median() -> dict[int, float | None]:
    rows = sample_results()["configurations"]
    return {
        n: row["latency"]["stages"]["total"]["median_ms"] if row["latency"] else None for n, row in enumerate(rows, 1)
    }


def test_everything_is_shown_and_nothing_is_blocked(opened: Browser) -> None:
    assert len(numbers(opened)) == 13
    assert opened.evaluate("document.getElementById('filter-shown').textContent") == "13 of 13 shown"
    loaded = "Promise.all([...document.images].map(i => i.decode().then(() => i.naturalWidth > 0)))"
    widths = opened.evaluate(loaded)
    assert len(widths) > 50 and all(widths)


def test_sorting_by_keyboard(opened: Browser) -> None:
    medians = by_median()
    known = sorted((n for n, ms in medians.items() if ms is not None), key=lambda n: medians[n] or 0)
    unknown = {n for n, ms in medians.items() if ms is None}
    for direction, expected in (("ascending", known), ("descending", known[::-1])):
        assert sort_by(opened, "Median") == direction
        shown = numbers(opened)
        assert shown[: len(expected)] == expected
        assert set(shown[len(expected) :]) == unknown, "what has no figure stays at the end"
    assert sort_by(opened, "No.") == "ascending"
    assert numbers(opened) == list(range(1, 14))
    assert opened.evaluate("document.querySelectorAll('#comparison [aria-sort]').length") == 1


def test_filters(opened: Browser) -> None:
    for name, value, shown in (
        ("text", "TensorRT board", {11, 12}),
        ("text", "sigsegv", {9}),  # reasons are searched too
        ("text", "", set(range(1, 14))),
        ("status", "out of memory", {13}),
        ("status", "", set(range(1, 14))),
        ("group", "1", {5}),  # the group that starts from noise
        ("status", "failed", set()),  # both at once
    ):
        fill(opened, name, value, "input" if name == "text" else "change")
        assert set(numbers(opened)) == shown, (name, value)
        assert opened.evaluate("document.getElementById('filter-shown').textContent") == f"{len(shown)} of 13 shown"


def test_pictures_switch_to_differences(opened: Browser) -> None:
    visible = "[...document.querySelectorAll('#grid img.view')].filter(i => i.offsetWidth).map(i => i.alt)"
    results = opened.evaluate(visible)
    opened.evaluate("document.querySelector('input[name=view][value=truth]').click()")
    differences = opened.evaluate(visible)
    assert len(results) == len(differences) == 27
    assert all(text.endswith(": result") for text in results)
    assert all("difference to the ground truth, times 4" in text for text in differences)
    opened.evaluate("document.querySelector('input[name=view][value=reference]').click()")
    assert 0 < len(opened.evaluate(visible)) < 27  # a reference has no difference to itself


def test_results_can_be_saved_from_the_page(opened: Browser) -> None:
    assert opened.evaluate(SAVED) == sample_results()


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [400, 1280])
def test_it_fits_the_window_in_both_schemes(browser: Browser, report: Path, width: int, dark: bool) -> None:
    browser.open(report, width, 800, dark)
    assert browser.evaluate("document.documentElement.scrollWidth") <= width, "the page itself must not scroll sideways"
    shown = browser.evaluate("[...document.querySelectorAll('img.chart')].map(i => i.currentSrc === i.src)")
    assert len(shown) == 6 and set(shown) == {not dark}, "the picture of the page's scheme"
    light = browser.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert light != dark
    assert browser.evaluate(CONTRAST) >= 4.5
    assert browser.problems == []


# What the button hands to the browser to save.
SAVED = """(async () => {
  let saved;
  const make = URL.createObjectURL;
  URL.createObjectURL = blob => { saved = blob; return make(blob); };
  document.getElementById('filter-save').click();
  return JSON.parse(await saved.text());
})()"""

# The least contrast (WCAG 2.2) between the colour of any text and the page's background.
CONTRAST = """(() => {
  const linear = v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const light = colour => {
    const [r, g, b] = colour.match(/[0-9.]+/g).slice(0, 3).map(v => linear(v / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const paper = light(getComputedStyle(document.body).backgroundColor);
  const texts = document.querySelectorAll('h1, p, th, td, figcaption, summary, a, .reason, .unit');
  return Math.min(...[...texts].map(e => {
    const ink = light(getComputedStyle(e).color);
    return (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
  }));
})()"""


def test_it_prints(opened: Browser, tmp_path: Path) -> None:
    opened.pdf(tmp_path / "report.pdf")
    assert (tmp_path / "report.pdf").read_bytes().startswith(b"%PDF")
    assert opened.evaluate("[...document.querySelectorAll('details')].every(d => d.open)")


def test_without_a_script_everything_is_there(browser: Browser, report: Path) -> None:
    browser.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.open(report)
    finally:
        browser.call("Emulation.setScriptExecutionDisabled", value=False)
    assert len(numbers(browser)) == 13
    assert browser.evaluate("[...document.querySelectorAll('.controls')].every(c => c.hidden)")


def test_hostile_text_does_nothing(browser: Browser, tmp_path: Path) -> None:
    results: dict[str, Any] = hostile_results()
    draw_pictures(sample_results(), tmp_path)
    browser.open(page.write(results, tmp_path))
    assert browser.problems == [], "not even tried: the policy would have complained"
    assert len(numbers(browser)) == 13
    assert browser.evaluate("document.querySelectorAll('main script, main img[src=x]').length") == 0
    sort_by(browser, "No.")
    fill(browser, "text", "<script>", "input")
    assert len(numbers(browser)) == 13
    assert browser.problems == []


def test_the_policy_stops_what_would_get_in(browser: Browser, report: Path, tmp_path: Path) -> None:
    """The check's own check: markup that got past the escaping would be blocked, and noticed here."""
    changed = report.read_text(encoding="utf-8").replace("<main>", "<main><img src=x onerror='window.hit = 1'>")
    (tmp_path / "changed.html").write_text(changed, encoding="utf-8")
    browser.open(tmp_path / "changed.html")
    assert browser.problems and browser.evaluate("window.hit") is None
