"""From pictures to what a network is trained on: encoded as they are drawn, each time with a new crop and mask.

Nothing is encoded beforehand. That would spare two passes of the encoder a sample, and a network would see the same
few crops and holes again and again: on a small set of pictures it learns them by heart.
"""

from __future__ import annotations

import hashlib
import json
from typing import Protocol

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from ..data.samples import MaskedPictures
from ..errors import BundleError
from ..imaging.masks import latent_mask

_BATCH = 4  # pictures that go through the autoencoder at a time, for it takes more memory than the denoiser


class Source(Protocol):
    """Where samples come from. ``draw`` is called in a loading process, ``latents`` on what it drew, stacked."""

    def draw(self, number: int, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
        """Sample ``number``, from it and ``rng`` alone."""

    def latents(self, drawn: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Clean and masked latents (N, 4, h, w) and the mask (N, 1, h, w), float32.

        A fourth tensor (N,) may say the branches, 0 or 1; where it is -1 the branch is drawn at random.
        """


class EncodedPictures:
    """A ``Source`` of pictures with a new crop and mask every time, encoded by ``vae`` as they are drawn.

    ``sampled``: see ``encode_batch``.
    """

    def __init__(self, vae: AutoencoderKL, pictures: MaskedPictures, sampled: bool = False) -> None:
        self._vae, self.pictures, self._sampled = vae, pictures, sampled

    def draw(self, number: int, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
        """uint8 RGB (S, S, 3), bool (S, S) and the branch, int64."""
        image, mask, branch = self.pictures.sample(number)
        return image, mask, np.asarray(branch)

    def latents(self, drawn: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """See ``encode_batch``. Raises BundleError for latents that are not finite."""
        *drawn_parts, branch = drawn
        images, masks = (part.cpu().numpy() for part in drawn_parts)
        parts = [
            encode_batch(self._vae, images[k : k + _BATCH], masks[k : k + _BATCH, None], self._sampled)
            for k in range(0, len(images), _BATCH)
        ]
        clean, masked, mask = (torch.cat(column) for column in zip(*parts, strict=True))
        if not (clean.isfinite().all() and masked.isfinite().all()):
            raise BundleError("the VAE gives latents that are not finite: its weights are damaged, or no VAE's")
        return clean, masked[:, 0], mask, branch


@torch.no_grad()
def encode_batch(
    vae: AutoencoderKL, images: np.ndarray, masks: np.ndarray, sampled: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """What a denoiser learns from, encoded on the VAE's device in bfloat16, given in float32.

    Args:
        images: uint8 RGB (N, S, S, 3), S a multiple of 8.
        masks: bool (N, M, S, S), True where to fill.
        sampled: take a sample of the posterior, by PyTorch's generator, as upstream does; else its mean.

    Returns:
        clean (N, 4, h, w): of the posterior, scaled; masked (N, M, 4, h, w): the same of the picture with its hole
        mid-grey; mask (N, M, h, w): 1 where to fill, of ``masks.latent_mask``.
    """
    device = next(vae.parameters()).device
    pictures = torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
    known = torch.from_numpy(~masks).to(device)
    clean = _encode(vae, pictures, sampled)
    masked = [_encode(vae, pictures * known[:, m : m + 1], sampled) for m in range(masks.shape[1])]
    cells = [[latent_mask(mask, clean.shape[-1]) for mask in of_picture] for of_picture in masks]
    return clean, torch.stack(masked, 1), torch.from_numpy(np.array(cells)).to(device).float()


def _encode(vae: AutoencoderKL, images: Tensor, sampled: bool) -> Tensor:
    """Images (N, 3, S, S) in [-1, 1] to scaled latents (N, 4, h, w), float32."""
    with torch.autocast(images.device.type, torch.bfloat16):
        posterior = vae.encode(images).latent_dist
    latent: Tensor = posterior.sample() if sampled else posterior.mean
    return latent.float() * vae.config["scaling_factor"]


def vae_hash(vae: AutoencoderKL) -> str:
    """SHA-256 of the VAE's weights and of its configuration, without the notes on where it came from."""
    settings = {k: v for k, v in vae.config.items() if not k.startswith("_")}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in sorted(vae.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
