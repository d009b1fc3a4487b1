"""Recipes as files: what is written is read back, what is not a recipe is refused with the reason."""

from __future__ import annotations

from pathlib import Path

import pytest

from moebius_edge.calibration.recipe import Recipe
from moebius_edge.errors import MachineError, UsageError


def test_a_recipe_is_read_as_it_was_written(tmp_path: Path) -> None:
    recipe = Recipe({"conv_in": False, "down_blocks.0.attentions.0.ff": True})
    recipe.save(tmp_path / "recipe.json")
    assert Recipe.load(tmp_path / "recipe.json") == recipe
    assert recipe.chosen == {"down_blocks.0.attentions.0.ff"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not valid JSON"),
        ("[]", "should hold a JSON object"),
        ('{"schema_version": 2, "quantised": {}}', "schema_version is 2, expected 1"),
        ('{"schema_version": 1}', "quantised is missing"),
        ('{"schema_version": 1, "quantised": {"a": true, "b": 1}}', "quantised.b is 1, expected a valid boolean"),
        ('{"schema_version": 1, "quantised": {}, "smoothed": "a"}', "smoothed is 'a', expected a valid list"),
    ],
)
def test_what_is_no_recipe(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "recipe.json").write_text(content)
    with pytest.raises(UsageError, match=message):
        Recipe.load(tmp_path / "recipe.json")


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match=r"cannot read .*none\.json: No such file or directory"):
        Recipe.load(tmp_path / "none.json")
