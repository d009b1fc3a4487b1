"""Sharpen a trained autoencoder: texture statistics, a discriminator, and a loss on the mesh of the latent grid.

    python -m examples.train_tiny.sharpen --vae runs/autoencoder/vae --photos PHOTOS --output runs/sharpened

Pixel losses answer doubt with blur. This phase also asks for the right amount of local texture, and lets a small
discriminator tell decoded pictures from real ones; a loss on patterns that repeat from cell to cell keeps the texture
from becoming a mesh. By default the encoder goes on learning as well; once a denoiser has been trained on the latents,
--set train_encoder=false leaves them as they are.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import cv2
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional as F

from moebius_edge.export.source import open_vae

from .autoencoder import add_noise, draw_picture
from .losses import Adversary, balance, mean_colours, pattern_loss, pyramid_l1, texture_loss
from .training import Loss, Training, changed, open_data, parser, train


@dataclass(frozen=True)
class Recipe:
    """What decides the result of the phase; saved with the state.

    ``latent_noise`` is relative to each channel's deviation: a denoiser's latents are never exact.
    ``adversary_warmup`` steps pass until the discriminator's weight is whole, so that it learns first.
    """

    learning_rate: float = 5e-4
    warmup: int = 100
    train_encoder: bool = True
    square_weight: float = 4.0
    colour_weight: float = 0.5
    texture_weight: float = 0.1
    pattern_weight: float = 10.0
    adversary_weight: float = 0.1  # 0 leaves the discriminator out
    adversary_learning_rate: float = 2e-4
    adversary_warmup: int = 500
    latent_noise: float = 0.05
    hole_share: float = 0.0
    ema_decay: float = 0.997
    validation: int = 8
    seed: int = 500


def sharpening_loss(recipe: Recipe, adversary: Adversary) -> Loss:
    """Return the loss of the phase; calling it also trains the discriminator by one step, if that has a weight."""

    def loss(model: AutoencoderKL, image: Tensor, step: int) -> tuple[Tensor, dict[str, float]]:
        with torch.autocast(image.device.type, torch.bfloat16):
            with torch.set_grad_enabled(recipe.train_encoder):
                latent = model.encode(image).latent_dist.mean.float()
            decoded = model.decode(add_noise(latent, recipe.latent_noise)).sample.float()
        squared, texture = F.mse_loss(decoded, image), texture_loss(decoded, image)
        total = pyramid_l1(decoded, image) + recipe.square_weight * squared
        total = total + recipe.colour_weight * F.l1_loss(mean_colours(decoded), mean_colours(image))
        total = total + recipe.texture_weight * texture + recipe.pattern_weight * pattern_loss(decoded, image)
        figures = {"loss": total.item(), "squared": squared.item(), "texture": texture.item()}
        if not recipe.adversary_weight:
            return total, figures
        with torch.autocast(image.device.type, torch.bfloat16):
            judged = adversary.judge(decoded).float()
        share = recipe.adversary_weight * min(1.0, step / max(1, recipe.adversary_warmup))
        total = total + share * balance(total, judged, model.decoder.conv_out.weight) * judged
        with torch.autocast(image.device.type, torch.bfloat16):
            return total, {**figures, "adversary": adversary.learn(image, decoded)}

    return loss


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("--vae", type=Path, required=True, help="diffusers folder of the trained autoencoder")
    options = options.parse_args(arguments)
    recipe = changed(Recipe(), options.set)
    cv2.setNumThreads(0)
    options.output.mkdir(parents=True, exist_ok=True)
    mixture, pictures = open_data(options, recipe.validation, recipe.seed)
    torch.manual_seed(recipe.seed)
    model = open_vae(options.vae).requires_grad_(True)
    for encoding_part in (model.encoder, model.quant_conv):
        encoding_part.requires_grad_(recipe.train_encoder)
    adversary = Adversary(recipe.adversary_learning_rate, options.device)
    training = Training(recipe, model, options.output, options.device, {"adversary": adversary})
    training.resume()
    if options.decay_over:
        training.begin_decay(options.decay_over)
    draw = partial(draw_picture, mixture, recipe.hole_share)
    train(training, sharpening_loss(recipe, adversary), draw, pictures, options)


if __name__ == "__main__":
    main(sys.argv[1:])
