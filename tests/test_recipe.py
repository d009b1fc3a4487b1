"""Recipes from presets, TOML and flags: what is written is read back, and every mistake is named."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pytest

from moebius_edge.errors import UsageError
from moebius_edge.toml import read_toml
from moebius_edge.training.recipe import Recipe, RunOptions, parse_setting, recipe_toml, with_values
from moebius_edge.training.tiny import stage_recipe


@pytest.mark.parametrize("recipe", [Recipe(), *map(stage_recipe, ("teacher", "student", "guidance"))])
def test_a_recipe_comes_back_from_its_toml(recipe: Recipe, tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(recipe_toml(recipe), "utf-8")
    assert with_values(Recipe(), read_toml(path)) == recipe


def test_the_default_is_the_paper_s() -> None:
    losses = Recipe().losses
    assert (losses.distillation, losses.task, losses.perceptual) == (0.01, 0.5, 0.5)
    assert losses.terms == ("coarse", "fine", "task", "perceptual")
    assert Recipe().noise.timesteps == "logit-normal" and Recipe().noise.offset == 0.0357
    assert Recipe().resolution == 512


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("optimiser.steps=2000", {"optimiser": {"steps": 2000}}),
        ("losses.terms=['task']", {"losses": {"terms": ["task"]}}),
        ("noise.timesteps=uniform", {"noise": {"timesteps": "uniform"}}),
        ("data.cache=false", {"data": {"cache": False}}),
        ("seed=3", {"seed": 3}),
    ],
)
def test_a_setting_is_read_as_toml(text: str, expected: dict[str, object]) -> None:
    assert parse_setting(text) == expected


def test_a_flag_changes_one_value_and_a_whole_number_may_stand_for_a_float() -> None:
    changed = with_values(Recipe(), parse_setting("losses.velocity_limit=40"))
    assert changed == replace(Recipe(), losses=replace(Recipe().losses, velocity_limit=40.0))
    assert isinstance(changed.losses.velocity_limit, float)
    assert with_values(Recipe(), parse_setting("student.latent_size=32")).resolution == 256


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("optimiser.stepz=1", r"the recipe has no optimiser.stepz: it has optimiser.steps"),
        ("optimiser=1", r"optimiser is 1: it is a section, such as \[optimiser\]"),
        ("optimiser.steps=many", r"optimiser.steps is 'many': give a whole number, such as 100000"),
        ("optimiser.steps=true", r"optimiser.steps is True: give a whole number"),
        ("optimiser.steps=0", r"optimiser.steps is 0: give 1 or more"),
        ("optimiser.learning_rate=nan", r"optimiser.learning_rate is nan: give a number above 0"),
        ("optimiser.precision=int4", r"optimiser.precision is 'int4': use fp32, bf16, fp16"),
        ("losses.terms=[]", r"losses.terms and data.masks need at least one name"),
        ("losses.terms=['tusk']", r"losses.terms is 'tusk': use coarse, fine, task, perceptual"),
        ("data.coverage=[0.9,0.1]", r"data.coverage\[0\] is 0.9: give a number from 0.0 to 0.1"),
        ("student.num_heads=7", r"320 channels do not divide into 7 heads"),
        ("steps", r"--set 'steps' sets nothing: write section.name=value"),
    ],
)
def test_mistakes_are_named(setting: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        with_values(Recipe(), parse_setting(setting))


def test_guidance_of_one_is_nothing_to_distil() -> None:
    with pytest.raises(UsageError, match=r"losses.guidance is 1.0: there is nothing to distil"):
        Recipe(stage="guidance", losses=replace(Recipe().losses, guidance=1.0))


@pytest.mark.parametrize(("name", "value"), [("micro_batch", -1), ("save_every", 0), ("keep", 0), ("device", "tpu")])
def test_options_out_of_range(name: str, value: object) -> None:
    with pytest.raises(UsageError, match=f"{name} is {value!r}"):
        replace(RunOptions(), **{name: value})  # type: ignore[arg-type]
    assert asdict(RunOptions())["keep"] == 3
