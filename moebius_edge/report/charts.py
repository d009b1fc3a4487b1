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

# Text, grid and paper of a scheme. The colours are the colour-blind safe set of Okabe and Ito, lightened for the dark.
_INK = {"light": ("#1b1f23", "#d5d9dd", "#ffffff"), "dark": ("#e6e8ea", "#363c42", "#14171a")}
_COLOURS = {
    "light": ("#0072b2", "#d97a00", "#00805c", "#b5558f", "#3d9fd3", "#c24400", "#7a7f85"),
    "dark": ("#4aa8e8", "#f0a530", "#2fbf94", "#e08fc0", "#8fd0f5", "#ff8a4a", "#9aa1a8"),
}
_STYLE = {"text.parse_math": False, "svg.fonttype": "none", "svg.hashsalt": "moebius-edge", "font.size": 9}
_STYLE |= {"axes.grid": True, "axes.spines.top": False, "axes.spines.right": False}
_MARKS = {"frontier": ("o", 0, True), "dominated": ("o", 6, False), "baseline": ("D", 6, False)}
# Where a label may stand beside its point: offset in points, and which side of it the point is on.
_PLACES = [(8, 0, "left"), (-8, 0, "right"), (5, 9, "left"), (-5, 9, "right"), (5, -9, "left"), (-5, -9, "right")]
Draw = Callable[[Any, Sequence[str]], None]  # on these axes, in these colours


class Chart(NamedTuple):
    """A picture for each scheme as a data URI, and the words that stand with it."""

    caption: str
    description: str
    light: str
    dark: str


class Point(NamedTuple):
    """``kind`` is a key of ``_MARKS``, the label begins with a number; the ``chosen`` one is ringed."""

    x: float
    y: float
    label: str
    kind: str
    chosen: bool = False


def scatter(caption: str, points: Sequence[Point], y_title: str) -> Chart:
    """Latency against PSNR with the frontier as steps; a value at the PSNR's cap is drawn at the top as "equal"."""
    best = "; ".join(f"{p.label}, {p.x:.4g} ms, {p.y:.1f} dB" for p in points if p.kind == "frontier")
    finite = [p.y for p in points if p.y < PSNR_CAP_DB] or [0.0]
    top = max(finite) + max(0.15 * (max(finite) - min(finite)), 0.5)
    drawn = [p._replace(y=min(p.y, top)) for p in points]

    def draw(axes: Any, colours: Sequence[str]) -> None:
        steps = sorted((p.x, p.y) for p in drawn if p.kind == "frontier")
        steps += [(max(p.x for p in drawn), steps[-1][1])] if steps else []
        axes.plot([x for x, _ in steps], [y for _, y in steps], drawstyle="steps-post", color=colours[0], alpha=0.55)
        for p in drawn:
            marker, colour, filled = _MARKS[p.kind]
            face = colours[colour] if filled else "none"
            axes.scatter(p.x, p.y, marker=marker, facecolor=face, edgecolor=colours[colour], zorder=3)
            if p.chosen:
                axes.scatter(p.x, p.y, s=150, facecolor="none", edgecolor=colours[colour])
        if max(p.y for p in points) >= PSNR_CAP_DB:
            axes.axhline(top, linestyle=":", color=colours[6])
            axes.annotate("equal", (0.01, top), xycoords=("axes fraction", "data"), va="bottom")
        axes.set(xlabel="median latency of one picture (ms)", ylabel=y_title)
        axes.margins(x=0.08, y=0.12)
        if max(p.x for p in drawn) > 4 * min(p.x for p in drawn):
            _make_logarithmic(axes)
        _label_points(axes, drawn)

    description = f"Latency against hole PSNR of {len(points)} configurations. On the frontier: {best}."
    return _chart(caption, description, draw, 4.2)


def bars(caption: str, drawn: Mapping[str, Mapping[str, float]], unit: str) -> Chart:
    """Horizontal bars by label, stacked of named parts; the sum stands at each one's end."""
    names = list(dict.fromkeys(name for parts in drawn.values() for name in parts))
    sums = {label: sum(parts.values()) for label, parts in drawn.items()}
    digits = needed_digits([max(sums.values())])
    texts = {label: f"{sums[label]:.{digits}f} {unit}".rstrip() for label in drawn}

    def draw(axes: Any, colours: Sequence[str]) -> None:
        longest = max(sum(parts.values()) for parts in drawn.values())
        for row, (label, parts) in enumerate(drawn.items()):
            left = 0.0
            for name, value in parts.items():
                index = names.index(name)
                axes.barh(row, value, 0.38, left, color=colours[index % 7], label=name)
                left += value
            axes.annotate(_shortened(label, 120), (0, row - 0.3), va="bottom")
            axes.annotate(texts[label], (left + longest / 150, row), va="center")
        axes.set(ylim=(len(drawn) - 0.6, -0.9), xlim=(0, longest * 1.12))
        axes.axis("off")
        handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))  # one of each name
        if len(names) > 1:
            place = {"loc": "lower left", "bbox_to_anchor": (0, 1), "ncols": 6, "frameon": False}
            axes.legend([handles[name] for name in names], names, **place)

    description = "; ".join(f"{label}, {text}" for label, text in texts.items())
    return _chart(caption, f"{caption}: {description}.", draw, 0.45 * len(drawn) + (0.5 if len(names) > 1 else 0.1))


def _chart(caption: str, description: str, draw: Draw, height: float) -> Chart:
    """The picture of 9.6 by ``height`` inches in each scheme; the same for the same figures."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    uris = []
    for scheme, (ink, grid, paper) in _INK.items():
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
    return Chart(caption, description, uris[0], uris[1])


def _label_points(axes: Any, points: Sequence[Point]) -> None:
    """Write each point's label beside it where there is room, else its number alone."""
    from matplotlib.transforms import Bbox

    axes.figure.draw_without_rendering()  # the layout decides where the points lie
    places = [axes.transData.transform((p.x, p.y)) for p in points]
    taken = [Bbox.from_bounds(x - 6, y - 6, 12, 12) for x, y in places]
    box: Any = {"facecolor": axes.figure.get_facecolor(), "edgecolor": "none", "pad": 0.5, "alpha": 0.8}
    for point in sorted(points, key=lambda p: (not p.chosen, list(_MARKS).index(p.kind))):
        style: Any = {"textcoords": "offset points", "va": "center", "weight": "bold" if point.chosen else "normal"}
        texts = (_shortened(point.label, 70), point.label.partition(":")[0])
        for text, (dx, dy, side) in ((text, place) for text in texts for place in _PLACES):
            note = axes.annotate(text, (point.x, point.y), (dx, dy), ha=side, in_layout=False, bbox=box, **style)
            extent = note.get_window_extent()
            inside = axes.bbox.x0 <= extent.x0 and extent.x1 <= axes.bbox.x1 + 5
            if inside and not any(extent.overlaps(other) for other in taken):
                taken.append(extent)
                break
            note.remove()


def _make_logarithmic(axes: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator

    axes.set(xscale="log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, place: f"{value:g}"))
    axes.xaxis.set_minor_locator(LogLocator(subs=()))


def _shortened(label: str, most: int) -> str:
    return label if len(label) <= most else label[: most - 1].rstrip(" ,") + "\N{HORIZONTAL ELLIPSIS}"
