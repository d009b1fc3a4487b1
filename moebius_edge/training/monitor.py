"""What a training shows while it runs: a line of figures, TensorBoard scalars, and grids of sampled pictures.

TensorBoard because every trainer's user knows it, by ``torch.utils.tensorboard``; it reads back nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import harmonic_mean
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from ..bundle.manifest import resolved_components
from ..errors import MachineError
from ..pipeline.loop import denoise, initial_noise
from ..runtimes.pytorch import TorchRuntime
from ..sampling.calls import Sampling
from ..sampling.scheduler import DDIM
from ..spec import LATENT_DOWNSCALE
from ..system.files import atomic_write, utf8_path
from ..system.packages import install
from .loop import make_folder

_RECENT = 100  # steps that a shown figure is the mean of
_LATEST = ("step", "learning_rate")  # shown as they are, not as a mean
_SPEED = "images_per_s"


class Monitor:
    """Scalars to ``output/tensorboard``, and pictures to ``output/samples`` as well. Use as a context manager.

    ``step`` is the last one that counts: what a killed run wrote after it is purged.
    Raises MachineError if the package tensorboard is missing.
    """

    def __init__(self, output: Path, step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise MachineError(f"training needs tensorboard ({error})", str(install("train"))) from error
        self._output = output
        self._writer: Any = SummaryWriter(str(output / "tensorboard"), purge_step=step + 1)
        self._recent: dict[str, deque[float]] = {}
        self._since_written: dict[str, list[float]] = {}

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *error: object) -> None:
        self._writer.close()

    def add(self, figures: Mapping[str, float]) -> None:
        """Take one step's figures into the means."""
        for name, value in figures.items():
            self._since_written.setdefault(name, []).append(value)
            self._recent.setdefault(name, deque(maxlen=_RECENT)).append(value)

    def means(self) -> dict[str, float]:
        """The running means by name; of step and learning rate the latest value."""
        return {name: _mean(name, values) for name, values in self._recent.items()}

    def line(self) -> str:
        """The losses and the speed, for a line of progress."""
        hidden = ("step", "gradient_norm", "learning_rate")
        shown = [(n, v) for n, v in self.means().items() if n not in hidden and not n.startswith("w_")]
        return "  ".join(f"{name} {value:.4g}" for name, value in shown)

    def write(self, step: int) -> None:
        """The means since the last time as scalars at ``step``: a resumed run, which has no past, gives the same."""
        for name, values in self._since_written.items():
            group = "weights" if name.startswith("w_") else "run" if name in (*_LATEST, _SPEED) else "losses"
            self._writer.add_scalar(f"{group}/{name}", _mean(name, values), step)
        self._since_written.clear()

    def picture(self, step: int, grid: np.ndarray) -> None:
        """``grid``, uint8 RGB (H, W, 3), as a PNG and in TensorBoard."""
        make_folder(self._output / "samples")
        with atomic_write(self._output / "samples" / f"step-{step:09d}.png") as temporary, utf8_path(temporary) as name:
            cv2.imwrite(name, cv2.cvtColor(grid, cv2.COLOR_RGB2BGR))
        self._writer.add_image("samples", grid, step, dataformats="HWC")


def _mean(name: str, values: Sequence[float]) -> float:
    """The mean of values a step; speeds by the time that the steps took together."""
    return values[-1] if name in _LATEST else harmonic_mean(values) if name == _SPEED else float(np.mean(values))


class SampleGrid:
    """Fills of the same few samples from the same noise, time after time: a row each of picture, hole and fill.

    ``vae`` is a diffusers ``AutoencoderKL``; ``clean``, ``masked`` (N, 4, h, w) and ``mask`` (N, 1, h, w).
    """

    def __init__(self, vae: Any, clean: Tensor, masked: Tensor, mask: Tensor, steps: int = 20) -> None:
        self._vae, self._steps = vae, steps
        self._mask, self._masked = mask.cpu().numpy(), masked.cpu().numpy()
        pixels = self._mask[:, 0].repeat(LATENT_DOWNSCALE, 1).repeat(LATENT_DOWNSCALE, 2)
        self._clean, self._hole = self._decode(clean), pixels[..., None] > 0.5

    def draw(self, student: nn.Module) -> np.ndarray:
        """The grid, uint8 RGB, with the fills of ``student``, which is put into evaluation mode and runs where it is.

        Raises BundleError for a student whose prediction is not finite.
        """
        components = resolved_components(self._mask.shape[-1] * LATENT_DOWNSCALE, latent_channels=self._masked.shape[1])
        noise = initial_noise(0, 0, self._masked.shape)
        with TorchRuntime(student, self._vae, components) as runtime:
            latents = denoise(runtime, noise, self._mask, self._masked, Sampling(DDIM(self._steps), guidance=1.0))
        holes = np.where(self._hole, np.uint8(255), self._clean)
        fills = np.where(self._hole, self._decode(torch.from_numpy(latents)), self._clean)
        return np.concatenate(list(np.concatenate([self._clean, holes, fills], axis=2)))

    @torch.no_grad()
    def _decode(self, latents: Tensor) -> np.ndarray:
        weight = next(self._vae.parameters())
        scaled = latents.to(weight) / self._vae.config["scaling_factor"]
        pictures = self._vae.decode(scaled).sample.float().clamp(-1, 1)
        return ((pictures.permute(0, 2, 3, 1).cpu().numpy() + 1) * 127.5).round().astype(np.uint8)
