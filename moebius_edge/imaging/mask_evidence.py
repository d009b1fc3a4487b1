"""What can be seen in a mask file: its flat levels, its colours and paint, and photographs.

Distances are in levels of 255, and the samples are in 8 bits unless they are said to be of any depth.
"""

from __future__ import annotations

import functools
import math

import cv2
import numpy as np
import numpy.typing as npt

from .masks import Mask

Bytes = npt.NDArray[np.uint8]
Colour = npt.NDArray[np.float32]

NOISE = 16  # around a flat colour, as JPEG leaves it
APART = 24  # between two flat parts that are two levels of their own
COLOURED = 32  # between the largest and the smallest channel of a colour that is no grey
MOST_LABELS = 64  # of greys no brighter than this each is a label
WHITE = 255
OFF_LINE = 48  # of a pixel from the mixtures of two colours: JPEG's edges reach about 40

# What is a photograph: any row of (flat below, between at least, roughness at least), which ``is_photograph`` explains.
# They find all of 400 photographs, and mistake two of 2400 generated masks for one, both of 150 pixels a side.
_PHOTOGRAPHS = (
    *((0.15, 0, 0), (0.25, 0.05, 0.34), (0.35, 0.01, 0.7)),
    *((0.6, 0.35, 0.4), (0.6, 0.2, 1.2), (0.6, 0.02, 2), (0.65, 0.2, 3)),
)


def eight_bits(values: np.ndarray) -> Bytes:
    """In 8 bits. 16-bit samples that all fit into 8 are taken as such; no value but 0 becomes 0."""
    if values.dtype == np.uint8 or values.max(initial=0) <= WHITE:
        return values.astype(np.uint8, copy=False)
    white = 65535 if values.max() > 4095 else 2 ** int(values.max()).bit_length() - 1  # of 10 or 12 bits in 16
    return np.maximum((values.astype(np.uint32) * 510 + white) // (2 * white), values > 0).astype(np.uint8)


def luma(pixels: Bytes) -> Bytes:
    """ITU-R BT.601 brightness, (H, W)."""
    return pixels[..., 0] if pixels.shape[2] == 1 else np.asarray(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY))


def on_black(pixels: Bytes, alpha: Bytes) -> Bytes:
    return ((pixels.astype(np.uint16) * alpha[..., None] + 127) // 255).astype(np.uint8)


def largest(pixels: Bytes) -> Bytes:
    """The largest channel, (H, W)."""
    return functools.reduce(np.maximum, np.moveaxis(pixels, 2, 0))


def smallest(pixels: Bytes) -> Bytes:
    return functools.reduce(np.minimum, np.moveaxis(pixels, 2, 0))


def core(where: Mask, side: int) -> Mask:
    """The centres of the squares of ``side`` pixels that lie within ``where``."""
    return np.asarray(cv2.erode(where.view(np.uint8), np.ones((side, side), np.uint8))).astype(bool)


def _spread(values: np.ndarray) -> np.ndarray:
    """The largest minus the smallest value of each 3x3 square; 0 where the file is flat."""
    square = np.ones((3, 3), np.uint8)
    return np.asarray(cv2.subtract(cv2.dilate(values, square), cv2.erode(values, square)))


def value_counts(values: np.ndarray, where: Mask | None = None) -> npt.NDArray[np.float32]:
    """How many pixels of ``values`` (H, W), of any depth, have each value."""
    length = int(np.iinfo(values.dtype).max) + 1
    mask = None if where is None else where.view(np.uint8)
    counts = cv2.calcHist([np.ascontiguousarray(values)], [0], mask, [length], [0, length])
    return np.asarray(counts, np.float32).ravel()


def flat_levels(values: Bytes) -> list[int]:
    """The levels of the flat parts, rising: the background and the strokes, but no level of their edges."""
    flat = value_counts(values, _spread(values) <= 2)
    every, window = (np.convolve(counts, np.ones(13), "same") for counts in (value_counts(values), flat))
    window[2 * window < every] = 0
    least = max(16.0, 0.03 * (flat.sum() - window.max()))
    peaks: list[int] = []
    for level in np.argsort(-window, kind="stable").tolist():
        between = (window[min(level, peak) : max(level, peak) + 1].min() for peak in peaks)
        apart = all(abs(level - peak) >= APART for peak in peaks) and all(2 * b <= window[level] for b in between)
        if window[level] >= least and apart:
            peaks.append(level)
    near = [np.arange(max(0, peak - 6), min(256, peak + 7)) for peak in sorted(peaks)]
    return [round(float(np.average(levels, weights=flat[levels]))) for levels in near]


def painted(amount: Bytes) -> Mask:
    """Where there is paint, by its amount from 0 to 255: more than half of the faintest flat part of the strokes.

    Strokes without a flat part are cut at half of the strongest paint.
    """
    levels = [level for level in flat_levels(amount) if level > NOISE]
    return np.asarray(amount > (levels[0] if levels else int(amount.max())) / 2)


def common_colour(pixels: Bytes) -> Colour:
    """The most frequent colour, (3,), of about a million of the pixels."""
    thin = max(1, int(math.sqrt(pixels.shape[0] * pixels.shape[1] / 1e6)))
    few = np.ascontiguousarray(pixels[::thin, ::thin])
    bins = cv2.calcHist([few], [0, 1, 2], None, [16] * 3, [0, 256] * 3)
    place = np.array(np.unravel_index(int(bins.argmax()), bins.shape))
    return np.asarray(np.median(few[(few >> 4 == place).all(axis=2)], axis=0), np.float32)


def far_colour(pixels: Bytes, distance: Bytes) -> Colour:
    """The colour of the pixels at the largest ``distance`` (H, W) from the background's."""
    # JPEG leaves single pixels beyond the farthest colour: one in two hundred of those off the background.
    off = np.cumsum(value_counts(distance)[NOISE + 1 :])
    far = NOISE + 1 + int(np.searchsorted(off, 0.995 * off[-1]))
    return np.asarray(np.median(pixels[distance > 0.95 * far], axis=0), np.float32)


def colour_distance(pixels: Bytes, colour: Colour) -> Bytes:
    """The largest difference of a channel, in levels, (H, W)."""
    levels = np.rint(colour).astype(np.uint8)
    return largest(np.maximum(pixels, levels) - np.minimum(pixels, levels))


def along(pixels: Bytes, start: Colour, end: Colour) -> tuple[Bytes, Bytes]:
    """How far each pixel is from ``start`` (0) to ``end`` (255), and its distance in levels from that line."""
    way = end - start
    weights = np.append(way, -(way @ start)) * (WHITE / (way @ way))
    amount = np.asarray(cv2.transform(pixels, weights[None].astype(np.float32)), np.uint8)
    mixture = cv2.transform(amount, np.stack([way / WHITE, start], axis=1).astype(np.float32))
    return amount, largest(np.asarray(cv2.absdiff(pixels, mixture), np.uint8))


def is_grey(pixels: Bytes) -> bool:
    if pixels.shape[2] == 1:
        return True
    coloured = int(np.count_nonzero(largest(pixels) - smallest(pixels) > COLOURED))
    painted = coloured and int(np.count_nonzero(colour_distance(pixels, common_colour(pixels)) > COLOURED))
    return coloured < 0.1 * painted or coloured == 0


def has_black_and_white(pixels: Bytes, shown: Mask) -> bool:
    visible = pixels[shown][None]
    if not visible.size or not is_grey(visible):
        return False
    grey = luma(visible)
    return min(float((grey < 64).mean()), float((grey > 191).mean())) > 0.01


def is_photograph(pixels: Bytes, shown: Mask | None = None) -> bool:
    """Whether ``pixels`` are a photograph, by their brightness once they are reduced to about 900 pixels a side.

    Masks have little else than flat squares of 3x3 equal pixels, but for soft edges and what JPEG does to edges.
    Between their flat levels they have narrow or smooth areas alone, which the 3x3 mean hardly changes. With ``shown``,
    only those pixels count, and they must be rough: colours painted over each other on a layer are smooth.
    """
    grey = luma(pixels)
    if shown is None and grey.size >= 4096 and np.count_nonzero(value_counts(grey)) == 2:
        return float((cv2.medianBlur(grey, 3) != grey).mean()) > 0.08  # dithered: dots all over
    where = np.ones(grey.shape, np.uint8) if shown is None else shown.view(np.uint8)
    if (reduce := max(1, max(grey.shape) // 900)) > 1:
        size = (-(-grey.shape[1] // reduce), -(-grey.shape[0] // reduce))
        grey = np.asarray(cv2.resize(grey, size, interpolation=cv2.INTER_AREA))
        where = np.asarray(cv2.resize(where, size, interpolation=cv2.INTER_NEAREST), np.uint8)
    seen = where.astype(bool) if shown is None else core(where.astype(bool), 3)
    if np.count_nonzero(value_counts(grey, seen)) < 12:
        return False
    between = seen.copy()
    for level in flat_levels(grey):
        between &= np.abs(grey.astype(np.int16) - level) > 12
    deep = core(between, 5)
    brightness = grey.astype(np.float32)
    rough = float(np.abs(brightness - cv2.blur(brightness, (3, 3)))[deep].mean()) if deep.any() else 0.0
    flat, share = float((_spread(grey)[seen] == 0).mean()), float(deep.sum() / seen.sum())
    return (shown is None or rough >= 0.7) and any(flat < f and share >= b and rough >= r for f, b, r in _PHOTOGRAPHS)
