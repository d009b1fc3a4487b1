"""From what a mask file holds to the pixels that are to be filled.

White fills, but people mark holes in many other ways. ``read_hole`` decides in this order; each step either gives the
hole, with a note unless it is plain white on black, or refuses in one line that names the option which decides.

1. Alpha, where some pixels are clear and others are not: strokes on a transparent layer are the hole, whatever their
   colour. A photograph with a clear part is refused, since some programs mean the clear part and some the rest.
   Black and white on a transparent layer are composited on black, and go on.
2. Palette indices, where they and not their colours tell the parts of the file apart: one label besides the
   background is the hole, several are refused.
3. A photograph, also one that was drawn on, is refused.
4. Colours: strokes of one colour on black, white or grey are the hole. Several colours are refused.
5. Grey: the brighter of two levels is the hole, whatever they are (255, 1, or a brush at 40%). Of more levels all
   above half are the hole, and so are the overlaps of one translucent white brush; others are refused.

Soft edges are cut half-way between the background and the faintest flat part of the strokes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, NoReturn

import numpy as np

from ..errors import UsageError
from .mask_evidence import (
    APART,
    COLOURED,
    MOST_LABELS,
    NOISE,
    OFF_LINE,
    WHITE,
    Bytes,
    Colour,
    along,
    channels_of,
    colour_distance,
    colour_of,
    common_colour,
    core,
    eight_bits,
    exact_labels,
    flat_levels,
    has_black_and_white,
    is_grey,
    is_photograph,
    luma,
    nearly_largest,
    on_black,
    one_brush,
    painted,
    smallest,
    typical,
    white_parts,
    with_faint_strokes,
)
from .masks import Mask, threshold

CHANNELS = ("red", "green", "blue")
SOURCES = ("alpha", "luma", *CHANNELS)  # of --mask-from, besides index:N


@dataclass(frozen=True, eq=False)
class MaskContent:
    """An upright mask file: ``pixels`` (H, W, 1 or 3), ``alpha`` and palette ``indices`` (H, W) where it has them."""

    pixels: np.ndarray
    alpha: np.ndarray | None = None
    indices: np.ndarray | None = None


class Reading(NamedTuple):
    """The hole, bool (H, W), and a sentence on how it was read; empty for plain white on black."""

    hole: Mask
    note: str = ""


def check_source(text: str) -> str:
    """``text`` if it is a value of --mask-from: one of ``SOURCES``, or index:N.

    Raises:
        UsageError: it is neither.
    """
    kind, _, number = text.partition(":")
    if text in SOURCES or (kind == "index" and number.isascii() and number.isdigit()):
        return text
    raise UsageError(f"--mask-from {text} is unknown: choose {', '.join(SOURCES)}, or index:N such as index:1")


def read_hole(content: MaskContent, name: str, source: str | None = None) -> Reading:
    """Decide which pixels of ``content`` are to be filled; ``source`` is a value of --mask-from, None to find out.

    Raises:
        UsageError: the content may be meant in several ways, is no mask, or does not have what ``source`` names.
    """
    if source is not None:
        return Reading(_chosen(content, name, check_source(source)))
    pixels, alpha = eight_bits(content.pixels), None if content.alpha is None else eight_bits(content.alpha)
    if alpha is not None and 0 < alpha.max() <= NOISE:  # of 0 and 1, or all but invisible
        alpha = (alpha > int(alpha.max()) / 2) * np.uint8(WHITE)
    if alpha is not None and int(alpha.max()) - int(alpha.min()) > NOISE:
        if alpha.min() <= NOISE / 2:
            reading = _of_layer(pixels, alpha, name)
            if reading is not None:
                return reading
        pixels = on_black(pixels, alpha)
    elif alpha is not None and alpha.max() == 0:  # a layer on which nothing was painted
        if np.ptp(pixels) > NOISE:
            _refuse(name, "is transparent everywhere, but has colours", "fill by those with --mask-from luma")
        return Reading(np.zeros(alpha.shape, bool))
    if content.indices is not None:
        reading = _of_indices(content.indices, pixels, name)
        if reading is not None:
            return reading
    if is_photograph(pixels):
        _refuse(
            name,
            "looks like a photograph, perhaps one that was drawn on: are IMAGE and MASK swapped?",
            "--mask-from luma fills what is bright",
            separator=" ",
        )
    if is_grey(pixels):
        single = content.pixels.shape[2] == 1 and alpha is None
        return _of_greys(luma(pixels), content.pixels[..., 0] if single else pixels[..., 0], name)
    indices = content.indices
    first = None if indices is None or indices.min() > 0 else colour_of(0, indices, pixels)
    return _of_colours(pixels, first, name)


# What the user chose


def _chosen(content: MaskContent, name: str, source: str) -> Mask:
    if source.startswith("index:"):
        return _index(content, name, int(source.partition(":")[2]))
    if source == "alpha":
        if content.alpha is None:
            raise UsageError(f"{name} has no alpha channel: leave out --mask-from alpha")
        alpha = eight_bits(content.alpha)
        if alpha.max() - alpha.min() <= NOISE:
            raise UsageError(f"{name} has alpha {alpha.max()} everywhere: leave out --mask-from alpha")
        return with_faint_strokes(alpha, painted(alpha))
    pixels = eight_bits(content.pixels)
    if content.alpha is not None:
        pixels = on_black(pixels, eight_bits(content.alpha))
    if source == "luma" or pixels.shape[2] == 1:
        return threshold(luma(pixels), name)
    channel = pixels[..., CHANNELS.index(source)]
    if common_colour(pixels).min() > WHITE / 2:  # on a white background: what of the channel is not white
        channel = channel - smallest(channels_of(pixels))
    return threshold(channel, name)


def _index(content: MaskContent, name: str, number: int) -> Mask:
    values = content.indices
    if values is None:
        values = content.pixels[..., 0]
        if (content.pixels != values[..., None]).any():
            raise UsageError(f"{name} has colours and no palette: --mask-from index:N needs a palette, or grey levels")
    hole: Mask = values == number
    if not hole.any():
        raise UsageError(f"{name} has no pixel of index {number}: it holds {_listed(np.unique(values))}")
    return hole


# The steps of the decision


def _of_layer(pixels: Bytes, alpha: Bytes, name: str) -> Reading | None:
    """Of a file with clear pixels; None for black and white, which are to be read on black."""
    shown = alpha > max(NOISE / 2, int(alpha.max()) / 2)
    opaque = float(shown.mean())
    if is_photograph(pixels, shown):
        _refuse(
            name,
            f"is a photograph of which {_percent(1 - opaque)} is transparent",
            "--mask-from alpha --invert-mask fills that part, --mask-from alpha the other",
        )
    if has_black_and_white(pixels, shown):
        return None
    if opaque > 0.5:
        _refuse(
            name,
            f"has one part of {_percent(opaque)} that is opaque and one of {_percent(1 - opaque)} that is transparent",
            "--mask-from alpha fills the opaque one, --mask-from alpha --invert-mask the other",
        )
    hole = with_faint_strokes(alpha, painted(alpha))
    return Reading(hole, f"{name} has a transparent background: what is painted on it is filled")


def _of_indices(indices: np.ndarray, pixels: Bytes, name: str) -> Reading | None:
    """Of a palette picture; None where its colours tell as much, or where its indices are no labels."""
    labels = exact_labels(indices)
    if labels is None or len(labels) < 2:
        return None
    colours = [colour_of(label, indices, pixels) for label in labels]
    greys = [int(colour[0]) for colour in colours if np.ptp(colour) <= COLOURED]
    if len(labels) == 2 and np.abs(colours[0] - colours[1]).max() > APART:
        return None
    if len(labels) > 2 and len(greys) == len(colours) and white_parts(sorted({0, *greys})):
        return None
    background = 0 if 0 in labels else max(labels, key=lambda label: int((indices == label).sum()))
    others = [label for label in labels if label != background]
    if len(others) > 1:
        shares = [f"{label} ({_percent(float((indices == label).mean()))})" for label in others]
        seen = f"has {len(others)} palette labels besides {background}, {_listed(shares)}"
        _refuse(name, seen, "fill one with --mask-from index:N")
    return Reading(indices != background, f"{name} tells its parts apart by palette index: {others[0]} is filled")


def _of_colours(pixels: Bytes, first: Colour | None, name: str) -> Reading:
    """Of a file that is not grey: strokes of one colour. ``first`` is the colour of a palette's index 0."""
    common = common_colour(pixels)
    distance = colour_distance(pixels, common)
    if distance.max() <= NOISE:
        _refuse(name, f"is {_named(common)} everywhere and marks nothing", "")
    other = typical(pixels, distance > 0.95 * nearly_largest(distance))
    amount, apart = along(pixels, common, other)
    strokes = int((distance > max(NOISE, float(distance.max()) / 2)).sum())
    if int(core(apart > OFF_LINE, 3).sum()) > 0.08 * strokes:
        seen = f"has more than one colour besides {_named(common)}"
        _refuse(name, seen, "take one channel with --mask-from red, green or blue")
    share = float((distance <= NOISE).mean())
    background = _background(common, other, share, first)
    if background is None:
        channel = CHANNELS[int(np.argmax(common - other))]
        _refuse(
            name,
            f"is {_named(common)} on {_percent(share)} of it and {_named(other)} on the rest",
            f"--mask-from {channel} fills the {_named(common)}, --mask-from {channel} --invert-mask the rest",
        )
    if background is other:
        common, other, amount = other, common, WHITE - amount
    return Reading(painted(amount), f"{name} has {_named(other)} strokes on {_named(common)}: the strokes are filled")


def _background(common: Colour, other: Colour, share: float, first: Colour | None) -> Colour | None:
    """Which of the two colours is not to be filled, where ``common`` covers ``share``; None if that is not certain.

    Strokes are coloured, and white where only the background is. Of two colours the background is the common one, or
    that of a palette's index 0, ``first``.
    """
    if not _coloured(common):
        return common
    if first is not None and np.abs(first - other).max() <= NOISE:
        return other
    if first is not None and np.abs(first - common).max() <= NOISE:
        return common
    if _coloured(other):
        return common if share > 0.6 else None
    if other.min() >= 192 and share > 0.8:  # white
        return common
    return other if share <= 0.5 else None


def _of_greys(values: Bytes, exact: np.ndarray, name: str) -> Reading:
    """Of brightness; ``exact`` are the same in the file's own depth, for they may be labels."""
    labels = exact_labels(exact)
    low, high = int(values.min()), int(values.max())
    if labels is not None and len(labels) == 2 and labels[0] == 0:
        hole: Mask = exact > labels[1] / 2
        return Reading(hole, _unless_white(int(values[hole][0]), f"{name} has the values 0 and {labels[1]}"))
    if labels is not None and len(labels) > 2 and labels[-1] <= MOST_LABELS:
        _refuse_levels(name, labels, exact=True)
    if high - low <= NOISE:
        return _of_one_level(low, high, values.shape, name)
    levels = flat_levels(values)
    if len(levels) == 1:  # the strokes are too thin or too soft to be flat anywhere
        levels = sorted([levels[0], high if high - levels[0] >= levels[0] - low else low])
    elif not levels:
        levels = [low, high]
    if len(levels) == 2:
        note = _unless_white(levels[1] if levels[0] <= NOISE else 0, f"{name} has the grey levels {_listed(levels)}")
        return Reading(values > sum(levels) / 2, note)
    if white_parts(levels):
        return Reading(values > WHITE / 2, f"{name} has the levels {_listed(levels)}: all above half are filled")
    if one_brush(levels):
        share = _percent((levels[1] - levels[0]) / (WHITE - levels[0]))
        note = f"{name} was painted with a brush of {share} white: all of it is filled"
        return Reading(values > (levels[0] + levels[1]) / 2, note)
    _refuse_levels(name, levels if labels is None else labels, exact=labels is not None)


def _of_one_level(low: int, high: int, shape: tuple[int, ...], name: str) -> Reading:
    if high > WHITE - NOISE:
        return Reading(np.ones(shape, bool))
    if low > 0:
        _refuse(name, f"is one grey ({high} of {WHITE}) everywhere and marks nothing", "")
    return Reading(np.zeros(shape, bool))


# Texts


def _refuse(name: str, seen: str, remedy: str, separator: str = ": ") -> NoReturn:
    save = "save the hole as white on black"
    raise UsageError(f"{name} {seen}{separator}{f'{remedy}, or {save}' if remedy else save}")


def _refuse_levels(name: str, levels: Sequence[int] | np.ndarray, exact: bool) -> NoReturn:
    one = "--mask-from index:N fills one, " if exact else ""
    _refuse(name, f"has {len(levels)} grey levels, {_listed(levels)}", f"{one}--mask-from luma those above half")


def _unless_white(level: float, seen: str) -> str:
    return "" if level > 0.9 * WHITE else f"{seen}: the brighter is filled"


def _listed(values: Sequence[object] | np.ndarray, most: int = 8) -> str:
    words = [str(value) for value in values]
    if len(words) > most:
        words = [*words[: most - 1], f"{len(words) - most + 1} more"]
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def _percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.01 else "under 1%"


def _coloured(colour: Colour) -> bool:
    return float(np.ptp(colour)) > COLOURED


def _named(colour: Colour) -> str:
    """A word for ``colour``, such as red, and its hexadecimal digits."""
    low, high = float(colour.min()), float(colour.max())
    if _coloured(colour):
        red, green, blue = (colour > (low + high) / 2).tolist()
        word = ("", "blue", "green", "cyan", "red", "magenta", "yellow")[4 * red + 2 * green + blue]
    else:
        word = "black" if high <= 64 else "white" if low >= 192 else "grey"
    digits = "".join(f"{round(float(channel)):02x}" for channel in colour)
    return f"{word} (#{digits})"
