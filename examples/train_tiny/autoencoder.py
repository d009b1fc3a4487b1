"""Train the demonstration model's autoencoder on a folder of photographs.

    python -m examples.train_tiny.autoencoder --photos photos --output runs/tiny-autoencoder

The learning rate stays constant until ``--decay-over N`` is given, which lowers it to zero over the next N steps; so a
training can go on for as long as there is time. The same command continues an interrupted training exactly.
"""

from __future__ import annotations

import argparse
import copy
import json
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional as F

from moebius_edge.training.autoencoder import load_autoencoder, mean_colours, pyramid_l1, save_autoencoder
from moebius_edge.training.data import to_network
from moebius_edge.training.loop import check_finite, load_state, save_state, update_average
from moebius_edge.training.masks import draw_mask
from moebius_edge.training.optimiser import MuonAdamW

from .data import NETWORK_SIDE, PhotoCache, PictureMixture, list_photographs, open_cache, split_validation
from .data import validation_pictures
from .metrics import evaluate

STATE = "state.pt"
Loss = Callable[[AutoencoderKL, Tensor, int], tuple[Tensor, dict[str, float]]]


@dataclass(frozen=True)
class Recipe:
    """What decides the result and stays the same over all sittings; saved with the state.

    ``norm_num_groups`` is 1 because group norm takes away the mean and the scale of every group: with many groups a
    flat colour can hardly pass. ``anchor_weight`` holds three latent channels at the cells' mean colours during the
    first ``anchor_steps`` steps, fading; without it a short training returns grey pictures, and held on it would
    leave only one channel for all detail. ``latent_noise`` is relative to each channel's deviation.
    """

    block_out_channels: tuple[int, ...] = (32, 64, 128, 128)
    layers_per_block: int = 1
    norm_num_groups: int = 1
    attention: bool = False
    learning_rate: float = 2e-3
    warmup: int = 100
    anchor_weight: float = 0.1
    anchor_steps: int = 1000
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
        latent_channels=4,
        norm_num_groups=recipe.norm_num_groups,
        mid_block_add_attention=recipe.attention,
        sample_size=NETWORK_SIDE,
        scaling_factor=1.0,
    )


def add_noise(latent: Tensor, share: float) -> Tensor:
    """Add Gaussian noise of ``share`` times each channel's standard deviation; latent (N, 4, h, w)."""
    return latent + share * latent.detach().std((0, 2, 3), keepdim=True) * torch.randn_like(latent)


def reconstruction_loss(recipe: Recipe) -> Loss:
    """Return the loss of the encoder and decoder together."""

    def loss(model: AutoencoderKL, image: Tensor, step: int) -> tuple[Tensor, dict[str, float]]:
        with torch.autocast(image.device.type, torch.bfloat16):
            latent = model.encode(image).latent_dist.mean.float()
            decoded = model.decode(add_noise(latent, recipe.latent_noise)).sample.float()
        squared = F.mse_loss(decoded, image)
        mean, deviation = latent.mean((0, 2, 3)), latent.std((0, 2, 3))
        in_range = (mean.square() + (deviation - 1).square()).sum()
        total = pyramid_l1(decoded, image) + recipe.square_weight * squared + recipe.range_weight * in_range
        anchor = recipe.anchor_weight * max(0.0, 1 - step / max(1, recipe.anchor_steps))
        if anchor > 0:
            total = total + anchor * (latent[:, :3] - mean_colours(image)).square().mean()
        return total, {"loss": total.item(), "squared": squared.item()}

    return loss


class Training:
    """An autoencoder with its running average, its optimiser and the counters of the schedule; saved as one file."""

    def __init__(self, recipe: Recipe, model: AutoencoderKL, folder: Path, device: str = "cpu") -> None:
        self.recipe, self.folder, self.device = recipe, folder, device
        self.model = model.to(device).train()
        self.average = copy.deepcopy(model).requires_grad_(False).eval()
        self.optimiser = MuonAdamW(model, recipe.learning_rate)
        self.step = self.drawn = 0  # optimiser steps, and pictures drawn, so far
        self.decay_start = self.decay_steps = 0  # no decay as long as decay_steps is 0

    def learning_rate(self) -> float:
        """Return the learning rate of the next step: warm-up, constant, then linear to zero once decay has begun."""
        share = min(1.0, (self.step + 1) / self.recipe.warmup)
        if self.decay_steps:
            share *= max(0.0, 1 - (self.step - self.decay_start) / self.decay_steps)
        return self.recipe.learning_rate * share

    @property
    def finished(self) -> bool:
        return self.decay_steps > 0 and self.step >= self.decay_start + self.decay_steps

    def begin_decay(self, steps: int) -> None:
        """Let the learning rate fall to zero over the next ``steps`` steps, unless it is falling already."""
        if not self.decay_steps:
            self.decay_start, self.decay_steps = self.step, steps

    def train_step(self, pictures: np.ndarray, loss: Loss) -> dict[str, float]:
        """Take one step on uint8 pictures (N, H, W, 3); return the loss's figures."""
        image = torch.from_numpy(to_network(pictures)).to(self.device, memory_format=torch.channels_last)
        self.optimiser.set_learning_rate(self.learning_rate())
        value, figures = loss(self.model, image, self.step)
        check_finite(value, "the autoencoder's loss", self.step)
        value.backward()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        check_finite(nn.utils.clip_grad_norm_(trained, 1.0), "the autoencoder's gradient", self.step)
        self.optimiser.step()
        self.optimiser.zero_grad()
        self.step += 1
        self.drawn += len(pictures)
        update_average(self.average, self.model, min(self.recipe.ema_decay, self.step / (self.step + 10)))
        return figures

    def state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "counters": [self.step, self.drawn, self.decay_start, self.decay_steps],
            "generator": torch.get_rng_state(),
        }

    def save(self) -> None:
        """Write the state that ``resume`` continues from, and the averaged model as a diffusers folder."""
        save_state(self.folder / STATE, asdict(self.recipe), **self.state())
        save_autoencoder(self.average, self.folder / "vae")

    def resume(self) -> bool:
        """Continue from the saved state, exactly; return whether there was one. Raises as ``loop.load_state``."""
        saved = load_state(self.folder / STATE, asdict(self.recipe), self.device)
        if saved is None:
            return False
        self.restore(saved)
        return True

    def restore(self, saved: dict[str, Any]) -> None:
        self.model.load_state_dict(saved["model"])
        self.average.load_state_dict(saved["average"])
        self.optimiser.load_state_dict(saved["optimiser"])
        self.step, self.drawn, self.decay_start, self.decay_steps = saved["counters"]
        torch.set_rng_state(saved["generator"].cpu())


@torch.no_grad()
def reconstruct(model: AutoencoderKL, picture: np.ndarray) -> np.ndarray:
    """Encode and decode one uint8 RGB picture (H, W, 3)."""
    device = next(model.parameters()).device
    image = torch.from_numpy(to_network(picture[None])).to(device)
    decoded = model.decode(model.encode(image).latent_dist.mean).sample[0].clamp(-1, 1)
    return ((decoded.permute(1, 2, 0).cpu().numpy() + 1) * 127.5).round().astype(np.uint8)


def write_sheet(path: Path, pictures: Sequence[np.ndarray], decoded: Sequence[np.ndarray], columns: int = 4) -> None:
    """Write a contact sheet: each original beside what the autoencoder makes of it."""
    tiles = [np.hstack(pair) for pair in zip(pictures, decoded, strict=True)]
    tiles += [np.zeros_like(tiles[0])] * (-len(tiles) % columns)
    rows = [np.hstack(tiles[i : i + columns]) for i in range(0, len(tiles), columns)]
    cv2.imwrite(str(path), cv2.cvtColor(np.vstack(rows), cv2.COLOR_RGB2BGR))


def draw_batch(mixture: PictureMixture, recipe: Recipe, first: int, batch: int, side: int) -> np.ndarray:
    """Draw pictures ``first`` to ``first + batch``, some with a mid-grey hole as a denoiser's masked pictures have."""
    pictures = np.stack([mixture(number, side) for number in range(first, first + batch)])
    for number, picture in enumerate(pictures, first):
        rng = np.random.default_rng([recipe.seed + 1, number])
        if rng.random() < recipe.hole_share:
            picture[draw_mask(rng, side, str(rng.choice(["medium", "thick", "box"])))] = 127
    return pictures


class Log:
    """Appends one JSON object a line to a file, and prints it."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __call__(self, **figures: Any) -> None:
        line = json.dumps({k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in figures.items()})
        with open(self.file, "a") as stream:
            stream.write(line + "\n")
        print(line, flush=True)


def validate(training: Training, pictures: Sequence[np.ndarray], log: Log) -> None:
    """Log the averaged model's figures on the validation pictures, and write a contact sheet of them."""
    decoded = {}

    def run(picture: np.ndarray) -> np.ndarray:
        return decoded.setdefault(id(picture), reconstruct(training.average, picture))

    figures = evaluate(lambda picture: reconstruct(training.average, picture), pictures)
    log(step=training.step, pictures=training.drawn, time=time.strftime("%H:%M:%S"), **figures)
    write_sheet(training.folder / f"sheet-{training.step:06d}.png", pictures, [run(p) for p in pictures])


def train(training: Training, loss: Loss, mixture: PictureMixture, pictures: list[np.ndarray], options: Any) -> None:
    """Train until the decay has ended, ``options.steps`` steps are done, or the process is asked to stop."""
    log, stopped, begun = Log(training.folder / "log.jsonl"), [], time.monotonic()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.append(True))
    while not (training.finished or stopped or (options.steps and training.step >= options.steps)):
        batch = draw_batch(mixture, training.recipe, training.drawn, options.batch, options.side)
        figures = training.train_step(batch, loss)
        if training.step % 100 == 0:
            elapsed = time.monotonic() - begun
            log(step=training.step, **figures, learning_rate=training.learning_rate(), elapsed_s=round(elapsed, 1))
        if training.step % options.save_every == 0:
            training.save()
        if training.step % options.validate_every == 0:
            validate(training, pictures, log)
    training.save()
    if not stopped:
        validate(training, pictures, log)


def parser() -> argparse.ArgumentParser:
    """Return the options that every phase of the training has."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--photos", type=Path, required=True, help="folder of photographs, searched recursively")
    options.add_argument("--exclude", action="append", default=[], help="name of a folder in it to leave out")
    options.add_argument("--output", type=Path, required=True, help="folder for the state, the model and the log")
    options.add_argument("--cache", type=Path, help="file for the decoded photographs (default: in the output)")
    options.add_argument("--batch", type=int, default=4)
    options.add_argument("--side", type=int, default=128, help="pixels of the square training pictures")
    options.add_argument("--decay-over", type=int, default=0, help="begin to lower the learning rate, over N steps")
    options.add_argument("--steps", type=int, default=0, help="stop after this many steps in total")
    options.add_argument("--save-every", type=int, default=500)
    options.add_argument("--validate-every", type=int, default=1500)
    options.add_argument("--device", default="cpu")
    options.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="change the recipe")
    return options


def changed(recipe: Any, settings: Sequence[str]) -> Any:
    """Return the recipe with ``NAME=VALUE`` settings, values written as JSON."""
    values = {name: json.loads(value) for name, _, value in (setting.partition("=") for setting in settings)}
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    return type(recipe)(**{**asdict(recipe), **values})


def open_data(options: Any, recipe: Recipe) -> tuple[PictureMixture, list[np.ndarray]]:
    """Open the training pictures and the validation pictures of a folder of photographs."""
    names = list_photographs(options.photos, options.exclude)
    training_names, validation_names = split_validation(names, recipe.validation)
    cache_file = options.cache or options.output / "photographs.bin"
    cache = open_cache(cache_file, options.photos, training_names)
    held = open_cache(cache_file.with_name(f"{cache_file.stem}-validation.bin"), options.photos, validation_names)
    return PictureMixture(cache, recipe.seed), validation_pictures(held)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    recipe = changed(Recipe(), options.set)
    cv2.setNumThreads(0)
    options.output.mkdir(parents=True, exist_ok=True)
    mixture, pictures = open_data(options, recipe)
    torch.manual_seed(recipe.seed)
    training = Training(recipe, build_autoencoder(recipe), options.output, options.device)
    training.resume()
    if options.decay_over:
        training.begin_decay(options.decay_over)
    train(training, reconstruction_loss(recipe), mixture, pictures, options)


if __name__ == "__main__":
    main(sys.argv[1:])
