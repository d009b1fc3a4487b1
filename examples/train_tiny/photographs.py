"""Photographs that the demonstration model is never trained on, cut into cases to fill.

Either those of a folder, or four that come with scikit-image, which a development installation has.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import cv2
import numpy as np

from moebius_edge.data.masks import sample_mask
from moebius_edge.errors import MachineError, UsageError

from .data import list_photographs
from .holes import KINDS, draw_hole

# The file of each in ``skimage.data``, and its licence as scikit-image states it.
HELD_OUT = {
    "astronaut": ("astronaut.png", "public domain, NASA"),
    "chelsea": ("chelsea.png", "CC0, Stefan van der Walt"),
    "coffee": ("coffee.png", "CC0, Rachel Michetti"),
    "rocket": ("rocket.jpg", "CC0, SpaceX"),
}


@dataclass(frozen=True)
class Case:
    """A held-out crop with its mask of a kind: uint8 RGB (size, size, 3) and bool (size, size)."""

    name: str
    image: np.ndarray
    mask: np.ndarray
    kind: str = "strokes"


def load_photograph(name: str) -> np.ndarray:
    """One of ``HELD_OUT`` as uint8 RGB (H, W, 3). Raises MachineError if scikit-image is not installed."""
    try:
        data = np.frombuffer(files("skimage.data").joinpath(HELD_OUT[name][0]).read_bytes(), np.uint8)
    except (ModuleNotFoundError, OSError) as error:
        raise MachineError(f"the photograph {name} is missing ({error}): pip install scikit-image") from error
    return cv2.cvtColor(cv2.imdecode(data, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)


def held_out_cases(per_photograph: int = 4, size: int = 256, seed: int = 0) -> list[Case]:
    """Square crops of the held-out photographs with masks of 10 to 40% of their area, seeded."""
    cases: list[Case] = []
    for name in HELD_OUT:
        photograph = load_photograph(name)
        shortest = min(photograph.shape[:2])
        for number in range(per_photograph):
            rng = np.random.default_rng([seed, len(cases)])
            crop = _random_crop(rng, photograph, shortest if number == 0 else None, size)
            mask = sample_mask(rng, size, (0.1, 0.4), ("medium", "thick", "box"))
            cases.append(Case(f"{name}-{number}", crop, mask))
    return cases


def folder_cases(folder: Path, count: int = 96, size: int = 256, seed: int = 0) -> list[Case]:
    """Cut ``count`` square crops from the photographs of a folder, in turn; the holes are of all kinds, in turn.

    The first crop of a photograph is its whole height or width. Raises UsageError for a folder without photographs, or
    with one that cannot be decoded.
    """
    names, cases = list_photographs(folder), []
    for number in range(count):
        rng = np.random.default_rng([seed, number])
        turn, which = divmod(number, len(names))
        photograph = cv2.imread(str(folder / names[which]), cv2.IMREAD_COLOR_RGB)
        if photograph is None:
            raise UsageError(f"{folder / names[which]} cannot be decoded", "remove it or replace it by a sound picture")
        crop = _random_crop(rng, photograph, min(photograph.shape[:2]) if turn == 0 else None, size)
        kind = KINDS[(turn + which) % len(KINDS)]
        cases.append(Case(f"{Path(names[which]).stem}-{turn}", crop, draw_hole(rng, size, kind), kind))
    return cases


def _random_crop(rng: np.random.Generator, photograph: np.ndarray, side: int | None, size: int) -> np.ndarray:
    """A square at a random place, of ``side`` pixels or of a random number from ``size`` on, resized to ``size``."""
    shortest = min(photograph.shape[:2])
    side = side or int(rng.integers(min(size, shortest), shortest + 1))
    y, x = (int(rng.integers(0, n - side + 1)) for n in photograph.shape[:2])
    return cv2.resize(photograph[y : y + side, x : x + side], (size, size), interpolation=cv2.INTER_AREA)


def border_mean(image: np.ndarray, mask: np.ndarray, width: int = 8) -> np.ndarray:
    """The hole filled with the mean colour of a ring of ``width`` pixels round it; uint8."""
    ring = cv2.dilate(mask.astype(np.uint8), np.ones((2 * width + 1,) * 2, np.uint8)).astype(bool) & ~mask
    filled = image.copy()
    filled[mask] = image[ring].mean(0).round()
    return filled
