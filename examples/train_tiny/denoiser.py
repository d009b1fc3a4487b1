"""Train the demonstration model's denoiser on the latents of a trained autoencoder.

    python -m examples.train_tiny.denoiser --vae runs/sharpened/vae --photos PHOTOS --output runs/denoiser --steps 20000

Every sample has a new crop, flip and mask; each is encoded once and used with several noises. The branch says what the
hole holds, background or an object (see objects.py), so that guidance has something to lead away from. The same
command continues an interrupted training exactly. It writes ``student.safetensors``, ``student.json`` and ``vae/``,
which ``moebius-edge export`` reads. The autoencoder in it gives every latent channel zero mean and unit deviation.
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
from torch import Tensor

from moebius_edge.export.source import open_vae
from moebius_edge.model import build_student
from moebius_edge.system.files import atomic_write
from moebius_edge.training.latents import encode_batch
from moebius_edge.training.loop import atomic_save
from moebius_edge.training.losses import Task
from moebius_edge.training.networks import identity_start
from moebius_edge.training.recipe import Recipe, RunOptions, preset_recipe, with_values
from moebius_edge.training.trainer import Trainer, make_accelerator

from .data import NETWORK_SIDE, PictureMixture, list_photographs, open_cache, to_network
from .objects import BranchSamples
from .training import save_autoencoder


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


class EncodedSamples:
    """A source for the trainer: pictures with mask and branch, encoded as they are drawn.

    ``repeats`` consecutive samples are the same picture and mask, each with a noise and timestep of its own: encoding
    costs as much as the denoiser's step. The batch has to be a multiple of it.
    """

    def __init__(self, vae: AutoencoderKL, samples: BranchSamples, repeats: int) -> None:
        self.vae, self.samples, self.repeats = vae, samples, repeats

    def draw(self, number: int, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
        """uint8 RGB (S, S, 3), bool (S, S) and the branch; ``rng`` is left to the noise."""
        picture, mask, branch = self.samples(number // self.repeats)
        return picture, mask, np.asarray(branch, np.int64)

    def latents(self, drawn: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """Clean and masked latents (N, 4, h, w) and the mask (N, 1, h, w)."""
        pictures, masks = (column[:: self.repeats].cpu().numpy() for column in drawn[:2])
        clean, masked, mask = (
            part.repeat_interleave(self.repeats, 0) for part in encode_batch(self.vae, pictures, masks[:, None])
        )
        return clean, masked[:, 0], mask


class BranchTrainer(Trainer):
    """The trainer, with the branch that belongs to each sample instead of one that is drawn at random."""

    def draw(self, number: int, seed: int | None = None) -> tuple[Any, ...]:
        picture, mask, branch, noise, timestep, _ = super().draw(number, seed)
        return picture, mask, noise, timestep, branch


def recipe_of(options: argparse.Namespace) -> Recipe:
    """Return the preset ``tiny``: the task alone, weighed as predicting the velocity would, the hole five times."""
    optimiser = {"steps": options.steps, "batch": options.batch, "ema_decay": 0.999}
    return with_values(preset_recipe("tiny", "student"), {"seed": options.seed, "optimiser": optimiser})


def write_checkpoint(trainer: Trainer, vae: AutoencoderKL, folder: Path) -> None:
    """Write the averaged weights, rounded to float16, their configuration and the autoencoder."""
    weights = {
        name: (tensor.half() if tensor.is_floating_point() else tensor).cpu().contiguous()
        for name, tensor in trainer.average.state_dict().items()
    }
    with atomic_write(folder / "student.safetensors") as temporary:
        save_file(weights, temporary)
    atomic_save(trainer.recipe.student.to_dict(), folder / "student.json")
    save_autoencoder(copy.deepcopy(vae).half(), folder / "vae")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vae", type=Path, required=True, help="diffusers folder of the trained autoencoder")
    parser.add_argument("--photos", type=Path, required=True, help="folder of photographs, searched recursively")
    parser.add_argument("--exclude", action="append", default=[], help="name of a folder in it to leave out")
    parser.add_argument("--output", type=Path, required=True, help="folder for the checkpoints and the model")
    parser.add_argument("--cache", type=Path, help="file for the decoded photographs (default: in the output)")
    parser.add_argument("--steps", type=int, default=20000)
    parser.add_argument("--batch", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=3, help="noises that each encoded picture is used with")
    parser.add_argument("--save-every", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    options = parser.parse_args(arguments)
    if options.batch % options.repeats:
        parser.error(f"--batch {options.batch} is no multiple of --repeats {options.repeats}")
    cv2.setNumThreads(0)
    options.output.mkdir(parents=True, exist_ok=True)
    names = list_photographs(options.photos, options.exclude)
    cache = open_cache(options.cache or options.output / "photos.bin", options.photos, names)
    accelerator = make_accelerator(options.device)
    recipe = recipe_of(options)
    mixture = PictureMixture(cache, recipe.seed)
    vae = open_vae(options.vae)
    settle_latents(vae, mixture)
    vae = vae.to(accelerator.device)
    torch.manual_seed(recipe.seed)
    network = build_student(recipe.student)
    identity_start(network)
    objective = Task(recipe.losses, recipe.student.num_prompts, recipe.optimiser.precision)
    source = EncodedSamples(vae, BranchSamples(mixture), options.repeats)
    trainer = BranchTrainer(
        recipe,
        network.to(accelerator.device),
        build_student(recipe.student),
        objective,
        source,
        options.output,
        replace(RunOptions(), save_every=options.save_every),
        accelerator,
    )
    trainer.resume()
    for figures in trainer.run():
        if trainer.done % 100 == 0:
            print(json.dumps({"time": time.strftime("%H:%M:%S"), **figures}), flush=True)
        if trainer.done % options.save_every == 0:
            write_checkpoint(trainer, vae, options.output)
    trainer.settle_batch_norms()
    write_checkpoint(trainer, vae, options.output)


if __name__ == "__main__":
    main(sys.argv[1:])
