"""How good a fill is: figures of the hole and of the whole picture against another picture, and its texture.

One implementation behind the report and the training's evaluation. PSNR and SSIM are ``fidelity``'s.
"""

from __future__ import annotations

import math

import cv2
import numpy as np

from ..imaging.masks import Mask, bounds
from .fidelity import PEAK, SSIM_WINDOW, psnr_db, ssim

_MARGIN = SSIM_WINDOW // 2 + 1  # so that the window also meets the hole's outermost pixels


def planes(image: np.ndarray) -> np.ndarray:
    """uint8 (H, W, C) -> float32 (C, H, W) in [-1, 1], as ``fidelity`` measures."""
    return image.transpose(2, 0, 1).astype(np.float32) * np.float32(PEAK / 255) - np.float32(1)


def fill_figures(image: np.ndarray, reference: np.ndarray, hole: Mask) -> dict[str, float | None]:
    """PSNR in dB and SSIM of ``image`` against ``reference``, float (C, H, W) in [-1, 1], in the hole and whole.

    SSIM is None for a picture smaller than its window.
    """
    large_enough = min(hole.shape) >= SSIM_WINDOW
    return {
        "hole_psnr_db": psnr_db(image[:, hole], reference[:, hole]),
        "psnr_db": psnr_db(image, reference),
        "hole_ssim": hole_ssim(image, reference, hole) if large_enough else None,
        "ssim": ssim(image, reference) if large_enough else None,
    }


def hole_psnr_db(result: np.ndarray, truth: np.ndarray, mask: Mask) -> float:
    """Peak signal-to-noise ratio over the masked pixels of uint8 pictures (H, W, C), in dB."""
    return psnr_db(planes(result)[:, mask], planes(truth)[:, mask])


def hole_ssim(image: np.ndarray, reference: np.ndarray, hole: Mask) -> float:
    """Mean SSIM of the hole's bounding box with a margin of half a window; float (C, H, W) in [-1, 1].

    Raises:
        ValueError: the pictures are smaller than the window, or the hole is empty.
    """
    box = bounds(hole)
    if box is None:
        raise ValueError("an empty hole has no SSIM")
    rows, columns = (_span(box[i], box[i + 2], hole.shape[i]) for i in (0, 1))
    return ssim(image[:, rows, columns], reference[:, rows, columns])


def texture_ratio(result: np.ndarray, mask: Mask, width: int = 16) -> float:
    """Variance of the Laplacian inside the hole over that of a ring round it: 1 is equal texture, 0 is none.

    ``result`` is uint8 RGB. NaN for a hole that is too thin to have an inside, or has nothing round it.
    """
    grey = cv2.cvtColor(result, cv2.COLOR_RGB2GRAY).astype(np.float32)
    laplacian = cv2.Laplacian(grey, cv2.CV_32F)
    inside = cv2.erode(mask.astype(np.uint8), np.ones((5, 5), np.uint8)).astype(bool)  # away from the seam
    outer = cv2.dilate(mask.astype(np.uint8), np.ones((2 * width + 1,) * 2, np.uint8)).astype(bool)
    ring = outer & ~cv2.dilate(mask.astype(np.uint8), np.ones((5, 5), np.uint8)).astype(bool)
    if not inside.any() or not ring.any():
        return math.nan
    return float(laplacian[inside].var() / (laplacian[ring].var() + 1e-9))


def _span(start: int, end: int, length: int) -> slice:
    """start..end with a margin, at least a window long, inside 0..length."""
    low, high = max(0, start - _MARGIN), min(length, end + _MARGIN)
    low = min(low, max(0, high - SSIM_WINDOW))
    return slice(low, max(high, low + SSIM_WINDOW))
