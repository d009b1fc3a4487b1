"""Train the demonstration model's denoiser on the latents of a trained autoencoder, on a CPU; see gpu.py for a GPU.

    python -m examples.train_tiny.denoiser --vae runs/sharpened/vae --photos PHOTOS --output runs/denoiser --steps 20000

Every sample has a new crop, flip and mask. The branch says what the hole holds, background or an object (see
objects.py), so that guidance has something to lead away from. The same command continues an interrupted training
exactly. It writes ``student.safetensors``, ``student.json`` and ``vae/``, which ``moebius-edge export`` reads. The
autoencoder in it gives every latent channel zero mean and unit deviation.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from moebius_edge.export.source import open_vae
from moebius_edge.model import build_student
from moebius_edge.system.files import atomic_write
from moebius_edge.training.latents import encode_batch
from moebius_edge.training.loop import atomic_save
from moebius_edge.training.losses import autocast, noise_loss
from moebius_edge.training.networks import identity_start, load_student
from moebius_edge.training.noising import Batch, prompt_ids
from moebius_edge.training.recipe import LossRecipe, Recipe, RunOptions, preset_recipe, with_values
from moebius_edge.training.trainer import Trainer, make_accelerator

from .data import NETWORK_SIDE, PictureMixture, to_network
from .objects import BranchSamples
from .training import open_data, save_autoencoder

VALIDATION = 8  # photographs that are not trained on, the same as the autoencoder's
SETTLING_PICTURES = 512  # that the batch norms' statistics are measured on at the end; no step trains on their noise


@torch.no_grad()
def settle_latents(vae: AutoencoderKL, mixture: PictureMixture, count: int = 48) -> None:
    """Give the latent channels zero mean and unit deviation over training pictures, in place; no picture changes.

    The 1x1 convolutions next to the latent take the factors. A channel of small deviation would otherwise drown in the
    noise, which is the same for all. The posterior's variance, which nothing has trained, becomes so small that a
    sample of it is its mean.
    """
    pictures = [mixture(number, NETWORK_SIDE) for number in range(count)]
    latents = torch.cat([vae.encode(torch.from_numpy(to_network(p[None]))).latent_dist.mean for p in pictures])
    mean, deviation = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    channels, encode, decode = len(mean), vae.quant_conv, vae.post_quant_conv
    decode.bias += decode.weight[:, :, 0, 0] @ mean
    decode.weight *= deviation[None, :, None, None]
    encode.weight[:channels] /= deviation[:, None, None, None]
    encode.bias[:channels] = (encode.bias[:channels] - mean) / deviation
    encode.weight[channels:] = 0
    encode.bias[channels:] = -20  # the logarithm of the variance


class PooledSamples:
    """A source for the trainer: samples come from a rolling pool of encoded ones, of ``size``.

    Encoding costs half as much as the denoiser's step. Each sample stays in the pool while ``size * reuse`` are drawn,
    so it is used ``reuse`` times, each with its own noise and timestep, and seldom twice in a batch. Which sample is
    drawn depends on the number alone: a resumed training encodes the same ones again. The trainer draws in a process
    of its own, which holds the pool and encodes beside the training where there is a second core.
    """

    GROUP = 8  # samples that are encoded together

    def __init__(self, vae: AutoencoderKL, samples: BranchSamples, size: int = 1024, reuse: int = 8) -> None:
        self.vae, self.samples, self.size, self.reuse = vae, samples, size, reuse
        self._groups: dict[int, tuple[int, list[np.ndarray]]] = {}  # by place in the pool: a group's number and arrays

    def draw(self, number: int, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
        """Clean and masked latent (C, h, w), mask (1, h, w), float32, and the branch."""
        oldest = number // self.reuse // self.GROUP * self.GROUP
        group, row = divmod(oldest + int(rng.integers(self.size)), self.GROUP)
        place = group % (self.size // self.GROUP)
        if self._groups.get(place, (-1,))[0] != group:
            self._groups[place] = group, self._encoded(group)
        *latents, branch = (column[row] for column in self._groups[place][1])
        return (*(array.astype(np.float32) for array in latents), branch)

    def latents(self, drawn: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return drawn

    def _encoded(self, group: int) -> list[np.ndarray]:
        drawn = [self.samples(number) for number in range(group * self.GROUP, (group + 1) * self.GROUP)]
        pictures, masks, branches = (np.stack(column) for column in zip(*drawn, strict=True))
        clean, masked, mask = encode_batch(self.vae, pictures, masks[:, None])
        return [clean.half().numpy(), masked[:, 0].half().numpy(), mask.half().numpy(), branches]


class BranchTrainer(Trainer):
    """The trainer, which settles batch norms on few pictures: any others lie far from the pool, and cost much."""

    def draw(self, number: int, seed: int | None = None) -> tuple[Any, ...]:
        return super().draw(number if seed is None else number % SETTLING_PICTURES, seed)


class HoleTask:
    """Predicting the true noise: the trainer's objective.

    A known cell counts once, a cell of the hole five times, and one at the hole's border, on either side, eight times.
    Whatever is predicted for the known region is thrown away, but for the cells that the decoder mixes into the hole;
    and a wrong colour next to the border is what makes a fill look like a patch. Timesteps are weighed as predicting
    the velocity would, or the early ones, which decide the colours, would hardly count. For the same reason the error's
    mean over every ``COARSE`` x ``COARSE`` cells of the hole counts once more, as much as the cells' own errors would
    if they were independent (a loss at several scales, as in Hoogeboom et al., arXiv 2301.11093).
    """

    COARSE = 4

    def __init__(self, recipe: LossRecipe, num_prompts: int, precision: str, border_weight: float = 8.0) -> None:
        self.recipe, self.prompts, self.precision, self.border_weight = recipe, num_prompts, precision, border_weight

    def __call__(self, model: nn.Module, batch: Batch, scale: float = 1.0) -> tuple[Tensor, dict[str, Tensor]]:
        with autocast(batch.sample.device, self.precision):
            predicted = model(batch.sample, batch.timestep, prompt_ids(self.prompts, batch.unconditional)).noise
        weight = 1 + (self.recipe.hole_weight - 1) * batch.mask
        weight = torch.where(border_cells(batch.mask), self.border_weight, weight)
        velocity = (1 / batch.alpha_bar).clamp(max=self.recipe.velocity_limit)[:, None, None, None]
        loss = noise_loss(predicted, batch.noise, weight * velocity)
        coarse = F.avg_pool2d((predicted.float() - batch.noise) * batch.mask, self.COARSE).square() * velocity
        loss = loss + self.recipe.hole_weight * self.COARSE**2 * coarse.mean()
        error = noise_loss(predicted.detach(), batch.noise, batch.mask) / batch.mask.mean()
        return loss, {"task": loss.detach(), "coarse": coarse.detach().mean(), "hole_error": error}


def border_cells(mask: Tensor) -> Tensor:
    """The cells on either side of the hole's border, bool (N, 1, h, w), from a mask of 0 and 1."""
    return (F.max_pool2d(mask, 3, 1, 1) + F.max_pool2d(1 - mask, 3, 1, 1)) > 1.5


def recipe_of(options: argparse.Namespace, latent_channels: int) -> Recipe:
    """Return the preset ``tiny``, with the student's channels those of the autoencoder."""
    rate = options.learning_rate
    optimiser = {"steps": options.steps, "batch": options.batch, "learning_rate": rate, "ema_decay": 0.999}
    student = {"block_out_channels": list(options.channels)} if options.channels else {}
    losses = {"velocity_limit": 215.0}  # no limit: the last timestep's 1 / alpha-bar is 214.6
    values = {
        "seed": options.seed,
        "optimiser": optimiser,
        "losses": losses,
        "student": {**student, "latent_channels": latent_channels},
    }
    return with_values(preset_recipe("tiny", "student"), values)


def starting_student(recipe: Recipe, weights: Path | None) -> nn.Module:
    """The student to train, in float32: drawn by the recipe's seed, or with the weights of a file."""
    torch.manual_seed(recipe.seed)
    if weights:
        return load_student(weights, recipe.student)
    network = build_student(recipe.student)
    identity_start(network)
    return network


def build_trainer(options: argparse.Namespace, vae: AutoencoderKL, samples: BranchSamples) -> BranchTrainer:
    """Build the student and its trainer as the command line's ``options`` say, at the start of the training."""
    recipe = recipe_of(options, vae.config["latent_channels"])
    return BranchTrainer(
        recipe,
        starting_student(recipe, options.weights),
        build_student(recipe.student),
        HoleTask(recipe.losses, recipe.student.num_prompts, recipe.optimiser.precision),
        PooledSamples(vae, samples, options.pool, options.reuse),
        options.output,
        replace(RunOptions(), save_every=options.save_every, workers=options.workers),
        make_accelerator("cpu"),
    )


def write_student(student: nn.Module, recipe: Recipe, vae: AutoencoderKL, folder: Path) -> None:
    """Write the student's weights, rounded to float16, their configuration and the autoencoder."""
    weights = {
        name: (tensor.half() if tensor.is_floating_point() else tensor).cpu().contiguous()
        for name, tensor in student.state_dict().items()
    }
    with atomic_write(folder / "student.safetensors") as temporary:
        save_file(weights, temporary)
    atomic_save(recipe.student.to_dict(), folder / "student.json")
    save_autoencoder(copy.deepcopy(vae).half(), folder / "vae")


def parser_of(description: str | None, batch: int, workers: int) -> argparse.ArgumentParser:
    """The options of the training on a CPU and of that on a GPU, with the defaults in which these differ."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vae", type=Path, required=True, help="diffusers folder of the trained autoencoder")
    parser.add_argument("--photos", type=Path, required=True, help="folder of photographs, searched recursively")
    parser.add_argument("--exclude", action="append", default=[], help="name of a folder in it to leave out")
    parser.add_argument("--output", type=Path, required=True, help="folder for the checkpoints and the model")
    parser.add_argument("--cache", type=Path, help="file for the decoded photographs (default: in the output)")
    parser.add_argument("--batch", type=int, default=batch)
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="the highest")
    parser.add_argument("--weights", type=Path, help="student.safetensors to start from")
    parser.add_argument("--channels", nargs="+", type=int, help="of the levels (%(default)s; None: the preset's)")
    parser.add_argument("--workers", type=int, default=workers, help="processes that draw samples; on a GPU most cores")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    parser = parser_of(__doc__, batch=12, workers=1)
    parser.add_argument("--steps", type=int, default=20000)
    parser.add_argument("--pool", type=int, default=1024, help="encoded samples that are held")
    parser.add_argument("--reuse", type=int, default=8, help="noises that each of them is used with")
    parser.add_argument("--save-every", type=int, default=500)
    options = parser.parse_args(arguments)
    if options.pool < PooledSamples.GROUP or options.pool % PooledSamples.GROUP:
        parser.error(f"--pool {options.pool} is no multiple of {PooledSamples.GROUP}")
    cv2.setNumThreads(0)
    options.output.mkdir(parents=True, exist_ok=True)
    (mixture, _), vae = open_data(options, VALIDATION, options.seed), open_vae(options.vae)
    settle_latents(vae, mixture)
    trainer = build_trainer(options, vae, BranchSamples(mixture))
    trainer.resume()
    recipe = trainer.recipe
    for figures in trainer.run():
        if trainer.done % 100 == 0:
            print(json.dumps({"time": time.strftime("%H:%M:%S"), **figures}), flush=True)
        if trainer.done % options.save_every == 0:
            write_student(trainer.average, recipe, vae, options.output)
    trainer.settle_batch_norms()
    write_student(trainer.average, recipe, vae, options.output)


if __name__ == "__main__":
    main(sys.argv[1:])
