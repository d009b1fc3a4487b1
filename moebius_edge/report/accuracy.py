"""How far a configuration is from the reference with the same noise, and from the true picture.

Against the reference the network's own outputs are compared, window by window and unclipped, so that what 8 bits
would hide is seen; against the truth it is the finished pictures. Figures are means over windows or pictures, but
for the worst pixel and the texture, which are the largest and the median.

LPIPS and FID are torchmetrics', where it and the weights it needs lie on this machine already: nothing is downloaded.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import os
from collections.abc import Callable
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
from ..system.machine import cache_directory

_FIGURES = ("hole_psnr_db", "psnr_db", "hole_ssim", "ssim")
# What torchmetrics would fetch: torchvision's AlexNet for LPIPS, torch-fidelity's Inception for FID.
PERCEPTUAL = {
    "lpips": ("torchvision", "alexnet-owt-7be5be79.pth"),
    "fid": ("torch_fidelity", "weights-inception-2015-12-05-6726825d.pth"),
}


@dataclass
class Trace:
    """What one picture's run went through: hand its methods to ``Inpainter.inpaint``.

    ``latents`` has (1, 4, h, w) a network call, ``outputs`` (R, R, 3) and ``holes`` (R, R) a window.
    """

    latents: list[Floats] = field(default_factory=list)
    outputs: list[Floats] = field(default_factory=list)
    holes: list[Mask] = field(default_factory=list)

    def on_step(self, step: Step) -> None:
        self.latents.append(step.latent.copy())

    def on_window(self, window: Window, output: Floats, hole: Mask) -> None:
        self.outputs.append(output)
        self.holes.append(hole)

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as temporary, temporary.open("wb") as stream:
            np.savez(stream, latents=np.stack(self.latents), outputs=np.stack(self.outputs))


class AgainstReference:
    """Adds up the differences to a reference's traces."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._rows: list[dict[str, float | None]] = []
        self._worst = 0.0
        self._squares: Any = 0.0  # mean square of the latents' difference after each step, summed over windows
        self._images = 0

    def add(self, trace: Trace, path: Path) -> None:
        """One picture's trace, and where the reference's was saved. Raises BundleError if the two do not match."""
        with np.load(path) as saved:
            latents, outputs = saved["latents"], saved["outputs"]
        if latents.shape != (len(trace.latents), *trace.latents[0].shape) or len(outputs) != len(trace.outputs):
            raise BundleError(f"the reference {self._name} went through other steps: measure both again with --force")
        difference = np.stack(trace.latents).astype(np.float64) - latents
        squares = np.square(difference).mean(axis=tuple(range(1, difference.ndim)))
        self._squares = self._squares + squares.reshape(len(outputs), -1).sum(0)
        for hole, ours, reference in zip(trace.holes, trace.outputs, outputs, strict=True):
            a, b = (i.transpose(2, 0, 1) * np.float32(PEAK) - np.float32(1) for i in (ours, reference))
            self._rows.append(fill_figures(a, b, hole))
            self._worst = max(self._worst, worst_pixel(a[None], b[None])["levels"])
        self._images += 1

    def result(self) -> dict[str, Any]:
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


class Perceptual:
    """Adds up pictures; ``result`` has ``lpips`` (mean, AlexNet) and ``fid``, or null and why, for each."""

    def __init__(self) -> None:
        self._reasons = {name: _lacks(name) for name in PERCEPTUAL}
        self._metrics: dict[str, Any] = {}

    def add(self, result: np.ndarray, truth: np.ndarray) -> None:
        """uint8 RGB (H, W, 3) both."""
        for name in PERCEPTUAL:
            self._try(name, self._update, result, truth)

    def result(self) -> dict[str, Any]:
        values = {name: self._try(name, lambda name: float(self._metrics[name].compute())) for name in PERCEPTUAL}
        return values | {f"{name}_reason": self._reasons[name] or None for name in PERCEPTUAL}

    def _try(self, name: str, action: Callable[..., Any], *pictures: np.ndarray) -> Any:
        """What ``action`` returns; None where the metric cannot be had, or fails, which is its reason from then on."""
        try:
            return None if self._reasons[name] else action(name, *pictures)
        except Exception as error:  # another version's interface, a picture too small, or FID of one picture
            self._reasons[name] = f"torchmetrics failed: {' '.join(str(error).split()):.200}"
            return None

    def _update(self, name: str, result: np.ndarray, truth: np.ndarray) -> None:
        torch = importlib.import_module("torch")
        ours, true = (torch.from_numpy(np.ascontiguousarray(i.transpose(2, 0, 1)[None])) for i in (result, truth))
        if name not in self._metrics:
            self._metrics[name] = _create(name)
        if name == "fid":
            self._metrics[name].update(true, real=True)
            self._metrics[name].update(ours, real=False)
        else:
            self._metrics[name].update(ours.float() / 255, true.float() / 255)


def _create(name: str) -> Any:
    if name == "fid":
        return importlib.import_module("torchmetrics.image.fid").FrechetInceptionDistance()
    metric = importlib.import_module("torchmetrics.image.lpip").LearnedPerceptualImagePatchSimilarity
    return metric(net_type="alex", normalize=True)  # pictures in [0, 1]


def _lacks(name: str) -> str:
    """What is missing here for ``lpips`` or ``fid``; empty where nothing is."""
    package, weights = PERCEPTUAL[name]
    for needed in ("torchmetrics", package):
        if importlib.util.find_spec(needed) is None:
            return f"{needed.replace('_', '-')} is not installed"
    # Where PyTorch keeps what it has downloaded.
    folder = Path(os.environ.get("TORCH_HOME") or cache_directory() / "torch") / "hub" / "checkpoints"
    return "" if (folder / weights).is_file() else f"its weights {weights} are not in {folder}"
