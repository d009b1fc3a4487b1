"""One stage of training from files to files: a teacher, a student distilled from it, guidance or INT8 made part of it.

``output`` holds ``train.json`` (all that is needed to do it again), ``recipe.toml``, ``checkpoints/``,
``tensorboard/``, ``samples/`` and, at the end, the averaged weights with their configuration.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from safetensors.torch import save
from torch import nn

from .. import __version__
from ..errors import BundleError, MachineError, UsageError
from ..export.weights_metadata import find_guidance, guidance_metadata
from ..model import build_student, build_teacher
from ..system.files import atomic_write, sha256_file
from ..system.machine import machine_info, package_version
from .checkpoints import checkpoint_files
from .fake_quantise import Simulation, simulate
from .loop import atomic_save, make_folder, plain, progress_bar
from .material import Material
from .monitor import Monitor, SampleGrid
from .networks import identity_start, load_student, load_teacher
from .objectives import Distillation, Guidance, Objective, QuantisationAware, Task
from .perceptual import choose_distance
from .recipe import Recipe, RunOptions, recipe_toml
from .sharding import launcher_asks
from .trainer import Trainer, make_accelerator, mean_over_processes

RECORD = "train.json"
_PACKAGES = ("torch", "accelerate", "diffusers", "numpy", "opencv-python-headless", "safetensors", "elatentlpips")
_SAMPLES = 4
_Network = TypeVar("_Network", bound=nn.Module)
_LONGEST_SILENCE_S = 10.0  # where a step takes a minute, twenty would be too many to wait for


def train_stage(
    recipe: Recipe, material: Material, output: Path, options: RunOptions | None = None, resume: bool = False
) -> Path:
    """Trains, and returns the file of the averaged weights; at once if ``resume`` finds them finished.

    Raises:
        UsageError: ``output`` holds a run and ``resume`` is off, or one of another recipe; the material does not suit
            the stage. MachineError: no such device, a file or package is missing, the disk is full.
        BundleError: a checkpoint is damaged, or a loss was not finite.
    """
    options = options or RunOptions()
    name = "teacher" if recipe.stage == "teacher" else "student"
    result = output / f"{name}.safetensors"
    claim(output, recipe, resume)
    if result.exists():
        return result
    accelerator = make_accelerator(options.device, options.fsdp)
    if recipe.stage == "int8" and (options.fsdp or launcher_asks()):
        raise UsageError("stage int8 has not been tried in shards: leave FSDP out, the student fits any process whole")
    torch.manual_seed(recipe.seed)
    network, average, objective = _networks(recipe, material, accelerator)
    if options.gradient_checkpointing:
        network.diff_model.checkpoint_gradients()
    trainer = Trainer(recipe, network, average, objective, material.source, output, options, accelerator)
    if isinstance(objective, QuantisationAware):  # before any step, and after a resumption the same again
        network.eval()
        objective.simulation.calibrate(trainer.passes(network, recipe.int8.range_batches), recipe.int8.ranges)
    trainer.resume()
    if not accelerator.is_main_process:
        for _ in trainer.run():
            if _draws(trainer, material, options):
                trainer.whole_average()  # the first process waits for this one's shards
        trainer.settle_batch_norms()
        return result
    distance = objective.distance if isinstance(objective, Distillation) else None
    record = _record(recipe, material, options, trainer, distance)
    if isinstance(objective, QuantisationAware):
        record["int8"] = _described(objective.simulation)
    atomic_save(record, output / RECORD)
    with atomic_write(output / "recipe.toml") as temporary:
        temporary.write_text(recipe_toml(recipe), "utf-8")
    if distance is not None:
        print(f"perceptual distance: {distance}", file=sys.stderr)
    started = time.monotonic()
    last = _watch(trainer, material, output, options)
    trainer.settle_batch_norms()
    _finish(trainer.average, recipe, result, _guidance(recipe, material))
    record["result"] = {"file": result.name, "sha256": sha256_file(result), "last_figures": last}
    record["seconds"] = round(time.monotonic() - started, 1)
    atomic_save(record, output / RECORD)
    return result


def claim(output: Path, recipe: Recipe, resume: bool) -> None:
    """Raises UsageError unless ``output`` is free, or holds a run of ``recipe`` that is to go on."""
    record = output / RECORD
    if not record.exists():
        if checkpoint_files(output):
            raise UsageError(f"{output} has checkpoints and no {RECORD}: give another output folder")
        make_folder(output)
        return
    if not resume:
        raise UsageError(f"{output} holds a run already: add --resume to go on with it, or give another output folder")
    try:
        theirs = json.loads(record.read_text("utf-8"))["recipe"]
    except OSError as error:
        raise MachineError(f"{record} cannot be read: {error.strerror}: run `chmod u+r {record}`") from error
    except (ValueError, KeyError, TypeError) as error:
        raise BundleError(f"{record} is damaged ({error}): give another output folder") from error
    ours = plain(asdict(recipe))
    if theirs != ours:
        raise UsageError(
            f"{output} holds a run of another recipe ({_difference(theirs, ours)}): give the same, or another output "
            "folder"
        )


def _difference(theirs: Any, ours: Any, where: str = "") -> str:
    """The first value that differs, as ``section.name is 1 there, 2 here``."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for name in [*ours, *(n for n in theirs if n not in ours)]:
            if theirs.get(name) != ours.get(name):
                return _difference(theirs.get(name), ours.get(name), f"{where}.{name}" if where else name)
    return f"{where} is {theirs!r} there, {ours!r} here"


def _networks(recipe: Recipe, material: Material, accelerator: Accelerator) -> tuple[Any, nn.Module, Objective]:
    """The network to train, on its device, one of the same shape for its average, and its objective."""
    losses, precision, device = recipe.losses, recipe.optimiser.precision, accelerator.device
    if recipe.stage == "teacher":
        given = material.teacher
        teacher = _fresh(build_teacher(recipe.teacher), recipe) if given is None else load_teacher(given)
        task = Task(losses, recipe.teacher.num_prompts, precision)
        return teacher.requires_grad_(True).to(device), build_teacher(recipe.teacher), task
    start = material.student
    student = _fresh(build_student(recipe.student), recipe) if start is None else load_student(start, recipe.student)
    student, average = student.to(device), build_student(recipe.student)
    if recipe.stage in ("guidance", "int8"):
        if start is None:
            raise UsageError(f"stage {recipe.stage} starts from a trained student: add --student FILE")
        frozen = load_student(start, recipe.student).to(device)
        if recipe.stage == "guidance":
            return student, average, Guidance(losses, frozen, precision)
        one_branch = find_guidance(start, None) is not None
        simulation = simulate(student, recipe.int8.blocks)
        return student, average, QuantisationAware(losses, frozen, simulation, precision, one_branch)
    if set(losses.terms) == {"task"}:
        return student, average, Task(losses, recipe.student.num_prompts, precision)
    if material.teacher is None:
        raise UsageError("distillation needs a teacher: add --teacher FILE, or --set 'losses.terms=[\"task\"]'")
    master = load_teacher(material.teacher, device)
    distance = choose_distance(losses.distance, master) if "perceptual" in losses.terms else None
    mean = partial(mean_over_processes, accelerator)
    return student, average, Distillation(losses, student, master, distance, precision, mean)


def _fresh(network: _Network, recipe: Recipe) -> _Network:
    """``network``, just built, as the recipe has fresh ones start."""
    if recipe.optimiser.identity_start:
        identity_start(network)
    return network


def _draws(trainer: Trainer, material: Material, options: RunOptions) -> bool:
    """Whether pictures are drawn after the step just done."""
    if material.vae is None or not options.sample_every or trainer.recipe.stage == "teacher":
        return False
    return trainer.done % options.sample_every == 0 or trainer.done == trainer.recipe.optimiser.steps


def _watch(trainer: Trainer, material: Material, output: Path, options: RunOptions) -> dict[str, float]:
    """Runs ``trainer`` to its end and shows it; returns the last running means."""
    recipe = trainer.recipe
    grid = None
    if material.vae is not None and options.sample_every and recipe.stage != "teacher":
        generators = [np.random.default_rng([recipe.seed + 2, number]) for number in range(_SAMPLES)]
        drawn = [material.source.draw(number, rng) for number, rng in enumerate(generators)]
        tensors = tuple(torch.from_numpy(np.stack(column)).to(trainer.device) for column in zip(*drawn, strict=True))
        grid = SampleGrid(material.vae, *material.source.latents(tensors))
    with (
        progress_bar(recipe.stage, recipe.optimiser.steps) as report,
        Monitor(output, trainer.done) as monitor,
    ):
        shown = time.monotonic()
        for figures in trainer.run():
            monitor.add(figures)
            step = trainer.done
            waited = time.monotonic() - shown > _LONGEST_SILENCE_S
            if step % options.log_every == 0 or step == recipe.optimiser.steps or waited:
                shown = time.monotonic()
                report(step, monitor.shown())
                monitor.write(step)
            if grid is not None and _draws(trainer, material, options):
                monitor.picture(step, grid.draw(trainer.whole_average()))
        return monitor.shown()


def _guidance(recipe: Recipe, material: Material) -> float | None:
    """The guidance that the result has distilled: what this stage distils, or what its student had."""
    if recipe.stage == "guidance":
        return recipe.losses.guidance
    return find_guidance(material.student, None) if recipe.stage == "int8" and material.student is not None else None


def _described(simulation: Simulation) -> dict[str, Any]:
    """For the record; what is left out is said to the user, too."""
    if simulation.left:
        print(
            f"{len(simulation.left)} blocks of the recipe train in floating point, for training does not simulate the "
            f"products inside lambda operators: {', '.join(simulation.left)}",
            file=sys.stderr,
        )
    return {"left_in_floating_point": simulation.left, "scales": simulation.scales}


def _finish(average: nn.Module, recipe: Recipe, result: Path, guidance: float | None) -> None:
    """The averaged weights with their configuration beside them; the weights last, since they mean finished."""
    config = recipe.teacher if recipe.stage == "teacher" else recipe.student
    atomic_save(config.to_dict(), result.with_suffix(".json"))
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in average.state_dict().items()}
    note = None if guidance is None else guidance_metadata(guidance)
    with atomic_write(result) as temporary:
        temporary.write_bytes(save(weights, note))


def _record(
    recipe: Recipe, material: Material, options: RunOptions, trainer: Trainer, distance: str | None
) -> dict[str, Any]:
    """``train.json``: recipe, material with hashes, versions, machine."""

    def described(path: Path | None) -> dict[str, str] | None:
        return None if path is None else {"path": str(path), "sha256": sha256_file(path)}

    return {
        "moebius_edge": __version__,
        "command": sys.argv,
        "recipe": plain(asdict(recipe)),
        "options": asdict(options),
        "material": {
            "samples": material.origin,
            "teacher": described(material.teacher),
            "student": described(material.student),
        },
        "perceptual_distance": distance,
        "processes": trainer.accelerator.num_processes,
        "micro_batch": trainer.micro_batch,
        "sharded": trainer.sharded,
        "machine": {**machine_info(), "device": str(trainer.device), "threads": torch.get_num_threads()},
        "versions": {name: found[1] for name in _PACKAGES if (found := package_version(name))},
    }
