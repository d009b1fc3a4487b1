"""Train the demonstration model's autoencoder on a folder of photographs.

    python -m examples.train_tiny.autoencoder --photos PHOTOS --output runs/autoencoder

The learning rate stays constant until --decay-over N is given, which lowers it to zero over the next N steps, so a
training can go on for as long as there is time. The same command continues an interrupted training exactly.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import cv2
import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional as F

from moebius_edge.data.masks import draw_mask

from .data import NETWORK_SIDE, PictureMixture
from .losses import mean_colours, pyramid_l1
from .training import Loss, Training, changed, open_data, parser, train

HOLE_LEVEL = 127  # the mid-grey that a denoiser's masked pictures have in their holes


@dataclass(frozen=True)
class Recipe:
    """What decides the result and stays the same over all sittings; saved with the state.

    ``norm_num_groups`` is 1 because group norm takes away the mean and the scale of every group: with many groups a
    flat colour can hardly pass. ``anchor_weight`` holds three latent channels at the cells' mean colours during the
    first ``anchor_steps`` steps, fading: without it a short training returns grey pictures, and with it all the time
    only one channel would be left for detail. ``colour_weight`` counts errors of the cells' mean colours once more,
    the differences between the channels at several times their size: green and magenta, which are rare in photographs,
    are otherwise given up for detail. ``latent_noise`` is relative to each channel's deviation.
    """

    block_out_channels: tuple[int, ...] = (16, 32, 96, 128)
    layers_per_block: int = 1
    latent_channels: int = 16  # the published autoencoder has 4
    norm_num_groups: int = 1
    attention: bool = False
    learning_rate: float = 1e-3
    warmup: int = 100
    anchor_weight: float = 0.3
    anchor_steps: int = 1500
    colour_weight: float = 0.5
    square_weight: float = 4.0
    latent_noise: float = 0.03
    range_weight: float = 1e-3
    hole_share: float = 0.1
    ema_decay: float = 0.999
    validation: int = 8
    seed: int = 0


def build_autoencoder(recipe: Recipe) -> AutoencoderKL:
    """Build diffusers' autoencoder of the recipe's shape, with random weights."""
    levels = len(recipe.block_out_channels)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=recipe.block_out_channels,
        layers_per_block=recipe.layers_per_block,
        latent_channels=recipe.latent_channels,
        norm_num_groups=recipe.norm_num_groups,
        mid_block_add_attention=recipe.attention,
        sample_size=NETWORK_SIDE,
        scaling_factor=1.0,
    )


def add_noise(latent: Tensor, share: float) -> Tensor:
    """Add Gaussian noise of ``share`` times each channel's standard deviation; latent (N, 4, h, w)."""
    return latent + share * latent.detach().std((0, 2, 3), keepdim=True) * torch.randn_like(latent)


def reconstruction_loss(recipe: Recipe) -> Loss:
    """Return the loss of encoder and decoder together: L1 at all scales, squared error, latents in range."""

    def loss(model: AutoencoderKL, image: Tensor, step: int) -> tuple[Tensor, dict[str, float]]:
        with torch.autocast(image.device.type, torch.bfloat16):
            latent = model.encode(image).latent_dist.mean.float()
            decoded = model.decode(add_noise(latent, recipe.latent_noise)).sample.float()
        squared = F.mse_loss(decoded, image)
        mean, deviation = latent.mean((0, 2, 3)), latent.std((0, 2, 3))
        in_range = (mean.square() + (deviation - 1).square()).sum()
        total = pyramid_l1(decoded, image) + recipe.square_weight * squared + recipe.range_weight * in_range
        colours = mean_colours(image)
        total = total + recipe.colour_weight * F.l1_loss(mean_colours(decoded), colours)
        anchor = recipe.anchor_weight * max(0.0, 1 - step / max(1, recipe.anchor_steps))
        if anchor > 0:
            total = total + anchor * (latent[:, :3] - colours).square().mean()
        return total, {"loss": total.item(), "squared": squared.item()}

    return loss


def draw_picture(mixture: PictureMixture, hole_share: float, number: int, side: int) -> np.ndarray:
    """Draw picture ``number``, sometimes with a mid-grey hole; uint8 (side, side, 3)."""
    picture = mixture(number, side)
    rng = np.random.default_rng([mixture.seed + 1, number])
    if rng.random() < hole_share:
        picture[draw_mask(rng, side, str(rng.choice(["medium", "thick", "box"])))] = HOLE_LEVEL
    return picture


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__).parse_args(arguments)
    recipe = changed(Recipe(), options.set)
    cv2.setNumThreads(0)
    options.output.mkdir(parents=True, exist_ok=True)
    mixture, pictures = open_data(options, recipe.validation, recipe.seed)
    torch.manual_seed(recipe.seed)
    training = Training(recipe, build_autoencoder(recipe), options.output, options.device)
    training.resume()
    if options.decay_over:
        training.begin_decay(options.decay_over)
    train(training, reconstruction_loss(recipe), partial(draw_picture, mixture, recipe.hole_share), pictures, options)


if __name__ == "__main__":
    main(sys.argv[1:])
