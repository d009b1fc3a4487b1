"""``moebius-edge train``: trains a model. The work is ``moebius_edge.training``'s."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import MachineError, UsageError
from . import console

if TYPE_CHECKING:
    from ..training.recipe import Recipe

PRESETS = ("moebius", "tiny")
STAGES = ("teacher", "student", "guidance", "int8")


def train(
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Where the run is kept.")],
    preset: Annotated[
        str, typer.Option(metavar="moebius|tiny", help="The published size, or the bundled model's, for a laptop.")
    ] = "moebius",
    stage: Annotated[
        str, typer.Option(metavar="NAME", help="teacher, student (distilled), guidance, int8.")
    ] = "student",
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
    micro_batch: Annotated[
        int, typer.Option(min=0, metavar="N", help="Samples at a time; gradients add up to the whole batch. 0: all.")
    ] = 0,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, about a third more time.")
    ] = False,
    workers: Annotated[int, typer.Option(min=1, metavar="N", help="Processes that draw samples.")] = 1,
    save_every: Annotated[int, typer.Option(min=1, metavar="N", help="Steps between checkpoints.")] = 250,
    keep: Annotated[int, typer.Option(min=1, metavar="N", help="Checkpoints kept.")] = 3,
    sample_every: Annotated[
        int, typer.Option(min=0, metavar="N", help="Steps between sampled pictures; 0: none.")
    ] = 1000,
) -> None:
    """Train a model on your pictures: the paper's distillation and its stages.

    Stages: a teacher, the student distilled from it, guidance made part of the student, a student used to INT8. To try
    it: moebius-edge train --preset tiny --images DIR --output RUN. On several GPUs: accelerate launch -m moebius_edge
    train ... Needs: pip install "moebius-edge[train]"
    """
    _check_choice("preset", preset, PRESETS)
    _check_choice("stage", stage, STAGES)
    _check_choice("device", device, ("auto", "cpu", "cuda"))
    if int8_recipe is not None and stage != "int8":
        raise UsageError("--int8-recipe goes with stage int8: add --stage int8, or leave it out")
    try:
        from ..training.recipe import Inputs, RunOptions

        options = RunOptions(
            micro_batch, gradient_checkpointing, save_every, keep, sample_every=sample_every, workers=workers,
            device=device,  # type: ignore[arg-type]
        )  # fmt: skip
        recipe = _recipe(preset, stage, config, settings or [], int8_recipe)
        inputs = Inputs(images, masks, latents, vae, teacher, student)
        if preset == "tiny":
            inputs = inputs.with_bundled(stage)
        from ..training.stage import train as train_from_inputs

        with console.progress() as progress:
            result = train_from_inputs(recipe, inputs, output, options, resume, progress)
    except ModuleNotFoundError as error:
        raise _missing(error) from error
    except KeyboardInterrupt:
        raise console.Interrupted(f"interrupted; add --resume to go on from what lies in {output}") from None
    if os.environ.get("RANK", "0") != "0":  # the first of several processes speaks for all
        return
    print(f"saved {result}")
    if stage != "teacher":
        precision = " --precision int8" if stage == "int8" else ""
        print(f"next: moebius-edge export {result} --vae {inputs.vae or 'DIR'}{precision} --output BUNDLE")


def _check_choice(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UsageError(f"there is no {name} {value!r}: use {', '.join(known)}")


def _missing(error: ModuleNotFoundError) -> Exception:
    if (error.name or "").startswith("moebius_edge"):  # a fault of ours
        return error
    return MachineError(f'training needs {error.name}: pip install "moebius-edge[train]"')


def _recipe(preset: str, stage: str, config: Path | None, settings: list[str], int8_recipe: Path | None) -> Recipe:
    """The preset's recipe, then the file's values, then the flags', then the blocks of ``int8_recipe``."""
    from ..toml import read_toml
    from ..training.recipe import parse_setting, preset_recipe, with_values

    recipe = preset_recipe(preset, stage)
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
