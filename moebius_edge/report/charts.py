"""The report's charts, drawn by matplotlib as SVG in a light and a dark scheme, each a data URI for an ``<img>``.

An image in a page may hold styles of its own where the page's Content-Security-Policy allows none. All figures of a
chart stand in a table of the page as well; ``description`` says in words what the chart shows.
"""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from ..metrics.fidelity import PSNR_CAP_DB
from .tables import needed_digits

# Colour-blind safe: the set of Okabe and Ito, lightened for the dark scheme. Nothing is told by colour alone.
_COLOURS = {
    "light": ("#0072b2", "#d97a00", "#00805c", "#b5558f", "#3d9fd3", "#c24400", "#7a7f85"),
    "dark": ("#4aa8e8", "#f0a530", "#2fbf94", "#e08fc0", "#8fd0f5", "#ff8a4a", "#9aa1a8"),
}
_INK = {"light": ("#1b1f23", "#d5d9dd", "#ffffff"), "dark": ("#e6e8ea", "#363c42", "#14171a")}  # text, grid, paper
_STYLE = {"text.parse_math": False, "svg.fonttype": "none", "svg.hashsalt": "moebius-edge", "font.size": 9}
_STYLE |= {"axes.grid": True, "axes.spines.top": False, "axes.spines.right": False}
_DASHES = ("-", "--", ":", "-.")
# Where a label may stand beside its point: offset in points, and which side of it the point is on.
_PLACES = [(8, 0, "left"), (-8, 0, "right"), (5, 9, "left"), (-5, 9, "right"), (5, -9, "left"), (-5, -9, "right")]
_PLACES += [(0, 11, "center"), (0, -11, "center")]


class Chart(NamedTuple):
    """A picture for each scheme as a data URI, and the words that stand with it."""

    caption: str
    description: str
    light: str
    dark: str
    note: str = ""


class Point(NamedTuple):
    """``kind`` is "frontier", "dominated" or "baseline", ``number`` that of its row; the ``chosen`` one is ringed."""

    x: float
    y: float
    number: int
    label: str
    kind: str
    chosen: bool = False


def scatter(caption: str, points: Sequence[Point], y_title: str) -> Chart:
    """Latency against PSNR with the frontier as steps; a value at the PSNR's cap is drawn at the top as "equal"."""
    best = "; ".join(f"{p.label}, {p.x:.4g} ms, {p.y:.1f} dB" for p in points if p.kind == "frontier")
    description = f"Latency against hole PSNR of {len(points)} configurations. On the frontier: {best}."
    finite = [p.y for p in points if p.y < PSNR_CAP_DB] or [0.0]
    top = max(finite) + max(0.15 * (max(finite) - min(finite)), 0.5)
    drawn = [p._replace(y=min(p.y, top)) for p in points]

    def draw(axes: Any, colours: Sequence[str]) -> None:
        steps = sorted((p.x, p.y) for p in drawn if p.kind == "frontier")
        if steps:
            right = max(p.x for p in drawn)
            x, y = zip(*steps, (right, steps[-1][1]), strict=True)
            axes.plot(x, y, drawstyle="steps-post", color=colours[0], alpha=0.55)
        for kind, marker, face in (
            ("frontier", "o", colours[0]),
            ("dominated", "o", "none"),
            ("baseline", "D", "none"),
        ):
            some = [p for p in drawn if p.kind == kind]
            edge = colours[0] if kind == "frontier" else colours[6]
            axes.scatter([p.x for p in some], [p.y for p in some], marker=marker, facecolor=face, edgecolor=edge)
        ringed = [p for p in drawn if p.chosen]
        axes.scatter([p.x for p in ringed], [p.y for p in ringed], s=150, facecolor="none", edgecolor=colours[0])
        if any(p.y >= PSNR_CAP_DB for p in points):
            axes.axhline(top, linestyle=":", color=colours[6])
            axes.annotate(
                "equal", (0, top), xycoords=("axes fraction", "data"), xytext=(3, 4), textcoords="offset points"
            )
        axes.set_xlabel("median latency of one picture (ms)")
        axes.set_ylabel(y_title)
        axes.margins(x=0.08, y=0.12)
        if max(p.x for p in drawn) > 4 * min(p.x for p in drawn):
            _logarithmic(axes.set_xscale, axes.xaxis)
        _label_points(axes, drawn)

    return _chart(caption, description, draw, 4.2)


def lines(
    caption: str, drawn: Mapping[str, Sequence[float]], x_title: str, y_title: str, log: bool, note: str = ""
) -> Chart:
    """One line each, by label, over 1, 2, 3 ...; on a logarithmic scale values of 0 are left out."""
    ends = "; ".join(f"{label}, {values[-1]:.3g}" for label, values in drawn.items())

    def draw(axes: Any, colours: Sequence[str]) -> None:
        for index, (label, values) in enumerate(drawn.items()):
            points = [(x, y) for x, y in enumerate(values, start=1) if y > 0 or not log]
            dash = _DASHES[index // len(colours) % len(_DASHES)]
            axes.plot(
                *zip(*points, strict=True),
                dash,
                color=colours[index % len(colours)],
                label=_shortened(label),
                marker=".",
            )
        axes.set_xlabel(x_title)
        axes.set_ylabel(y_title)
        axes.xaxis.get_major_locator().set_params(integer=True)
        if log:
            _logarithmic(axes.set_yscale, axes.yaxis)
        axes.legend(loc="upper left", bbox_to_anchor=(0, -0.15), frameon=False, ncols=2 if len(drawn) > 3 else 1)

    height = 3.6 + 0.2 * (len(drawn) if len(drawn) <= 3 else (len(drawn) + 1) // 2)
    return _chart(caption, f"{y_title} by {x_title}. At the end: {ends}.", draw, height, note)


def bars(
    caption: str, drawn: Mapping[str, Mapping[str, float]], unit: str, totals: Mapping[str, float] | None = None
) -> Chart:
    """Horizontal bars by label, stacked of named parts; the sum stands at each one's end, or what ``totals`` says."""
    names = list(dict.fromkeys(name for parts in drawn.values() for name in parts))
    sums = {label: sum(parts.values()) for label, parts in drawn.items()}
    shown = {**sums, **(totals or {})}
    digits = needed_digits([max(sums.values())])
    texts = {label: f"{shown[label]:.{digits}f} {unit}".rstrip() for label in drawn}

    def draw(axes: Any, colours: Sequence[str]) -> None:
        lefts = dict.fromkeys(drawn, 0.0)
        for index, name in enumerate(names):
            widths = [max(parts.get(name, 0.0), 0.0) for parts in drawn.values()]
            axes.barh(
                range(len(drawn)), widths, 0.38, list(lefts.values()), color=colours[index % len(colours)], label=name
            )
            lefts = {label: left + width for (label, left), width in zip(lefts.items(), widths, strict=True)}
        for row, (label, left) in enumerate(lefts.items()):
            axes.annotate(_shortened(label, 120), (0, row - 0.3), va="bottom")
            axes.annotate(texts[label], (left, row), xytext=(5, 0), textcoords="offset points", va="center")
        axes.set_ylim(len(drawn) - 0.6, -0.9)
        axes.set_xlim(0, max([1e-9, *lefts.values()]) * 1.12)
        axes.axis("off")
        if len(names) > 1:
            axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=min(len(names), 6), frameon=False)

    longest = "; ".join(f"{label}, {texts[label]}" for label in drawn)
    return _chart(caption, f"{caption}: {longest}.", draw, 0.45 * len(drawn) + (0.5 if len(names) > 1 else 0.1))


def _chart(
    caption: str, description: str, draw: Callable[[Any, Sequence[str]], None], height: float, note: str = ""
) -> Chart:
    """The picture of 9.6 by ``height`` inches in each scheme; the same for the same figures."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    uris = []
    for scheme in ("light", "dark"):
        ink, grid, paper = _INK[scheme]
        style: Any = {**_STYLE, "axes.edgecolor": grid, "grid.color": grid, "figure.facecolor": paper}
        style |= dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), ink)
        buffer = io.BytesIO()
        with matplotlib.rc_context(style), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a glyph that its own font lacks is the browser's to draw
            figure = Figure(figsize=(9.6, height), layout="constrained")
            FigureCanvasAgg(figure)
            draw(figure.add_subplot(), _COLOURS[scheme])
            figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
        uris.append("data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode())
    return Chart(caption, description, uris[0], uris[1], note)


def _label_points(axes: Any, points: Sequence[Point]) -> None:
    """Write each point's number and label beside it where there is room, else the number alone."""
    from matplotlib.transforms import Bbox

    axes.figure.draw_without_rendering()  # the layout decides where the points lie
    places = [axes.transData.transform((p.x, p.y)) for p in points]
    taken = [Bbox.from_bounds(x - 6, y - 6, 12, 12) for x, y in places]
    order = ("frontier", "dominated", "baseline")
    for point in sorted(points, key=lambda p: (not p.chosen, order.index(p.kind))):
        style: Any = {"textcoords": "offset points", "va": "center", "weight": "bold" if point.chosen else "normal"}
        style["bbox"] = {"facecolor": axes.figure.get_facecolor(), "edgecolor": "none", "pad": 0.5, "alpha": 0.8}
        texts = (f"{point.number}: {_shortened(point.label)}", str(point.number))
        for text, (dx, dy, side) in ((text, place) for text in texts for place in _PLACES):
            note = axes.annotate(text, (point.x, point.y), (dx, dy), ha=side, in_layout=False, **style)
            box = note.get_window_extent()
            inside = axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1 + 5
            if inside and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
            note.remove()


def _logarithmic(set_scale: Callable[[str], None], axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator

    set_scale("log")
    axis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda value, place: f"{value:g}"))
    axis.set_minor_locator(LogLocator(subs=()))


def _shortened(label: str, most: int = 70) -> str:
    return label if len(label) <= most else label[: most - 1].rstrip(" ,") + "\N{HORIZONTAL ELLIPSIS}"
