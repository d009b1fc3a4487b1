"""How far a configuration is from the reference with the same noise, and from the true picture.

Against the reference the network's own outputs are compared, window by window and unclipped, so that what 8 bits
would hide is seen; against the truth it is the finished pictures. Figures are means over windows or pictures.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import BundleError
from ..imaging.masks import Mask
from ..imaging.windows import Floats, Window
from ..metrics.fidelity import PEAK, fill_figures, planes
from ..system.files import atomic_write

_FIGURES = ("hole_psnr_db", "psnr_db", "hole_ssim", "ssim")


@dataclass
class Trace:
    """What the network returned for one picture: hand ``on_window`` to ``Inpainter.inpaint``.

    ``outputs`` has (R, R, 3) in [0, 1] and ``holes`` (R, R) a window.
    """

    outputs: list[Floats] = field(default_factory=list)
    holes: list[Mask] = field(default_factory=list)

    def on_window(self, window: Window, output: Floats, hole: Mask) -> None:
        self.outputs.append(output)
        self.holes.append(hole)

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as temporary, temporary.open("wb") as stream:
            np.save(stream, np.stack(self.outputs))


class Fidelity:
    """Adds up differences, each of a window to the reference's or of a picture to the truth."""

    def __init__(self) -> None:
        self._rows: list[dict[str, float | None]] = []
        self._images = 0

    def add_reference(self, trace: Trace, path: Path) -> None:
        """One picture's trace, and where the reference's was saved. Raises BundleError if the two do not match."""
        outputs = np.load(path)
        if len(outputs) != len(trace.outputs):
            raise BundleError(f"the reference in {path} has other windows", "measure both again with --force")
        for hole, ours, reference in zip(trace.holes, trace.outputs, outputs, strict=True):
            a, b = (i.transpose(2, 0, 1) * np.float32(PEAK) - np.float32(1) for i in (ours, reference))
            self._rows.append(fill_figures(a, b, hole))
        self._images += 1

    def add_truth(self, result: np.ndarray, truth: np.ndarray, hole: Mask) -> None:
        """uint8 RGB (H, W, 3) both."""
        self._rows.append(fill_figures(planes(result), planes(truth), hole))
        self._images += 1

    def result(self) -> dict[str, Any]:
        """The mean of each figure over the rows that have it"""
        means: dict[str, Any] = {}
        for key in _FIGURES:
            values = [value for row in self._rows if (value := row[key]) is not None]
            means[key] = round(float(np.mean(values)), 6 if key.endswith("ssim") else 2) if values else None
        return {**means, "images": self._images}
