"""A hole and a grey picture of noise, for what measures fills."""

from __future__ import annotations

import numpy as np


def square(size: int = 64, low: int = 20, high: int = 44) -> np.ndarray:
    mask = np.zeros((size, size), bool)
    mask[low:high, low:high] = True
    return mask


def noise(size: int = 64, spread: float = 40.0) -> np.ndarray:
    values = 128 + spread * np.random.default_rng(0).standard_normal((size, size, 1))
    return np.clip(values, 0, 255).astype(np.uint8).repeat(3, 2)
