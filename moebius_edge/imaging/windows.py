"""Which squares of a picture the network sees, in which order, and what it sees in them.

A mask is covered by square windows. Most have the network's own resolution, so that a wire across a large photograph
is filled at the photograph's own sharpness; only a hole that is too large for such a window gets a larger one, which
is scaled down. The windows are filled one after the other, and each sees what the earlier ones have filled. Every
function touches only the pixels of its window, so a small hole in a large photograph is cheap.

Pictures are arrays (H, W, C) of uint8 or uint16 with C = 1 or 3; the network's side is float32 RGB in [0, 1]. How a
fill is blended into the picture is in ``stitching``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import cv2
import numpy as np
import numpy.typing as npt

from .classical import telea
from .masks import Mask, bounds

Box = tuple[int, int, int, int]  # top, left, bottom, right; ends exclusive
Floats = npt.NDArray[np.float32]

_MARGIN = 1 / 8  # of a window's side: the least context between a pixel to fill and the window's edge
_COMPACT = 3  # a hole at most this many times as long as it is thick is filled in one piece
_TIGHT = 1.25  # a hole nearly as large as its picture gets a window this much larger, not twice as large
_CELLS = 32  # the thickness of holes is measured on a grid of this many cells to the network's resolution


@dataclass(frozen=True)
class Window:
    """A square of the picture that goes through the network once, in pixels of the picture.

    Attributes:
        top, left, side: the square. Where the picture is smaller, it reaches beyond the picture on both sides;
            those pixels are reflected.
        fills: the box of the pixels that this window fills: those of the mask in it that no earlier window fills.
    """

    top: int
    left: int
    side: int
    fills: Box

    def room(self, height: int, width: int) -> int:
        """The least distance from ``fills`` to an edge of the square that is not the picture's edge as well."""
        top, left, bottom, right = self.fills
        below, beside = self.top + self.side, self.left + self.side
        distances = (
            (top - self.top, self.top > 0),
            (left - self.left, self.left > 0),
            (below - bottom, below < height),
            (beside - right, beside < width),
        )
        return min((distance for distance, counts in distances if counts), default=self.side)

    def overlaps(self, other: Window) -> bool:
        """Whether the two squares share a pixel."""
        rows = self.top < other.top + other.side and other.top < self.top + self.side
        return rows and self.left < other.left + other.side and other.left < self.left + self.side


def plan_windows(mask: Mask, resolution: int) -> list[Window]:
    """The windows that fill ``mask``, in the order in which they are to be filled.

    1. A hole that is longer than half the resolution, and at most three times as long as it is thick, gets one window
       of twice its length, or what the picture has: it is filled in one piece, with surroundings on every side.
    2. A band thicker than half the resolution is covered by windows of twice its thickness.
    3. All the rest (wires, text, specks, small holes) is covered by windows of exactly ``resolution``, from the top
       to the bottom, each centred on what it fills.

    Every pixel to fill keeps a distance of at least an eighth of the side from its window's edge, unless that is the
    picture's edge too or the picture has no more to give.
    """
    pending = mask.copy()
    windows: list[Window] = []
    for box, thickness in _large_parts(mask, resolution):
        if _longest(box) > _COMPACT * thickness:
            windows += _covering(pending, box, _side(math.ceil(thickness), mask.shape, resolution))
        elif pending[_inside(box)].any():
            side = _side(_longest(box), mask.shape, resolution)
            windows.append(_taken(pending, _window_round(box, side, mask.shape), within=box))
    outer = bounds(pending)
    if outer is not None:
        windows += _covering(pending, outer, resolution)
    return windows


def extract(pixels: np.ndarray, window: Window, resolution: int) -> Floats:
    """The square as the network sees it: RGB in [0, 1], (resolution, resolution, 3); grey is repeated."""
    square = _square(pixels, window)
    if window.side != resolution:  # averaged in the samples' own type: a large window as floats is very large
        square = np.asarray(cv2.resize(square, (resolution, resolution), interpolation=cv2.INTER_AREA))
    scaled = square.astype(np.float32).reshape(resolution, resolution, -1) / np.float32(np.iinfo(pixels.dtype).max)
    return np.repeat(scaled, 3, axis=2) if scaled.shape[2] == 1 else scaled


def extract_mask(mask: Mask, window: Window, resolution: int) -> Mask:
    """The hole as the network sees it, (resolution, resolution).

    Scaled down, a pixel is in the hole if anything of it is, so that nothing under the mask shows through.
    """
    square = _square(mask, window)
    if window.side == resolution:
        return square.copy()
    size = (resolution, resolution)
    return np.asarray(cv2.resize(square.astype(np.float32), size, interpolation=cv2.INTER_AREA)) > 0


def prefill(image: Floats, hole: Mask, inpainter: Callable[[np.ndarray, Mask], np.ndarray] = telea) -> Floats:
    """``image`` (H, W, 3 in [0, 1]), its hole filled by a function of ``classical``, the rest as it was.

    It works on 8 bits, ample for what is noised afterwards. A hole without surroundings turns mid-grey.
    """
    filled = image.copy()
    if hole.all():
        filled[...] = 0.5
    elif hole.any():
        levels = inpainter(np.rint(image * 255).astype(np.uint8), hole)
        filled[hole] = levels[hole].astype(np.float32) / 255
    return filled


def parts(mask: Mask, cell: int) -> list[Box]:
    """Boxes that hold all masked pixels: one for each connected part of ``mask`` on a grid of ``cell`` pixels."""
    if not mask.any():
        return []
    _, boxes = _components(_pooled(mask, cell, np.any))
    height, width = mask.shape
    return [(cell * y, cell * x, min(cell * b, height), min(cell * r, width)) for y, x, b, r in boxes]


def _large_parts(mask: Mask, resolution: int) -> Iterator[tuple[Box, float]]:
    """The parts of ``mask`` that a window of ``resolution`` is too small for: box and thickness in pixels.

    The thickness is the diameter of the largest disc in the part, measured on a coarse grid. A connected
    part that is compact comes whole. Of any other, such as an object with a cable, only what is thicker than half the
    resolution comes.
    """
    outer = bounds(mask)
    if outer is None:
        return
    cell = max(1, resolution // _CELLS)
    touched, solid = (_pooled(mask[_inside(outer)], cell, reduce) for reduce in (np.any, np.all))
    # The border of zeros makes the picture's edge an edge of the hole.
    depth = np.asarray(cv2.distanceTransform(np.pad(solid, 1).view(np.uint8), cv2.DIST_L2, 5))[1:-1, 1:-1]
    thickness = 2 * cell * depth
    labels, boxes = _components(touched)
    for label, cells in enumerate(boxes, start=1):
        if _longest(cells) * cell <= resolution // 2:
            continue
        own = np.where(labels[_inside(cells)] == label, thickness[_inside(cells)], 0)
        box = _tight(mask, outer, cell, cells, 0)
        longest, thickest = _longest(box), float(own.max())
        if longest <= _COMPACT * thickest:
            if longest > resolution // 2:
                yield box, thickest
            continue
        cores, core_boxes = _components(own > resolution / 2)
        for core, (top, left, bottom, right) in enumerate(core_boxes, start=1):
            place = (cells[0] + top, cells[1] + left, cells[0] + bottom, cells[1] + right)
            yield _tight(mask, outer, cell, place, resolution // 4 + 2 * cell), float(own[cores == core].max())


def _components(grid: Mask) -> tuple[np.ndarray, list[Box]]:
    """The connected parts of ``grid``: their numbers from 1 on, (h, w), and a box for each."""
    _, labels, stats, _ = cv2.connectedComponentsWithStats(grid.view(np.uint8), connectivity=8)
    return labels, [(y, x, y + h, x + w) for x, y, w, h in stats[1:, :4].tolist()]  # row 0 is the background


def _pooled(mask: Mask, cell: int, reduce: Callable[..., Mask]) -> Mask:
    """``mask`` on a grid of ``cell`` x ``cell`` pixels, by ``np.any`` or ``np.all`` over each cell."""
    # np.logical_or.reduceat would say this in a word, and take fifty times as long.
    rows = np.stack([reduce(mask[y : y + cell], axis=0) for y in range(0, mask.shape[0], cell)])
    return np.stack([reduce(rows[:, x : x + cell], axis=1) for x in range(0, mask.shape[1], cell)], axis=1)


def _tight(mask: Mask, outer: Box, cell: int, cells: Box, grown: int) -> Box:
    """The bounding box of the masked pixels in the box ``cells`` of the grid, which begins at ``outer``'s corner.

    The box is first grown by ``grown`` pixels on every side.
    """
    top, left = (max(0, o + c * cell - grown) for o, c in zip(outer[:2], cells[:2], strict=True))
    bottom, right = (o + c * cell + grown for o, c in zip(outer[:2], cells[2:], strict=True))
    return _bounds_in(mask, (top, left, min(bottom, mask.shape[0]), min(right, mask.shape[1])))


def _bounds_in(mask: Mask, box: Box) -> Box:
    """The bounding box of the masked pixels in ``box``, which holds at least one."""
    tight = bounds(mask[_inside(box)])
    assert tight is not None, "there is a masked pixel in the box"
    return box[0] + tight[0], box[1] + tight[1], box[0] + tight[2], box[1] + tight[3]


def _inside(box: Box) -> tuple[slice, slice]:
    return slice(box[0], box[2]), slice(box[1], box[3])


def _longest(box: Box) -> int:
    return max(box[2] - box[0], box[3] - box[1])


def _side(length: int, shape: tuple[int, int], resolution: int) -> int:
    """The side of a window for a hole of ``length``: twice that, or what the picture has, at least ``resolution``."""
    available = max(min(shape), math.ceil(_TIGHT * length))
    return max(resolution, min(2 * length, available, max(shape)))


def _covering(pending: Mask, box: Box, side: int) -> Iterator[Window]:
    """Windows of ``side`` for all pixels of ``pending`` in ``box``, which are cleared.

    The topmost pixel that is left, of these the leftmost, must be in the next window; of the places that the window
    may have with that pixel at its inner part's top, the one that fills most is taken.
    """
    shape = pending.shape
    rows, columns = (n if side >= n else side - 2 * math.ceil(side * _MARGIN) for n in shape)  # the inner part
    y = box[0]
    while y < box[2]:
        line = pending[y, box[1] : box[3]]
        if not line.any():
            y += 1
            continue
        x = box[1] + int(line.argmax())
        first = max(box[1], x - columns + 1)
        counts = pending[y : min(y + rows, box[2]), first : min(x + columns, box[3])].sum(axis=0)
        sums = np.concatenate([[0], np.cumsum(counts)])
        starts = np.arange(x - first + 1)
        best = first + int(np.argmax(sums[np.minimum(starts + columns, len(counts))] - sums[starts]))
        piece = _bounds_in(pending, (y, best, min(y + rows, box[2]), min(best + columns, box[3])))
        yield _taken(pending, _window_round(piece, side, shape), box)


def _window_round(box: Box, side: int, shape: tuple[int, int]) -> Window:
    """A window of ``side`` centred on ``box``, but inside the picture; centred on the picture if that is smaller."""
    top, left = (
        -((side - shape[a]) // 2)
        if side >= shape[a]
        else min(max(0, (box[a] + box[a + 2] - side) // 2), shape[a] - side)
        for a in (0, 1)
    )
    return Window(top, left, side, box)


def _taken(pending: Mask, window: Window, within: Box) -> Window:
    """``window`` with everything of ``pending`` that its inner part and the box ``within`` hold, which is cleared."""
    margin, reach = math.ceil(window.side * _MARGIN), []
    for axis, start in enumerate((window.top, window.left)):
        end, length = start + window.side, pending.shape[axis]
        inner = (start + margin if start > 0 else 0), (end - margin if end < length else length)
        least, most = window.fills[axis], window.fills[axis + 2]
        reach.append((max(min(inner[0], least), within[axis]), min(max(inner[1], most), within[axis + 2])))
    (top, bottom), (left, right) = reach
    fills = _bounds_in(pending, (top, left, bottom, right))
    pending[_inside(fills)] = False
    return replace(window, fills=fills)


def _square(array: np.ndarray, window: Window) -> np.ndarray:
    """The square of ``array``, a view where it lies inside; a mask is reflected as its picture is."""
    pads = []
    for axis, start in enumerate((window.top, window.left)):
        end, length = start + window.side, array.shape[axis]
        pads.append((max(0, -start), max(0, end - length)))
        array = array[max(0, start) : end] if axis == 0 else array[:, max(0, start) : end]
    return np.pad(array, pads + [(0, 0)] * (array.ndim - 2), "reflect") if np.any(pads) else array
