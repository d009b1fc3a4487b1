"""The report's three charts as inline SVG: points with a frontier, lines over steps, stacked bars.

Each takes the width it is drawn for. Below ``NARROW`` pixels there is no room for labels, and a configuration goes
by its number in the table alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..metrics.fidelity import PSNR_CAP_DB
from . import svg

WIDE, NARROW = 960, 380
COLOURS = 7  # classes c0..c6 of the style sheet; further lines are dashed
_LEFT, _TOP, _BOTTOM = 44, 34, 44


@dataclass(frozen=True)
class Point:
    """``kind`` is "frontier", "dominated" or "baseline", ``number`` that of its row; the ``chosen`` one is ringed."""

    x: float
    y: float
    number: int
    label: str
    kind: str
    chosen: bool = False


@dataclass(frozen=True)
class Line:
    number: int
    label: str
    values: Sequence[float]


@dataclass(frozen=True)
class Bar:
    number: int
    label: str
    parts: Mapping[str, float]
    total: float | None = None  # where it is known better than as the parts' sum


def scatter(points: Sequence[Point], x_title: str, y_title: str, description: str, width: int = WIDE) -> str:
    """Points with the frontier as steps; a value at the PSNR's cap is drawn at the top as "equal"."""
    height, right = (400 if width > NARROW else 320), width - 14
    finite = [p.y for p in points if p.y < PSNR_CAP_DB]
    top = _TOP + (26 if len(finite) < len(points) else 0)
    xs = [p.x for p in points if p.x > 0] or [1.0]
    x = svg.Scale.around(xs, _LEFT, right, log=max(xs) > 4 * min(xs))
    y = svg.Scale.around(finite or [0.0], height - _BOTTOM, top)

    def at(point: Point) -> tuple[float, float]:
        return x(max(point.x, min(xs))), (_TOP + 10 if point.y >= PSNR_CAP_DB else y(point.y))

    parts = svg.axes(x, y, x_title, y_title)
    if top > _TOP:
        parts += [
            svg.line(_LEFT, _TOP + 10.0, right, _TOP + 10.0, "grid"),
            svg.text("equal", _LEFT - 6, _TOP + 14, "tick", "end"),
        ]
    taken: list[svg.Box] = [(a - 6, b - 6, a + 6, b + 6) for a, b in map(at, points)]
    steps = sorted(at(p) for p in points if p.kind == "frontier")
    if steps:
        path = f"M{steps[0][0]:.1f} {steps[0][1]:.1f}" + "".join(f"H{a:.1f}V{b:.1f}" for a, b in steps[1:])
        parts.append(svg.element("path", d=f"{path}H{right}", class_="frontier-line"))
        for (a, b), (c, d) in zip(steps, [*steps[1:], (float(right), steps[-1][1])], strict=True):
            taken += [(a, b - 2, c, b + 2), (c - 2, min(b, d), c + 2, max(b, d))]
    order = sorted(points, key=lambda p: ("frontier", "dominated", "baseline").index(p.kind))
    for point in order:
        a, b = at(point)
        parts.append(_mark(point, a, b))
        parts.append(_point_label(point, a, b, taken, width, height))
    return svg.drawing(parts, width, height, _class(width), description)


def lines(
    drawn: Sequence[Line], x_title: str, y_title: str, description: str, width: int = WIDE, log: bool = True
) -> str:
    """One line each over 1, 2, 3 ...; on a logarithmic scale values of 0 are left out."""
    gutter = 350 if width > NARROW else 34
    height = max(340, int(svg.LINE_PX * len(drawn)) + _TOP + _BOTTOM) if width > NARROW else 300
    values = [v for one in drawn for v in one.values if v > 0 or not log]
    x = svg.Scale(1, max(2, *(len(one.values) for one in drawn)), _LEFT + 6, width - gutter, whole=True)
    y = svg.Scale.around(values or [1.0], height - _BOTTOM, _TOP, log)
    parts, ends = svg.axes(x, y, x_title, y_title), []
    for index, one in enumerate(drawn):
        points = [(x(i), y(v)) for i, v in enumerate(one.values, start=1) if v > 0 or not log]
        ends.append(points[-1] if points else (x.end, y.start))
        if points:
            path = "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in points)
            parts.append(svg.element("path", d=path, class_=_line_class(index)))
            parts.append(svg.element("circle", cx=points[-1][0], cy=points[-1][1], r=2.5, class_=f"c{index % COLOURS}"))
    for index, (one, end, at) in enumerate(
        zip(drawn, ends, svg.spread([e[1] for e in ends], _TOP, height - 20), strict=True)
    ):
        shown = f"{one.number}: {_shortened(one.label, gutter - 40)}" if width > NARROW else str(one.number)
        if abs(at - end[1]) > 3 or end[0] < x.end - 3:
            parts.append(svg.line(end[0] + 3, end[1], x.end + 8, at, "leader"))
        parts.append(svg.text(shown, x.end + 11, at + 4, f"label t{index % COLOURS}"))
    return svg.drawing(parts, width, height, _class(width), description)


def bars(drawn: Sequence[Bar], unit: str, digits: int, description: str, width: int = WIDE) -> str:
    """Horizontal stacked bars, with a legend where there is more than one part; the sum stands at each bar's end."""
    names = list(dict.fromkeys(name for bar in drawn for name in bar.parts))
    parts, x_at, y_at = [], 0.0, 12.0 if len(names) > 1 else -16.0
    for index, name in enumerate(names if len(names) > 1 else ()):
        if x_at + 20 + svg.CHARACTER_PX * len(name) > width:
            x_at, y_at = 0.0, y_at + 18
        parts.append(svg.element("rect", x=x_at, y=y_at - 9, width=10, height=10, class_=f"c{index % COLOURS}"))
        parts.append(svg.text(name, x_at + 14, y_at, "label"))
        x_at += 36 + svg.CHARACTER_PX * len(name)
    longest = max([1e-9, *(sum(bar.parts.values()) for bar in drawn)])
    room = width - 90
    for bar in drawn:
        y_at += 34
        total = sum(bar.parts.values()) if bar.total is None else bar.total
        parts.append(svg.text(_shortened(f"{bar.number}: {bar.label}", width), 0, y_at - 5, "label"))
        left = 0.0
        for name, value in bar.parts.items():
            length = room * max(value, 0.0) / longest
            tip = svg.element("title", svg.html.escape(f"{name}: {value:.{digits}f} {unit}"))
            index = names.index(name) % COLOURS
            parts.append(svg.element("rect", tip, x=left, y=y_at, width=length, height=11, class_=f"c{index}"))
            left += length
        parts.append(svg.text(f"{total:.{digits}f} {unit}".rstrip(), left + 6, y_at + 10, "tick"))
    return svg.drawing(parts, width, y_at + 18, _class(width), description)


def _mark(point: Point, x: float, y: float) -> str:
    tip = svg.element("title", svg.html.escape(f"{point.number} {point.label}: {point.x:.4g} ms, {point.y:.1f} dB"))
    if point.kind == "baseline":
        corners = f"{x:.1f},{y - 6:.1f} {x + 6:.1f},{y:.1f} {x:.1f},{y + 6:.1f} {x - 6:.1f},{y:.1f}"
        return svg.element("polygon", tip, points=corners, class_="point baseline")
    ring = svg.element("circle", cx=x, cy=y, r=9.0, class_="ring") if point.chosen else ""
    return ring + svg.element("circle", tip, cx=x, cy=y, r=5.0, class_=f"point {point.kind}")


def _point_label(point: Point, x: float, y: float, taken: list[svg.Box], width: int, height: int) -> str:
    """The label beside its point where there is room, else the number alone; ``taken`` gains its place."""
    wanted = [str(point.number)] if width <= NARROW else [f"{point.number}: {point.label}", str(point.number)]
    places = [(12, 4, "start"), (-12, 4, "end"), (7, -7, "start"), (-7, -7, "end"), (0, -10, "middle")]
    places += [(7, 16, "start"), (-7, 16, "end"), (0, 19, "middle")]
    far = [(s * 12, dy, "start" if s > 0 else "end") for dy in (-24, 32, -40, 48) for s in (1, -1)]
    own = (x - 6, y - 6, x + 6, y + 6)
    class_ = f"label {point.kind}" + (" chosen" if point.chosen else "")
    for content in wanted:
        for dx, dy, anchor in [*places, *far]:
            box = svg.text_box(content, x + dx, y + dy, anchor)
            inside = box[0] >= _LEFT and box[2] <= width and box[1] >= 16 and box[3] <= height - _BOTTOM
            if inside and not svg.overlap(box, [t for t in taken if t != own]):
                taken.append(box)
                leader = svg.line(x, y, x + dx * 0.8, y + dy - 4, "leader") if abs(dy) > 20 else ""
                return leader + svg.text(content, x + dx, y + dy, class_, anchor)
    return svg.text(wanted[-1], x + 9, y + 4, class_)


def _shortened(label: str, width: float) -> str:
    most = int(width / svg.CHARACTER_PX)
    return label if len(label) <= most else label[: most - 1].rstrip(" ,") + "\N{HORIZONTAL ELLIPSIS}"


def _line_class(index: int) -> str:
    return f"line s{index % COLOURS}" + (f" dash{min(index // COLOURS, 3)}" if index >= COLOURS else "")


def _class(width: int) -> str:
    return "chart wide" if width > NARROW else "chart narrow"
