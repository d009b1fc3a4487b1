"""Encodes training pictures once: latents of the picture and of the picture with its hole greyed.

The encoder costs more than the small denoiser, so every pair is made once and read many times, each
time with other noise at another timestep.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

from ..masks import latent_mask
from .data import PictureSource, to_network
from .loop import Loader, progress_bar
from .masks import sample_mask


@dataclass(frozen=True)
class LatentCache:
    """``clean`` (P, 4, h, w), ``masked`` (P, M, 4, h, w) float16, both scaled; ``mask`` (P, M, h, w) uint8."""

    clean: np.ndarray
    masked: np.ndarray
    mask: np.ndarray

    @classmethod
    def load(cls, path: Path) -> LatentCache:
        with np.load(path) as data:
            return cls(data["clean"], data["masked"], data["mask"])

    def pair(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """A random picture with one of its masks: clean (4, h, w), masked (4, h, w), mask (1, h, w), float32."""
        i, j = int(rng.integers(len(self.clean))), int(rng.integers(self.mask.shape[1]))
        clean, masked = self.clean[i].astype(np.float32), self.masked[i, j].astype(np.float32)
        return clean, masked, self.mask[i, j][None].astype(np.float32)


@torch.no_grad()
def encode_pairs(
    vae: AutoencoderKL, path: Path, pictures: int, masks_each: int, size: int, photo_share: float, seed: int
) -> LatentCache:
    """Draws, masks and encodes ``pictures`` pictures, and writes them to ``path`` (.npz)."""
    source = PictureSource(size, photo_share)

    def draw(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        return source(rng), np.stack([sample_mask(rng, size) for _ in range(masks_each)])

    scale = vae.config["scaling_factor"]
    clean, masked, masks = [], [], []
    started = time.monotonic()
    with progress_bar("encoding", pictures) as report:
        for picture, mask in Loader(draw, 1, seed):
            image = to_network(picture)  # (1, 3, H, W)
            holes = image * (1 - mask[0][:, None].astype(np.float32))  # (M, 3, H, W), the hole mid-grey
            with torch.autocast("cpu", torch.bfloat16):
                latents = vae.encode(torch.from_numpy(np.concatenate([image, holes]))).latent_dist.mean
            latents = (latents.float() * scale).numpy().astype(np.float16)
            clean.append(latents[0])
            masked.append(latents[1:])
            masks.append(np.stack([latent_mask(m, latents.shape[-1]) for m in mask[0]]).astype(np.uint8))
            if len(clean) % 50 == 0:
                report(len(clean), {"pairs": len(clean), "per_s": len(clean) / (time.monotonic() - started)})
            if len(clean) == pictures:
                break
    cache = LatentCache(np.stack(clean), np.stack(masked), np.stack(masks))
    temporary = path.with_name(f".{path.name}.tmp.npz")
    np.savez(temporary, clean=cache.clean, masked=cache.masked, mask=cache.mask)
    temporary.replace(path)
    return cache
