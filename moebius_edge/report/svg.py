"""What the report's charts are drawn with: scales with round ticks, escaped SVG elements, labels kept apart.

Colours are classes of the page's style sheet, so that one drawing serves light, dark and print. No ``style``
attribute is written, for the page's Content-Security-Policy allows none.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

CHARACTER_PX = 6.3  # mean width of one at the style sheet's 12 px, on the wide side
LINE_PX = 14.0
Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True)
class Scale:
    """From a value in [low, high] to a pixel between start and end; ``log`` needs values above 0."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False
    whole: bool = False  # ticks at whole numbers only

    @classmethod
    def around(cls, values: Iterable[float], start: float, end: float, log: bool = False) -> Scale:
        """A scale with a little room around the values, of which there is at least one."""
        found = list(values)
        low, high = min(found), max(found)
        if log:
            room = max((high / low) ** 0.06, 1.15)
            return cls(low / room, high * room, start, end, True)
        room = max((high - low) * 0.08, abs(high) * 0.01, 1e-9)
        return cls(low - room, high + room, start, end)

    def __call__(self, value: float) -> float:
        low, high, at = map(math.log10, (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        return self.start + (at - low) / (high - low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round values within the scale, one every 70 pixels across or 45 up, about."""
        most = max(2, int((self.end - self.start) / 70 if self.end > self.start else (self.start - self.end) / 45))
        if self.log:
            first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            for digits in ((1, 2, 5), (1, 3), (1,)):
                found = [d * 10.0**e for e in range(first, last + 1) for d in digits]
                found = [v for v in found if self.low <= v <= self.high]
                if len(found) <= most:
                    break
            if len(found) >= 2:
                return found[:: math.ceil(len(found) / most)]
        step = max(_round_step((self.high - self.low) / most), 1.0 if self.whole else 0.0)
        count = math.floor(self.high / step) - math.ceil(self.low / step) + 1
        return [round((math.ceil(self.low / step) + i) * step, 12) for i in range(count)]


def element(name: str, content: str = "", **attributes: object) -> str:
    """One element; attributes are escaped and numbers rounded, ``content`` is markup. ``class_`` means class."""
    written = "".join(f' {key.strip("_").replace("_", "-")}="{_attribute(value)}"' for key, value in attributes.items())
    return f"<{name}{written}>{content}</{name}>"


def text(content: str, x: float, y: float, class_: str = "", anchor: str = "start") -> str:
    extra = {"class_": class_} if class_ else {}
    return element("text", html.escape(content), x=x, y=y, text_anchor=anchor, **extra)


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> str:
    return element("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


def drawing(parts: Iterable[str], width: float, height: float, class_: str, description: str) -> str:
    """The whole picture, which a screen reader announces by ``description``."""
    return (
        f'<svg class="{class_}" viewBox="0 0 {width:g} {height:g}" role="img" '
        f'aria-label="{_attribute(description)}">{"".join(parts)}</svg>'
    )


def axes(x: Scale, y: Scale, x_title: str, y_title: str) -> list[str]:
    """Grid lines with their values; the titles stand at the axes' ends."""
    parts = []
    for value in y.ticks():
        parts += [
            line(x.start, y(value), x.end, y(value), "grid"),
            text(tick(value), x.start - 6, y(value) + 4, "tick", "end"),
        ]
    for value in x.ticks():
        parts += [
            line(x(value), y.start, x(value), y.start + 4, "axis"),
            text(tick(value), x(value), y.start + 17, "tick", "middle"),
        ]
    return [
        *parts,
        line(x.start, y.start, x.end, y.start, "axis"),
        text(x_title, x.end, y.start + 34, "title", "end"),
        text(y_title, 0, 14, "title"),
    ]


def tick(value: float) -> str:
    """2000, 0.05, 10⁻⁵, 3·10⁻⁴."""
    if value == 0 or 1e-3 <= abs(value) < 1e6:
        return f"{value:g}"
    digits, power = f"{value:.0e}".split("e")
    raised = str(int(power)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"10{raised}" if digits == "1" else f"{digits}·10{raised}"


def text_box(content: str, x: float, y: float, anchor: str) -> Box:
    """Where a line of text comes to lie, estimated."""
    width = CHARACTER_PX * len(content)
    left = {"start": x, "middle": x - width / 2, "end": x - width}[anchor]
    return left, y - 11, left + width, y + 3


def overlap(box: Box, others: Iterable[Box]) -> bool:
    return any(box[0] < o[2] and o[0] < box[2] and box[1] < o[3] and o[1] < box[3] for o in others)


def spread(wanted: Sequence[float], low: float, high: float, distance: float = LINE_PX) -> list[float]:
    """Positions near the wanted ones, in their order, ``distance`` apart and within [low, high] where there is room."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    placed: list[float] = []
    for index in order:
        placed.append(max(wanted[index], placed[-1] + distance if placed else low))
    for i in range(len(placed) - 1, -1, -1):
        limit = high if i == len(placed) - 1 else placed[i + 1] - distance
        placed[i] = min(placed[i], limit)
    result = [0.0] * len(wanted)
    for index, at in zip(order, placed, strict=True):
        result[index] = at
    return result


def _round_step(step: float) -> float:
    power = 10.0 ** math.floor(math.log10(step))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= step * 0.999)


def _attribute(value: object) -> str:
    return f"{value:.1f}".rstrip("0").rstrip(".") if isinstance(value, float) else html.escape(str(value))
