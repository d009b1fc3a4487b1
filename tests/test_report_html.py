"""``report.html`` as a file: self-contained, within its policy, and deaf to what the document would make it do."""

from __future__ import annotations

import base64
import hashlib
import html
import importlib.util
import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image
from report_sample import configuration, draw_pictures, hostile_results, report_of, sample_results

from moebius_edge.errors import MachineError
from moebius_edge.report import charts
from moebius_edge.report import html as page
from moebius_edge.report.charts import Point
from moebius_edge.report.html import RESULT, TO_REFERENCE, TO_TRUTH, Thumbnail, shown_inputs

FLOAT32, FLOAT16 = (f"sample-{kind}_onnxruntime-cpu_ddim-20_g2_image" for kind in ("float32", "float16"))
VOID = {"meta", "link", "img", "input", "source"}


class Elements(HTMLParser):
    """Every element with its attributes, and a check that they nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> at {self.getpos()}"

    def all(self, tag: str) -> Iterator[dict[str, str]]:
        return (attributes for name, attributes in self.found if name == tag)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("report")
    draw_pictures(sample_results(), where)
    return where


@pytest.fixture(scope="module")
def text(folder: Path) -> str:
    path = page.write(sample_results(), folder)
    assert path.name == "report.html"
    return path.read_text(encoding="utf-8")


def test_sections_in_the_order_of_use(text: str) -> None:
    assert re.findall(r"<h2>(.*?)</h2>", text) == [
        *("Recommendation", "Accuracy against latency", "All configurations"),
        *("Where the time goes", "Memory and energy", "Pictures", "Conditions"),
    ]


def test_nothing_is_loaded_from_elsewhere(text: str) -> None:
    elements = Elements(text)
    for tag, attributes in elements.found:
        for name in ("src", "srcset", "action", "data", "poster", "xlink:href"):
            assert attributes.get(name, "data:").startswith("data:"), (tag, name)
        if "href" in attributes:
            assert attributes["href"].startswith(("#", "pictures/", "data:,")), attributes["href"]
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest|WebSocket", text)
    assert len(text) < 4_000_000


def test_the_policy_allows_this_script_and_style_and_nothing_else(text: str) -> None:
    (policy,) = (a["content"] for a in Elements(text).all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; img-src data:; ") and "unsafe" not in policy
    for kind, pattern in (("style", r"<style>(.*?)</style>"), ("script", r"<script>(.*?)</script>")):
        (inline,) = re.findall(pattern, text, re.S)
        digest = base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    for tag, attributes in Elements(text).found:
        assert not [name for name in attributes if name == "style" or name.startswith("on")], tag


def test_the_figures_travel_with_the_page(text: str) -> None:
    (data,) = re.findall(r'<script type="application/json" id="results">(.*?)</script>', text, re.S)
    assert json.loads(data) == sample_results()
    assert not set("<>&") & set(data)


def test_figures_and_tables_are_accessible(text: str) -> None:
    elements = Elements(text)
    assert all(a.get("alt") for a in elements.all("img"))
    assert all(a.get("scope") in ("col", "row") for a in elements.all("th"))
    assert next(elements.all("html"))["lang"] == "en"
    ids = [a["id"] for _, a in elements.found if "id" in a]
    assert len(ids) == len(set(ids))


def test_failed_rows_are_there_with_their_reason(text: str) -> None:
    shown = html.unescape(text)
    for row in sample_results()["configurations"]:
        if row["status"] != "ok":
            assert f'<span class="reason bad">{row["reason"]}</span>' in shown


def svgs(text: str, scheme: str) -> list[ET.Element]:
    """The charts of a page."""
    pattern = r'<img class="chart" src' if scheme == "light" else r'dark\)" srcset'
    uris = re.findall(pattern + r'="data:image/svg\+xml;base64,([^"]*)"', text)
    return [ET.fromstring(base64.b64decode(uri)) for uri in uris]


def words(svg: ET.Element) -> list[str]:
    return [e.text or "" for e in svg.iter("{http://www.w3.org/2000/svg}text")]


def test_charts_are_drawn_for_both_schemes(text: str) -> None:
    light, dark = svgs(text, "light"), svgs(text, "dark")
    assert len(light) == 6 and [words(svg) for svg in light] == [words(svg) for svg in dark]
    assert all("#1b1f23" in ET.tostring(svg, "unicode") for svg in light)
    assert all("#e6e8ea" in ET.tostring(svg, "unicode") for svg in dark)


def points(chart: charts.Chart) -> list[str]:
    """The labels of a chart's points."""
    svg = ET.fromstring(base64.b64decode(chart.light.partition(",")[2]))
    return [text for text in words(svg) if re.match(r"\d+(: |$)", text)]


def test_every_point_has_its_number_and_its_label_where_there_is_room() -> None:
    alone = [Point(10, 22, "1: a", "frontier"), Point(200, 26, "2: b", "frontier", chosen=True)]
    chart = charts.scatter("title", alone, "dB")
    assert {"1: a", "2: b"} <= set(points(chart))
    assert chart.description.endswith("On the frontier: 1: a, 10 ms, 22.0 dB; 2: b, 200 ms, 26.0 dB.")
    crowd = [Point(100 + i, 22 + i % 5, f"{i}: number {i} of a crowd", "dominated") for i in range(1, 25)]
    found = points(charts.scatter("title", crowd, "dB"))
    assert 0 < sum(": " in text for text in found) < len(found), "some have room for the number alone"
    equal = [Point(10, 200.0, "1: reference", "frontier"), Point(5, 60.0, "2: half", "frontier")]
    shown = words(ET.fromstring(base64.b64decode(charts.scatter("title", equal, "dB").light.partition(",")[2])))
    assert "equal" in shown and "200" not in shown, "it stands at the top and leaves the scale alone"


def test_a_page_needs_two_packages_and_says_how_it_is_made_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert page.how_to_render(tmp_path) == ""
    with pytest.raises(MachineError, match=r"cannot write .*report\.html: the folder .* does not exist: run `mkdir"):
        page.write(sample_results(), tmp_path / "none")
    plain = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else plain(name))
    how = page.how_to_render(tmp_path)
    assert "matplotlib is not installed" in how and "pip install 'moebius-edge[report]'" in how
    assert f"moebius-edge report merge {tmp_path} --output DIR" in how


def test_hostile_text_stays_text(folder: Path) -> None:
    results = hostile_results()
    results["configurations"] = results["configurations"][1:6]
    rendered = page.render(results, folder)
    elements = Elements(rendered)
    assert [tag for tag, _ in elements.found].count("script") == 2
    assert not [a for a in elements.all("a") if not a["href"].startswith("#")], "a path that is none is no link"
    assert not {"iframe", "object", "base", "form"} & {tag for tag, _ in elements.found}
    for tag, attributes in elements.found:
        assert not [name for name in attributes if name.startswith("on")], tag
    (data,) = re.findall(r'<script type="application/json" id="results">(.*?)</script>', rendered, re.S)
    assert json.loads(data) == results
    assert "\u202e" not in rendered and "{{script}}" in rendered  # braces in a name are no field of the template
    rendered.encode("utf-8")


@pytest.mark.parametrize("value", [0, -1, 1e24])
def test_absurd_figures_break_nothing(folder: Path, value: float) -> None:
    def changed(entry: Any, name: str = "") -> Any:
        if isinstance(entry, dict):
            return {k: v if k in ("inputs", "conditions", "pictures") else changed(v, k) for k, v in entry.items()}
        if isinstance(entry, list):
            return [changed(v) for v in entry]
        return value if isinstance(entry, float) else entry

    results = changed(sample_results() | {"configurations": sample_results()["configurations"][:3]})
    results["inputs"] = []
    Elements(page.render(results, folder))


def test_nothing_measured_is_still_a_page(tmp_path: Path) -> None:
    results = report_of([configuration("a", status="failed", reason="stopped")])
    results["inputs"] = []
    elements = Elements(page.write(results, tmp_path).read_text(encoding="utf-8"))
    sections = [a["id"] for a in elements.all("section")]
    assert sections == ["recommendation", "configurations", "conditions"]
    Elements(page.render(report_of([]) | {"machines": {}}, tmp_path))
    alone = page.render(report_of([configuration("a")]), tmp_path)
    assert '<th scope="row" data-value="a">a</th>' in alone, "one machine is not repeated in every row"


@pytest.fixture
def results(tmp_path: Path) -> dict[str, Any]:
    """The sample's first input only, with its pictures in ``tmp_path``."""
    document = sample_results()
    document["inputs"] = document["inputs"][:1]
    draw_pictures(document, tmp_path)
    return document


def cells(results: dict[str, Any], folder: Path) -> dict[str, Thumbnail]:
    ((_, cells),) = shown_inputs(results, folder)
    return {cell.configuration["id"] if cell.configuration else cell.caption: cell for cell in cells}


def pixels(uri: str) -> np.ndarray:
    head, data = uri.split(",")
    assert head == "data:image/jpeg;base64"
    decoded = cv2.imdecode(np.frombuffer(base64.b64decode(data), np.uint8), cv2.IMREAD_COLOR)
    assert decoded is not None
    return np.asarray(decoded[..., ::-1])


def test_the_hole_and_its_surroundings_are_shown(results: dict[str, Any], tmp_path: Path) -> None:
    found = cells(results, tmp_path)
    assert list(found)[:4] == ["image", "mask", "ground truth", FLOAT32]
    mask = pixels(found["mask"].views[RESULT])[..., 0] > 127
    assert 0.1 < mask.mean() < 0.5, "the mask of the whole picture is smaller"
    assert {pixels(cell.views[RESULT]).shape for cell in found.values()} == {mask.shape + (3,)}
    assert max(mask.shape) <= 240
    assert found[FLOAT16].link == f"pictures/{FLOAT16}/beach.png"
    (tmp_path / "pictures/inputs/beach_mask.png").unlink()
    found = cells(results, tmp_path)
    assert pixels(found["image"].views[RESULT]).shape == (120, 160, 3), "everything, where the mask is gone"
    assert found["mask"].problem.startswith("there is no picture pictures/inputs/beach_mask.png")


def test_differences_are_amplified_before_scaling(results: dict[str, Any], tmp_path: Path) -> None:
    flat = np.full((120, 160, 3), 100, np.uint8)
    for path, value in ((f"pictures/{FLOAT32}", 100), (f"pictures/{FLOAT16}", 110), ("pictures/truth", 20)):
        Image.fromarray(np.full_like(flat, value)).save(tmp_path / path / "beach.png")
    found = cells(results, tmp_path)
    assert np.abs(pixels(found[FLOAT16].views[TO_REFERENCE]).astype(int) - 40).max() <= 2
    assert pixels(found[FLOAT16].views[TO_TRUTH]).min() >= 253  # 4 x 90 is clipped
    assert TO_REFERENCE not in found[FLOAT32].views, "the reference has no difference to itself"
    assert TO_REFERENCE not in found["telea"].views
    other = tmp_path / f"pictures/{FLOAT16}/beach.png"
    cv2.imwrite(str(other), np.full((120, 160), 40 << 8, np.uint16))
    assert np.abs(pixels(cells(results, tmp_path)[FLOAT16].views[RESULT]).astype(int) - 40).max() <= 1, "in 8 bits"
    Image.new("RGB", (32, 24)).save(other)
    assert set(cells(results, tmp_path)[FLOAT16].views) == {RESULT}, "another size has no difference"


@pytest.mark.parametrize(
    "path", ["../secret.png", "/etc/passwd", "pictures/missing.png", "pictures/damaged.png", "pictures", "a\0b"]
)
def test_a_picture_that_cannot_be_had_is_a_sentence(results: dict[str, Any], tmp_path: Path, path: str) -> None:
    folder = tmp_path / "report"
    (tmp_path / "pictures").rename(tmp_path / "kept")
    folder.mkdir()
    (tmp_path / "kept").rename(folder / "pictures")
    Image.new("RGB", (640, 480)).save(tmp_path / "secret.png")
    (folder / "pictures/damaged.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    results["configurations"][1]["pictures"]["beach.jpg"] = path
    cell = cells(results, folder)[FLOAT16]
    assert cell.views == {} and not cell.link
    assert cell.problem and "\0" not in cell.problem


def test_a_page_has_no_more_thumbnails_than_it_can_hold(
    results: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results["inputs"] *= 5
    each = 3 + 2 * len(results["configurations"])
    for most, shown in ((1, 1), (2 * each, 2), (10 * each, 5)):
        monkeypatch.setattr(page, "MOST_THUMBNAILS", most)
        assert len(list(shown_inputs(results, tmp_path))) == shown
