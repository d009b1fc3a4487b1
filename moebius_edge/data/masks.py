"""Inpainting masks for training and evaluation: LaMa-style irregular strokes and boxes.

The families are those of LaMa (Suvorov et al., arXiv 2109.07161, section 3.3): polygonal chains
dilated by a random width, and unions of rectangles. Numbers are scaled to the image's side, so one
preset means the same at 256 and at 512. No randomness of its own: the generator is passed in.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from ..errors import UsageError


@dataclass(frozen=True)
class MaskPreset:
    """How much is drawn. Lengths are fractions of the image's side."""

    strokes: tuple[int, int]
    vertices: tuple[int, int]
    step: float
    width: tuple[float, float]
    boxes: tuple[int, int]
    box_side: tuple[float, float]


PRESETS: dict[str, MaskPreset] = {
    "thin": MaskPreset((1, 5), (4, 12), 0.20, (0.01, 0.04), (0, 0), (0.0, 0.0)),
    "medium": MaskPreset((1, 4), (3, 8), 0.22, (0.05, 0.12), (0, 1), (0.10, 0.30)),
    "thick": MaskPreset((1, 3), (2, 6), 0.30, (0.12, 0.25), (0, 1), (0.15, 0.40)),
    "box": MaskPreset((0, 0), (0, 0), 0.0, (0.0, 0.0), (1, 3), (0.12, 0.45)),
}


def draw_mask(rng: np.random.Generator, size: int, preset: str) -> np.ndarray:
    """One mask, bool (size, size), True where the picture is to be filled. May come out empty."""
    p = PRESETS[preset]
    mask = np.zeros((size, size), np.uint8)
    for _ in range(rng.integers(p.strokes[0], p.strokes[1] + 1)):
        _draw_stroke(mask, rng, p, size)
    for _ in range(rng.integers(p.boxes[0], p.boxes[1] + 1)):
        width, height = (int(size * rng.uniform(*p.box_side)) for _ in range(2))
        x, y = int(rng.integers(0, size - width + 1)), int(rng.integers(0, size - height + 1))
        mask[y : y + height, x : x + width] = 1
    return mask.astype(bool)


def _draw_stroke(mask: np.ndarray, rng: np.random.Generator, p: MaskPreset, size: int) -> None:
    x, y = rng.uniform(0, size, 2)
    angle = rng.uniform(0, 2 * np.pi)
    width = max(1, int(size * rng.uniform(*p.width)))
    for _ in range(rng.integers(p.vertices[0], p.vertices[1] + 1)):
        angle += rng.normal(0, 0.9)
        length = size * p.step * rng.uniform(0.3, 1.0)
        x2 = float(np.clip(x + length * np.cos(angle), 0, size - 1))
        y2 = float(np.clip(y + length * np.sin(angle), 0, size - 1))
        start, end = (int(x), int(y)), (int(x2), int(y2))
        cv2.line(mask, start, end, 1, width)
        cv2.circle(mask, end, width // 2, 1, -1)
        x, y = x2, y2


def sample_mask(
    rng: np.random.Generator,
    size: int,
    coverage: tuple[float, float] = (0.05, 0.5),
    presets: tuple[str, ...] = ("thin", "medium", "thick", "box"),
    attempts: int = 1000,
) -> np.ndarray:
    """A mask of a random preset whose covered share lies within ``coverage``; bool (size, size).

    Raises UsageError if no draw lands in the range, which means that the range does not suit the presets.
    """
    for _ in range(attempts):
        mask = draw_mask(rng, size, presets[rng.integers(len(presets))])
        if coverage[0] <= mask.mean() <= coverage[1]:
            return mask
    raise UsageError(
        f"none of {attempts} masks of the presets {', '.join(presets)} covers {coverage[0]} to {coverage[1]} of the "
        "picture: widen data.coverage, or name other data.masks"
    )
