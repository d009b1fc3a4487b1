"""The user's photographs for calibration, parted into those that are recorded and those that INT8 is judged by."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..errors import UsageError
from ..imaging.masks import Mask, latent_mask
from ..spec import LATENT_DOWNSCALE
from .masks import PRESETS, draw_mask
from .pictures import Pictures, Place
from .samples import resize_square
from .sources import open_pictures

MASK_SIZES = (0.1, 0.25, 1.0)  # the largest share of the network's picture in a small, a medium and a large hole
HELD_OUT_CASES = 16  # at least so many trajectories judge INT8
ADVISED = 20  # pictures
_FOLD = 5  # one picture of so many is held out
_MASK_ENDING = "_mask"
_SMALLEST_HOLE, _LARGEST_HOLE = 0.02, 0.5  # shares of the picture
_ATTEMPTS = 1000  # of which about one in ten succeeds


def open_calibration(source: str, masks: str | None = None) -> tuple[Pictures, Pictures, list[str]]:
    """The pictures to record, those held out (every fifth, at most ``HELD_OUT_CASES``), and notes for the user.

    ``source`` and ``masks`` are as for ``open_pictures``; besides, ``a_mask.png`` is the mask of ``a.jpg`` beside it.

    Raises:
        UsageError: there are too few pictures, or as ``open_pictures``.
        MachineError: something is missing, or may not be read.
    """
    pictures = open_pictures(source, masks)
    if masks is None and Path(source).is_dir():
        pictures = _with_neighbouring_masks(pictures)
    number = len(pictures)
    if number < _FOLD:
        remedy = f"give at least {_FOLD}, better {ADVISED} or more; one in {_FOLD} is held out to judge by"
        raise UsageError(f"too few calibration pictures, {number}", remedy)
    notes = []
    if number < ADVISED:
        notes.append(f"{number} calibration pictures are few: ranges may be too narrow for others, give {ADVISED}")
    if bare := sum(mask is None for mask in pictures.masks):
        notes.append(f"{bare} of {number} calibration pictures have no mask: holes are drawn for them")
    held_out = range(_FOLD - 1, number, _FOLD)[:HELD_OUT_CASES]
    recorded = [i for i in range(number) if i not in held_out]
    return _subset(pictures, recorded), _subset(pictures, held_out), notes


def picture_and_hole(pictures: Pictures, i: int, resolution: int, seed: int) -> tuple[np.ndarray, Mask]:
    """Picture ``i``, uint8 (H, W, 3), and where to fill it, bool (H, W). Raises as ``Pictures.read``.

    One without a mask of its own is cut square and scaled, and a hole is drawn.
    """
    pixels, hole = pictures.read(i)
    if hole is not None:
        return pixels, hole
    return square(pixels, resolution), draw_hole(seed, i, resolution)


def draw_hole(seed: int, number: int, resolution: int) -> Mask:
    """The hole of picture ``number``, bool (resolution, resolution): strokes and boxes as for training.

    Small, medium and large ones take turns, by their share of the latent grid, as the network sees them.
    """
    rng = np.random.default_rng([seed, number])
    size = number % len(MASK_SIZES)
    least = MASK_SIZES[size - 1] if size else _SMALLEST_HOLE
    presets = list(PRESETS)
    for _ in range(_ATTEMPTS):
        hole = draw_mask(rng, resolution, presets[rng.integers(len(presets))])
        share = latent_mask(hole, resolution // LATENT_DOWNSCALE).mean()
        if least < share <= min(MASK_SIZES[size], _LARGEST_HOLE):
            return hole
    raise RuntimeError(f"no hole of more than {least:.0%} was drawn in {_ATTEMPTS} attempts")


def square(pixels: np.ndarray, resolution: int) -> np.ndarray:
    """The square in the middle of a picture, uint8 (H, W, 3), scaled: (resolution, resolution, 3)."""
    height, width = pixels.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return resize_square(pixels[top : top + side, left : left + side], resolution)


def _subset(pictures: Pictures, indices: Sequence[int]) -> Pictures:
    return Pictures(pictures.source, [pictures.pictures[i] for i in indices], [pictures.masks[i] for i in indices])


def _with_neighbouring_masks(pictures: Pictures) -> Pictures:
    """``a_mask.png`` taken out of the pictures and given to ``a.jpg`` in the same folder, where there is one."""
    by_stem = {_stem(place): place for place in pictures.pictures}
    masks = {s: p for s, p in by_stem.items() if s.endswith(_MASK_ENDING) and s[: -len(_MASK_ENDING)] in by_stem}
    remaining = [place for place in pictures.pictures if _stem(place) not in masks]
    return Pictures(pictures.source, remaining, [masks.get(_stem(place) + _MASK_ENDING) for place in remaining])


def _stem(place: Place) -> str:
    return os.path.splitext(place.name)[0]
