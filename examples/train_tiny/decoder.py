"""Sharpen a trained autoencoder's decoder, the encoder left as it is.

    python -m examples.train_tiny.decoder --vae runs/autoencoder/vae --photos PHOTOS --output runs/decoder

Pixel losses answer doubt with blur. This phase also asks for the right amount of local texture, and lets a small
discriminator tell decoded pictures from real ones; a loss on patterns that repeat from cell to cell keeps the texture
from becoming a mesh. First every latent channel is given zero mean and unit deviation, which changes no picture.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional as F

from moebius_edge.training.adversary import Adversary, balance
from moebius_edge.training.autoencoder import (
    load_autoencoder,
    normalise_latents,
    pattern_loss,
    pyramid_l1,
    texture_loss,
)

from .autoencoder import add_noise, draw_batch
from .data import NETWORK_SIDE, PictureMixture
from .training import Loss, Training, changed, open_data, parser, train


@dataclass(frozen=True)
class Recipe:
    """What decides the result of the phase; saved with the state.

    ``latent_noise`` is relative to each channel's deviation: a denoiser's latents are never exact.
    ``adversary_warmup`` steps pass until the discriminator's weight is whole, so that it learns first.
    """

    learning_rate: float = 5e-4
    warmup: int = 100
    square_weight: float = 4.0
    texture_weight: float = 0.1
    pattern_weight: float = 10.0
    adversary_weight: float = 0.1
    adversary_learning_rate: float = 2e-4
    adversary_warmup: int = 500
    latent_noise: float = 0.05
    hole_share: float = 0.0
    ema_decay: float = 0.997
    validation: int = 8
    seed: int = 500


def sharpening_loss(recipe: Recipe, adversary: Adversary) -> Loss:
    """Return the loss of the decoder alone; calling it also trains the discriminator by one step."""

    def loss(model: AutoencoderKL, image: Tensor, step: int) -> tuple[Tensor, dict[str, float]]:
        with torch.autocast(image.device.type, torch.bfloat16):
            with torch.no_grad():
                latent = add_noise(model.encode(image).latent_dist.mean.float(), recipe.latent_noise)
            decoded = model.decode(latent).sample.float()
            judged = adversary.judge(decoded).float()
        pixels = pyramid_l1(decoded, image) + recipe.square_weight * F.mse_loss(decoded, image)
        texture = texture_loss(decoded, image)
        total = pixels + recipe.texture_weight * texture + recipe.pattern_weight * pattern_loss(decoded, image)
        share = recipe.adversary_weight * min(1.0, step / max(1, recipe.adversary_warmup))
        total = total + share * balance(total, judged, model.decoder.conv_out.weight) * judged
        with torch.autocast(image.device.type, torch.bfloat16):
            learnt = adversary.learn(image, decoded)
        return total, {"loss": pixels.item(), "texture": texture.item(), "adversary": learnt}

    return loss


def unit_latents(model: AutoencoderKL, mixture: PictureMixture, count: int = 48) -> None:
    """Give every latent channel zero mean and unit deviation over ``count`` training pictures, in place."""
    normalise_latents(model, np.stack([mixture(number, NETWORK_SIDE) for number in range(count)]))


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("--vae", type=Path, required=True, help="diffusers folder of the trained autoencoder")
    options = options.parse_args(arguments)
    recipe = changed(Recipe(), options.set)
    cv2.setNumThreads(0)
    options.output.mkdir(parents=True, exist_ok=True)
    mixture, pictures = open_data(options, recipe.validation, recipe.seed)
    torch.manual_seed(recipe.seed)
    model = load_autoencoder(options.vae)
    unit_latents(model, mixture)
    model.requires_grad_(False)
    model.decoder.requires_grad_(True)
    model.post_quant_conv.requires_grad_(True)
    adversary = Adversary(recipe.adversary_learning_rate, options.device)
    training = Training(recipe, model, options.output, options.device, {"adversary": adversary})
    training.resume()
    if options.decay_over:
        training.begin_decay(options.decay_over)
    draw = partial(draw_batch, mixture, recipe.hole_share)
    train(training, sharpening_loss(recipe, adversary), draw, pictures, options)


if __name__ == "__main__":
    main(sys.argv[1:])
