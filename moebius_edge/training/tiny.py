"""The recipe of the bundled model ``tiny``: autoencoder, latents, teacher, student, then a checkpoint to export.

Every stage that is already on disk is kept, and the one that was cut short goes on where it was last saved,
so the same command continues after an interruption. Its figures are in ``docs/tiny-model.md``.
"""

from __future__ import annotations

import copy
import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save

from ..bundle.bundle import ASSETS
from ..errors import BundleError, UsageError
from ..model import StudentConfig, TeacherConfig
from ..system.files import atomic_write
from .autoencoder import AutoencoderRecipe, finetune_decoder, load_autoencoder, save_autoencoder, train_autoencoder
from .data import PHOTO_SHARE, PICTURES, bundled_samples
from .encoding import encode_latents
from .latent_sources import CachedLatents
from .latents import LatentCache
from .loop import atomic_save, make_folder, plain
from .material import Material, describe_latents
from .recipe import DataRecipe, Inputs, LossRecipe, NoiseRecipe, OptimiserRecipe, Recipe, RunOptions
from .stage import train_stage
from .trainer import make_accelerator

STUDENT = StudentConfig(
    block_out_channels=(64, 96, 128),
    layers_per_block=1,
    cross_attention_dim=32,
    prompt_embedding_dim=32,
    latent_size=32,
)
TEACHER = TeacherConfig(
    block_out_channels=(64, 96, 128, 128),
    layers_per_block=1,
    cross_attention_dim=32,
    prompt_embedding_dim=32,
    gate_rank=8,
)
# As predicting the velocity would weigh it: with equal weights the early steps, which decide the hole's colours,
# hardly count. So all timesteps are drawn alike, too.
_LOSSES = LossRecipe(hole_weight=5.0, velocity_limit=40.0, distance="teacher")
_NOISE = NoiseRecipe(timesteps="uniform", prompt_dropout=0.15)
_OPTIMISER = OptimiserRecipe(batch=12, learning_rate=3e-3, warmup=100, ema_decay=0.997, identity_start=True)
_TASK = replace(_LOSSES, terms=("task",))


def _stage(stage: str, losses: LossRecipe, side: int, **optimiser: Any) -> Recipe:
    student = replace(STUDENT, latent_size=side)
    return Recipe(
        stage, 0, student, TEACHER, noise=_NOISE, losses=losses, optimiser=replace(_OPTIMISER, **optimiser)
    )


@dataclass(frozen=True)
class TinyRecipe:
    """All of it; ``pictures`` are encoded once, each with ``masks_per_picture`` masks.

    ``teacher`` learns at half the student's grid, where a step costs a quarter, ``teacher_full`` goes on from it at
    the whole. ``student`` learns the task alone, ``distilled`` goes on from it with the whole distillation.
    """

    autoencoder: AutoencoderRecipe = field(default_factory=AutoencoderRecipe)
    teacher: Recipe = field(
        default_factory=lambda: _stage("teacher", _TASK, 16, steps=3200, batch=16, learning_rate=2e-3)
    )
    teacher_full: Recipe = field(
        default_factory=lambda: _stage("teacher", _TASK, 32, steps=600, batch=8, learning_rate=5e-4)
    )
    student: Recipe = field(default_factory=lambda: _stage("student", _TASK, 32, steps=5000))
    distilled: Recipe = field(
        default_factory=lambda: _stage("student", _LOSSES, 32, steps=300, learning_rate=5e-4)
    )
    pictures: int = PICTURES
    masks_per_picture: int = 3
    photo_share: float = PHOTO_SHARE


def stage_recipe(stage: str) -> Recipe:
    """One stage of ``tiny`` by itself: ``teacher``, ``student`` (a fresh one, distilled), ``guidance`` or ``int8``."""
    tiny = TinyRecipe()
    if stage == "teacher":
        return tiny.teacher_full
    if stage == "student":
        return replace(tiny.student, losses=_LOSSES)
    if stage == "int8":
        recipe = _stage(stage, _LOSSES, 32, steps=240, batch=6, learning_rate=2e-4, warmup=20, ema_decay=0.95,
                        precision="fp32", batch_norm="running", identity_start=False)  # fmt: skip
        noise = replace(_NOISE, prompt_dropout=0.3)  # guidance amplifies the error of both branches
        return replace(recipe, noise=noise, data=DataRecipe(pictures=300, masks_per_picture=3))
    return _stage("guidance", _LOSSES, 32, steps=500, learning_rate=5e-4, identity_start=False)


def with_bundled(inputs: Inputs) -> Inputs:
    """``inputs`` with the bundled model's student, and its autoencoder unless one is named, where no student is."""
    if inputs.student is not None:
        return inputs
    folder = ASSETS / "tiny" / "checkpoint"
    return replace(inputs, student=folder / "student.safetensors", vae=inputs.vae or folder / "vae")


def train_tiny(output: Path, recipe: TinyRecipe, options: RunOptions | None = None, resume: bool = False) -> Path:
    """Trains ``tiny`` and writes ``output/checkpoint``, which ``moebius-edge export`` reads; returns that folder.

    Raises:
        UsageError: ``output`` is a file, holds a run and ``resume`` is off, or one of another recipe.
        MachineError: no such device, no right to write, or a package with the photographs is missing.
        BundleError: a file of the run is damaged, or a loss became infinite.
    """
    options = options or RunOptions()
    accelerator = make_accelerator(options.device, options.fsdp)
    if accelerator.num_processes > 1:
        raise UsageError("stage all runs in one process: launch several for one stage, such as --stage student")
    device = str(accelerator.device)
    _claim(output, recipe, resume)
    checkpoint = output / "checkpoint"
    if (checkpoint / "training.json").exists():  # the last file to be written
        return checkpoint
    vae, cache = prepare(output, recipe, device)

    def train(name: str, stage: Recipe, teacher: Path | None = None, student: Path | None = None) -> Path:
        source = CachedLatents(cache, stage.student.latent_size)
        material = Material(source, describe_latents(output / "latents"), teacher, student, vae)
        return train_stage(stage, material, output / name, options, resume=True)

    half = train("teacher", recipe.teacher)
    teacher = train("teacher_full", recipe.teacher_full, teacher=half)
    alone = train("student", recipe.student)
    distilled = train("distilled", recipe.distilled, teacher=teacher, student=alone)
    return save_checkpoint(distilled, vae, recipe, checkpoint)


def prepare(output: Path, recipe: TinyRecipe, device: str) -> tuple[AutoencoderKL, LatentCache]:
    """The autoencoder with its finetuned decoder, and the encoded pictures: made where they are not there yet."""
    vae_folder, finetuned = output / "vae", output / "vae_finetuned"
    if not vae_folder.exists():
        train_autoencoder(recipe.autoencoder, vae_folder, device)
    if not finetuned.exists():
        finetune_decoder(load_autoencoder(vae_folder), recipe.autoencoder, finetuned, device)
    vae = load_autoencoder(finetuned)  # its encoder is still the first one's
    seed, size = recipe.student.seed, recipe.student.resolution
    samples = bundled_samples(size, seed, recipe.photo_share)
    cache = encode_latents(vae, samples, output / "latents", recipe.pictures, recipe.masks_per_picture)
    return vae, cache


def _claim(output: Path, recipe: TinyRecipe, resume: bool) -> None:
    """Notes in ``output/recipe.json`` what the run is of, so that no stage of another one is taken for it."""
    path, ours = output / "recipe.json", plain(asdict(recipe))
    try:
        theirs = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        make_folder(output)
        atomic_save(ours, path)
        return
    except (OSError, ValueError) as error:
        raise BundleError(f"{path} cannot be read ({error}): give another output folder") from error
    if theirs != ours:
        raise UsageError(f"{output} holds a run of another recipe, see {path.name} in it: give another output folder")
    if not resume:
        raise UsageError(f"{output} holds a run already: add --resume to go on with it, or give another output folder")


def save_checkpoint(weights: Path, vae: AutoencoderKL, recipe: TinyRecipe, folder: Path) -> Path:
    """``student.safetensors``, ``student.json``, ``vae/`` and ``training.json``; weights rounded to float16, half
    the size. Raises BundleError if a weight is not finite as float16, and then writes nothing."""
    rounded = {
        name: tensor.to(torch.float16 if tensor.is_floating_point() else tensor.dtype)
        for name, tensor in load_file(weights).items()
    }
    for name, tensor in rounded.items():
        if not tensor.isfinite().all():
            raise BundleError(f"{name} is not finite in float16: lower the recipe's learning rate and train again")
    make_folder(folder)
    with atomic_write(folder / "student.safetensors") as temporary:
        temporary.write_bytes(save(rounded))
    atomic_save(recipe.distilled.student.to_dict(), folder / "student.json")
    save_autoencoder(copy.deepcopy(vae).half(), folder / "vae")
    atomic_save(asdict(recipe), folder / "training.json")
    return folder
