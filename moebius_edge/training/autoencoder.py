"""Trains a small autoencoder: diffusers' ``AutoencoderKL``, the class the published models use.

The loss is L1 on pixels and on the levels of a Laplacian pyramid, so that detail counts at every scale, plus a
light Kullback-Leibler term that keeps the latents smooth. No perceptual network and no adversary: nothing
has to be downloaded, and the price is a slight softness.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import nn
from torch.nn import functional as F

from .data import PictureSource, to_network
from .loop import Loader, atomic_save, progress_bar


@dataclass(frozen=True)
class AutoencoderRecipe:
    """Everything that decides the result, saved beside the weights."""

    block_out_channels: tuple[int, ...] = (16, 32, 64, 96)
    norm_num_groups: int = 8
    # (share of the time, batch, side): small crops first, whole pictures last.
    stages: tuple[tuple[float, int, int], ...] = ((0.55, 8, 64), (0.3, 4, 128), (0.15, 2, 256))
    minutes: float = 25.0
    learning_rate: float = 2e-3
    kl_weight: float = 2e-6
    photo_share: float = 0.6
    ema_decay: float = 0.997
    seed: int = 0


def build_autoencoder(recipe: AutoencoderRecipe) -> AutoencoderKL:
    levels = len(recipe.block_out_channels)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=recipe.block_out_channels,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=recipe.norm_num_groups,
        sample_size=256,
    )


def pyramid_l1(a: torch.Tensor, b: torch.Tensor, levels: int = 3) -> torch.Tensor:
    """L1 between images (N, 3, H, W) plus L1 between the bands of their Laplacian pyramids; a scalar."""
    difference = a - b
    loss = difference.abs().mean()
    for _ in range(levels):
        coarse = F.avg_pool2d(difference, 2)
        band = difference - F.interpolate(coarse, scale_factor=2.0, mode="nearest")
        loss = loss + band.abs().mean()
        difference = coarse
    return loss + difference.abs().mean()


def train_autoencoder(recipe: AutoencoderRecipe, output: Path, device: str = "cpu") -> AutoencoderKL:
    """Trains for ``recipe.minutes`` and writes a diffusers folder ``output``; returns the averaged model."""
    torch.manual_seed(recipe.seed)
    model = build_autoencoder(recipe).to(device)
    average = build_autoencoder(recipe).to(device).requires_grad_(False)
    average.load_state_dict(model.state_dict())
    optimiser = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, weight_decay=1e-4, betas=(0.9, 0.95))
    started, step, elapsed = time.monotonic(), 0, 0.0
    with progress_bar("autoencoder", recipe.minutes * 60) as report:
        stage_ends = np.cumsum([share for share, _, _ in recipe.stages]) * recipe.minutes * 60
        for stage, (_, batch, side) in enumerate(recipe.stages):
            source = PictureSource(side, recipe.photo_share)
            loader = Loader(lambda rng, s=source: s(rng), batch, seed=recipe.seed + 1000 * stage)
            for pictures in loader:
                elapsed = time.monotonic() - started
                if elapsed > stage_ends[stage]:
                    break
                share = elapsed / (recipe.minutes * 60)
                for group in optimiser.param_groups:
                    warm = min(1.0, (step + 1) / 100)
                    group["lr"] = recipe.learning_rate * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * share)))
                image = torch.from_numpy(to_network(pictures)).to(device)
                with torch.autocast(device, torch.bfloat16):
                    posterior = model.encode(image).latent_dist
                    decoded = model.decode(posterior.sample()).sample
                reconstruction = pyramid_l1(decoded.float(), image)
                loss = reconstruction + recipe.kl_weight * posterior.kl().mean()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimiser.step()
                optimiser.zero_grad(set_to_none=True)
                step += 1
                decay = min(recipe.ema_decay, step / (step + 10))
                with torch.no_grad():
                    for slow, fast in zip(average.parameters(), model.parameters(), strict=True):
                        slow.lerp_(fast, 1 - decay)
                if step % 20 == 0:
                    report(elapsed, {"step": step, "side": side, "loss": reconstruction.item()})
                if step % 500 == 0:
                    _save(average, recipe, output, {"steps": step})
    _save(average, recipe, output, {"steps": step, "seconds": elapsed})
    return average


@torch.no_grad()
def latent_deviation(model: AutoencoderKL, pictures: np.ndarray) -> float:
    """Standard deviation of the posterior means over uint8 pictures (N, H, W, 3)."""
    latents = [model.encode(torch.from_numpy(to_network(p[None]))).latent_dist.mean for p in pictures]
    return float(torch.cat(latents).std())


def _save(model: AutoencoderKL, recipe: AutoencoderRecipe, output: Path, figures: dict[str, Any]) -> None:
    rng = np.random.default_rng(recipe.seed + 7)
    source = PictureSource(256, recipe.photo_share)
    model.register_to_config(scaling_factor=1 / latent_deviation(model, np.stack([source(rng) for _ in range(32)])))
    model.save_pretrained(output)
    atomic_save({"recipe": asdict(recipe), **figures}, output / "training.json")
