"""The training loop that both phases of the autoencoder share: schedule, state, validation, log and options."""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, TypeVar

import cv2
import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from moebius_edge.errors import BundleError, UsageError
from moebius_edge.system.files import atomic_directory
from moebius_edge.training.loop import draw_batches, load_state, save_state, update_average
from moebius_edge.training.optimiser import MuonAdamW

from .data import PictureMixture, list_photographs, open_cache, split_validation, to_network, validation_pictures
from .metrics import evaluate

STATE = "state.pt"
Loss = Callable[[AutoencoderKL, Tensor, int], tuple[Tensor, dict[str, float]]]  # model, images, step
RecipeType = TypeVar("RecipeType")


class Schedule(Protocol):
    """What the loop reads of a recipe, which is a frozen dataclass."""

    learning_rate: float
    warmup: int
    ema_decay: float


class Stateful(Protocol):
    """A part of the training, besides the model, that has a state to save."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Training:
    """An autoencoder with its running average, its optimiser and the counters of the schedule; saved as one file.

    ``parts`` are saved and restored with it, by name.
    """

    def __init__(
        self,
        recipe: Any,
        model: AutoencoderKL,
        folder: Path,
        device: str = "cpu",
        parts: Mapping[str, Stateful] | None = None,
    ) -> None:
        self.recipe, self.folder, self.device, self.parts = recipe, folder, device, dict(parts or {})
        self.schedule: Schedule = recipe
        self.model = model.to(device).train()
        self.average = copy.deepcopy(model).requires_grad_(False).eval()
        self.optimiser = MuonAdamW(model, recipe.learning_rate)
        self.step = self.drawn = 0  # optimiser steps, and pictures drawn, so far
        self.decay_start = self.decay_steps = 0  # decay_steps is 0 until the learning rate begins to fall

    def learning_rate(self) -> float:
        """Return the learning rate of the next step: warm-up, constant, then linear to zero once decay has begun."""
        share = min(1.0, (self.step + 1) / self.schedule.warmup)
        if self.decay_steps:
            share *= max(0.0, 1 - (self.step - self.decay_start) / self.decay_steps)
        return self.schedule.learning_rate * share

    @property
    def finished(self) -> bool:
        """Whether the learning rate has fallen to zero."""
        return self.decay_steps > 0 and self.step >= self.decay_start + self.decay_steps

    def begin_decay(self, steps: int) -> None:
        """Let the learning rate fall to zero over the next ``steps`` steps, unless it is falling already."""
        if not self.decay_steps:
            self.decay_start, self.decay_steps = self.step, steps

    def train_step(self, pictures: np.ndarray, loss: Loss) -> dict[str, float]:
        """Take one step on uint8 pictures (N, H, W, 3) and return the figures of ``loss``.

        Raises BundleError if the loss or its gradient is not finite.
        """
        image = torch.from_numpy(to_network(pictures)).to(self.device, memory_format=torch.channels_last)
        self.optimiser.set_learning_rate(self.learning_rate())
        value, figures = loss(self.model, image, self.step)
        check_finite(value, "the autoencoder's loss", self.step)
        value.backward()
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        check_finite(nn.utils.clip_grad_norm_(trained, 1.0), "the autoencoder's gradient", self.step)
        self.optimiser.step()
        self.optimiser.zero_grad()
        self.step += 1
        self.drawn += len(pictures)
        update_average(self.average, self.model, min(self.schedule.ema_decay, self.step / (self.step + 10)))
        return figures

    def save(self) -> None:
        """Write the state that ``resume`` continues from, and the averaged model as a diffusers folder ``vae``."""
        save_state(
            self.folder / STATE,
            asdict(self.recipe),
            model=self.model.state_dict(),
            average=self.average.state_dict(),
            optimiser=self.optimiser.state_dict(),
            counters=[self.step, self.drawn, self.decay_start, self.decay_steps],
            generator=torch.get_rng_state(),  # the losses draw noise
            **{name: part.state_dict() for name, part in self.parts.items()},
        )
        save_autoencoder(self.average, self.folder / "vae")

    def resume(self) -> bool:
        """Continue exactly from the saved state; return whether there was one. Raises as ``loop.load_state``."""
        saved = load_state(self.folder / STATE, asdict(self.recipe), self.device)
        if saved is None:
            return False
        for name, part in {
            "model": self.model,
            "average": self.average,
            "optimiser": self.optimiser,
            **self.parts,
        }.items():
            part.load_state_dict(saved[name])
        self.step, self.drawn, self.decay_start, self.decay_steps = saved["counters"]
        torch.set_rng_state(saved["generator"].cpu())
        return True


def check_finite(value: Tensor, what: str, step: int) -> None:
    """Stop a run before it spoils its weights. Raises BundleError if the scalar ``value`` is not finite."""
    if not torch.isfinite(value):
        raise BundleError(f"{what} is {value.item()} at step {step}: lower the learning rate; what was saved is kept")


@torch.no_grad()
def reconstruct(model: AutoencoderKL, picture: np.ndarray) -> np.ndarray:
    """Encode and decode one uint8 RGB picture (H, W, 3), sides multiples of 8."""
    image = torch.from_numpy(to_network(picture[None])).to(next(model.parameters()).device)
    decoded = model.decode(model.encode(image).latent_dist.mean).sample[0].clamp(-1, 1)
    return np.asarray(((decoded.permute(1, 2, 0).cpu().numpy() + 1) * 127.5).round().astype(np.uint8))


def save_autoencoder(model: AutoencoderKL, folder: Path) -> None:
    """Write a diffusers folder, whole or not at all; another autoencoder there is replaced."""
    with atomic_directory(folder, overwrite=True, marker="config.json") as temporary:
        model.save_pretrained(temporary)
        config = json.loads((temporary / "config.json").read_text())
        config.pop("_name_or_path", None)  # the folder that it was read from, on this machine
        (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def write_sheet(path: Path, versions: Sequence[Sequence[np.ndarray]], columns: int = 4) -> None:
    """Write a contact sheet: the same pictures in several ``versions``, those of a picture side by side."""
    tiles = [np.hstack(tile) for tile in zip(*versions, strict=True)]
    tiles += [np.zeros_like(tiles[0])] * (-len(tiles) % columns)
    rows = [np.hstack(tiles[i : i + columns]) for i in range(0, len(tiles), columns)]
    cv2.imwrite(str(path), cv2.cvtColor(np.vstack(rows), cv2.COLOR_RGB2BGR))


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
    decoded: list[np.ndarray] = []

    def run(picture: np.ndarray) -> np.ndarray:
        decoded.append(reconstruct(training.average, picture))
        return decoded[-1]

    figures = evaluate(run, pictures)
    log(step=training.step, pictures=training.drawn, time=time.strftime("%H:%M:%S"), **figures)
    write_sheet(training.folder / f"sheet-{training.step:06d}.png", [pictures, decoded[: len(pictures)]])


def numbers(training: Training, options: argparse.Namespace) -> Iterator[list[tuple[int, int]]]:
    """The numbers and the side of each following step's pictures, without end."""
    first = training.drawn
    for step in itertools.count(training.step):
        side = options.sides[step % len(options.sides)]
        count = max(1, options.pixels // side**2)
        yield [(number, side) for number in range(first, first + count)]
        first += count


def train(
    training: Training,
    loss: Loss,
    draw: Callable[[int, int], np.ndarray],
    pictures: Sequence[np.ndarray],
    options: argparse.Namespace,
) -> None:
    """Train until the learning rate is zero, ``options.steps`` steps are done, or the process is asked to stop.

    ``draw(number, side)`` draws a training picture by its number, uint8 (side, side, 3), in other processes.
    """
    log, begun = Log(training.folder / "log.jsonl"), time.monotonic()
    stop_signals: list[int] = []
    recent: list[dict[str, float]] = []  # the figures since the last line of the log
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _: stop_signals.append(received))
    batches = draw_batches(lambda item: (draw(*item),), numbers(training, options), options.workers)
    while not (training.finished or stop_signals or (options.steps and training.step >= options.steps)):
        recent.append(training.train_step(*next(batches), loss))
        if training.step % options.log_every == 0:
            means = {name: float(np.mean([figures[name] for figures in recent])) for name in recent[0]}
            elapsed = round(time.monotonic() - begun, 1)
            log(step=training.step, **means, learning_rate=training.learning_rate(), elapsed_s=elapsed)
            recent.clear()
        if training.step % options.save_every == 0:
            training.save()
        if training.step % options.validate_every == 0:
            validate(training, pictures, log)
    batches.close()
    training.save()
    if not stop_signals:
        validate(training, pictures, log)


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return the options that every phase of the training has."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--photos", type=Path, required=True, help="folder of photographs, searched recursively")
    options.add_argument("--exclude", action="append", default=[], help="name of a folder in it to leave out")
    options.add_argument("--output", type=Path, required=True, help="folder for the state, the model and the log")
    options.add_argument("--cache", type=Path, help="file for the decoded photographs (default: in the output)")
    options.add_argument("--pixels", type=int, default=65536, help="in all pictures of a step together")
    options.add_argument(
        "--sides", type=int, nargs="+", default=[96, 256, 128, 256], help="of the square training pictures, in turn"
    )
    options.add_argument("--decay-over", type=int, default=0, help="let the learning rate fall to zero over N steps")
    options.add_argument("--steps", type=int, default=0, help="stop after this many steps in total")
    options.add_argument("--save-every", type=int, default=500)
    options.add_argument("--validate-every", type=int, default=1500)
    options.add_argument("--log-every", type=int, default=100)
    options.add_argument("--workers", type=int, default=1, help="processes that draw pictures")
    options.add_argument("--device", default="cpu")
    options.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="change the recipe")
    return options


def changed(recipe: RecipeType, settings: Sequence[str]) -> RecipeType:
    """Return the recipe with ``NAME=VALUE`` settings, whose values are written as JSON.

    Raises UsageError for an unknown name or a value that is no JSON.
    """
    values: dict[str, Any] = asdict(recipe)  # type: ignore[call-overload]
    for setting in settings:
        name, _, text = setting.partition("=")
        if name not in values:
            raise UsageError(f"--set {setting}: the recipe has no {name}, only {', '.join(values)}")
        try:
            value = json.loads(text)
        except ValueError:
            raise UsageError(f"--set {setting}: write the value as JSON, such as {name}={values[name]}") from None
        values[name] = tuple(value) if isinstance(value, list) else value
    return type(recipe)(**values)


def open_data(options: argparse.Namespace, validation: int, seed: int) -> tuple[PictureMixture, list[np.ndarray]]:
    """Open the training pictures, and those of ``validation`` photographs kept aside, of a folder of photographs."""
    names = list_photographs(options.photos, options.exclude)
    training_names, validation_names = split_validation(names, validation)
    file = options.cache or options.output / "photos.bin"
    cache = open_cache(file, options.photos, training_names)
    aside = open_cache(file.with_name(f"{file.stem}-validation{file.suffix}"), options.photos, validation_names)
    shrunk, full_size = validation_pictures(aside)
    return PictureMixture(cache, seed), shrunk + full_size
