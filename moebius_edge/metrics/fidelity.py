"""How far pictures and trajectories are apart, and how good a fill is: PSNR, SSIM, worst pixel, drift, texture.

The one implementation behind the export's gate, ``compare``, the report and training's evaluation. Images span
[-1, 1] unless said otherwise and are never clipped first, for a conversion that leaves the range differs there too.
"""

from __future__ import annotations

import math
from typing import Any

import cv2
import numpy as np

from ..imaging.masks import Mask, bounds
from .trajectory import Trajectory

PEAK = 2.0  # images span [-1, 1]
PSNR_CAP_DB = 200.0  # stands for equal images: infinity has no place in JSON
SSIM_WINDOW, _SIGMA = 11, 1.5  # Wang et al.'s
_C1, _C2 = (0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2
_MARGIN = SSIM_WINDOW // 2 + 1  # so that the window also meets the hole's outermost pixels


def compare(candidate: Trajectory, reference: Trajectory) -> dict[str, Any]:
    """The figures of the gate in ``bundle.json``. Latents are in the sampler's scale."""
    pairs = list(zip(candidate.latents, reference.latents, strict=True))
    drift = [_max_difference(c, r) for c, r in pairs]
    return {
        "psnr_db": round(psnr_db(candidate.image, reference.image), 2),
        "ssim": round(ssim(candidate.image, reference.image), 6),
        "image_max_difference": _max_difference(candidate.image, reference.image),
        "worst_pixel": worst_pixel(candidate.image, reference.image),
        "encoded_max_difference": _max_difference(candidate.encoded, reference.encoded),
        "latent_max_difference": max(drift),
        "latent_drift": drift,  # largest absolute difference after each step
        "latent_rms_drift": [_rounded(math.sqrt(_mean_square(c, r))) for c, r in pairs],
        # A figure in dB says little of a picture without contrast: these say that there was one.
        "reference_image_std": _rounded(float(reference.image.std())),
        "reference_latent_std": _rounded(float(reference.latents[-1].std())),
        "steps_executed": len(drift),
    }


def psnr_db(image: np.ndarray, reference: np.ndarray) -> float:
    """10 log10(peak² / mean squared difference) in dB, at most ``PSNR_CAP_DB``; nothing is clipped first."""
    error = _mean_square(image, reference)
    return min(PSNR_CAP_DB, 10 * math.log10(PEAK**2 / error)) if error > 0 else PSNR_CAP_DB


def ssim(image: np.ndarray, reference: np.ndarray) -> float:
    """Mean structural similarity of (..., H, W) arrays in [-1, 1], at most 1; every H x W plane counts alike.

    It is taken of brightness from 0 up, x + 1, for its luminance term compares means by their ratio and has no meaning
    round 0, where mid-grey lies in [-1, 1].

    Wang et al. 2004, "Image Quality Assessment: From Error Visibility to Structural Similarity", eq. 13: local
    means, variances and covariance under an 11x11 Gaussian of σ = 1.5, K1 = 0.01 and K2 = 0.03, averaged over
    the places where the window lies inside the picture.

    Raises:
        ValueError: the shapes differ, or a side is shorter than the window.
    """
    if image.shape != reference.shape or min(image.shape[-2:]) < SSIM_WINDOW:
        raise ValueError(f"SSIM needs two arrays of one shape, {SSIM_WINDOW} or more each way, got {image.shape}")
    planes = [a.astype(np.float64).reshape(-1, *a.shape[-2:]) + 1 for a in (image, reference)]
    return float(np.mean([_plane_ssim(a, b) for a, b in zip(*planes, strict=True)]))


def worst_pixel(image: np.ndarray, reference: np.ndarray) -> dict[str, Any]:
    """Where (1, C, H, W) images differ most in one channel: position, channel, both values, the difference.

    ``levels`` is the difference in steps of an 8-bit picture, of which [-1, 1] has 255.
    """
    difference = np.abs(image.astype(np.float64) - reference.astype(np.float64))
    _, channel, y, x = (int(i) for i in np.unravel_index(int(np.argmax(difference)), difference.shape))
    worst = float(difference[0, channel, y, x])
    return {
        "x": x,
        "y": y,
        "channel": channel,
        "value": _rounded(float(image[0, channel, y, x])),
        "reference": _rounded(float(reference[0, channel, y, x])),
        "difference": _rounded(worst),
        "levels": _rounded(worst * 255 / PEAK),
    }


def planes(image: np.ndarray) -> np.ndarray:
    """uint8 (H, W, C) -> float32 (C, H, W) in [-1, 1]."""
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
    hole, seam = mask.astype(np.uint8), np.ones((5, 5), np.uint8)
    inside = cv2.erode(hole, seam).astype(bool)
    outer = cv2.dilate(hole, np.ones((2 * width + 1,) * 2, np.uint8)).astype(bool)
    ring = outer & ~cv2.dilate(hole, seam).astype(bool)
    if not inside.any() or not ring.any():
        return math.nan
    return float(laplacian[inside].var() / (laplacian[ring].var() + 1e-9))


def _plane_ssim(a: np.ndarray, b: np.ndarray) -> float:
    mean_a, mean_b = _blurred(a), _blurred(b)
    variance_a = _blurred(a * a) - mean_a**2
    variance_b = _blurred(b * b) - mean_b**2
    covariance = _blurred(a * b) - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + _C1) / (mean_a**2 + mean_b**2 + _C1)
    structure = (2 * covariance + _C2) / (variance_a + variance_b + _C2)
    edge = SSIM_WINDOW // 2
    return float((luminance * structure)[edge:-edge, edge:-edge].mean())


def _blurred(plane: np.ndarray) -> np.ndarray:
    return np.asarray(cv2.GaussianBlur(plane, (SSIM_WINDOW, SSIM_WINDOW), _SIGMA))


def _span(start: int, end: int, length: int) -> slice:
    """start..end with a margin, at least a window long, inside 0..length."""
    low, high = max(0, start - _MARGIN), min(length, end + _MARGIN)
    low = min(low, max(0, high - SSIM_WINDOW))
    return slice(low, max(high, low + SSIM_WINDOW))


def _max_difference(a: np.ndarray, b: np.ndarray) -> float:
    return _rounded(float(np.abs(a.astype(np.float64) - b.astype(np.float64)).max()))


def _mean_square(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2))


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")
