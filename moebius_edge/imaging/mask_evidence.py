"""What can be seen in a mask file: its flat levels and labels, its colours, paint and its edges, and photographs.

Distances are in levels of 255, and the samples are in 8 bits unless they are said to be of any depth.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from .masks import Mask, distance_outside

Bytes = npt.NDArray[np.uint8]
Colour = npt.NDArray[np.float32]

NOISE = 16  # around a flat colour, as JPEG leaves it
APART = 24  # between two flat parts that are two levels of their own
COLOURED = 32  # between the largest and the smallest channel of a colour that is no grey
OFF_LINE = 48  # of a pixel from the mixtures of two colours: JPEG's edges reach about 40
MOST_LABELS = 64  # distinct values; an antialiased mask may have as many as 256
WHITE = 255


def eight_bits(values: np.ndarray) -> Bytes:
    """In 8 bits. 16-bit samples that all fit into 8 are taken as such; no value but 0 becomes 0."""
    if values.dtype == np.uint8:
        return values
    if values.max(initial=0) <= WHITE:
        return values.astype(np.uint8)
    white = 65535 if values.max() > 4095 else 2 ** int(values.max()).bit_length() - 1  # of 10 or 12 bits in 16
    return np.maximum((values.astype(np.uint32) * 510 + white) // (2 * white), values > 0).astype(np.uint8)


def luma(pixels: Bytes) -> Bytes:
    """ITU-R BT.601 brightness, (H, W)."""
    return pixels[..., 0] if pixels.shape[2] == 1 else np.asarray(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY))


def channels_of(pixels: Bytes) -> Bytes:
    """(H, W, C) as (C, H, W), without a copy."""
    return np.moveaxis(pixels, 2, 0)


def _largest(channels: Iterable[np.ndarray]) -> np.ndarray:
    return functools.reduce(np.maximum, channels)


def smallest(channels: Iterable[np.ndarray]) -> np.ndarray:
    return functools.reduce(np.minimum, channels)


def on_black(pixels: Bytes, alpha: Bytes) -> Bytes:
    return ((pixels.astype(np.uint16) * alpha[..., None] + 127) // 255).astype(np.uint8)


def core(where: Mask, side: int) -> Mask:
    """The centres of the squares of ``side`` pixels that lie within ``where``."""
    return np.asarray(cv2.erode(where.view(np.uint8), np.ones((side, side), np.uint8))).astype(bool)


def _spread(values: np.ndarray) -> np.ndarray:
    """The largest minus the smallest value of each 3x3 square; 0 where the file is flat."""
    square = np.ones((3, 3), np.uint8)
    return np.asarray(cv2.subtract(cv2.dilate(values, square), cv2.erode(values, square)))


def _counts(values: np.ndarray, where: Mask | None = None) -> npt.NDArray[np.int64]:
    """How many pixels have each value, row by row in blocks, for bincount makes eight bytes of each pixel."""
    length = int(values.max(initial=0)) + 1
    total = np.zeros(length, np.int64)
    for top in range(0, values.shape[0], 256):
        block = values[top : top + 256]
        block = block.ravel() if where is None else block[where[top : top + 256]]
        total += np.bincount(block, minlength=length)
    return total


def exact_labels(values: np.ndarray) -> list[int] | None:
    """The values of a picture that consists of few, each in flat areas or one of two; None for any other."""
    counts = _counts(values)
    used = np.flatnonzero(counts)
    if len(used) <= 2:
        return [int(value) for value in used]
    if len(used) > MOST_LABELS:
        return None
    flat = np.zeros_like(counts)
    inside = _counts(values, _spread(values) == 0)
    flat[: len(inside)] = inside
    labels = [int(value) for value in used if 5 * flat[value] >= counts[value]]
    painted = counts.sum() - counts.max()
    edges = counts.sum() - counts[labels].sum() if labels else painted
    return labels if len(labels) > 1 and edges <= 0.1 * painted else None


def flat_levels(values: Bytes) -> list[int]:
    """The levels of the flat parts, rising: the background and the strokes, but no level of their edges."""
    counts, flat = np.zeros(256), np.zeros(256)
    for into, found in ((counts, _counts(values)), (flat, _counts(values, _spread(values) <= 2))):
        into[: len(found)] = found
    every, window = (np.convolve(each, np.ones(13), "same") for each in (counts, flat))
    window[2 * window < every] = 0
    counts = flat
    order = np.argsort(-window, kind="stable")
    least = max(16.0, 0.03 * (counts.sum() - window[order[0]]))
    peaks: list[int] = []
    for level in (int(level) for level in order if window[level] >= least):
        between = (window[min(level, peak) : max(level, peak) + 1].min() for peak in peaks)
        if all(abs(level - peak) >= APART for peak in peaks) and all(2 * b <= window[level] for b in between):
            peaks.append(level)
    near = [np.arange(max(0, peak - 6), min(256, peak + 7)) for peak in sorted(peaks)]
    return [round(float(np.average(levels, weights=counts[levels]))) for levels in near]


def painted(amount: Bytes) -> Mask:
    """Where there is paint, by its amount from 0 to 255: more than half of what the stroke has where it is flat.

    Fainter strokes are looked for last: what has as much paint is theirs if it is nearer to them than to a stronger
    one, of which it would be the soft edge.
    """
    top = int(amount.max())
    levels = [level for level in flat_levels(amount) if level > max(NOISE, top / 10)] or [top]
    hole: Mask = amount > levels[-1] / 2
    for level, stronger in reversed(list(itertools.pairwise(levels))):
        strong = amount > (level + stronger) / 2
        faint = (amount > level / 2) & ~strong
        hole |= faint & (distance_outside(faint & (_spread(amount) <= 2)) <= distance_outside(strong))
    return hole


def with_faint_strokes(amount: Bytes, hole: Mask) -> Mask:
    """``hole`` and the strokes that lie apart from it, which it lacks because others are stronger."""
    trace = amount > NOISE / 2
    count, components = cv2.connectedComponents(trace.view(np.uint8))
    places = np.asarray(components, np.int32)
    faint = np.ones(count, bool)
    faint[0] = False
    faint[places[hole]] = False
    if not faint.any():
        return hole
    most = np.zeros(count, np.uint8)
    np.maximum.at(most, places[trace], amount[trace])
    return hole | (faint[places] & (amount > most[places] / 2))


def white_parts(levels: Sequence[int]) -> bool:
    """Whether all levels but the darkest are above half: then white and not black are the same."""
    return levels[0] <= WHITE / 2 < levels[1]


def one_brush(levels: Sequence[int]) -> bool:
    """Whether the levels are those of one translucent white brush, laid over itself 1, 2, 3, ... times."""
    dark, once = levels[0], levels[1]
    clear = (WHITE - once) / (WHITE - dark)
    expected = [WHITE - (WHITE - dark) * clear**times for times in range(len(levels))]
    return all(abs(level - right) <= 4 for level, right in zip(levels, expected, strict=True))


def common_colour(pixels: Bytes) -> Colour:
    """The most frequent colour, (3,)."""
    few = np.ascontiguousarray(_thinned(pixels))
    bins = cv2.calcHist([few], [0, 1, 2], None, [16] * 3, [0, 256] * 3)
    place = np.array(np.unravel_index(int(bins.argmax()), bins.shape))
    return typical(few, (few >> 4 == place).all(axis=2))


def typical(pixels: Bytes, where: Mask) -> Colour:
    """The median of the pixels; in a large picture, of some of them."""
    if np.count_nonzero(_thinned(where)) >= 1000:
        pixels, where = _thinned(pixels), _thinned(where)
    return np.asarray(np.median(pixels[where], axis=0), np.float32)


def _thinned(array: np.ndarray) -> np.ndarray:
    """Every so many rows and columns, about a million pixels."""
    every = max(1, int(math.sqrt(array.shape[0] * array.shape[1] / 1e6)))
    return array[::every, ::every]


def nearly_largest(distance: Bytes) -> float:
    """What one in two hundred of the pixels off the background exceed: JPEG leaves single pixels beyond it."""
    counts = _counts(distance)
    counts[: min(NOISE + 1, len(counts) - 1)] = 0
    return float(np.searchsorted(np.cumsum(counts), 0.995 * counts.sum()))


def colour_distance(pixels: Bytes, colour: Colour) -> Bytes:
    """The largest difference of a channel, in levels, (H, W)."""
    levels = np.rint(colour).astype(np.uint8)
    return _largest(np.maximum(p, c) - np.minimum(p, c) for p, c in zip(channels_of(pixels), levels, strict=True))


def along(pixels: Bytes, start: Colour, end: Colour) -> tuple[Bytes, Bytes]:
    """How far each pixel is from ``start`` (0) to ``end`` (255), and its distance in levels from that line."""
    way = end - start
    weights = np.append(way, -(way @ start)) * (WHITE / (way @ way))
    amount = np.asarray(cv2.transform(pixels, weights[None].astype(np.float32)), np.uint8)
    apart = np.empty_like(amount)
    for top in range(0, len(amount), 512):  # in blocks, for the mixtures are as large as the picture
        rows = np.s_[top : top + 512]
        mixture = cv2.transform(amount[rows], np.stack([way / WHITE, start], axis=1).astype(np.float32))
        apart[rows] = _largest(channels_of(np.asarray(cv2.absdiff(pixels[rows], mixture), np.uint8)))
    return amount, apart


def colour_of(index: int, indices: np.ndarray, pixels: Bytes) -> Colour:
    """The colour of a palette's index, one that some pixel has."""
    return pixels[divmod(int((indices == index).argmax()), indices.shape[1])].astype(np.float32)


def is_grey(pixels: Bytes) -> bool:
    if pixels.shape[2] == 1:
        return True
    channels = channels_of(pixels)
    coloured = int(np.count_nonzero(cv2.subtract(_largest(channels), smallest(channels)) > COLOURED))
    if coloured == 0:
        return True
    return coloured < 0.1 * int(np.count_nonzero(colour_distance(pixels, common_colour(pixels)) > COLOURED))


def has_black_and_white(pixels: Bytes, shown: Mask) -> bool:
    visible = pixels[shown]
    if not len(visible) or not is_grey(visible[None]):
        return False
    grey = luma(visible[None])
    return min(float((grey < 64).mean()), float((grey > 191).mean())) > 0.01


# What is a photograph: any row of (flat below, between at least, roughness at least), of ``_Texture``. They find all of
# 400 photographs, and of 2400 generated masks, soft and JPEG ones too, they mistake two, of 150 pixels a side, for one.
_PHOTOGRAPHS = (
    *((0.15, 0, 0), (0.25, 0.05, 0.34), (0.35, 0.01, 0.7)),
    *((0.6, 0.35, 0.4), (0.6, 0.2, 1.2), (0.6, 0.02, 2), (0.65, 0.2, 3)),
)


class _Texture(NamedTuple):
    """Shares of a picture's pixels, and how rough it is.

    Attributes:
        flat: of 3x3 pixels that are all equal. Masks have little else, but for soft edges and what JPEG does to edges.
        between: inside of areas with other levels than the flat ones. Such areas are narrow or smooth in masks.
        roughness: mean distance in these areas from the 3x3 mean, in levels of 255.
        levels: how many there are.
    """

    flat: float
    between: float
    roughness: float
    levels: int


def _texture(grey: Bytes, shown: Mask | None) -> _Texture:
    """Of brightness, of the pixels ``shown`` alone if given, once it is reduced to about 900 pixels."""
    reduce = max(1, max(grey.shape) // 900)
    if reduce > 1:
        size = (-(-grey.shape[1] // reduce), -(-grey.shape[0] // reduce))
        grey = np.asarray(cv2.resize(grey, size, interpolation=cv2.INTER_AREA))
        if shown is not None:
            shown = cv2.resize(shown.view(np.uint8), size, interpolation=cv2.INTER_NEAREST).astype(bool)
    where = np.ones(grey.shape, bool) if shown is None else core(shown, 3)
    if not where.any():
        return _Texture(1.0, 0.0, 0.0, 0)
    between = where.copy()
    for level in flat_levels(grey):
        between &= np.abs(grey.astype(np.int16) - level) > 12
    deep = core(between, 5)
    brightness = grey.astype(np.float32)
    rough = np.abs(brightness - cv2.blur(brightness, (3, 3)))[deep]
    return _Texture(
        flat=float((_spread(grey)[where] == 0).mean()),
        between=float(deep.sum() / where.sum()),
        roughness=float(rough.mean()) if rough.size else 0.0,
        levels=int(np.count_nonzero(_counts(grey, where))),
    )


def is_photograph(pixels: Bytes, shown: Mask | None = None) -> bool:
    """Whether ``pixels`` are a photograph. With ``shown``, only those pixels count, and all must be rough: colours that
    were painted over each other on a layer are smooth."""
    grey = luma(pixels)
    seen = _texture(grey, shown)
    if shown is None and grey.size >= 4096 and np.count_nonzero(_counts(grey)) == 2:
        return float((cv2.medianBlur(grey, 3) != grey).mean()) > 0.08  # dithered: dots all over
    if seen.levels < 12 or (shown is not None and seen.roughness < 0.7):
        return False
    return any(seen.flat < f and seen.between >= b and seen.roughness >= r for f, b, r in _PHOTOGRAPHS)
