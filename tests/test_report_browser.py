"""The page in a browser: it renders without complaint, sorts, filters, switches pictures, and prints.

Skipped where there is no Chromium: `apt-get install chromium` brings it, and CHROMIUM names another program.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import NO_CHROMIUM, Pages, chromium, find_chromium
from playwright.sync_api import Browser, Page
from report_sample import draw_pictures, hostile_results, sample_results

from moebius_edge.report import html as page

pytestmark = pytest.mark.skipif(find_chromium() is None, reason=NO_CHROMIUM)

ROWS = "[...document.querySelectorAll('#comparison tbody tr')]"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    draw_pictures(sample_results(), folder)
    return page.write(sample_results(), folder)


@pytest.fixture
def pages(browser: Browser) -> Iterator[Pages]:
    with Pages(browser) as pages:
        yield pages


@pytest.fixture
def opened(pages: Pages, report: Path) -> Page:
    return pages(report.as_uri(), viewport={"width": 1280, "height": 900})


def numbers(opened: Page) -> list[int]:
    """The numbers of the rows shown, from the top."""
    return list(opened.evaluate(f"{ROWS}.filter(r => !r.hidden).map(r => Number(r.cells[0].textContent))"))


def sort_by(opened: Page, heading: str) -> str | None:
    """Press Enter on a heading's button, and return the heading's aria-sort."""
    column = opened.locator("#comparison th").filter(has_text=re.compile(f"^{re.escape(heading)}"))
    column.locator("button").press("Enter")
    return column.get_attribute("aria-sort")


def by_median() -> dict[int, float | None]:
    rows = sample_results()["configurations"]
    return {
        n: row["latency"]["stages"]["total"]["median_ms"] if row["latency"] else None for n, row in enumerate(rows, 1)
    }


def test_everything_is_shown_and_nothing_is_blocked(opened: Page) -> None:
    assert len(numbers(opened)) == 13
    assert opened.evaluate("document.getElementById('filter-shown').textContent") == "13 of 13 shown"
    loaded = "Promise.all([...document.images].map(i => i.decode().then(() => i.naturalWidth > 0)))"
    widths = opened.evaluate(loaded)
    assert len(widths) > 50 and all(widths)


def test_sorting_by_keyboard(opened: Page) -> None:
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


def test_filters(opened: Page) -> None:
    for name, value, shown in (
        ("text", "TensorRT board", {11, 12}),
        ("text", "sigsegv", {9}),  # reasons are searched too
        ("text", "", set(range(1, 14))),
        ("status", "out of memory", {13}),
        ("status", "", set(range(1, 14))),
        ("group", "1", {5}),  # the group that starts from noise
        ("status", "failed", set()),  # both at once
    ):
        field = opened.locator(f"#filter-{name}")
        _ = field.fill(value) if name == "text" else field.select_option(value)
        assert set(numbers(opened)) == shown, (name, value)
        assert opened.evaluate("document.getElementById('filter-shown').textContent") == f"{len(shown)} of 13 shown"


def test_pictures_switch_to_differences(opened: Page) -> None:
    visible = "[...document.querySelectorAll('#grid img.view')].filter(i => i.offsetWidth).map(i => i.alt)"
    results = opened.evaluate(visible)
    opened.evaluate("document.querySelector('input[name=view][value=truth]').click()")
    differences = opened.evaluate(visible)
    assert len(results) == len(differences) == 27
    assert all(text.endswith(": result") for text in results)
    assert all("difference to the ground truth, times 4" in text for text in differences)
    opened.evaluate("document.querySelector('input[name=view][value=reference]').click()")
    assert 0 < len(opened.evaluate(visible)) < 27  # a reference has no difference to itself


def test_results_can_be_saved_from_the_page(opened: Page) -> None:
    assert opened.evaluate(SAVED) == sample_results()


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [400, 1280])
def test_it_fits_the_window_in_both_schemes(pages: Pages, report: Path, width: int, dark: bool) -> None:
    scheme = "dark" if dark else "light"
    opened = pages(report.as_uri(), viewport={"width": width, "height": 800}, color_scheme=scheme)
    assert opened.evaluate("document.documentElement.scrollWidth") <= width, "the page itself must not scroll sideways"
    shown = opened.evaluate("[...document.querySelectorAll('img.chart')].map(i => i.currentSrc === i.src)")
    assert len(shown) == 6 and set(shown) == {not dark}, "the picture of the page's scheme"
    light = opened.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert light != dark
    assert opened.evaluate(CONTRAST) >= 4.5


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


def test_it_prints(opened: Page, tmp_path: Path) -> None:
    opened.pdf(path=tmp_path / "report.pdf", prefer_css_page_size=True)
    assert (tmp_path / "report.pdf").read_bytes().startswith(b"%PDF")
    assert opened.evaluate("[...document.querySelectorAll('details')].every(d => d.open)")


def test_without_a_script_everything_is_there(pages: Pages, report: Path) -> None:
    opened = pages(report.as_uri(), java_script_enabled=False)
    assert len(numbers(opened)) == 13
    assert opened.evaluate("[...document.querySelectorAll('.controls')].every(c => c.hidden)")


def test_hostile_text_does_nothing(pages: Pages, tmp_path: Path) -> None:
    """It is not even tried: the policy would have complained."""
    results: dict[str, Any] = hostile_results()
    draw_pictures(sample_results(), tmp_path)
    opened = pages(page.write(results, tmp_path).as_uri())
    assert len(numbers(opened)) == 13
    assert opened.evaluate("document.querySelectorAll('main script, main img[src=x]').length") == 0
    sort_by(opened, "No.")
    opened.locator("#filter-text").fill("<script>")
    assert len(numbers(opened)) == 13


def test_the_policy_stops_what_would_get_in(pages: Pages, report: Path, tmp_path: Path) -> None:
    """The check's own check: markup that got past the escaping would be blocked, and noticed."""
    changed = report.read_text(encoding="utf-8").replace("<main>", "<main><img src=x onerror='window.hit = 1'>")
    (tmp_path / "changed.html").write_text(changed, encoding="utf-8")
    opened = pages((tmp_path / "changed.html").as_uri(), expected="Content Security Policy")
    assert opened.evaluate("window.hit") is None and pages.expected
