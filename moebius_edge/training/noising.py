"""From clean latents to what a network is trained on: timesteps, noise, and the prompts' branch.

Everything random comes from the sample's own generator, so a sample depends on nothing but its seed and number.
"""

from __future__ import annotations

from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..sampling.scheduler import DDIM
from ..spec import NUM_TRAIN_TIMESTEPS
from .recipe import NoiseRecipe

_EDGE = 1e-6  # of the uniform variable, where the normal's inverse would be infinite


class Batch(NamedTuple):
    """What a step sees, on its device. N samples; h, w the latent grid.

    ``clean``, ``masked``, ``noise``, ``noisy`` (N, 4, h, w); ``mask`` (N, 1, h, w), 1 in the hole; ``timestep``,
    ``alpha_bar`` (N,); ``sample`` (N, 9, h, w), a network's input; ``unconditional`` (N,) 0 or 1.
    """

    clean: Tensor
    masked: Tensor
    mask: Tensor
    noise: Tensor
    noisy: Tensor
    timestep: Tensor
    alpha_bar: Tensor
    sample: Tensor
    unconditional: Tensor


def timestep_at(place: float, recipe: NoiseRecipe) -> int:
    """The timestep below which a share ``place``, in [0, 1), of the distribution lies."""
    if recipe.timesteps == "logit-normal":
        normal = NormalDist(recipe.logit_mean, recipe.logit_std)
        place = float(1 / (1 + np.exp(-normal.inv_cdf(min(max(place, _EDGE), 1 - _EDGE)))))
    return min(int(place * NUM_TRAIN_TIMESTEPS), NUM_TRAIN_TIMESTEPS - 1)


def draw_noise(
    rng: np.random.Generator, shape: tuple[int, ...], stratum: int, strata: int, recipe: NoiseRecipe
) -> tuple[Any, ...]:
    """Noise (4, h, w), timestep and branch of a sample that is number ``stratum`` of ``strata`` in its batch.

    The samples of a batch divide the timesteps' distribution into equal shares: less spread between batches.
    The noise has upstream's offset, one an image and channel.
    """
    noise = rng.standard_normal(shape, np.float32)
    noise += recipe.offset * rng.standard_normal((shape[0], 1, 1), np.float32)
    timestep = timestep_at((stratum + rng.random()) / strata, recipe)
    return noise, np.int64(timestep), np.int64(rng.random() < recipe.prompt_dropout)


class Noising:
    """DDPM's forward process with the sampler's betas (Ho et al., arXiv 2006.11239, equation 4)."""

    def __init__(self, device: torch.device | str) -> None:
        scheduler = DDIM(NUM_TRAIN_TIMESTEPS)
        values = [scheduler.alpha_bar(t) for t in range(NUM_TRAIN_TIMESTEPS)]
        self.alpha_bars = torch.tensor(values, dtype=torch.float32, device=device)

    def __call__(
        self, clean: Tensor, masked: Tensor, mask: Tensor, noise: Tensor, timestep: Tensor, unconditional: Tensor
    ) -> Batch:
        """Shapes as in ``Batch``."""
        alpha_bar = self.alpha_bars[timestep]
        signal, spread = (a.sqrt()[:, None, None, None] for a in (alpha_bar, 1 - alpha_bar))
        noisy = signal * clean + spread * noise
        sample = torch.cat([noisy, mask, masked], 1)
        return Batch(clean, masked, mask, noise, noisy, timestep, alpha_bar, sample, unconditional)


def prompt_ids(num_prompts: int, unconditional: Tensor) -> Tensor:
    """(N, M) prompt ids: 0..M-1, for ``unconditional`` (N,) samples M..2M-1."""
    ids = torch.arange(num_prompts, device=unconditional.device)
    return ids[None] + num_prompts * unconditional[:, None]
