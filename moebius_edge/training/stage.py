"""One stage of training from files to files: a teacher, a student distilled from it, guidance or INT8 made part of it.

``output`` holds ``train.json`` (all that is needed to do it again), ``recipe.toml``, ``checkpoints/``,
``tensorboard/``, ``samples/`` and, at the end, the averaged weights with their configuration.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
import torch
from accelerate import Accelerator
from safetensors.torch import save
from torch import nn

from .. import __version__
from ..checkpoints.weights_metadata import find_guidance, guidance_metadata
from ..data.samples import MaskedPictures, Transform, listed_names
from ..data.sources import open_pictures
from ..errors import BundleError, MachineError, UsageError
from ..export.source import find_vae, open_vae
from ..model import build_student, build_teacher
from ..progress import Progress, no_progress
from ..system.files import atomic_write, sha256_file
from ..system.fingerprint import first_difference
from ..system.machine import machine_info, package_version
from ..text import counted
from .fake_quantise import simulate
from .latents import EncodedPictures, Source, vae_hash
from .loop import atomic_save, checkpoint_files, make_folder, plain
from .losses import Distillation, Guidance, Objective, QuantisationAware, Task
from .monitor import Monitor, SampleGrid
from .networks import identity_start, load_student, load_teacher, upstream_start
from .perceptual import choose_distance
from .recipe import Inputs, Recipe, RunOptions, with_values
from .trainer import Trainer, make_accelerator, mean_over_processes

RECORD = "train.json"
_PACKAGES = ("torch", "accelerate", "diffusers", "numpy", "opencv-python-headless", "safetensors", "elatentlpips")
_SAMPLES = 4  # fills in a grid
_LINE_EVERY_S = 5.0


@dataclass(frozen=True)
class StageInputs:
    """What a stage works on. ``source`` gives samples, ``origin`` says for the record where they come from.

    ``teacher`` and ``student`` are checkpoint files. Stages ``guidance`` and ``int8`` start from the student's; stages
    ``student`` and ``teacher`` start from their own if it is given, else afresh. ``vae`` is the autoencoder that
    samples are shown with, None for no pictures.
    """

    source: Source
    origin: dict[str, Any]
    teacher: Path | None = None
    student: Path | None = None
    vae: Any = None


def open_inputs(recipe: Recipe, inputs: Inputs, unreadable: Path, device: torch.device) -> StageInputs:
    """What the user names, opened; pictures that cannot be read are listed in ``unreadable``.

    Raises:
        UsageError: pictures or the autoencoder are not named, or do not suit. MachineError: something named is not
            there. As ``open_pictures``, too.
    """
    if not inputs.images:
        raise UsageError("there is nothing to train on: add --images SOURCE, your pictures")
    if inputs.vae is None:
        raise UsageError("pictures are encoded before a network sees them: add --vae DIR, a diffusers VAE folder")
    for path in (inputs.teacher, inputs.student):
        if path is not None and not path.is_file():
            raise MachineError(f"there is no checkpoint {path}: name a file of weights")
    vae, data = open_vae(inputs.vae).to(device), recipe.data
    pictures = open_pictures(inputs.images, inputs.masks or None)
    transform = Transform(recipe.resolution, data.min_scale, data.flip, data.masks, data.coverage, data.widen)
    samples = MaskedPictures(pictures, transform, recipe.seed, unreadable)
    made_from = plain({**samples.identity(), "vae": vae_hash(vae)})
    origin = {"images": inputs.images, "masks": inputs.masks, "number": len(pictures), "made_from": made_from}
    source = EncodedPictures(vae, samples, data.posterior == "sample")
    return StageInputs(source, origin, inputs.teacher, inputs.student, vae)


def train(
    recipe: Recipe,
    inputs: Inputs,
    output: Path,
    options: RunOptions,
    resume: bool = False,
    progress: Progress = no_progress,
) -> Path:
    """Train a stage from what a user names; the file of the averaged weights. Raises as ``train_stage``."""
    accelerator = make_accelerator(options.device)  # what it refuses is said before anything is made
    if inputs.vae is not None:
        latents = {"latent_channels": find_vae(inputs.vae)[1]["latent_channels"]}
        recipe = with_values(recipe, {"student": latents, "teacher": latents})
    check_output_dir(output, recipe_of_processes(recipe, accelerator), resume)
    unreadable = output / "unreadable.txt"
    opened = open_inputs(recipe, inputs, unreadable, accelerator.device)
    try:
        return train_stage(recipe, opened, output, options, resume, progress)
    finally:
        if accelerator.is_main_process and (number := len(listed_names(unreadable))):
            print(f"{counted(number, 'picture')} could not be read: see {unreadable}", file=sys.stderr)


def recipe_of_processes(recipe: Recipe, accelerator: Accelerator) -> Recipe:
    """The recipe with the whole batch in place of one for each process."""
    batch = recipe.optimiser.batch * (accelerator.num_processes if recipe.optimiser.per_process else 1)
    return replace(recipe, optimiser=replace(recipe.optimiser, batch=batch, per_process=False))


def train_stage(
    recipe: Recipe,
    inputs: StageInputs,
    output: Path,
    options: RunOptions,
    resume: bool = False,
    progress: Progress = no_progress,
) -> Path:
    """Train, and return the file of the averaged weights; at once if ``resume`` finds them finished.

    Raises:
        UsageError: ``output`` holds a run and ``resume`` is off, or one of another recipe or other samples; the inputs
            do not suit the stage. MachineError: no such device, a file or package is missing, the disk is full.
        BundleError: a checkpoint is damaged, or a loss was not finite.
    """
    result = output / ("teacher.safetensors" if recipe.stage == "teacher" else "student.safetensors")
    accelerator = make_accelerator(options.device)
    recipe = recipe_of_processes(recipe, accelerator)
    _check_samples(output, check_output_dir(output, recipe, resume), inputs.origin)
    if result.exists():
        return result
    if accelerator.is_main_process:
        processes = "1 process" if accelerator.num_processes == 1 else f"{accelerator.num_processes} processes"
        print(f"training on {accelerator.device.type}, {processes}", file=sys.stderr)
    torch.manual_seed(recipe.seed)
    network, average = _networks(recipe, inputs, accelerator.device)
    objective = _objective(recipe, inputs, network, accelerator)
    if options.gradient_checkpointing:
        network.diff_model.checkpoint_gradients()
    trainer = Trainer(recipe, network, average, objective, inputs.source, output, options, accelerator)
    if isinstance(objective, QuantisationAware):  # before any step, and after a resumption the same again
        network.eval()
        objective.simulation.calibrate(trainer.passes(network, recipe.int8.range_batches), recipe.int8.ranges)
    trainer.resume()
    if not accelerator.is_main_process:
        for _ in trainer.run():
            pass
        trainer.settle_batch_norms()
        return result
    record = _record(recipe, inputs, options, trainer)
    atomic_save(record, output / RECORD)
    with atomic_write(output / "recipe.toml") as temporary:
        temporary.write_text(tomli_w.dumps(asdict(recipe)), "utf-8")
    started = time.monotonic()
    last = _run(trainer, inputs, output, options, progress)
    trainer.settle_batch_norms()
    _write_result(trainer.average, recipe, result, inputs.student)
    record["result"] = {"file": result.name, "sha256": sha256_file(result), "last_figures": last}
    record["seconds"] = round(time.monotonic() - started, 1)
    atomic_save(record, output / RECORD)
    return result


def check_output_dir(output: Path, recipe: Recipe, resume: bool) -> dict[str, Any]:
    """The record of the run in ``output``, empty where there is none.

    Raises UsageError unless ``output`` is free, or holds a run of ``recipe`` that is to go on.
    """
    record = output / RECORD
    if not record.exists():
        if checkpoint_files(output):
            raise UsageError(f"{output} has checkpoints and no {RECORD}: give another output folder")
        make_folder(output)
        return {}
    if not resume:
        raise UsageError(f"{output} holds a run already: add --resume to go on with it, or give another output folder")
    try:
        before: dict[str, Any] = json.loads(record.read_text("utf-8"))
        there = before["recipe"]
    except OSError as error:
        raise MachineError(f"{record} cannot be read: {error.strerror}: run `chmod u+r {record}`") from error
    except (ValueError, KeyError, TypeError) as error:
        raise BundleError(f"{record} is damaged ({error}): give another output folder") from error
    if there != (here := plain(asdict(recipe))):
        difference = first_difference(there, here)
        raise UsageError(f"{output} holds a run of another recipe ({difference}): give the same, or another output")
    return before


def _check_samples(output: Path, before: dict[str, Any], origin: dict[str, Any]) -> None:
    """Raise UsageError where the run recorded in ``before`` was on other samples: it could not go on as it began."""
    there, here = (place.get("made_from") for place in (before.get("inputs", {}).get("samples", origin), origin))
    if there != here:
        difference = first_difference(there, here)
        raise UsageError(f"{output} holds a run on other samples ({difference}): name the same, or another output")


def _networks(recipe: Recipe, inputs: StageInputs, device: torch.device) -> tuple[Any, nn.Module]:
    """The network to train, on its device, and one of the same shape for its average."""
    teaches = recipe.stage == "teacher"
    start = inputs.teacher if teaches else inputs.student
    build: Any = partial(build_teacher, recipe.teacher) if teaches else partial(build_student, recipe.student)
    if start is not None:
        network = load_teacher(start) if teaches else load_student(start, recipe.student)
    else:
        network = build()
        starts: dict[str, Callable[[nn.Module], None]] = {"identity": identity_start, "upstream": upstream_start}
        if recipe.optimiser.start in starts:
            starts[recipe.optimiser.start](network)
    return network.requires_grad_(True).to(device), build()


def _objective(recipe: Recipe, inputs: StageInputs, network: Any, accelerator: Accelerator) -> Objective:
    """What the stage minimises; for stage ``int8`` the products of ``network`` are replaced by rounded ones."""
    losses, precision, device = recipe.losses, recipe.optimiser.precision, accelerator.device
    if recipe.stage in ("guidance", "int8"):
        if inputs.student is None:
            raise UsageError(f"stage {recipe.stage} starts from a trained student: add --student FILE")
        frozen = load_student(inputs.student, recipe.student).to(device)
        if recipe.stage == "guidance":
            return Guidance(losses, frozen, precision)
        simulation = simulate(network, recipe.int8.blocks)
        return QuantisationAware(losses, frozen, simulation, precision, find_guidance(inputs.student, None) is not None)
    if recipe.stage == "teacher":
        return Task(losses, recipe.teacher.num_prompts, precision)
    if set(losses.terms) == {"task"}:
        if inputs.teacher is not None:
            raise UsageError(
                "--teacher plays no part in losses.terms ['task']: leave it out, or distil from it by "
                '--set \'losses.terms=["coarse", "fine", "task", "perceptual"]\''
            )
        return Task(losses, recipe.student.num_prompts, precision)
    if inputs.teacher is None:
        raise UsageError("distillation needs a teacher: add --teacher FILE, or --set 'losses.terms=[\"task\"]'")
    teacher = load_teacher(inputs.teacher, device)
    distance = choose_distance(losses.distance, teacher, losses.rescale) if "perceptual" in losses.terms else None
    mean = (lambda value: value) if losses.local_weights else partial(mean_over_processes, accelerator)
    return Distillation(losses, network, teacher, distance, precision, mean)


def _run(
    trainer: Trainer, inputs: StageInputs, output: Path, options: RunOptions, progress: Progress
) -> dict[str, float]:
    """Run ``trainer`` to its end and show it; return the last running means."""
    recipe, steps = trainer.recipe, trainer.recipe.optimiser.steps
    grid = None
    if inputs.vae is not None and options.sample_every and recipe.stage != "teacher":
        generators = [np.random.default_rng([recipe.seed + 2, number]) for number in range(_SAMPLES)]
        drawn = [inputs.source.draw(number, rng) for number, rng in enumerate(generators)]
        tensors = tuple(torch.from_numpy(np.stack(column)).to(trainer.device) for column in zip(*drawn, strict=True))
        torch.manual_seed(recipe.seed)
        clean, masked, mask, *_ = inputs.source.latents(tensors)
        grid = SampleGrid(inputs.vae, clean, masked, mask)
    with Monitor(output, trainer.done) as monitor:
        shown = -math.inf
        for figures in trainer.run():
            monitor.add(figures)
            step, ended = trainer.done, trainer.done == steps
            if ended or time.monotonic() - shown > _LINE_EVERY_S:
                shown = time.monotonic()
                progress(f"{recipe.stage}  {monitor.line()}", step, steps)
            if ended or step % options.log_every == 0 or step % options.save_every == 0:  # where a resumed run begins
                monitor.write(step)
            if grid is not None and (step % options.sample_every == 0 or ended):
                monitor.picture(step, grid.draw(trainer.average))
        return monitor.means()


def _write_result(average: nn.Module, recipe: Recipe, result: Path, start: Path | None) -> None:
    """The averaged weights with their configuration beside them; the weights last, since they mean finished.

    Their metadata have the guidance that the result has distilled: what this stage distils, or its student had.
    """
    guidance = recipe.losses.guidance if recipe.stage == "guidance" else None
    if recipe.stage == "int8" and start is not None:
        guidance = find_guidance(start, None)
    config = recipe.teacher if recipe.stage == "teacher" else recipe.student
    atomic_save(config.to_dict(), result.with_suffix(".json"))
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in average.state_dict().items()}
    with atomic_write(result) as temporary:
        temporary.write_bytes(save(weights, None if guidance is None else guidance_metadata(guidance)))


def _record(recipe: Recipe, inputs: StageInputs, options: RunOptions, trainer: Trainer) -> dict[str, Any]:
    """``train.json``: recipe, inputs with hashes, versions, machine. What the user should know is printed as well."""
    files = {"teacher": inputs.teacher, "student": inputs.student}
    hashes = {name: path and {"path": str(path), "sha256": sha256_file(path)} for name, path in files.items()}
    record = {
        "moebius_edge": __version__,
        "command": sys.argv,
        "recipe": plain(asdict(recipe)),
        "options": asdict(options),
        "inputs": {"samples": inputs.origin, **hashes},
        "processes": trainer.accelerator.num_processes,
        "micro_batch": trainer.micro_batch,
        "machine": {**machine_info(), "device": str(trainer.device), "threads": torch.get_num_threads()},
        "versions": {name: found[1] for name in _PACKAGES if (found := package_version(name))},
    }
    objective = trainer.objective
    if isinstance(objective, Distillation) and objective.distance is not None:
        record["perceptual_distance"] = objective.distance.name
        print(f"perceptual distance: {objective.distance.name}", file=sys.stderr)
    if isinstance(objective, QuantisationAware):
        left = objective.simulation.left
        record["int8"] = {"left_in_floating_point": left, "scales": objective.simulation.scales}
        if left:
            print(
                f"{len(left)} blocks of the recipe train in floating point, for training does not simulate the "
                f"products inside lambda operators: {', '.join(left)}",
                file=sys.stderr,
            )
    return record
