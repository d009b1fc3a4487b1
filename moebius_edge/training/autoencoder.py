"""Trains a small autoencoder: diffusers' ``AutoencoderKL``, the class the published models use.

The loss is L1 on pixels and on the levels of a Laplacian pyramid, so that detail counts at every scale, plus a
light Kullback-Leibler term that keeps the latents smooth. Three of the four latent channels are anchored to the
mean colour of their 8x8 pixels: left to itself a short training spends all four on brightness and the pictures
come out grey. The decoder is then sharpened against a discriminator. No perceptual network: nothing has to be
downloaded.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors import SafetensorError
from torch import nn
from torch.nn import functional as F

from ..errors import BundleError, UsageError
from ..system.files import atomic_directory
from .adversary import Adversary, balance
from .data import CropSource, PictureSource, to_network
from .loop import Loader, check_finite, cosine, load_state, make_folder, progress_bar, save_state, update_average

PICTURE_SIDE = 256  # what crops are cut from: the scale at which the network will see pictures

Loss = Callable[[AutoencoderKL, torch.Tensor], tuple[torch.Tensor, dict[str, float]]]


class Stage(NamedTuple):
    """``steps`` optimiser steps on batches of ``batch`` crops of ``side`` pixels, an even number or one."""

    steps: int
    batch: int
    side: int


@dataclass(frozen=True)
class AutoencoderRecipe:
    """Everything that decides the result, saved beside the weights."""

    block_out_channels: tuple[int, ...] = (16, 32, 64, 96)
    norm_num_groups: int = 8
    stages: tuple[Stage, ...] = (Stage(7000, 8, 64), Stage(2000, 4, 128))
    learning_rate: float = 2e-3
    warmup: int = 100
    kl_weight: float = 2e-6
    anchor_weight: float = 0.1
    decoder_stage: Stage = Stage(1500, 1, 256)
    decoder_learning_rate: float = 1e-3
    texture_weight: float = 0.1
    pattern_weight: float = 10.0
    adversary_weight: float = 0.1
    adversary_learning_rate: float = 2e-4
    adversary_warmup: int = 500
    latent_noise: float = 0.1
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
    return loss + 2 * difference.abs().mean()


def mean_colours(image: torch.Tensor) -> torch.Tensor:
    """What three latent channels are anchored to: brightness and two colour differences, each of about unit
    deviation on photographs; image (N, 3, 8h, 8w) in [-1, 1] -> (N, 3, h, w)."""
    red, green, blue = F.avg_pool2d(image, 8).unbind(1)
    return torch.stack([(red + green + blue) * (2 / 3), (red - blue) * 3, (green - (red + blue) / 2) * 4], 1)


def random_filters(number: int = 24, side: int = 5) -> torch.Tensor:
    """Seeded filters (F, 3, side, side) of unit length that answer nothing to a flat picture."""
    filters = torch.randn(number, 3, side, side, generator=torch.Generator().manual_seed(0))
    filters = filters - filters.mean((2, 3), keepdim=True)
    return filters / filters.flatten(1).norm(dim=1)[:, None, None, None]


def texture_loss(decoded: torch.Tensor, image: torch.Tensor, window: int = 16, floor: float = 1e-4) -> torch.Tensor:
    """How far local texture is off: half the mean |log ratio| of the energies, in windows, of the answers of random
    filters to the two finest pyramid bands, summed over both; a scalar. 0.7 is texture of half the contrast.

    Pixel losses alone answer doubt with blur. This asks for the right amount of detail of the right kind, wherever it
    may lie (after Ustyuzhaninov et al., arXiv 1606.00021: random filters describe a texture). ``floor`` is the energy
    that counts as none, of pictures in [-1, 1].
    """
    filters = random_filters().to(decoded)
    loss = decoded.new_zeros(())
    for _ in range(2):
        energies, coarse = [], []
        for picture in (decoded, image):
            small = F.avg_pool2d(picture, 2)
            band = picture - F.interpolate(small, scale_factor=2.0, mode="nearest")
            answers = F.conv2d(band, filters).square()
            energies.append(F.avg_pool2d(answers, min(window, *answers.shape[2:]), window // 2) + floor)
            coarse.append(small)
        loss = loss + (energies[0] / energies[1]).log().abs().mean() / 2
        decoded, image = coarse
    return loss


def pattern_loss(decoded: torch.Tensor, image: torch.Tensor, cells: int = 4) -> torch.Tensor:
    """What repeats from cell to cell of 8x8 pixels in the error, within blocks of ``cells`` x ``cells``; a scalar.

    Asked for texture, a decoder finds it cheapest to draw one pattern in every latent cell, a mesh. Its mean over
    the cells of a block is what this counts; texture that differs from cell to cell has none. L1, cell means apart.
    """
    error = decoded - image
    error = error - F.interpolate(F.avg_pool2d(error, 8), scale_factor=8.0, mode="nearest")
    blocks = error.unflatten(3, (-1, cells, 8)).unflatten(2, (-1, cells, 8))  # (N, 3, b, cells, 8, b, cells, 8)
    return blocks.mean((3, 6)).abs().mean()


class Trainer:
    """An autoencoder with its running average and optimiser; ``run`` trains it on stages with one loss.

    ``state`` is the file that an interrupted ``run`` goes on from. Raises as ``load_state``.
    """

    def __init__(
        self,
        title: str,
        model: AutoencoderKL,
        recipe: AutoencoderRecipe,
        learning_rate: float,
        device: str,
        state: Path,
        adversary: Adversary | None = None,
    ) -> None:
        self.adversary = adversary
        self.title, self.model, self.recipe = title, model.to(device).train(), recipe
        self.learning_rate, self.device, self.state = learning_rate, device, state
        self.average = copy.deepcopy(model).requires_grad_(False)
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.optimiser = torch.optim.AdamW(self.trained, lr=learning_rate, weight_decay=1e-4, betas=(0.9, 0.95))
        self.done = 0

    def run(self, stages: tuple[Stage, ...], loss: Loss, seed: int, save_every: int = 500) -> AutoencoderKL:
        """Trains to the end of ``stages``; returns the averaged model. Raises BundleError on a loss not finite."""
        self.resume()
        recipe, total, end = self.recipe, sum(stage.steps for stage in stages), 0
        with progress_bar(self.title, total) as report:
            for number, stage in enumerate(stages):
                begin, end = end, end + stage.steps
                if self.done >= end:
                    continue
                crops = max(1, stage.batch // 2)  # so that a batch shows at least two pictures where it can
                source = CropSource(PictureSource(PICTURE_SIDE, recipe.photo_share), stage.side, crops)
                drawn = stage.batch // crops
                loader = Loader(source, drawn, seed + 1000 * number, drawn * (self.done - begin))
                with closing(iter(loader)) as batches:
                    for pictures in islice(batches, end - self.done):
                        figures = self.step(pictures.reshape(-1, *pictures.shape[2:]), loss, total)
                        if self.done % 20 == 0:
                            report(self.done, {"step": self.done, "side": stage.side, **figures})
                        if self.done % save_every == 0 or self.done == total:
                            self.save()
        return self.average.eval()

    def step(self, pictures: np.ndarray, loss: Loss, total: int) -> dict[str, float]:
        """One optimiser step of ``total`` on uint8 pictures (N, H, W, 3); returns the figures of ``loss``."""
        rate = min(1.0, (self.done + 1) / self.recipe.warmup) * cosine(self.done / total, 0.02)
        for group in self.optimiser.param_groups:
            group["lr"] = self.learning_rate * rate
        value, figures = loss(self.model, torch.from_numpy(to_network(pictures)).to(self.device))
        check_finite(value, f"the {self.title}'s loss", self.done)
        value.backward()
        norm = nn.utils.clip_grad_norm_(self.trained, 1.0)
        check_finite(norm, f"the {self.title}'s gradient", self.done)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.done += 1
        update_average(self.average, self.model, min(self.recipe.ema_decay, self.done / (self.done + 10)))
        return figures

    def save(self) -> None:
        """Writes the state that ``resume`` reads."""
        generators = [torch.get_rng_state()]  # the loss may sample the latents
        if self.device != "cpu":
            generators.append(torch.cuda.get_rng_state(self.device))
        save_state(
            self.state,
            asdict(self.recipe),
            model=self.model.state_dict(),
            average=self.average.state_dict(),
            optimiser=self.optimiser.state_dict(),
            generators=generators,
            adversary=self.adversary.state_dict() if self.adversary else None,
            done=self.done,
        )

    def resume(self) -> None:
        """Continues from ``state`` if it is there, exactly. Raises as ``load_state``."""
        saved = load_state(self.state, asdict(self.recipe), self.device)
        if saved is None:
            return
        fixed = {name: p for name, p in self.model.named_parameters() if not p.requires_grad}
        if not all(torch.equal(p, saved["model"][name]) for name, p in fixed.items()):
            raise UsageError(f"{self.state} was made with another encoder: remove it or give another output folder")
        self.model.load_state_dict(saved["model"])
        self.average.load_state_dict(saved["average"])
        self.optimiser.load_state_dict(saved["optimiser"])
        torch.set_rng_state(saved["generators"][0].cpu())
        if self.device != "cpu":
            torch.cuda.set_rng_state(saved["generators"][1].cpu(), self.device)
        if self.adversary:
            self.adversary.load_state_dict(saved["adversary"])
        self.done = saved["done"]

    def finish(self, model: AutoencoderKL, output: Path) -> None:
        """Writes the diffusers folder ``output``, after which the state has served."""
        save_autoencoder(model, output)
        self.state.unlink(missing_ok=True)


def save_autoencoder(model: AutoencoderKL, folder: Path) -> None:
    """Writes a diffusers folder, whole or not at all; another autoencoder there is replaced."""
    make_folder(folder.parent)
    with atomic_directory(folder, overwrite=True, marker="config.json") as temporary:
        try:
            model.save_pretrained(temporary)
        except SafetensorError as error:  # what the disk answered is in its text alone
            if (number := re.search(r"os error (\d+)", str(error))) is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1]))) from error


def load_autoencoder(folder: Path) -> AutoencoderKL:
    """The autoencoder in a diffusers folder, in evaluation mode. Raises BundleError if it is damaged."""
    try:
        return AutoencoderKL.from_pretrained(folder, low_cpu_mem_usage=False, local_files_only=True).eval()
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        line = " ".join(str(error).split())
        raise BundleError(f"{folder} is no whole autoencoder ({line:.200}): remove it and train it again") from error


def _state_file(output: Path) -> Path:
    return output.with_name(f"{output.name}_state.pt")


def train_autoencoder(recipe: AutoencoderRecipe, output: Path, device: str = "cpu") -> AutoencoderKL:
    """Trains encoder and decoder, evens out the latents and writes a diffusers folder ``output``.

    An interrupted run goes on from ``<output>_state.pt`` beside it. Raises as ``Trainer``.
    """
    torch.manual_seed(recipe.seed)

    def loss(model: AutoencoderKL, image: torch.Tensor) -> tuple[torch.Tensor, dict[str, float]]:
        with torch.autocast(device, torch.bfloat16):
            posterior = model.encode(image).latent_dist
            decoded = model.decode(posterior.sample()).sample
        reconstruction = pyramid_l1(decoded.float(), image)
        anchor = (posterior.mean[:, :3].float() - mean_colours(image)).square().mean()
        total = reconstruction + recipe.kl_weight * posterior.kl().mean() + recipe.anchor_weight * anchor
        return total, {"loss": reconstruction.item(), "anchor": anchor.item()}

    start = build_autoencoder(recipe)
    trainer = Trainer("autoencoder", start, recipe, recipe.learning_rate, device, _state_file(output))
    model = trainer.run(recipe.stages, loss, recipe.seed).cpu()
    rng, source = np.random.default_rng(recipe.seed + 7), PictureSource(PICTURE_SIDE, recipe.photo_share)
    normalise_latents(model, np.stack([source(rng) for _ in range(48)]))
    model.register_to_config(scaling_factor=1.0)
    trainer.finish(model, output)
    return model


def finetune_decoder(
    model: AutoencoderKL, recipe: AutoencoderRecipe, output: Path, device: str = "cpu"
) -> AutoencoderKL:
    """Goes on training the decoder alone, with ``texture_loss`` and against an ``Adversary``; writes ``output``.

    The encoder is frozen, so latents that a denoiser was trained on keep their meaning. The latents get a little
    noise, since a denoiser's are never exact. ``model`` itself is trained; its average is returned. An interrupted
    run goes on from ``<output>_state.pt``. Raises as ``Trainer``.
    """
    torch.manual_seed(recipe.seed + 500)
    model.requires_grad_(False)
    model.decoder.requires_grad_(True)
    model.post_quant_conv.requires_grad_(True)
    adversary = Adversary(recipe.adversary_learning_rate, device)

    def loss(model: AutoencoderKL, image: torch.Tensor) -> tuple[torch.Tensor, dict[str, float]]:
        with torch.autocast(device, torch.bfloat16):
            with torch.no_grad():
                latent = model.encode(image).latent_dist.mean
                latent = latent + recipe.latent_noise * torch.randn_like(latent)
            decoded = model.decode(latent).sample.float()
            judged = adversary.judge(decoded).float()
        reconstruction, texture = pyramid_l1(decoded, image), texture_loss(decoded, image)
        total = reconstruction + recipe.texture_weight * texture
        total = total + recipe.pattern_weight * pattern_loss(decoded, image)
        share = recipe.adversary_weight * min(1.0, trainer.done / recipe.adversary_warmup)  # it learns first
        total = total + share * balance(total, judged, model.decoder.conv_out.weight) * judged
        with torch.autocast(device, torch.bfloat16):
            learnt = adversary.learn(image, decoded)
        figures = {"loss": reconstruction.item(), "texture": texture.item(), "adversary": learnt}
        return total, figures

    trainer = Trainer("decoder", model, recipe, recipe.decoder_learning_rate, device, _state_file(output), adversary)
    model = trainer.run((recipe.decoder_stage,), loss, recipe.seed + 500).cpu()
    trainer.finish(model, output)
    return model


@torch.no_grad()
def normalise_latents(model: AutoencoderKL, pictures: np.ndarray) -> None:
    """Gives every latent channel zero mean and unit deviation over uint8 pictures (N, H, W, 3), in place.

    Exact: the 1x1 convolutions next to the latent take the factors, so decode(encode(x)) stays what it was.
    A channel of small deviation would otherwise drown in the noise that is the same for all.
    """
    means = [model.encode(torch.from_numpy(to_network(p[None]))).latent_dist.mean for p in pictures]
    latents = torch.cat(means)
    mean, deviation = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    channels = len(mean)
    encode, decode = model.quant_conv, model.post_quant_conv
    decode.bias += decode.weight[:, :, 0, 0] @ mean
    decode.weight *= deviation[None, :, None, None]
    encode.weight[:channels] /= deviation[:, None, None, None]
    encode.bias[:channels] = (encode.bias[:channels] - mean) / deviation
    encode.bias[channels:] -= 2 * deviation.log()  # the logarithm of the variance
