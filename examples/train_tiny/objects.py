"""Holes to fill with background, and holes that hold something of their own: what the denoiser's branches learn.

The published network has prompts for holes that are to be filled with background and prompts for holes that hold a
foreground object, and guidance leads away from the second kind, so that no object is invented. Nobody has outlined
objects in a folder of photographs. So objects are pasted, pieces of other pictures in smooth outlines, and the holes
of photographs are sorted by what they hide: where everything in a hole has its like round the hole it is background,
and where much of it has not, something of its own lies there. Both branches get holes of the same shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import cv2
import numpy as np

from .data import NETWORK_SIDE, PictureMixture, random_photo_crop
from .holes import KINDS, SHARES, covering_mask, draw_hole, draw_outline, widened
from .scenes import draw_scene

BACKGROUND, FOREGROUND = 0, 1  # the branches, as the bundle's input ``branch`` numbers them
CELL = 8  # pixels, a latent cell
REACH = 10  # cells round the hole that count as its surroundings
UNLIKE = 24.0  # levels by which a cell differs from all its surroundings when it has no like there
BACKGROUND_SHARE, OBJECT_SHARE = 0.03, 0.25  # at most, and at least, so many of a hole's cells without their like
_PICTURES, _HOLES = 6, 8  # at most so many pictures are drawn, and holes over each, until a hole suits its branch


def cell_features(picture: np.ndarray) -> np.ndarray:
    """The mean colour and the contrast of each cell of 8x8 pixels, in levels; uint8 RGB (S, S, 3) to (S/8, S/8, 4)."""
    side = len(picture) // CELL
    colours = cv2.resize(picture.astype(np.float32), (side, side), interpolation=cv2.INTER_AREA)
    grey = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY).astype(np.float32)
    mean, square = (cv2.resize(g, (side, side), interpolation=cv2.INTER_AREA) for g in (grey, grey * grey))
    return np.dstack([colours, np.sqrt(np.maximum(square - mean * mean, 0))])


def unlike_share(features: np.ndarray, mask: np.ndarray) -> float:
    """The share of the hole's cells that have no like round the hole; from ``cell_features`` and bool (S, S).

    NaN where no cell lies wholly in the hole, or none wholly outside it within ``REACH`` cells.
    """
    side = len(features)
    covered = cv2.resize(mask.astype(np.float32), (side, side), interpolation=cv2.INTER_AREA)
    inside, outside = covered > 0.99, covered == 0
    distance = cv2.distanceTransform((covered == 0).astype(np.uint8), cv2.DIST_L2, 3)
    hole, ring = features[inside], features[outside & (distance <= REACH)]
    if not len(hole) or not len(ring):
        return float("nan")
    # |a - b|^2 as a product of matrices, which is many times as fast as the differences themselves.
    squares = (hole**2).sum(1)[:, None] - 2 * hole @ ring.T + (ring**2).sum(1)[None]
    return float((squares.min(1) > UNLIKE**2).mean())


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


class BranchSamples:
    """``samples(number)`` draws a picture, its mask and its branch, from the seed and the number alone.

    The picture is uint8 RGB (side, side, 3), the mask bool (side, side), True where to fill. Of the samples,
    ``foreground_share`` belong to the foreground branch: pasted objects, wires and specks under a mask that covers
    them, and holes of photographs that hide something unlike their surroundings. The background's are holes of all
    kinds over what lies round them, sometimes with an object beside the hole that has to be left alone.
    """

    def __init__(self, mixture: PictureMixture, foreground_share: float = 0.3, side: int = NETWORK_SIDE) -> None:
        self.mixture, self.foreground_share, self.side = mixture, foreground_share, side

    def __call__(self, number: int) -> tuple[np.ndarray, np.ndarray, int]:
        rng = np.random.default_rng([self.mixture.seed + 2, number])
        if rng.random() >= self.foreground_share:
            return (*self._background(rng), BACKGROUND)
        return (*(self._own_content(rng) if rng.random() < 0.4 else self._pasted(rng)), FOREGROUND)

    def _background(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        _, picture, mask = min(self._tries(rng, KINDS, SHARES, lambda share: share <= BACKGROUND_SHARE), key=_share)
        if rng.random() < 0.15:
            outline = draw_outline(rng, self.side)
            beside = mask & ~covering_mask(rng, outline)
            if beside.any():
                return paste_object(rng, picture, self._picture(rng), outline), beside
        return picture, mask

    def _own_content(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        kinds, shares = ("strokes", "object", "box"), (0.4, 0.4, 0.2)
        share, picture, mask = max(self._tries(rng, kinds, shares, lambda share: share >= OBJECT_SHARE), key=_share)
        return (picture, mask) if share >= OBJECT_SHARE else self._pasted(rng)

    def _pasted(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        for _ in range(_HOLES):
            kind = str(rng.choice(("object", "wire", "specks"), p=(0.75, 0.17, 0.08)))
            if kind == "object":
                outline = draw_outline(rng, self.side)
                mask = covering_mask(rng, outline)
            else:
                thin = draw_hole(rng, self.side, kind)
                outline, mask = cv2.GaussianBlur(thin.astype(np.float32), (0, 0), 0.7), widened(thin, 2)
            picture = paste_object(rng, self._picture(rng), self._picture(rng), outline)
            share = unlike_share(cell_features(picture), outline > 0.5)
            if np.isnan(share) or share >= OBJECT_SHARE:
                break  # it differs from what it lies on, or is too thin to tell
        if rng.random() < 0.25:  # a hole that is more than the object needs
            mask = mask | draw_hole(rng, self.side, "strokes")
        return picture, mask

    def _tries(
        self, rng: np.random.Generator, kinds: Sequence[str], shares: Sequence[float], suits: Callable[[float], bool]
    ) -> list[tuple[float, np.ndarray, np.ndarray]]:
        """Draw holes, several over each picture, until one suits; with their ``unlike_share``, 0 for NaN."""
        tried: list[tuple[float, np.ndarray, np.ndarray]] = []
        for _ in range(_PICTURES):
            picture = self._picture(rng)
            features, kind = cell_features(picture), str(rng.choice(kinds, p=shares))
            for _ in range(_HOLES):
                mask = draw_hole(rng, self.side, kind)
                share = float(np.nan_to_num(unlike_share(features, mask)))  # a hole without a whole cell hides nothing
                tried.append((share, picture, mask))
                if suits(share):
                    return tried
        return tried

    def _picture(self, rng: np.random.Generator) -> np.ndarray:
        cache = self.mixture.cache
        if rng.random() < 0.85:
            return random_photo_crop(rng, cache[int(rng.integers(len(cache)))], self.side)
        return draw_scene(rng, self.side)


def _share(tried: tuple[float, np.ndarray, np.ndarray]) -> float:
    return tried[0]
