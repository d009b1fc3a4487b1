"""How far a configuration is from the reference with the same noise, and from the true picture.

Against the reference the network's own outputs are compared, window by window and unclipped, so that what 8 bits
would hide is seen; against the truth it is the finished pictures. Figures are means over windows or pictures, but
for the worst pixel and the texture, which are the largest and the median.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import BundleError
from ..imaging.masks import Mask
from ..imaging.windows import Floats, Window
from ..metrics.fidelity import PEAK, fill_figures, planes, texture_ratio, worst_pixel
from ..pipeline.inpainter import Step
from ..system.files import atomic_write
from .perceptual import Perceptual

_FIGURES = ("hole_psnr_db", "psnr_db", "hole_ssim", "ssim")


@dataclass
class Trace:
    """What one picture's run went through: hand its methods to ``Inpainter.inpaint``.

    ``latents`` has (1, 4, h, w) a network call, ``made`` (R, R, 3) and ``holes`` (R, R) a window.
    """

    latents: list[Floats] = field(default_factory=list)
    made: list[Floats] = field(default_factory=list)
    holes: list[Mask] = field(default_factory=list)

    def on_step(self, step: Step) -> None:
        self.latents.append(step.latent.copy())

    def on_window(self, window: Window, made: Floats, hole: Mask) -> None:
        self.made.append(made)
        self.holes.append(hole)

    def save(self, path: Path) -> None:
        with atomic_write(path) as temporary, temporary.open("wb") as stream:
            np.savez(stream, latents=np.stack(self.latents), made=np.stack(self.made))


class AgainstReference:
    """Adds up the differences to a reference's traces."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._rows: list[dict[str, float | None]] = []
        self._worst = 0.0
        self._squares: np.ndarray | None = None  # mean square of the latents' difference after each step, summed
        self._images = 0

    def add(self, trace: Trace, path: Path) -> None:
        """One picture's trace, and where the reference's was saved. Raises BundleError if the two do not match."""
        with np.load(path) as saved:
            latents, made = saved["latents"], saved["made"]
        if latents.shape != (len(trace.latents), *trace.latents[0].shape) or len(made) != len(trace.made):
            raise BundleError(f"the reference {self._name} went through other steps: measure both again with --force")
        difference = np.stack(trace.latents).astype(np.float64) - latents
        steps = len(latents) // len(made)
        squares = np.square(difference).mean(axis=tuple(range(1, difference.ndim))).reshape(len(made), steps)
        self._squares = squares.sum(0) if self._squares is None else self._squares + squares.sum(0)
        for seen, ours, reference in zip(trace.holes, trace.made, made, strict=True):
            a, b = (i.transpose(2, 0, 1) * np.float32(PEAK) - np.float32(1) for i in (ours, reference))
            self._rows.append(fill_figures(a, b, seen))
            self._worst = max(self._worst, worst_pixel(a[None], b[None])["levels"])
        self._images += 1

    def result(self) -> dict[str, Any]:
        assert self._squares is not None, "no picture was added"
        drift = np.sqrt(self._squares / len(self._rows))
        return {
            "reference": self._name,
            **_means(self._rows),
            "worst_pixel_levels": self._worst,
            "latent_rms_drift": [float(f"{value:.3g}") for value in drift],
            "images": self._images,
        }


class AgainstTruth:
    """Adds up the differences to the true pictures."""

    def __init__(self) -> None:
        self._rows: list[dict[str, float | None]] = []
        self._textures: list[float] = []
        self._perceptual = Perceptual()

    def add(self, result: np.ndarray, truth: np.ndarray, hole: Mask) -> None:
        """uint8 RGB (H, W, 3) both."""
        self._rows.append(fill_figures(planes(result), planes(truth), hole))
        if not math.isnan(texture := texture_ratio(result, hole)):
            self._textures.append(texture)
        self._perceptual.add(result, truth)

    def result(self) -> dict[str, Any]:
        return {
            **_means(self._rows),
            "texture_ratio": float(f"{np.median(self._textures):.4g}") if self._textures else None,
            **self._perceptual.result(),
            "images": len(self._rows),
        }


def _means(rows: list[dict[str, float | None]]) -> dict[str, float | None]:
    """The mean of each figure over the rows that have it."""
    means: dict[str, float | None] = {}
    for key in _FIGURES:
        values = [value for row in rows if (value := row[key]) is not None]
        digits = 6 if key.endswith("ssim") else 2
        means[key] = round(float(np.mean(values)), digits) if values else None
    return means
