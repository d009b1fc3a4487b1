"""Pictures with holes to record from: the user's, or the photographs that come with the training's packages.

A picture with a mask of its own goes through the pipeline as it is. One without is cut square at the centre and
scaled to the model's size, and a hole is drawn, of each of the three sizes in turn.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol

import cv2
import numpy as np

from ..errors import UsageError
from ..imaging.masks import Mask, latent_mask
from ..spec import LATENT_DOWNSCALE
from .masks import PRESETS, draw_mask
from .photographs import TRAINING, load_photograph
from .pictures import Pictures, Place
from .sources import open_pictures

MASK_SIZES = (0.1, 0.25, 1.0)  # largest share of the network's picture in a small, a medium and a large hole

FEWEST, ADVISED = 4, 16  # pictures
MASK_ENDING = "_mask"
_SMALLEST_HOLE, _LARGEST_HOLE = 0.02, 0.5  # shares of the picture
_ATTEMPTS = 1000  # of which about one in ten succeeds


class CalibrationPictures(Protocol):
    """What ``training.pictures.Pictures`` offers, as far as a recording needs it."""

    def __len__(self) -> int: ...

    def name(self, i: int) -> str:
        """The same wherever the pictures lie."""

    def read(self, i: int) -> tuple[np.ndarray, np.ndarray | None]:
        """uint8 RGB (H, W, 3), and the mask, bool (H, W), or None."""

    def fingerprint(self) -> str:
        """Another for other pictures."""


@dataclass(frozen=True)
class Photographs:
    """Photographs that come with scikit-image and scikit-learn; ``training.photographs`` holds some others back."""

    names: Sequence[str] = tuple(TRAINING)

    def __len__(self) -> int:
        return len(self.names)

    def name(self, i: int) -> str:
        return self.names[i]

    def read(self, i: int) -> tuple[np.ndarray, None]:
        """As ``Pictures.read``. Raises MachineError where their package is not installed."""
        return load_photograph(self.names[i]), None

    def fingerprint(self) -> str:
        return hashlib.sha256("\0".join(self.names).encode()).hexdigest()


def open_calibration(
    source: str | os.PathLike[str] | None, masks: str | os.PathLike[str] | None = None
) -> tuple[CalibrationPictures, list[str]]:
    """The pictures of ``source``, by default ``Photographs``, and notes on them for the user.

    Args:
        source: a folder, a ``.jsonl`` list or ``.tar`` shards, as for training. In a folder ``a_mask.png`` is the mask
            of ``a.jpg`` beside it, as for ``run``.
        masks: a folder with a mask for each picture of the folder ``source``.

    Raises:
        UsageError: too few pictures, a picture that has no mask in ``masks``, or as ``open_pictures``.
        MachineError: something is missing, or may not be read.
    """
    if source is None:
        if masks is not None:
            raise UsageError(f"masks {masks} go with pictures of yours: name their folder too")
        photographs = Photographs()
        note = f"calibrating on {len(photographs)} photographs that come with packages, with drawn holes: "
        note += "INT8 follows its calibration, so give pictures of your own kind"
        return photographs, [note, *check_number(photographs)]
    pictures = open_pictures(source, masks)
    if masks is None and Path(source).is_dir():
        pictures = _paired(pictures)
    if masks is not None:
        for i, mask in enumerate(pictures.masks):
            if mask is None:
                wanted = PurePosixPath(pictures.name(i)).with_suffix(".png")
                lacking = f"picture {pictures.name(i)} has no mask in {masks}: put {wanted} there"
                raise UsageError(f"{lacking}, or name no masks, and holes are drawn")
    notes = check_number(pictures, FEWEST + 1)  # one is held out
    if bare := sum(mask is None for mask in pictures.masks):
        notes.append(f"{bare} of {len(pictures)} calibration pictures have no mask: holes are drawn for them")
    return pictures, notes


def check_number(pictures: CalibrationPictures, least: int = FEWEST) -> list[str]:
    """A note where there are fewer than ``ADVISED``. Raises UsageError for fewer than ``least``."""
    number = len(pictures)
    if number < least:
        raise UsageError(f"too few calibration pictures, {number}: give at least {least}, better {ADVISED} or more")
    if number < ADVISED:
        return [f"{number} calibration pictures are few: ranges may be too narrow for others, {ADVISED} are better"]
    return []


def draw_hole(seed: int, number: int, resolution: int) -> Mask:
    """The hole of picture ``number``: bool (resolution, resolution), True where to fill; sizes take turns.

    Strokes and boxes as for training. What counts as its size is its share of the latent grid, as the network sees
    it, on which thin strokes are wider.
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
    raise RuntimeError(f"no hole of more than {least:.0%} was drawn in {_ATTEMPTS} attempts at {resolution} pixels")


def picture_and_hole(pictures: CalibrationPictures, i: int, resolution: int, seed: int) -> tuple[np.ndarray, Mask]:
    """Picture ``i``, uint8 (H, W, 3), and where to fill it, bool (H, W). Raises as ``Pictures.read``."""
    pixels, hole = pictures.read(i)
    if hole is not None:
        return pixels, hole
    return square(pixels, resolution), draw_hole(seed, i, resolution)


def square(pixels: np.ndarray, resolution: int) -> np.ndarray:
    """The square in the middle of a picture, uint8 (H, W, 3), scaled: (resolution, resolution, 3)."""
    height, width = pixels.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    middle = pixels[top : top + side, left : left + side]
    interpolation = cv2.INTER_AREA if side > resolution else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(middle, (resolution, resolution), interpolation=interpolation), np.uint8)


def _paired(pictures: Pictures) -> Pictures:
    """``a_mask.png`` taken out of the pictures and given to ``a.jpg`` in the same folder, where there is one."""
    by_stem = {_stem(place): place for place in pictures.pictures}
    masks = {s: p for s, p in by_stem.items() if s.endswith(MASK_ENDING) and s.removesuffix(MASK_ENDING) in by_stem}
    kept = [place for place in pictures.pictures if _stem(place) not in masks]
    return Pictures(pictures.source, kept, [masks.get(_stem(place) + MASK_ENDING) for place in kept])


def _stem(place: Place) -> str:
    return os.path.splitext(place.name)[0]
