"""The charts: scales with round ticks, labels that stay apart, and drawings that are well-formed SVG."""

from __future__ import annotations

import itertools
import xml.etree.ElementTree as ET

import pytest

from moebius_edge.report import charts, svg

HOSTILE = "</svg><script>alert(1)</script>\"'&"


@pytest.mark.parametrize(
    ("low", "high", "log", "expected"),
    [
        (0.0, 100.0, False, [0, 20, 40, 60, 80, 100]),
        (22.9, 24.1, False, [23, 23.2, 23.4, 23.6, 23.8, 24]),
        (10.0, 2000.0, True, [10, 20, 50, 100, 200, 500, 1000, 2000]),
        (0.3, 0.9, True, [0.5]),
        (1.0, 1e6, True, [1, 10, 100, 1000, 10000, 100000, 1e6]),
    ],
)
def test_ticks_are_round_and_within(low: float, high: float, log: bool, expected: list[float]) -> None:
    ticks = svg.Scale(low, high, 0, 560, log).ticks()
    if len(expected) > 1:
        assert ticks == pytest.approx(expected)
    assert all(low <= v <= high for v in ticks) and len(ticks) >= 2


@pytest.mark.parametrize("values", [[5.0], [5.0, 5.0], [0.0], [1e-9, 1e9], [-3.0, 7.0], [1e24], [1e-24, 1e24]])
@pytest.mark.parametrize("log", [False, True])
def test_any_values_have_a_scale(values: list[float], log: bool) -> None:
    if log and min(values) <= 0:
        return
    scale = svg.Scale.around(values, 40, 400, log)
    assert all(40 <= scale(v) <= 400 for v in values)
    assert 1 <= len(scale.ticks()) <= 12


def test_tick_text() -> None:
    values = [0, 0.001, 2000, 1e-5, 3e-4, 2e7]
    assert [svg.tick(v) for v in values] == ["0", "0.001", "2000", "10⁻⁵", "3·10⁻⁴", "2·10⁷"]


def test_labels_are_spread() -> None:
    found = svg.spread([100.0, 101.0, 300.0, 99.0], 0, 310, 14)
    ordered = sorted(found)
    assert all(b - a >= 14 for a, b in itertools.pairwise(ordered))
    assert found[3] < found[0] < found[1] < found[2] <= 310
    assert svg.spread([], 0, 10) == []


def points(count: int) -> list[charts.Point]:
    """Along a slope, every third on the frontier; the labels are as long as real ones."""
    return [
        charts.Point(100 * 1.3**i, 20 + 0.5 * i, i + 1, f"tiny float16, {i} steps DPM++2M", kind)
        for i, kind in zip(range(count), itertools.cycle(("frontier", "dominated", "baseline")), strict=False)
    ]


@pytest.mark.parametrize("width", [charts.WIDE, charts.NARROW])
@pytest.mark.parametrize("count", [1, 3, 12, 40])
def test_scatter_draws_and_names_every_point(count: int, width: int) -> None:
    root = ET.fromstring(charts.scatter(points(count), "x", "y", "what it shows", width))
    assert root.get("role") == "img" and root.get("aria-label") == "what it shows"
    marks = [e for e in root.iter() if e.tag in ("circle", "polygon")]
    labels = [e.text or "" for e in root.iter("text") if "label" in (e.get("class") or "")]
    assert len(marks) == len(labels) == count
    assert {text.split(":")[0] for text in labels} == {str(n) for n in range(1, count + 1)}
    if width == charts.NARROW:
        assert all(text.isdigit() for text in labels)
    elif count <= 12:
        assert sum("DPM++2M" in text for text in labels) >= count - 2, "there is room for nearly every label"


def test_labels_of_points_do_not_overlap() -> None:
    root = ET.fromstring(charts.scatter(points(24), "x", "y", "d"))
    boxes = [
        svg.text_box(e.text or "", float(e.get("x", "0")), float(e.get("y", "0")), e.get("text-anchor", ""))
        for e in root.iter("text")
        if "label" in (e.get("class") or "")
    ]
    assert len(boxes) == 24
    assert not any(svg.overlap(box, boxes[:i]) for i, box in enumerate(boxes))


def test_the_chosen_point_is_ringed() -> None:
    drawn = [charts.Point(10, 22, 1, "a", "frontier"), charts.Point(20, 23, 2, "b", "frontier", chosen=True)]
    root = ET.fromstring(charts.scatter(drawn, "ms", "dB", "d"))
    (ring,) = (c for c in root.iter("circle") if c.get("class") == "ring")
    marks = {(c.get("cx"), c.get("cy")) for c in root.iter("circle") if c.get("class") == "point frontier"}
    assert len(marks) == 2 and (ring.get("cx"), ring.get("cy")) in marks
    assert [e.text for e in root.iter("text") if "chosen" in (e.get("class") or "")] == ["2: b"]


def test_equal_points_go_to_the_top_and_leave_the_scale_alone() -> None:
    drawn = [charts.Point(10, 200.0, 1, "reference", "frontier"), charts.Point(5, 60.0, 2, "half", "frontier")]
    root = ET.fromstring(charts.scatter(drawn, "ms", "dB", "d"))
    ticks = [e.text for e in root.iter("text") if e.get("class") == "tick"]
    assert "equal" in ticks and "200" not in ticks
    heights = {c.get("class", ""): 0.0 for c in root.iter("circle")}
    ys = [float(c.get("cy", "0")) for c in root.iter("circle")]
    assert len(heights) == 1 and ys[0] != ys[1]


def test_lines_leave_out_zeros_of_a_logarithm() -> None:
    drawn = [charts.Line(1, "a", [0.0, 1e-3, 2e-3]), charts.Line(2, "b", [1e-5, 1e-4]), charts.Line(3, "c", [0.0, 0.0])]
    root = ET.fromstring(charts.lines(drawn, "step", "rms", "d"))
    paths = [p.get("d", "") for p in root.iter("path")]
    assert [path.count("L") for path in paths] == [1, 1]
    assert [e.text for e in root.iter("text") if "label" in (e.get("class") or "")] == ["1: a", "2: b", "3: c"]


def test_many_lines_differ_in_dash() -> None:
    drawn = [charts.Line(i, str(i), [1.0, 2.0 + i]) for i in range(charts.COLOURS * 3)]
    root = ET.fromstring(charts.lines(drawn, "step", "rms", "d"))
    assert len({p.get("class") for p in root.iter("path")}) == len(drawn)


def test_bars_are_as_long_as_their_parts() -> None:
    drawn = [charts.Bar(1, "a", {"host": 30.0, "device": 10.0}), charts.Bar(2, "b", {"host": 20.0}, total=21.0)]
    root = ET.fromstring(charts.bars(drawn, "MB", 0, "d"))
    lengths = [float(r.get("width", "0")) for r in root.iter("rect") if r.get("height") == "11"]
    assert lengths == pytest.approx([lengths[0], lengths[0] / 3, lengths[0] * 2 / 3], abs=0.1)
    assert [e.text for e in root.iter("text") if e.get("class") == "tick"] == ["40 MB", "21 MB"]
    assert {t.text for t in root.iter("title")} == {"host: 30 MB", "device: 10 MB", "host: 20 MB"}


@pytest.mark.parametrize("width", [charts.WIDE, charts.NARROW])
def test_text_is_escaped(width: int) -> None:
    drawings = [
        charts.scatter([charts.Point(1, 1, 1, HOSTILE, "frontier")], HOSTILE, HOSTILE, HOSTILE, width),
        charts.lines([charts.Line(1, HOSTILE, [1.0])], HOSTILE, HOSTILE, HOSTILE, width),
        charts.bars([charts.Bar(1, HOSTILE, {HOSTILE: 1.0, "b": 2.0})], HOSTILE, 0, HOSTILE, width),
    ]
    for drawing in drawings:
        root = ET.fromstring(drawing)
        assert root.get("aria-label") == HOSTILE
        assert "script" not in {e.tag for e in root.iter()}
        assert "style=" not in drawing  # the page's policy allows none
