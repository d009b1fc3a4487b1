"""``moebius-edge train``: trains a model. The work is ``moebius_edge.training``'s."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import MachineError, UsageError
from . import console

if TYPE_CHECKING:
    from ..training.recipe import Inputs, Recipe, RunOptions

PRESETS = ("tiny", "moebius")
STAGES = ("all", "teacher", "student", "guidance", "int8")


def train(
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Where the run is kept.")],
    preset: Annotated[str, typer.Option(metavar="tiny|moebius", help="The bundled model, or the published.")] = "tiny",
    stage: Annotated[
        str,
        typer.Option(metavar="NAME", help="all (tiny: everything), teacher, student (distilled), guidance, int8."),
    ] = "",
    images: Annotated[
        str, typer.Option(metavar="SOURCE", help="Pictures: a folder, a .jsonl list, or WebDataset .tar shards.")
    ] = "",
    masks: Annotated[str, typer.Option(metavar="DIR", help="Their masks; without, masks are drawn.")] = "",
    latents: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where encoded pictures are kept, or lie already.")
    ] = None,
    vae: Annotated[Path | None, typer.Option(metavar="DIR", help="The autoencoder, a diffusers folder.")] = None,
    teacher: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The teacher to distil from, or to go on training.")
    ] = None,
    student: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The student to start from; without, a fresh one.")
    ] = None,
    int8_recipe: Annotated[
        Path | None, typer.Option(metavar="FILE.json", help="Stage int8: which blocks will be quantised.")
    ] = None,
    config: Annotated[Path | None, typer.Option(metavar="FILE.toml", help="A recipe in place of the preset's.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="One value, such as optimiser.steps=2000.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --output.")] = False,
    device: Annotated[str, typer.Option(metavar="auto|cpu|cuda", help="Where to train.")] = "auto",
    fsdp: Annotated[
        bool, typer.Option("--fsdp", help="Several processes: each holds a share of the weights, not all.")
    ] = False,
    micro_batch: Annotated[
        int, typer.Option(metavar="N", help="Samples at a time; gradients add up to the whole batch. 0: all.")
    ] = 0,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, about a third more time.")
    ] = False,
    workers: Annotated[int, typer.Option(metavar="N", help="Processes that draw samples.")] = 1,
    save_every: Annotated[int, typer.Option(metavar="N", help="Steps between checkpoints.")] = 250,
    keep: Annotated[int, typer.Option(metavar="N", help="Checkpoints kept.")] = 3,
    sample_every: Annotated[int, typer.Option(metavar="N", help="Steps between sampled pictures; 0: none.")] = 1000,
) -> None:
    """Train a model: the paper's distillation and its stages.

    Stages: a teacher, the student distilled from it, guidance made part of the student, a student used to INT8.
    Without --images the bundled model's own pictures are used: photographs that come with scikit-image and
    scikit-learn, and synthetic scenes. On several GPUs: accelerate launch -m moebius_edge train ... Needs: pip install
    "moebius-edge[train]"
    """
    _check_choice("preset", preset, PRESETS)
    stage = stage or ("all" if preset == "tiny" else "student")
    _check_choice("stage", stage, STAGES)
    if int8_recipe is not None and stage != "int8":
        raise UsageError("--int8-recipe goes with stage int8: add --stage int8, or leave it out")
    try:
        from ..training.recipe import Inputs, RunOptions
    except ModuleNotFoundError as error:
        raise _missing(error) from error
    options = RunOptions(
        micro_batch,
        gradient_checkpointing,
        save_every,
        keep,
        sample_every=sample_every,
        workers=workers,
        device=device,
        fsdp=fsdp,
    )
    inputs = Inputs(images, masks, latents, vae, teacher, student)
    try:
        if stage == "all":
            _check_all(preset, inputs, config, settings)
            _everything(output, options, resume)
            return
        recipe = _recipe(preset, stage, config, settings or [], int8_recipe)
        if stage == "int8" and preset == "tiny":
            from ..training.tiny import with_bundled

            inputs = with_bundled(inputs)
        result = _stage(recipe, preset, output, options, resume, inputs)
    except ModuleNotFoundError as error:
        raise _missing(error) from error
    except KeyboardInterrupt:
        raise console.Interrupted(f"interrupted; add --resume to go on from what lies in {output}") from None
    if os.environ.get("RANK", "0") != "0":  # the first of several processes speaks for all
        return
    print(f"saved {result}")
    if stage != "teacher":
        shown = inputs.vae or "DIR"
        precision = " --precision int8 --calibration-data DIR" if stage == "int8" else ""
        print(f"next: moebius-edge export {result} --vae {shown}{precision} --output BUNDLE")


def _check_choice(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UsageError(f"there is no {name} {value!r}: use {', '.join(known)}")


def _check_all(preset: str, inputs: Inputs, config: Path | None, settings: list[str] | None) -> None:
    if preset != "tiny":
        raise UsageError(f"stage all is preset tiny's: train {preset} stage by stage, such as --stage student")
    given = {**vars(inputs), "config": config, "set": settings}
    for name, value in given.items():
        if value:
            raise UsageError(f"--{name} does not go with stage all: name a stage, such as --stage student")


def _missing(error: ModuleNotFoundError) -> Exception:
    if (error.name or "").startswith("moebius_edge"):  # a fault of ours
        return error
    return MachineError(f'training needs {error.name}: pip install "moebius-edge[train]"')


def _everything(output: Path, options: RunOptions, resume: bool) -> None:
    from ..training.tiny import TinyRecipe, train_tiny

    checkpoint = train_tiny(output, TinyRecipe(), options, resume)
    print(f"saved {checkpoint}")
    print(f"next: moebius-edge export {checkpoint / 'student.safetensors'} --vae {checkpoint / 'vae'} --output BUNDLE")


def _recipe(preset: str, stage: str, config: Path | None, settings: list[str], int8_recipe: Path | None) -> Recipe:
    """The preset's recipe, then the file's values, then the flags', then the blocks of ``int8_recipe``."""
    from ..toml import read_toml
    from ..training.recipe import parse_setting, published_recipe, with_values

    if preset == "tiny":
        from ..training.tiny import stage_recipe

        recipe = stage_recipe(stage)
    else:
        recipe = published_recipe(stage)
    layers: list[Mapping[str, Any]] = [] if config is None else [read_toml(config)]
    for values in (*layers, *map(parse_setting, settings)):
        recipe = with_values(recipe, values)
    if recipe.stage != stage:
        culprit = next((f"--set {s!r}" for s in settings if s.startswith("stage=")), config)
        raise UsageError(f"{culprit} changes the stage: add --stage {recipe.stage} instead")
    if int8_recipe is not None:
        from ..training.fake_quantise import read_blocks

        recipe = with_values(recipe, {"int8": {"blocks": read_blocks(int8_recipe, recipe.student)}})
    if stage == "int8" and not recipe.int8.blocks:
        raise UsageError("stage int8 has to know which blocks will be quantised: add --int8-recipe FILE.json")
    return recipe


def _stage(recipe: Recipe, preset: str, output: Path, options: RunOptions, resume: bool, inputs: Inputs) -> Path:
    from ..training.stage import claim, train_stage

    claim(output, recipe, resume)
    from ..training.material import UNREADABLE, open_material
    from ..training.trainer import make_accelerator

    make_accelerator(options.device, options.fsdp)  # what it refuses is said before pictures are encoded
    material = open_material(recipe, preset, inputs, output, options.device)
    try:
        return train_stage(recipe, material, output, options, resume)
    finally:
        if number := material.note_unreadable(output):
            print(f"{number} pictures could not be read: see {output / UNREADABLE}", file=sys.stderr)
