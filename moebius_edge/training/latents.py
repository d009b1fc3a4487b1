"""Encodes training pictures once: latents of the picture and of the picture with its hole greyed.

The encoder costs more than the small denoiser, so every pair is made once and read many times, each
time with other noise at another timestep.
"""

from __future__ import annotations

import time
import zipfile
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

from ..errors import BundleError, MachineError
from ..files import atomic_write
from ..masks import latent_mask
from .data import PictureSource, to_network
from .loop import Loader, make_folder, progress_bar
from .masks import sample_mask


@dataclass(frozen=True)
class LatentCache:
    """``clean`` (P, 4, h, w), ``masked`` (P, M, 4, h, w) float16, both scaled; ``mask`` (P, M, h, w) uint8."""

    clean: np.ndarray
    masked: np.ndarray
    mask: np.ndarray

    @classmethod
    def load(cls, path: Path) -> LatentCache:
        """Reads what ``encode_pairs`` wrote. Raises MachineError if it is missing, BundleError if damaged."""
        try:
            with np.load(path) as data:
                return cls(data["clean"], data["masked"], data["mask"])
        except FileNotFoundError:
            raise MachineError(f"there are no latents {path}: encode_pairs makes them") from None
        except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise BundleError(f"{path} is damaged: remove it, and the same command encodes anew") from error

    def pair(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """A random picture with one of its masks: clean (4, h, w), masked (4, h, w), mask (1, h, w), float32."""
        i, j = int(rng.integers(len(self.clean))), int(rng.integers(self.mask.shape[1]))
        clean, masked = self.clean[i].astype(np.float32), self.masked[i, j].astype(np.float32)
        return clean, masked, self.mask[i, j][None].astype(np.float32)


@torch.no_grad()
def encode_pairs(
    vae: AutoencoderKL, path: Path, pictures: int, masks_each: int, size: int, photo_share: float, seed: int
) -> LatentCache:
    """Draws, masks and encodes ``pictures`` pictures of ``size`` pixels, and writes them to ``path`` (.npz)."""
    source = PictureSource(size, photo_share)

    def draw(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        return source(rng), np.stack([sample_mask(rng, size) for _ in range(masks_each)])

    scale = vae.config["scaling_factor"]
    clean, masked, masks = [], [], []
    started = time.monotonic()
    with progress_bar("encoding", pictures) as report, closing(iter(Loader(draw, 1, seed))) as batches:
        for picture, mask in islice(batches, pictures):
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
    cache = LatentCache(np.stack(clean), np.stack(masked), np.stack(masks))
    make_folder(path.parent)
    with atomic_write(path) as temporary, temporary.open("wb") as stream:  # a name would get a second suffix
        np.savez(stream, clean=cache.clean, masked=cache.masked, mask=cache.mask)
    return cache
