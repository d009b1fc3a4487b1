"""Mask files: from what they hold to the pixels that are to be filled, turned as the picture is, inverted and grown.

White fills, but people mark holes in many other ways. ``read_hole`` decides in this order; each step either gives the
hole, with a note unless it is plain white on black, or refuses in one line that names the option which decides.

1. Alpha, where some pixels are clear and others are not: strokes on a transparent layer are the hole, whatever their
   colour. A photograph with a clear part is refused, since some programs mean the clear part and some the rest.
   Black and white on a transparent layer are composited on black, and go on.
2. A palette of two labels, where their colours do not say which is the background: the label that is not 0.
3. A photograph, also one that was drawn on, is refused.
4. Colours: strokes of one colour on black, white or grey are the hole. Several colours are refused.
5. Grey: the brighter of two levels is the hole, whatever they are (255, 1, or a brush at 40%). Of more levels all
   above half are the hole; others are refused.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import BinaryIO, NamedTuple, NoReturn

import numpy as np

from ..errors import UsageError
from . import mask_evidence as evidence
from .decoding import MAX_PIXELS, read_picture, upright
from .mask_evidence import NOISE, WHITE, Bytes, Colour
from .masks import Mask, threshold
from .masks import dilate as dilated
from .picture import Picture

CHANNELS = ("red", "green", "blue")
SOURCES = ("alpha", "luma", *CHANNELS)  # of --mask-from, besides index:N
_BACKGROUND = 0.8  # of the picture: what a colour must cover to be the background for certain
_MOSTLY = 0.5  # a mask that fills more of the picture may be meant the other way round


class MaskFile(NamedTuple):
    """The hole, bool (H, W), True where to fill, and notes on how the file was understood, a sentence each."""

    hole: Mask
    notes: tuple[str, ...]


def read_mask(
    path: str | os.PathLike[str],
    picture: Picture,
    invert: bool = False,
    dilate: float = 0,
    source: str | None = None,
    contents: BinaryIO | None = None,
    max_pixels: int = MAX_PIXELS,
) -> MaskFile:
    """Read the mask of ``picture`` from a file of any kind that ``pictures.read_picture`` reads.

    A mask without an orientation of its own that has the size of the picture before its EXIF orientation swapped its
    sides is turned as the picture was.

    Args:
        invert: fill the other part.
        dilate: grow the part to fill by so many pixels, after inverting.
        source: a value of --mask-from, see ``check_source``; None finds out.
        contents, max_pixels: as for ``read_picture``.

    Raises:
        MachineError, UsageError: as ``read_picture`` and ``read_hole``; also for another size than the picture's, and
            for ``dilate`` below 0.
    """
    name = f"mask {path}"
    drawn = read_picture(path, contents, max_pixels)
    samples, indices, notes = drawn.samples, drawn.indices, []
    swapped = samples.shape[1::-1] == picture.size[::-1] != picture.size
    if picture.orientation >= 5 and drawn.orientation == 1 and swapped:
        notes.append(f"{name} has the sides of the picture before its EXIF rotation: turned with it")
        samples = upright(samples, picture.orientation)
        indices = None if indices is None else upright(indices, picture.orientation)
    height, width = samples.shape[:2]
    if (width, height) != picture.size:
        size = f"{picture.size[0]}x{picture.size[1]}"
        raise UsageError(f"{name} is {width}x{height} and the picture is {size}", f"resize the mask to {size}")
    hole, note = read_hole(samples, name, source, indices)
    hole = ~hole if invert else hole
    notes += [note] if note else []
    if (share := float(hole.mean())) > _MOSTLY:
        advice = "leave out --invert-mask if white marks" if invert else "add --invert-mask if black marks"
        notes.append(f"{name} fills {share:.0%} of the picture: {advice} the hole")
    return MaskFile(dilated(hole, dilate), tuple(notes))


def check_source(text: str) -> str:
    """``text`` if it is a value of --mask-from: one of ``SOURCES``, or index:N.

    Raises:
        UsageError: it is neither.
    """
    kind, _, number = text.partition(":")
    if text in SOURCES or (kind == "index" and number.isascii() and number.isdigit()):
        return text
    raise UsageError(f"--mask-from {text} is unknown", f"choose {', '.join(SOURCES)}, or index:N such as index:1")


def read_hole(
    samples: np.ndarray, name: str, source: str | None = None, indices: np.ndarray | None = None
) -> tuple[Mask, str]:
    """The hole, bool (H, W), and a sentence on how it was read, empty for plain white on black.

    ``samples`` are as ``Picture.samples``, ``source`` is as for ``read_mask``, and ``indices`` (H, W) are a palette's.

    Raises:
        UsageError: the content may be meant in several ways, is no mask, or does not have what ``source`` names.
    """
    exact = samples[..., : 1 if samples.shape[2] < 3 else 3]
    pixels = evidence.eight_bits(exact)
    alpha = evidence.eight_bits(samples[..., -1]) if samples.shape[2] in (2, 4) else None
    if source is not None:
        if check_source(source).startswith("index:"):
            return _of_index(exact, indices, int(source.partition(":")[2]), name), ""
        return _of_channel(pixels, alpha, source, name), ""
    if alpha is not None:
        if alpha.max() == 0 and np.ptp(pixels) <= NOISE:  # a layer on which nothing was painted
            return np.zeros(alpha.shape, bool), ""
        if alpha.max() == 0:
            _refuse(name, "is transparent everywhere, but has colours", "fill by those with --mask-from luma")
        if alpha.max() <= NOISE:  # of 0 and 1, or all but invisible
            alpha = (alpha > int(alpha.max()) / 2) * np.uint8(WHITE)
        if alpha.min() <= NOISE / 2 and (hole := _of_layer(pixels, alpha, name)) is not None:
            return hole, f"{name} has a transparent background: what is painted on it is filled"
        if np.ptp(alpha) > NOISE:
            pixels = evidence.on_black(pixels, alpha)
    if indices is not None and (reading := _of_labels(indices, pixels, name)) is not None:
        return reading
    if evidence.is_photograph(pixels):
        seen = "looks like a photograph, perhaps one that was drawn on: are IMAGE and MASK swapped?"
        _refuse(name, seen, "--mask-from luma fills what is bright", separator=" ")
    if evidence.is_grey(pixels):
        return _of_greys(evidence.luma(pixels), exact[..., 0] if alpha is None else pixels[..., 0], name)
    return _of_colours(pixels, name)


# What the user chose


def _of_channel(pixels: Bytes, alpha: Bytes | None, source: str, name: str) -> Mask:
    if source == "alpha":
        if alpha is None or np.ptp(alpha) <= NOISE:
            has = "no alpha channel" if alpha is None else f"alpha {alpha.max()} everywhere"
            raise UsageError(f"{name} has {has}", "leave out --mask-from alpha")
        return evidence.painted(alpha)
    pixels = pixels if alpha is None else evidence.on_black(pixels, alpha)
    if source == "luma" or pixels.shape[2] == 1:
        return threshold(evidence.luma(pixels), name)
    channel = pixels[..., CHANNELS.index(source)]
    if evidence.common_colour(pixels).min() > WHITE / 2:  # on a white background: what of the channel is not white
        channel = channel - evidence.smallest(pixels)
    return threshold(channel, name)


def _of_index(exact: np.ndarray, indices: np.ndarray | None, number: int, name: str) -> Mask:
    values = exact[..., 0] if indices is None else indices
    if indices is None and (exact != values[..., None]).any():
        raise UsageError(f"{name} has colours and no palette", "--mask-from index:N needs a palette, or grey levels")
    hole: Mask = values == number
    if not hole.any():
        raise UsageError(f"{name} has no pixel of index {number}", f"it holds {_listed(np.unique(values))}")
    return hole


# The steps of the decision


def _of_layer(pixels: Bytes, alpha: Bytes, name: str) -> Mask | None:
    """Of a file with clear pixels; None for black and white, which are to be read on black."""
    shown = alpha > max(NOISE / 2, int(alpha.max()) / 2)
    opaque, clear = _percent(float(shown.mean())), _percent(1 - float(shown.mean()))
    if evidence.is_photograph(pixels, shown):
        options = "--mask-from alpha --invert-mask fills that part, --mask-from alpha the other"
        _refuse(name, f"is a photograph of which {clear} is transparent", options)
    if evidence.has_black_and_white(pixels, shown):
        return None
    if shown.mean() > 0.5:
        options = "--mask-from alpha fills the opaque one, --mask-from alpha --invert-mask the other"
        _refuse(name, f"has one part of {opaque} that is opaque and one of {clear} that is transparent", options)
    return evidence.painted(alpha)


def _of_labels(indices: np.ndarray, pixels: Bytes, name: str) -> tuple[Mask, str] | None:
    """Of a palette picture of two labels; None where its colours tell as much."""
    counts = evidence.value_counts(indices)
    labels = np.flatnonzero(counts).tolist()
    if len(labels) > 2 and np.ptp(pixels) <= NOISE:
        _refuse(name, f"has the palette labels {_listed(labels)} in one colour", "fill one with --mask-from index:N")
    if len(labels) != 2:
        return None
    common, rare = sorted(labels, key=lambda label: -counts[label])
    colours = [pixels[indices == label][0].astype(int) for label in (common, rare)]
    if np.abs(colours[0] - colours[1]).max() > evidence.APART and not _coloured(colours[0]):
        return None
    background = 0 if labels[0] == 0 else common
    other = rare if background == common else common
    return indices == other, f"{name} tells its parts apart by palette index: {other} is filled"


def _of_colours(pixels: Bytes, name: str) -> tuple[Mask, str]:
    """Of a file that is not grey: strokes of one colour on the common one, which is the background."""
    common = evidence.common_colour(pixels)
    distance = evidence.colour_distance(pixels, common)
    if distance.max() <= NOISE:
        _refuse(name, f"is {_named(common)} everywhere and marks nothing", "")
    other = evidence.far_colour(pixels, distance)
    amount, apart = evidence.along(pixels, common, other)
    strokes = int((distance > max(NOISE, float(distance.max()) / 2)).sum())
    if int(evidence.core(apart > evidence.OFF_LINE, 3).sum()) > 0.08 * strokes:
        seen = f"has more than one colour besides {_named(common)}"
        _refuse(name, seen, "take one with --mask-from red, green or blue, or index:N of a palette")
    share = float((distance <= NOISE).mean())
    if _coloured(common) and share <= _BACKGROUND:
        channel = CHANNELS[int(np.argmax(common - other))]
        _refuse(
            name,
            f"is {_named(common)} on {_percent(share)} of it and {_named(other)} on the rest",
            f"--mask-from {channel} fills the {_named(common)}, --mask-from {channel} --invert-mask the rest",
        )
    note = f"{name} has {_named(other)} strokes on {_named(common)}: the strokes are filled"
    return evidence.painted(amount), note


def _of_greys(values: Bytes, exact: np.ndarray, name: str) -> tuple[Mask, str]:
    """Of brightness; ``exact`` are the same in the file's own depth, for they may be labels."""
    labels = np.flatnonzero(evidence.value_counts(exact)).tolist()
    low, high = int(values.min()), int(values.max())
    if len(labels) == 2 and labels[0] == 0:
        note = f"{name} has the values 0 and {labels[1]}: the brighter is filled"
        return exact > labels[1] / 2, "" if high > 0.9 * WHITE else note
    if len(labels) > 2 and labels[-1] <= evidence.MOST_LABELS:
        _refuse_levels(name, labels)
    if high - low <= NOISE:
        if low > 0 and high <= WHITE - NOISE:
            _refuse(name, f"is one grey ({high} of {WHITE}) everywhere and marks nothing", "")
        return np.full(values.shape, high > WHITE - NOISE), ""
    levels = evidence.flat_levels(values) or [low, high]
    if len(levels) == 1:  # the strokes are too thin or too soft to be flat anywhere
        levels = sorted([levels[0], high if high - levels[0] >= levels[0] - low else low])
    if len(levels) == 2:
        note = f"{name} has the grey levels {_listed(levels)}: the brighter is filled"
        return values > sum(levels) / 2, "" if levels[0] <= NOISE and levels[1] > 0.9 * WHITE else note
    if levels[0] <= WHITE / 2 < levels[1]:
        return values > WHITE / 2, f"{name} has the levels {_listed(levels)}: all above half are filled"
    _refuse_levels(name, levels)


def _coloured(colour: np.ndarray) -> bool:
    return float(np.ptp(colour)) > evidence.COLOURED


# Texts


def _refuse(name: str, seen: str, remedy: str, separator: str = ": ") -> NoReturn:
    save = "save the hole as white on black"
    advice = f"{remedy}, or {save}" if remedy else save
    raise UsageError(f"{name} {seen}", advice) if separator == ": " else UsageError(f"{name} {seen}{separator}{advice}")


def _refuse_levels(name: str, levels: Sequence[int]) -> NoReturn:
    options = "--mask-from index:N fills one, --mask-from luma those above half"
    _refuse(name, f"has {len(levels)} grey levels, {_listed(levels)}", options)


def _listed(values: Sequence[object] | np.ndarray) -> str:
    words = [str(value) for value in values]
    if len(words) > 8:
        words = [*words[:7], f"{len(words) - 7} more"]
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def _percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.01 else "under 1%"


def _named(colour: Colour) -> str:
    """A word for ``colour``, such as red, and its hexadecimal digits."""
    low, high = float(colour.min()), float(colour.max())
    word = "black" if high <= 64 else "white" if low >= 192 else "grey"
    if _coloured(colour):
        red, green, blue = (colour > (low + high) / 2).tolist()
        word = ("", "blue", "green", "cyan", "red", "magenta", "yellow")[4 * red + 2 * green + blue]
    return f"{word} (#{''.join(f'{round(float(channel)):02x}' for channel in colour)})"
