"""Inpainting masks for training and evaluation: LaMa's medium masks, and our own strokes and boxes.

The families are those of LaMa (Suvorov et al., arXiv 2109.07161, section 3.3): polygonal chains
dilated by a random width, and unions of rectangles. Numbers are scaled to the image's side, so one
preset means the same at 256 and at 512. No randomness of its own: the generator is passed in.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from ..errors import UsageError

LAMA = "lama-medium"
Frame = tuple[int, int, int, int]  # height and width, and the row and column where a square begins in it


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


def draw_mask(rng: np.random.Generator, size: int, preset: str, frame: Frame | None = None) -> np.ndarray:
    """One mask, bool (size, size), True where the picture is to be filled. May come out empty.

    ``lama-medium`` is drawn over ``frame``, the whole picture, of which the square is cut.
    """
    if preset == LAMA:
        height, width, y, x = frame or (size, size, 0, 0)
        return _draw_lama(rng, height, width, size / 512)[y : y + size, x : x + size]
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


def _draw_lama(rng: np.random.Generator, height: int, width: int, unit: float) -> np.ndarray:
    """As LaMa's ``random_medium_512.yaml``: 4 to 11 broken lines, or in 3 of 13 masks 1 to 5 boxes.

    Bool (height, width). ``unit`` is the length in pixels of what is a pixel there.
    """
    mask = np.zeros((height, width), np.uint8)
    if rng.random() < 0.3 / 1.3:
        for _ in range(rng.integers(1, 6)):
            w, h = (min(int(unit * rng.integers(30, 151)), n) for n in (width, height))
            x, y = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            mask[y : y + h, x : x + w] = 1
        return mask.astype(bool)
    for stroke in range(rng.integers(4, 12)):
        x, y = int(rng.integers(width)), int(rng.integers(height))
        for _ in range(rng.integers(1, 6)):
            angle = (0.01 + rng.integers(4)) * (1 if stroke % 2 else -1)
            length = unit * rng.integers(10, 210)
            moved = np.clip((x + length * np.sin(angle), y + length * np.cos(angle)), 0, (width, height))
            end = int(moved[0]), int(moved[1])
            cv2.line(mask, (x, y), end, 1, max(1, int(unit * rng.integers(5, 105))))
            x, y = end
    return mask.astype(bool)


def widen_mask(rng: np.random.Generator, mask: np.ndarray) -> np.ndarray:
    """Grow a mask, bool (H, W), as upstream does 99 times in 100: by a square of 3, 5 or 7 pixels, once or twice."""
    if rng.random() >= 0.99:
        return mask
    side, times = 2 * int(rng.integers(1, 4)) + 1, int(rng.integers(1, 3))
    return cv2.dilate(mask.astype(np.uint8), np.ones((side, side), np.uint8), iterations=times) > 0


def sample_mask(
    rng: np.random.Generator,
    size: int,
    coverage: tuple[float, float] = (0.05, 0.5),
    presets: tuple[str, ...] = ("thin", "medium", "thick", "box"),
    attempts: int = 1000,
    frame: Frame | None = None,
) -> np.ndarray:
    """A mask of a random preset whose covered share lies within ``coverage``; bool (size, size), not empty, not full.

    Raises UsageError if no draw lands in the range, which means that the range does not suit the presets.
    """
    for _ in range(attempts):
        mask = draw_mask(rng, size, presets[rng.integers(len(presets))], frame)
        if coverage[0] <= mask.mean() <= coverage[1] and 0 < mask.mean() < 1:
            return mask
    raise UsageError(
        f"none of {attempts} masks of the presets {', '.join(presets)} covers {coverage[0]} to {coverage[1]} of the "
        "picture: widen data.coverage, or name other data.masks"
    )
