"""Photographs that the demonstration model is never trained on, cut into cases to fill.

They come with scikit-image, which a development installation has, so nothing is downloaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files

import cv2
import numpy as np

from moebius_edge.data.masks import sample_mask
from moebius_edge.errors import MachineError

# The file of each in ``skimage.data``, and its licence as scikit-image states it.
HELD_OUT = {
    "astronaut": ("astronaut.png", "public domain, NASA"),
    "chelsea": ("chelsea.png", "CC0, Stefan van der Walt"),
    "coffee": ("coffee.png", "CC0, Rachel Michetti"),
    "rocket": ("rocket.jpg", "CC0, SpaceX"),
}


@dataclass(frozen=True)
class Case:
    """A held-out crop with its mask: uint8 RGB (size, size, 3) and bool (size, size)."""

    name: str
    image: np.ndarray
    mask: np.ndarray


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
            side = shortest if number == 0 else int(rng.integers(min(size, shortest), shortest + 1))
            y, x = (int(rng.integers(0, n - side + 1)) for n in photograph.shape[:2])
            crop = cv2.resize(photograph[y : y + side, x : x + side], (size, size), interpolation=cv2.INTER_AREA)
            mask = sample_mask(rng, size, (0.1, 0.4), ("medium", "thick", "box"))
            cases.append(Case(f"{name}-{number}", crop, mask))
    return cases


def border_mean(image: np.ndarray, mask: np.ndarray, width: int = 8) -> np.ndarray:
    """The hole filled with the mean colour of a ring of ``width`` pixels round it; uint8."""
    ring = cv2.dilate(mask.astype(np.uint8), np.ones((2 * width + 1,) * 2, np.uint8)).astype(bool) & ~mask
    filled = image.copy()
    filled[mask] = image[ring].mean(0).round()
    return filled
