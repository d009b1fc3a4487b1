"""Filling a picture window by window: what the network made is blended in through a seam.

The seam lies outside the mask, and its width is a quarter of the hole's thickness at that place, up to a limit: a thin
wire has a thin seam. Beyond the seam every pixel keeps its bytes, at 8 and at 16 bits: nothing is computed there, so
nothing can be rounded.
"""

from __future__ import annotations

import math

import cv2
import numpy as np

from .classical import navier_stokes
from .masks import Mask, distance_outside
from .windows import Floats, Window, extract, extract_mask, parts, plan_windows, prefill

_FEATHER_SHARE = 0.03  # of the window's side: about one latent cell of a 256-pixel model
_LEAST_FEATHER = 4
_COLOUR_CELL = 4  # pixels of the network, half a latent cell: the scale on which colours are matched
_ROWS = 512  # blended at a time, to bound the memory
_GREY = np.array([[0.299], [0.587], [0.114]], np.float32)  # brightness of RGB, ITU-R BT.601


class Filling:
    """A picture whose mask is filled window by window.

    Args:
        pixels: (H, W, C) of uint8 or uint16, C being 1 or 3; not changed.
        mask: (H, W), True where to fill.
        resolution: the network's side in pixels.
        feather: the width of the seam in pixels. Absent, it follows the hole: see ``seam``.
        match: whether the colours of a fill are matched to those round the hole: see ``match_colours``.
        depth: how deep in the hole they follow a smooth fill, in pixels of the network; 0: nowhere.

    Attributes:
        canvas: the picture as far as it is filled.
        windows: the plan, see ``plan_windows``. They are to be pasted in this order.
    """

    def __init__(
        self,
        pixels: np.ndarray,
        mask: Mask,
        resolution: int,
        feather: float | None = None,
        match: bool = True,
        depth: float = 0.0,
    ) -> None:
        self.windows = plan_windows(mask, resolution)
        self.canvas = pixels.copy() if self.windows else pixels
        self._mask, self._resolution, self._feather = mask, resolution, feather
        self._match, self._depth = match, depth
        self._pending = mask.copy() if self.windows else mask

    def view(self, window: Window) -> tuple[Floats, Mask]:
        """What the network sees: RGB (R, R, 3) in [0, 1], and the hole (R, R), all that is not filled yet."""
        mask = extract_mask(self._pending, window, self._resolution)
        return extract(self.canvas, window, self._resolution), mask

    def feather(self, window: Window) -> float:
        """The largest width of the window's seam in pixels: a wider one would end in a step at the square's edge."""
        widest = max(_LEAST_FEATHER, round(_FEATHER_SHARE * window.side))
        feather = widest if self._feather is None else self._feather
        return min(feather, window.room(*self._mask.shape))

    def paste(self, window: Window, generated: Floats) -> None:
        """Blend what the network made of the window, (R, R, 3) in [0, 1], into ``canvas``."""
        if self._match:
            generated = match_colours(generated, *self.view(window), self._depth)
        feather = self.feather(window)
        reach = 4 * math.ceil(feather)  # as far as a disc goes that decides on the seam's width
        top, left, bottom, right = window.fills
        y, x = max(0, top - reach), max(0, left - reach)
        near = np.s_[y : bottom + reach, x : right + reach]
        filled = np.zeros_like(self._mask[near])
        filled[top - y : bottom - y, left - x : right - x] = self._pending[top:bottom, left:right]
        alpha = seam(filled, feather, None if self._feather is not None else self._mask[near])
        _blend(self.canvas[near], _enlarged(generated, window.side), alpha, y - window.top, x - window.left)
        self._pending[top:bottom, left:right] = False


def match_colours(generated: Floats, image: Floats, hole: Mask, depth: float = 0.0) -> Floats:
    """``generated`` with its colours brought to those of the picture round the hole, (R, R, 3) in [0, 1].

    An autoencoder does not give back exactly the colours that it gets, and in a thin hole a difference of a few levels
    shows as a band. How far off it is can be seen outside of the hole, where the picture is known. This error, averaged
    over small cells, is continued smoothly into the hole and subtracted. It is continued by a pyramid of averages:
    where a level knows nothing, the coarser one decides (push-pull; Gortler et al. 1996, The Lumigraph, section 3.6.2).

    A weak network is also wrong about the colours in the hole, where a smooth fill (Navier-Stokes) is often better,
    above all near the edge. With a ``depth`` above 0 the smooth fill counts as known too, by exp(-d / ``depth``) at d
    pixels from the edge, and the result differs from it by no more than the surroundings vary: see ``_limited``.

    Args:
        generated: what the network made of all of the window.
        image: what the window shows.
        hole: (R, R), True where ``image`` is not known.
        depth: the distance in pixels at which the smooth fill's weight has fallen to 1 / e; at 0 it has none.
    """
    if hole.all():
        return generated
    known = (~hole).astype(np.float32)
    target, weight = image, known
    if depth:
        target, weight = prefill(image, hole, navier_stokes), np.exp(distance_outside(~hole) / np.float32(-depth))
    matched = generated + _enlarged_to(hole, _spread(target - generated, weight))
    return _limited(matched, target, known) if depth else matched


def _limited(filled: Floats, smooth: Floats, known: Floats) -> Floats:
    """``filled``, brought so near to ``smooth`` in the hole that it differs by no more than the surroundings vary.

    The squared difference, averaged over 5x5 cells, is limited to the variance of the known colours. That is measured
    in a cell, or in a coarser one where nothing is known. So a hole in a plain wall comes back plain, and one in
    leaves hardly changes.
    """
    variance = (_spread(np.square(smooth), known) - np.square(_spread(smooth, known))).mean(2)
    difference = filled - smooth
    energy = cv2.blur(_spread(np.square(difference), np.ones_like(known)).mean(2), (5, 5))
    share = np.sqrt((variance / np.maximum(energy, np.float32(1e-9))).clip(0, 1))
    gain = np.where(known > 0, 1, _enlarged_to(known, share)).astype(np.float32)
    return smooth + difference * gain[..., None]


def _spread(values: Floats, weight: Floats) -> Floats:
    """The means of ``values`` (H, W, 3) by ``weight`` (H, W) over small cells, (h, w, 3), continued where it is 0."""
    cells = tuple(max(1, side // _COLOUR_CELL) for side in reversed(weight.shape))
    total = _resized(values * weight[..., None], cells, cv2.INTER_AREA)
    return _continued(total, _resized(weight, cells, cv2.INTER_AREA)[..., None])


def _enlarged_to(pixels: np.ndarray, cells: Floats) -> Floats:
    """``cells``, with or without channels, interpolated to the height and width of ``pixels`` (H, W)."""
    return _resized(cells, pixels.shape[::-1], cv2.INTER_LINEAR)


def _continued(total: Floats, weight: Floats) -> Floats:
    """The means ``total`` (h, w, 3) / ``weight`` (h, w, 1), continued to where the weight, 0 to 1, is small."""
    mean = total / np.maximum(weight, np.float32(1e-6))
    height, width = weight.shape[:2]
    if height == width == 1:
        return mean
    half = ((width + 1) // 2, (height + 1) // 2)
    coarse = _continued(_resized(total, half, cv2.INTER_AREA), _resized(weight, half, cv2.INTER_AREA)[..., None])
    return weight * mean + (1 - weight) * _resized(coarse, (width, height), cv2.INTER_LINEAR)


def _resized(image: Floats, size: tuple[int, ...], interpolation: int) -> Floats:
    """``image`` at another (width, height); a single channel loses its axis."""
    return np.asarray(cv2.resize(image, size, interpolation=interpolation), np.float32)


def seam(filled: Mask, feather: float, hole: Mask | None = None) -> Floats:
    """The generated picture's share of every pixel, (H, W): 1 in ``filled``, exactly 0 from the seam's width outside.

    Between, at distance d of a seam f wide: (g(d) - g(f)) / (1 - g(f)) with the Gaussian g of σ = f / 3.

    Args:
        filled: the pixels that are filled now.
        feather: the seam's width in pixels.
        hole: the whole mask. With it, ``feather`` is the largest width, and round a part of the hole that is less than
            four times as thick the seam is a quarter of the thickness wide: half the radius of the largest disc in the
            hole that covers the place, of radii falling by √2 from twice ``feather`` on.
    """
    if hole is None or hole.all():  # a hole without an edge has no thickness
        return _falloff(filled, feather)
    alpha = filled.astype(np.float32)
    depth = distance_outside(~hole)  # from a pixel's centre to that of the nearest pixel beyond: half a pixel too much
    _add_seam(alpha, filled, depth, 2 * feather)
    return alpha


def _add_seam(alpha: Floats, filled: Mask, depth: Floats, radius: float) -> None:
    """Raise ``alpha`` round the pixels ``filled``, by discs of ``radius`` and less: see ``seam``.

    Only where larger discs do not fit are smaller ones looked for, and only near there: it is quick where a large hole
    has a few corners.
    """
    if radius <= 2:  # a seam of one pixel or less changes nothing
        return
    centres = depth >= radius + 0.5
    if centres.any():
        covered = filled & (distance_outside(centres) <= radius + 0.5)
        np.maximum(alpha, _falloff(covered, radius / 2), out=alpha)
        filled = filled & ~covered
    reach = math.ceil(radius) + 1  # as far as the centre of a disc that covers a pixel
    for top, left, bottom, right in parts(filled, reach):
        near = np.s_[max(0, top - reach) : bottom + reach, max(0, left - reach) : right + reach]
        _add_seam(alpha[near], filled[near], depth[near], radius / math.sqrt(2))


def _falloff(mask: Mask, width: float) -> Floats:
    """The Gaussian of ``seam`` round ``mask``, which is 1 on it."""
    share = mask.astype(np.float32)
    if width <= 0 or not mask.any():
        return share
    distance = distance_outside(mask)
    seam = (distance > 0) & (distance < width)
    end = math.exp(-4.5)  # g(3 σ)
    gauss = np.exp(-4.5 * np.square(distance[seam] / np.float32(width)))
    share[seam] = (gauss - np.float32(end)) / np.float32(1 - end)
    return share


def _blend(target: np.ndarray, generated: np.ndarray, alpha: Floats, top: int, left: int) -> None:
    """Blend into ``target`` (h, w, C), in place, where ``alpha`` (h, w) is above 0; other pixels keep their bytes.

    ``generated`` is a whole square (S, S, 3), in which the corner of ``target`` lies at ``top``, ``left``.
    """
    largest = np.iinfo(target.dtype).max
    scale = np.float32(largest) / np.float32(1 if generated.dtype == np.float32 else 65535)
    for row in range(0, len(alpha), _ROWS):
        part = alpha[row : row + _ROWS]
        y, x = np.nonzero(part)
        colour = generated[y + row + top, x + left].astype(np.float32) * scale
        if target.shape[2] == 1:
            colour = colour @ _GREY
        weight = part[y, x][:, None]
        blended = weight * colour + (1 - weight) * target[y + row, x]
        target[y + row, x] = np.rint(blended).clip(0, largest).astype(target.dtype)


def _enlarged(generated: Floats, side: int) -> np.ndarray:
    """(side, side, 3): float32 as it is, or interpolated bicubically as uint16, half as large as floats."""
    if len(generated) == side:
        return generated.clip(0, 1)
    levels = np.rint(generated.clip(0, 1) * 65535).astype(np.uint16)
    return np.asarray(cv2.resize(levels, (side, side), interpolation=cv2.INTER_CUBIC))
