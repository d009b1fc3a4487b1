"""``moebius-edge train``: trains a model, one stage at a time. The work is ``moebius_edge.training``'s."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Option

from ..errors import UsageError
from ..options import AUTO, Stage, TrainingDevice, TrainingPreset
from . import console

if TYPE_CHECKING:
    from ..training.recipe import Recipe


def train(
    output: Annotated[Path, Option("--output", "-o", metavar="DIR", help="Where the run is kept.")],
    preset: Annotated[TrainingPreset, Option(help="The published size, the bundled, the paper's recipe.")] = "moebius",
    stage: Annotated[Stage, Option(help="What is trained: student is distilled from a teacher.")] = "student",
    images: Annotated[str, Option(metavar="SOURCE", help="A folder, a .jsonl list, or .tar shards.")] = "",
    masks: Annotated[str, Option(metavar="DIR", help="Their masks; without, masks are drawn.")] = "",
    vae: Annotated[Path | None, Option(metavar="DIR", help="The autoencoder, a diffusers folder.")] = None,
    teacher: Annotated[Path | None, Option(metavar="FILE", help="To distil from, or to go on training.")] = None,
    student: Annotated[Path | None, Option(metavar="FILE", help="To start from; without, a fresh one.")] = None,
    int8_recipe: Annotated[Path | None, Option(metavar="FILE.json", help="Stage int8: what is quantised.")] = None,
    config: Annotated[Path | None, Option(metavar="FILE.toml", help="A recipe in place of the preset's.")] = None,
    settings: Annotated[list[str], Option("--set", metavar="NAME=VALUE", help="As optimiser.steps=2000.")] = [],  # noqa: B006
    resume: Annotated[bool, Option("--resume", help="Go on with the run in --output.")] = False,
    device: Annotated[TrainingDevice, Option(help="Where to train.")] = AUTO,
    micro_batch: Annotated[int, Option(min=0, metavar="N", help="Samples at a time; gradients add up. 0: all.")] = 0,
    gradient_checkpointing: Annotated[
        bool, Option("--gradient-checkpointing", help="Less memory, about a third more time.")
    ] = False,
    workers: Annotated[int, Option(min=1, metavar="N", help="Processes that draw samples.")] = 1,
    save_every: Annotated[int, Option(min=1, metavar="N", help="Steps between checkpoints.")] = 250,
    keep: Annotated[int, Option(min=1, metavar="N", help="Checkpoints kept.")] = 3,
    sample_every: Annotated[int, Option(min=0, metavar="N", help="Steps between pictures; 0: none.")] = 1000,
) -> None:
    """Train a model on your pictures: the paper's distillation and its stages.

    Stages: a teacher, the student distilled from it, guidance made part of the student, a student used to INT8. To try
    it: moebius-edge train --preset tiny --images DIR --output RUN. On several GPUs: accelerate launch -m moebius_edge
    train ... Needs: pip install "moebius-edge[cpu,train]"
    """
    if int8_recipe is not None and stage != "int8":
        raise UsageError("--int8-recipe goes with stage int8", "add --stage int8, or leave it out")
    interrupted = f"interrupted; add --resume to go on from what lies in {output}"
    with console.needs("training", "train"), console.interruption(lambda: interrupted):
        from ..training.recipe import Inputs, RunOptions

        options = RunOptions(micro_batch, gradient_checkpointing, save_every, keep, sample_every=sample_every,
                             workers=workers, device=device)  # fmt: skip
        recipe = _recipe(preset, stage, config, settings, int8_recipe)
        inputs = Inputs(images, masks, vae, teacher, student)
        if preset == "tiny":
            inputs = inputs.with_bundled(stage)
        from ..training.stage import train as train_from_inputs

        with console.progress() as on_progress:
            result = train_from_inputs(recipe, inputs, output, options, resume, on_progress)
    if os.environ.get("RANK", "0") != "0":  # the first of several processes speaks for all
        return
    print(f"saved {result}")
    if stage != "teacher":
        precision = " --precision int8 --calibration-data DIR" if stage == "int8" else ""
        print(f"next: moebius-edge export {result} --vae {inputs.vae or 'DIR'}{precision} --output BUNDLE")


def _recipe(preset: str, stage: str, config: Path | None, settings: list[str], int8_recipe: Path | None) -> Recipe:
    """The preset's recipe, then the file's values, then the flags', then the blocks of ``int8_recipe``."""
    from ..toml import read_toml
    from ..training.recipe import parse_setting, preset_recipe, with_values

    recipe = preset_recipe(preset, stage)
    if config is not None:
        recipe = with_values(recipe, read_toml(config))
    for setting in settings:
        recipe = with_values(recipe, parse_setting(setting))
    if recipe.stage != stage:
        culprit = next((f"--set {setting!r}" for setting in settings if setting.startswith("stage=")), config)
        raise UsageError(f"{culprit} changes the stage", f"add --stage {recipe.stage} instead")
    if int8_recipe is not None:
        from ..calibration.blocks import Recipe as QuantisationRecipe
        from ..training.fake_quantise import block_names

        quantisation = QuantisationRecipe.load(int8_recipe)
        quantisation.check(block_names(recipe.student))
        recipe = with_values(recipe, {"int8": {"blocks": sorted(quantisation.chosen)}})
    if stage == "int8" and not recipe.int8.blocks:
        raise UsageError("stage int8 has to know which blocks will be quantised", "add --int8-recipe FILE.json")
    return recipe
