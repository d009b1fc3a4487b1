"""LPIPS and FID by torchmetrics, where it and the weights it needs lie on this machine already.

Nothing is downloaded, so the files are looked for first. The device path has no PyTorch: these two are for a
workstation, and the modules are found by name when they are asked for.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from pathlib import Path
from typing import Any

import numpy as np

from ..system.machine import cache_directory

# What torchmetrics would fetch: torchvision's AlexNet for LPIPS, torch-fidelity's Inception for FID.
LPIPS_WEIGHTS = "alexnet-owt-7be5be79.pth"
FID_WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"
_NEEDS = {"lpips": ("torchvision", LPIPS_WEIGHTS), "fid": ("torch_fidelity", FID_WEIGHTS)}


class Perceptual:
    """Adds up pictures; ``result`` has ``lpips`` (mean, AlexNet) and ``fid``, or null and why, for each."""

    def __init__(self) -> None:
        self._reasons = {name: absence(name) for name in _NEEDS}
        self._metrics: dict[str, Any] = {}

    def add(self, result: np.ndarray, truth: np.ndarray) -> None:
        """uint8 RGB (H, W, 3) both."""
        for name, reason in self._reasons.items():
            if reason:
                continue
            try:
                if name not in self._metrics:
                    self._metrics[name] = _create(name)
                _update(name, self._metrics[name], result, truth)
            except Exception as error:  # another version's interface, or a picture too small for the network
                self._reasons[name] = f"torchmetrics failed: {' '.join(str(error).split()):.200}"

    def result(self) -> dict[str, Any]:
        figures: dict[str, Any] = {}
        for name in _NEEDS:
            value = None
            if not self._reasons[name]:
                try:
                    value = float(self._metrics[name].compute())
                except Exception as error:  # FID needs two pictures
                    self._reasons[name] = f"torchmetrics failed: {' '.join(str(error).split()):.200}"
            figures |= {name: value, f"{name}_reason": self._reasons[name] or None}
        return figures


def absence(name: str) -> str:
    """What ``lpips`` or ``fid`` lacks here; empty where nothing."""
    package, weights = _NEEDS[name]
    for needed in ("torchmetrics", package):
        if importlib.util.find_spec(needed) is None:
            return f"{needed.replace('_', '-')} is not installed"
    folder = _checkpoints()
    return "" if (folder / weights).is_file() else f"its weights {weights} are not in {folder}"


def _checkpoints() -> Path:
    """Where PyTorch keeps what it has downloaded."""
    return Path(os.environ.get("TORCH_HOME") or cache_directory() / "torch") / "hub" / "checkpoints"


def _create(name: str) -> Any:
    if name == "fid":
        return importlib.import_module("torchmetrics.image.fid").FrechetInceptionDistance()
    metric = importlib.import_module("torchmetrics.image.lpip").LearnedPerceptualImagePatchSimilarity
    return metric(net_type="alex", normalize=True)  # pictures in [0, 1]


def _update(name: str, metric: Any, result: np.ndarray, truth: np.ndarray) -> None:
    torch = importlib.import_module("torch")
    ours, true = (torch.from_numpy(np.ascontiguousarray(i.transpose(2, 0, 1)[None])) for i in (result, truth))
    if name == "fid":
        metric.update(true, real=True)
        metric.update(ours, real=False)
    else:
        metric.update(ours.float() / 255, true.float() / 255)
