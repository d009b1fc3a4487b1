"""Holes to fill with background, and holes to fill with an object: what the two branches of the denoiser learn.

The published network has prompts for holes that hold background and prompts for holes that hold a foreground object,
and guidance leads away from the second kind, so that no object is invented. Nobody has outlined objects in a folder
of photographs, so objects are made: a piece of another picture with a smooth outline, laid over the first one. The
same outlines also serve as holes over plain background, so that the branches differ in what the hole holds alone.
"""

from __future__ import annotations

import cv2
import numpy as np

from moebius_edge.data.masks import sample_mask

from .data import NETWORK_SIDE, PictureMixture, random_photo_crop
from .scenes import draw_scene

BACKGROUND, FOREGROUND = 0, 1  # the branches, as the bundle's input ``branch`` numbers them
COVERAGE = (0.05, 0.7)  # share of the picture under one set of strokes and boxes, of which a mask has up to three


def draw_outline(rng: np.random.Generator, side: int) -> np.ndarray:
    """Draw the silhouette of an object, float32 (side, side) in [0, 1], 2 to 25% of the area, edges smooth."""
    angles = np.linspace(0, 2 * np.pi, 96, endpoint=False)
    waves = [rng.normal(0, 0.3 / k) * np.cos(k * angles + rng.uniform(0, 2 * np.pi)) for k in range(2, 7)]
    radii = np.clip(1 + np.sum(waves, 0), 0.25, None)
    stretch, turn = np.exp(rng.normal(0, 0.4)), rng.uniform(0, np.pi)
    points = radii[:, None] * np.stack([np.cos(angles) * stretch, np.sin(angles) / stretch], 1)
    points = points @ np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    area = 0.5 * abs(np.sum(points[:, 0] * np.roll(points[:, 1], 1) - points[:, 1] * np.roll(points[:, 0], 1)))
    points = points * side * np.sqrt(rng.uniform(0.03, 0.25) / area) + rng.uniform(0.25, 0.75, 2) * side
    outline = np.zeros((side, side), np.uint8)
    cv2.fillPoly(outline, [np.round(points * 16).astype(np.int32)], 255, cv2.LINE_AA, 4)
    return outline.astype(np.float32) / 255


def paste_object(
    rng: np.random.Generator, background: np.ndarray, filling: np.ndarray, outline: np.ndarray
) -> np.ndarray:
    """Lay ``filling`` over ``background`` inside ``outline``, often with a soft shadow below it; uint8 RGB."""
    canvas = background.astype(np.float32)
    if rng.random() < 0.6:
        reach = rng.uniform(0.02, 0.06) * len(outline)
        moved = np.roll(outline, (int(reach), int(rng.normal(0, reach))), (0, 1))
        shadow = cv2.GaussianBlur(moved, (0, 0), max(1.0, reach / 2)) * rng.uniform(0.2, 0.6)
        canvas *= 1 - shadow[..., None]
    alpha = outline[..., None]
    return (canvas * (1 - alpha) + filling.astype(np.float32) * alpha).round().astype(np.uint8)


def covering_mask(rng: np.random.Generator, outline: np.ndarray) -> np.ndarray:
    """Draw the mask that a user might draw over an object: its outline widened, or its bounding box; bool."""
    inside = (outline > 0.02).astype(np.uint8)
    widen = int(rng.integers(2, 2 + max(2, len(outline) // 20)))
    mask = cv2.dilate(inside, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * widen + 1, 2 * widen + 1)))
    if rng.random() < 0.2:
        left, top, width, height = cv2.boundingRect(mask)
        mask[top : top + height, left : left + width] = 1
    return mask.astype(bool)


class BranchSamples:
    """``samples(number)`` draws a picture, its mask and its branch, from the seed and the number alone.

    The picture is uint8 RGB (side, side, 3), the mask bool (side, side), True where to fill. Of the samples,
    ``foreground_share`` hold an object in the hole. The rest hold background in a hole of an object's outline, or of
    random strokes and boxes, and sometimes an object outside the hole that has to be left alone.
    """

    def __init__(self, mixture: PictureMixture, foreground_share: float = 0.3, side: int = NETWORK_SIDE) -> None:
        self.mixture, self.foreground_share, self.side = mixture, foreground_share, side

    def __call__(self, number: int) -> tuple[np.ndarray, np.ndarray, int]:
        rng = np.random.default_rng([self.mixture.seed + 2, number])
        picture = self._background(rng)
        if rng.random() < self.foreground_share:
            outline = draw_outline(rng, self.side)
            picture = paste_object(rng, picture, self._background(rng), outline)
            return picture, covering_mask(rng, outline), FOREGROUND
        if rng.random() < 0.4:
            return picture, covering_mask(rng, draw_outline(rng, self.side)), BACKGROUND
        sets = [sample_mask(rng, self.side, COVERAGE) for _ in range(int(rng.integers(1, 4)))]
        mask = np.any(sets, 0)
        if rng.random() < 0.2:
            outline = draw_outline(rng, self.side)
            beside = mask & ~covering_mask(rng, outline)
            if beside.any():
                return paste_object(rng, picture, self._background(rng), outline), beside, BACKGROUND
        return picture, mask, BACKGROUND

    def _background(self, rng: np.random.Generator) -> np.ndarray:
        cache = self.mixture.cache
        if rng.random() < 0.8:
            return random_photo_crop(rng, cache[int(rng.integers(len(cache)))], self.side)
        return draw_scene(rng, self.side)
