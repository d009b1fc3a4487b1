"""Which squares of a picture the network sees, and what it sees there.

Every function touches only the windows it needs, so a small hole in a large photograph is cheap. Pictures
come as (H, W, C) arrays of uint8 or uint16 with C = 1 or 3, the network's side is float32 RGB in [0, 1]. What
comes back from the network is ``stitching``'s business.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

from .classical import telea
from .masks import Mask, bounds

Box = tuple[int, int, int, int]  # top, left, bottom, right; ends exclusive
Floats = npt.NDArray[np.float32]

_LEAST_CONTEXT = 1 / 8  # of the model's resolution, on every side of the smallest hole
_TIGHT = 1.25  # a hole nearly as large as its picture gets a crop this much larger, not twice as large


@dataclass(frozen=True)
class Region:
    """A square crop and the hole in it, in pixels of the picture.

    Attributes:
        top, left, side: the square. Where the picture is smaller, it reaches beyond the picture on both
            sides; those pixels are reflected.
        hole: bounding box of the masked pixels. No other region's square overlaps this one's.
    """

    top: int
    left: int
    side: int
    hole: Box

    def room(self, height: int, width: int) -> int:
        """Least distance from the hole to an edge of the square that is not the picture's edge as well."""
        top, left, bottom, right = self.hole
        below, beside = self.top + self.side, self.left + self.side
        distances = (
            (top - self.top, self.top > 0),
            (left - self.left, self.left > 0),
            (below - bottom, below < height),
            (beside - right, beside < width),
        )
        return min((distance for distance, counts in distances if counts), default=self.side)


def plan_regions(mask: Mask, resolution: int) -> list[Region]:
    """Squares round the connected parts of ``mask``, none overlapping another, ordered by top and left.

    A hole of up to half the resolution gets a square of exactly ``resolution``, which the network sees at
    native scale. A larger one gets as much context on every side as half its own length, so that its square
    is twice as large and is scaled down; less where the picture has no more to give. Holes whose squares
    would overlap are taken together until none do.
    """
    height, width = mask.shape
    holes: list[tuple[Box, int]] = []
    squares = np.empty((0, 3), np.int64)  # of ``holes``, row by row: top, left, side
    for box in _parts(mask, max(1, int(resolution * _LEAST_CONTEXT))):
        longest = max(box[2] - box[0], box[3] - box[1])
        context = max(longest // 2, math.ceil(resolution * _LEAST_CONTEXT))
        while True:
            square = _square(box, context, height, width, resolution)
            hit = _overlapping(square, squares)
            if not hit.any():
                break
            merged = [holes[i] for i in np.flatnonzero(hit)]
            holes = [holes[i] for i in np.flatnonzero(~hit)]
            squares = squares[~hit]
            for other, its_context in merged:
                box, context = _union(box, other), max(context, its_context)
        holes.append((box, context))
        squares = np.vstack([squares, square])
    regions = [
        Region(top, left, side, hole) for (top, left, side), (hole, _) in zip(squares.tolist(), holes, strict=True)
    ]
    return sorted(regions, key=lambda r: (r.top, r.left))


def extract(pixels: np.ndarray, region: Region, resolution: int) -> Floats:
    """The square as the network sees it: RGB in [0, 1], (resolution, resolution, 3); grey is repeated."""
    window = _window(pixels, region)
    scaled = window.astype(np.float32)
    if region.side != resolution:  # averaged in the samples' own type: a large window as floats is very large
        scaled = np.asarray(cv2.resize(window, (resolution, resolution), interpolation=cv2.INTER_AREA), np.float32)
    scaled = scaled.reshape(resolution, resolution, -1) / np.float32(np.iinfo(pixels.dtype).max)
    return np.repeat(scaled, 3, axis=2) if scaled.shape[2] == 1 else scaled


def extract_mask(mask: Mask, region: Region, resolution: int) -> Mask:
    """The hole as the network sees it, (resolution, resolution).

    Scaled down, a pixel is in the hole if anything of it is, so that nothing under the mask shows through.
    """
    window = _window(mask, region)
    if region.side == resolution:
        return window
    size = (resolution, resolution)
    return np.asarray(cv2.resize(window.astype(np.float32), size, interpolation=cv2.INTER_AREA)) > 0


def prefill(image: Floats, hole: Mask) -> Floats:
    """``image`` (H, W, 3 in [0, 1]), its hole filled by Telea's fast marching (OpenCV), the rest as it was.

    It works on 8 bits, ample for what is noised afterwards. A hole without surroundings turns mid-grey.
    """
    filled = image.copy()
    if hole.all():
        filled[...] = 0.5
    elif hole.any():
        bytes_ = np.rint(image * 255).astype(np.uint8)
        filled[hole] = telea(bytes_, hole)[hole].astype(np.float32) / 255
    return filled


def _parts(mask: Mask, cell: int) -> list[Box]:
    """Bounding boxes of the connected parts of ``mask``.

    Found on a grid of ``cell`` pixels, so that noise with a million parts costs no more than a clean mask.
    Parts in neighbouring cells count as one; with a cell no wider than the least context of a hole, their
    squares would overlap anyway.
    """
    outer = bounds(mask)
    if outer is None:
        return []
    top, left, bottom, right = outer
    inner = mask[top:bottom, left:right]
    # np.logical_or.reduceat would say this in a word, and take fifty times as long
    rows = np.stack([inner[y : y + cell].any(axis=0) for y in range(0, inner.shape[0], cell)])
    grid = np.stack([rows[:, x : x + cell].any(axis=1) for x in range(0, inner.shape[1], cell)], axis=1)
    _, _, stats, _ = cv2.connectedComponentsWithStats(grid.view(np.uint8), connectivity=8)
    boxes = []
    for x, y, w, h in stats[1:, :4].tolist():  # row 0 is the background
        y0, x0 = top + y * cell, left + x * cell
        tight = bounds(mask[y0 : y0 + h * cell, x0 : x0 + w * cell])
        assert tight is not None  # every cell of a part has a masked pixel
        boxes.append((y0 + tight[0], x0 + tight[1], y0 + tight[2], x0 + tight[3]))
    return boxes


def _square(box: Box, context: int, height: int, width: int, resolution: int) -> tuple[int, int, int]:
    """(top, left, side) of the square for a hole: inside the picture wherever the picture is large enough."""
    top, left, bottom, right = box
    longest = max(bottom - top, right - left)
    available = max(min(height, width), math.ceil(_TIGHT * longest))
    side = max(resolution, min(longest + 2 * context, available, max(height, width)))
    return _placed(top, bottom, side, height), _placed(left, right, side, width), side


def _placed(start: int, end: int, side: int, length: int) -> int:
    """Where ``side`` begins: centred on start..end but inside 0..length, or if longer, centred on that."""
    if side >= length:
        return -((side - length) // 2)
    return min(max(0, (start + end - side) // 2), length - side)


def _overlapping(square: tuple[int, int, int], squares: npt.NDArray[np.int64]) -> Mask:
    top, left, side = square
    tops, lefts, sides = squares.T
    return (tops < top + side) & (top < tops + sides) & (lefts < left + side) & (left < lefts + sides)


def _union(a: Box, b: Box) -> Box:
    return min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3])


def _window(array: np.ndarray, region: Region) -> np.ndarray:
    """The square of ``array``, a view where it lies inside; a mask is reflected as its picture is."""
    for axis, start in enumerate((region.top, region.left)):
        end, length = start + region.side, array.shape[axis]
        inside = start >= 0 and end <= length
        index = slice(start, end) if inside else _reflected(start, region.side, length)
        array = array[index] if axis == 0 else array[:, index]
    return array


def _reflected(start: int, count: int, length: int) -> npt.NDArray[np.int64]:
    """Indices start, start + 1, .. folded into 0..length - 1 the edge not repeated."""
    if length == 1:
        return np.zeros(count, np.int64)
    period = 2 * (length - 1)
    folded = np.abs(np.arange(start, start + count)) % period
    return np.minimum(folded, period - folded)
