"""One whole sampling trajectory on a runtime, every latent kept: what two conversions are compared by.

Encode, denoise and decode one scene of the model's own size, always from the same noise. The scene is drawn,
so that it is the same everywhere without a file, or is given. How far two trajectories are apart is
``fidelity``'s business.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np

from ..imaging.masks import Mask
from ..imaging.windows import extract, extract_mask, plan_windows
from ..pipeline.inpainter import STRENGTH
from ..pipeline.loop import Step, fill, initial_noise
from ..runtimes import Runtime
from ..sampling.calls import Sampling
from ..sampling.scheduler import DDIM

SEED = 20
Scene = tuple[np.ndarray, np.ndarray]  # image (1, 3, H, W) float32 in [-1, 1], hole (H, W) bool, True = fill


@dataclass(frozen=True)
class Trajectory:
    """One run: ``latents[i]`` (1, 4, h, w) after step i, ``encoded`` (2, 4, h, w), ``image`` (1, 3, H, W)."""

    encoded: np.ndarray
    latents: list[np.ndarray]
    image: np.ndarray


def draw_scene(resolution: int, seed: int = SEED) -> Scene:
    """A scene and the hole in it: image (1, 3, H, W) float32 in [-1, 1], mask (H, W) bool, True = fill.

    Gradients, waves of several scales, hard-edged discs and some noise: what a photograph's crop holds, but
    the same everywhere without a file.
    """
    generator = np.random.Generator(np.random.PCG64(seed))
    y, x = np.mgrid[0:resolution, 0:resolution] / resolution
    planes = []
    for _ in range(3):
        slope = generator.uniform(-0.5, 0.5, 2)
        plane = slope[0] * (x - 0.5) + slope[1] * (y - 0.5)
        for frequency in (3, 9, 31):
            angle, phase = generator.uniform(0, 2 * math.pi, 2)
            plane = plane + 0.15 * np.sin(2 * math.pi * frequency * (x * math.cos(angle) + y * math.sin(angle)) + phase)
        planes.append(plane)
    image = np.stack(planes)
    for _ in range(8):
        centre_x, centre_y = generator.uniform(0, 1), generator.uniform(0, 1)
        radius = generator.uniform(0.03, 0.18)
        image[:, (x - centre_x) ** 2 + (y - centre_y) ** 2 < radius**2] = generator.uniform(-0.9, 0.9, 3)[:, None]
    image = np.clip(image + generator.normal(0, 0.03, image.shape), -1, 1)
    ellipse = ((x - 0.42) / 0.22) ** 2 + ((y - 0.45) / 0.16) ** 2 < 1
    box = (abs(x - 0.7) < 0.12) & (abs(y - 0.68) < 0.1)
    return image[None].astype(np.float32), ellipse | box


def cut_scene(pixels: np.ndarray, hole: Mask, resolution: int) -> tuple[Scene, int]:
    """What the network sees in the window that fills the largest box, and the number of windows.

    Args:
        pixels: (H, W, C) of uint8 or uint16.
        hole: (H, W), True where to fill, somewhere.
        resolution: the network's side in pixels.
    """
    windows = plan_windows(hole, resolution)
    window = max(windows, key=lambda w: (w.fills[2] - w.fills[0]) * (w.fills[3] - w.fills[1]))
    image = extract(pixels, window, resolution).transpose(2, 0, 1)[None]
    return (image * np.float32(2) - np.float32(1), extract_mask(hole, window, resolution)), len(windows)


def run_trajectory(
    runtime: Runtime,
    *,
    steps: int,
    guidance: float,
    seed: int = SEED,
    scene: Scene | None = None,
    cache_interval: int = 1,
    on_step: Callable[[int, int], None],
) -> Trajectory:
    """Encode, denoise and decode a scene on ``runtime``, from the noised image with DDIM as upstream does.

    A runtime that is active already is used as it is and left active.

    Args:
        scene: by default the drawn one of ``seed``; one that is given must have the model's resolution.
        cache_interval: as in ``Sampling``.
        on_step: called with the number of steps done and their total.

    Raises:
        BundleError: a component's output is not finite.
    """
    side = int(runtime.components["vae_encoder"].inputs[0].shape[-1])
    channels, size = (int(runtime.components["denoiser"].outputs[0].shape[axis]) for axis in (1, 2))
    image, hole = draw_scene(side, seed) if scene is None else scene
    noise = initial_noise(seed, 0, (1, channels, size, size))
    latents: list[np.ndarray] = []

    def keep(step: Step) -> None:
        latents.append(step.latent)
        on_step(step.index, step.total)

    sampling = Sampling(DDIM(steps, STRENGTH), guidance, cache_interval=cache_interval)
    with nullcontext() if runtime.active else runtime:
        result = fill(runtime, image, hole[None], noise, sampling, image, keep)
    assert result.start is not None
    return Trajectory(np.concatenate([result.start, result.masked]), latents, result.images)
