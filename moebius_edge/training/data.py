"""Endless training pictures: augmented crops of the photographs mixed with synthetic scenes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..data.masks import sample_mask
from ..data.photographs import TRAINING, load_photograph, random_crop
from ..data.unreadable import Unreadable
from .scenes import draw_scene

# Natural colour photographs first; textures and grey or medical pictures fill up.
WEIGHTS = {"motorcycle": 4.0, "china": 4.0, "flower": 3.0, "camera": 1.5, "coins": 1.0}

PICTURES, PHOTO_SHARE = 4000, 0.6  # of the bundled model: pictures that are encoded, and how many are photographs


class PictureSource:
    """``source(rng)`` draws one uint8 RGB (size, size, 3) picture; ``photo_share`` of them are photographs."""

    def __init__(self, size: int, photo_share: float = 0.5) -> None:
        self.size, self.photo_share = size, photo_share
        self.photographs = [load_photograph(name) for name in TRAINING]
        weights = np.array([WEIGHTS.get(name, 0.6) for name in TRAINING])
        self.weights = weights / weights.sum()

    def __call__(self, rng: np.random.Generator) -> np.ndarray:
        if rng.random() < self.photo_share:
            return random_crop(rng, self.photographs[rng.choice(len(self.photographs), p=self.weights)], self.size)
        return draw_scene(rng, self.size)


class MaskedSource:
    """``Samples`` drawn by ``source(rng)``, pictures of ``size`` pixels, with masks of all presets.

    Sample i is seeded by (seed, i). ``recipe`` says what else decides what the source draws.
    """

    def __init__(
        self, source: Callable[[np.random.Generator], np.ndarray], size: int, seed: int, recipe: dict[str, Any]
    ) -> None:
        self.source, self.size, self.seed, self.recipe = source, size, seed, recipe
        self.unreadable = Unreadable()  # stays empty

    def sample_masks(self, index: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """uint8 RGB (size, size, 3) and bool (count, size, size)."""
        rng = np.random.default_rng([self.seed, index])
        return self.source(rng), np.stack([sample_mask(rng, self.size) for _ in range(count)])

    def identity(self) -> dict[str, Any]:
        return {"size": self.size, "seed": self.seed, **self.recipe}


def bundled_samples(size: int, seed: int, photo_share: float = PHOTO_SHARE) -> MaskedSource:
    """What the bundled model learns from: its photographs and scenes of ``size`` pixels, with masks."""
    return MaskedSource(PictureSource(size, photo_share), size, seed, {"photo_share": photo_share})


class CropSource:
    """``source(rng)`` cuts ``count`` square crops of ``side`` pixels from one picture; uint8 (count, side, side, 3).

    Crops show what the network will see, at the scale it will see it; a picture drawn small would not. Several
    of one picture, because drawing it costs more than training on a crop.
    """

    def __init__(self, source: Callable[[np.random.Generator], np.ndarray], side: int, count: int) -> None:
        self.source, self.side, self.count = source, side, count

    def __call__(self, rng: np.random.Generator) -> np.ndarray:
        picture = self.source(rng)
        room = len(picture) - self.side + 1
        corners = rng.integers(0, room, (self.count, 2))
        return np.stack([picture[y : y + self.side, x : x + self.side] for y, x in corners])


def to_network(pictures: np.ndarray) -> np.ndarray:
    """uint8 (N, H, W, 3) to float32 (N, 3, H, W) in [-1, 1]."""
    return pictures.transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1
