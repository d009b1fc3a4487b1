"""Recipes from presets, TOML and flags: what is written is read back, and every mistake is named."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import tomli_w

from moebius_edge.bundle.bundle import ASSETS
from moebius_edge.errors import UsageError
from moebius_edge.model import StudentConfig
from moebius_edge.toml import read_toml
from moebius_edge.training.recipe import PRESETS, Inputs, Recipe, parse_setting, preset_recipe, with_values

STAGES = ("teacher", "student", "guidance", "int8")


@pytest.mark.parametrize(
    ("preset", "stage"), [*((p, s) for p in ("moebius", "tiny") for s in STAGES), ("upstream", "student")]
)
def test_the_recipe_of_a_preset_comes_back_from_its_toml(preset: str, stage: str, tmp_path: Path) -> None:
    recipe, path = preset_recipe(preset, stage), tmp_path / "recipe.toml"
    assert recipe.stage == stage and recipe.resolution == {"moebius": 512, "tiny": 256, "upstream": 512}[preset]
    path.write_text(tomli_w.dumps(asdict(recipe)), "utf-8")
    assert with_values(Recipe(), read_toml(path)) == recipe


def test_the_upstream_preset_has_the_values_of_upstream_s_script() -> None:
    assert set(PRESETS) == {"moebius", "tiny", "upstream"}
    recipe = preset_recipe("upstream", "student")
    optimiser, noise, losses, data = recipe.optimiser, recipe.noise, recipe.losses, recipe.data
    assert (optimiser.steps, optimiser.batch, optimiser.per_process) == (200_000, 2, True)
    assert (optimiser.learning_rate, optimiser.warmup, optimiser.final_rate) == (1e-4, 0, 1.0)
    assert (optimiser.weight_decay, optimiser.decay, optimiser.betas) == (0.1, "all", (0.95, 0.95))
    assert (optimiser.muon, optimiser.start, optimiser.ema_decay) == ("all", "upstream", 0.0)
    assert (optimiser.precision, optimiser.batch_norm, recipe.seed) == ("bf16", "local", 42)
    assert (noise.timesteps, noise.offset, noise.prompt_dropout) == ("logit-normal", 0.0357, 0.0)
    assert (losses.distillation, losses.task, losses.perceptual) == (0.01, 0.5, 0.5)
    assert (losses.distance, losses.rescale, losses.local_weights) == ("elatentlpips", True, True)
    assert (data.masks, data.coverage, data.widen) == (("lama-medium",), (0.0, 1.0), True)
    assert (data.min_scale, data.flip, data.posterior) == (1.0, True, "sample")
    with pytest.raises(UsageError, match="--preset upstream has no stage int8: it is how upstream trains the student"):
        preset_recipe("upstream", "int8")


def test_the_tiny_preset_has_the_bundled_model_s_shape_and_autoencoder() -> None:
    checkpoint = ASSETS / "tiny" / "checkpoint"
    shape = StudentConfig.from_dict(json.loads((checkpoint / "student.json").read_text()))
    assert preset_recipe("tiny", "student").student == shape
    assert Inputs("photos").with_bundled("student") == Inputs("photos", vae=checkpoint / "vae")
    assert Inputs("photos").with_bundled("int8").student == checkpoint / "student.safetensors"
    own = Inputs(student=Path("other.safetensors"))
    assert own.with_bundled("int8") == own  # an autoencoder that is not its own would be wrong


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("optimiser.steps=2000", {"optimiser": {"steps": 2000}}),
        ("losses.terms=['task']", {"losses": {"terms": ["task"]}}),
        ("noise.timesteps=uniform", {"noise": {"timesteps": "uniform"}}),
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
        ("optimiser.stepz=1", r"recipe: optimiser.stepz is an unknown field: docs/schemas/recipe.schema.json lists"),
        ("optimiser=1", r"recipe: optimiser is 1, expected an object"),
        ("optimiser.steps=many", r"optimiser.steps is 'many', expected a valid integer"),
        ("optimiser.steps=true", r"optimiser.steps is True, expected a valid integer"),
        ("optimiser.learning_rate=nan", r"optimiser.learning_rate is nan, expected"),
        ("losses.terms=[]", r"losses.terms is \[\], expected to have at least 1 item"),
        ("losses.terms=['tusk']", r"losses.terms.0 is 'tusk', expected 'coarse', 'fine', 'task' or 'perceptual'"),
        ("data.coverage=[2,0.1]", r"data.coverage.0 is 2, expected less than or equal to 1"),
        ("student.num_heads=7", r"320 channels do not divide into 7 heads"),
        ("steps", r"--set 'steps' sets nothing: write section.name=value"),
    ],
)
def test_mistakes_are_named(setting: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        with_values(Recipe(), parse_setting(setting))


@pytest.mark.parametrize(
    ("stage", "setting", "message"),
    [
        ("guidance", "losses.guidance=1.0", r"losses.guidance is 1.0: there is nothing to distil"),
        ("int8", "optimiser.batch_norm=batch", r"optimiser.batch_norm is 'batch': stage int8 trains what export folds"),
        ("int8", "optimiser.precision=bf16", r"optimiser.precision is 'bf16', too coarse to tell INT8 steps: use fp32"),
    ],
)
def test_values_that_do_not_suit_the_stage_are_refused(stage: str, setting: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        with_values(preset_recipe("moebius", stage), parse_setting(setting))
