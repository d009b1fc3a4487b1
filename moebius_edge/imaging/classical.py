"""Inpainting without a network, by OpenCV: where a start is prefilled, and what a network has to beat."""

from __future__ import annotations

import cv2
import numpy as np

from .masks import Mask

_RADIUS = 3  # pixels round each filled one that count, OpenCV's own examples' value


def telea(image: np.ndarray, hole: Mask) -> np.ndarray:
    """``image`` uint8 (H, W, 1 or 3), its ``hole`` (H, W) filled by fast marching (Telea 2004); a new array."""
    return np.asarray(cv2.inpaint(image, hole.astype(np.uint8), _RADIUS, cv2.INPAINT_TELEA)).reshape(image.shape)


def navier_stokes(image: np.ndarray, hole: Mask) -> np.ndarray:
    """As ``telea``, by fluid dynamics along the isophotes (Bertalmio et al. 2001)."""
    return np.asarray(cv2.inpaint(image, hole.astype(np.uint8), _RADIUS, cv2.INPAINT_NS)).reshape(image.shape)
