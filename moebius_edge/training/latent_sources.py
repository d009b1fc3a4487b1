"""Where a trainer's samples come from: latents encoded once, or pictures encoded as they are drawn."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from ..data.samples import MaskedPictures
from .encoding import encode_batch
from .latents import LatentCache


class CachedLatents:
    """Random pictures of a cache with one of their masks, cut to ``side`` where the cache holds larger ones."""

    def __init__(self, cache: LatentCache, side: int) -> None:
        self._cache, self._side = cache, side

    def draw(self, number: int, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
        """Clean and masked latents (4, h, w) and the mask (1, h, w), float32."""
        return self._cache.pair(rng, self._side)

    def latents(self, drawn: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """What was drawn, for it is encoded already."""
        clean, masked, mask = drawn
        return clean, masked, mask


class EncodedPictures:
    """Pictures with a new crop and mask every time, encoded by ``vae`` in the training process."""

    def __init__(self, vae: Any, pictures: MaskedPictures) -> None:
        self._vae, self.pictures = vae, pictures

    def draw(self, number: int, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
        """uint8 RGB (S, S, 3) and bool (S, S)."""
        return tuple(self.pictures.sample(number))

    def latents(self, drawn: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """See ``encode_batch``."""
        image, mask = drawn
        return encode_batch(self._vae, image.cpu().numpy(), mask.cpu().numpy())
