"""The gate: a whole sampling trajectory on the exported files against the float32 reference, noise equal.

Both sides encode the same drawn scene, take the same steps from the same noise and decode. What is judged is
the decoded image; what is recorded also says where a difference grew. One trajectory on one scene proves the
conversion, not the model: how good the pictures are is the report's affair.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import QualityError
from ..masks import latent_mask
from ..pipeline import STRENGTH, check_finite, denoise, initial_noise
from ..runtimes import Runtime
from ..scheduler import DDIM

SEED = 20
PEAK = 2.0  # images span [-1, 1]
PSNR_CAP_DB = 200.0  # stands for equal images: infinity has no place in JSON
CONDITIONS = {"seed": SEED, "strength": STRENGTH, "scheduler": "ddim"}


@dataclass(frozen=True)
class Trajectory:
    """One run: ``latents[i]`` (1, 4, h, w) after step i, ``encoded`` (2, 4, h, w), ``image`` (1, 3, H, W)."""

    encoded: np.ndarray
    latents: list[np.ndarray]
    image: np.ndarray


def draw_scene(resolution: int, seed: int = SEED) -> tuple[np.ndarray, np.ndarray]:
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
        centre_x, centre_y, radius = (
            generator.uniform(0, 1),
            generator.uniform(0, 1),
            generator.uniform(0.03, 0.18),
        )
        colour = generator.uniform(-0.9, 0.9, 3)
        image[:, (x - centre_x) ** 2 + (y - centre_y) ** 2 < radius**2] = colour[:, None]
    image = np.clip(image + generator.normal(0, 0.03, image.shape), -1, 1)
    ellipse = ((x - 0.42) / 0.22) ** 2 + ((y - 0.45) / 0.16) ** 2 < 1
    box = (abs(x - 0.7) < 0.12) & (abs(y - 0.68) < 0.1)
    return image[None].astype(np.float32), ellipse | box


def run_trajectory(
    runtime: Runtime, *, steps: int, guidance: float, seed: int = SEED, on_step: Callable[[int, int], None]
) -> Trajectory:
    """Encode, denoise and decode the scene on an inactive ``runtime``; ``on_step(done, total)`` each step.

    Raises:
        BundleError: a component's output is not finite.
    """
    resolution = _size(runtime, "vae_encoder")
    image, hole = draw_scene(resolution, seed)
    with runtime:
        original, masked = _encode(runtime, image), _encode(runtime, image * ~hole)
        mask = latent_mask(hole, _size(runtime, "denoiser"))[None, None].astype(np.float32)
        scheduler = DDIM(steps, STRENGTH)
        latent = scheduler.add_noise(original, initial_noise(seed, 0, original.shape))
        latents = []
        for step in denoise(runtime, latent, mask, masked, scheduler, guidance):
            latents.append(step.latent.copy())
            on_step(step.index, step.total)
        decoded = runtime.run("vae_decoder", {"latent": latents[-1]})["image"]
        check_finite(decoded, "vae_decoder", _on(runtime))
    return Trajectory(np.concatenate([original, masked]), latents, decoded)


def psnr_db(image: np.ndarray, reference: np.ndarray) -> float:
    """10 log10(peak² / mean squared difference) in dB, at most ``PSNR_CAP_DB``; nothing is clipped first."""
    error = float(np.mean((image.astype(np.float64) - reference.astype(np.float64)) ** 2))
    return min(PSNR_CAP_DB, 10 * math.log10(PEAK**2 / error)) if error > 0 else PSNR_CAP_DB


def compare(candidate: Trajectory, reference: Trajectory) -> dict[str, Any]:
    """The figures that ``bundle.json`` keeps. Latents are in the sampler's scale."""
    drift = [_difference(c, r) for c, r in zip(candidate.latents, reference.latents, strict=True)]
    return {
        "psnr_db": round(psnr_db(candidate.image, reference.image), 2),
        "image_max_difference": _difference(candidate.image, reference.image),
        "encoded_max_difference": _difference(candidate.encoded, reference.encoded),
        "latent_max_difference": max(drift),
        "latent_drift": drift,  # largest absolute difference after each step
        # A figure in dB says little of a picture without contrast: these say that there was one.
        "reference_image_std": _rounded(float(reference.image.std())),
        "reference_latent_std": _rounded(float(reference.latents[-1].std())),
        "steps_executed": len(drift),
    }


def judge(figures: dict[str, Any], min_psnr_db: float) -> None:
    """Raise ``QualityError`` with the figures unless the decoded image reaches ``min_psnr_db``."""
    if figures["psnr_db"] >= min_psnr_db:  # a NaN fails too
        return
    drift = figures["latent_drift"]
    raise QualityError(
        f"quality gate missed: the decoded image is {figures['psnr_db']:.2f} dB from the PyTorch reference, "
        f"{min_psnr_db:g} dB is the floor; the encoder differs by {figures['encoded_max_difference']:.1e}, "
        f"the latent by {drift[0]:.1e} after step 1 and {drift[-1]:.1e} after step {len(drift)}; nothing was "
        "saved: try another onnxruntime version, or lower --min-psnr to accept the difference"
    )


def _size(runtime: Runtime, component: str) -> int:
    size = runtime.components[component].inputs[0].shape[-1]
    assert isinstance(size, int), "the gate needs components with their sizes filled in"
    return size


def _difference(a: np.ndarray, b: np.ndarray) -> float:
    return _rounded(float(np.abs(a.astype(np.float64) - b.astype(np.float64)).max()))


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")


def _encode(runtime: Runtime, image: np.ndarray) -> np.ndarray:
    latent = runtime.run("vae_encoder", {"image": image})["latent"]
    check_finite(latent, "vae_encoder", _on(runtime))
    return latent


def _on(runtime: Runtime) -> str:
    return f" on {runtime.info['name']}"
