"""What is said of a gate that was passed or missed, and of every block."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from moebius_edge.calibration.blocks import Block
from moebius_edge.calibration.recipe import Recipe
from moebius_edge.calibration.search import Sensitivity
from moebius_edge.calibration.trials import Figures
from moebius_edge.calibration.verdict import block_table, gate_figures, missed
from moebius_edge.errors import QualityError

FIGURES = [
    Figures("china", 34.0, 0.91, 40.0, 0.99, [0.1, 0.3]),
    Figures("camera, hole 2", 28.4, 0.95, 36.0, 0.97, [0.2, 0.2]),
    Figures("flower", 31.0, 0.93, 35.0, 0.98, [0.1, 0.1]),
]
RECIPE = Recipe({"a": True, "b": True, "c": True, "d": True, "e": False}, ("b",))
KNOWN = Sensitivity({"a": 45.0, "b": 30.0, "c": 35.25, "d": 38.0, "e": 20.0}, {"b": 41.0, "d": 38.1})


def test_the_gate_keeps_the_worst_of_all_cases() -> None:
    assert gate_figures(FIGURES, 28.0, {"steps": 20, "guidance": 2.0}) == {
        "hole_psnr_db": 28.4,
        "hole_ssim": 0.91,
        "mean_hole_psnr_db": 30.56,  # of the mean squared error
        "psnr_db": 35.0,
        "ssim": 0.97,
        "latent_rms_drift": [0.2, 0.3],
        "min_psnr_db": 28.0,
        "cases": 3,
        "start": "image",
        "steps": 20,
        "guidance": 2.0,
    }


def test_a_refusal_names_the_worst_case_and_the_three_worst_blocks() -> None:
    error = missed(FIGURES, RECIPE, KNOWN, 30.0, Path("out.calibration/recipe.json"))
    assert isinstance(error, QualityError)
    assert str(error) == (
        "quality gate missed: in the hole of camera, hole 2 INT8 is 28.40 dB from float32, 30 dB is the floor (mean of "
        "3 held-out cases 30.56 dB); the blocks that cost most: c (35.2 dB alone), d (38.0 dB alone), b (41.0 dB "
        "alone); nothing was saved: set them to false in out.calibration/recipe.json and pass it with --int8-recipe, "
        "give more calibration pictures, or lower --min-psnr"
    )


def table(recipe: Recipe, products: list[str], known: Sensitivity | None) -> list[dict[str, Any]]:
    blocks = [Block("a", ("a/1", "a/2"), 75), Block("b", ("b/1",), 20), Block("e", ("e/1",), 5)]
    quantiser = SimpleNamespace(blocks=blocks, share=lambda block: block.multiplications / 100)
    return block_table(quantiser, recipe, products, known)  # type: ignore[arg-type]


def test_the_table_says_of_each_block_what_it_costs_and_brings() -> None:
    assert table(RECIPE, ["a/1", "a/2", "b/1"], KNOWN) == [
        {"name": "a", "psnr_db": 45.0, "share": 0.75, "quantised": True},
        {"name": "b", "psnr_db": 30.0, "share": 0.2, "smoothed_psnr_db": 41.0, "quantised": True, "smoothed": True},
        {"name": "e", "psnr_db": 20.0, "share": 0.05, "quantised": False},
    ]


def test_what_was_not_measured_has_no_figure_and_what_stayed_in_float_is_not_quantised() -> None:
    """A recipe may name a block that its target computes in floating point, or smooth one that is not quantised."""
    (a, b, e) = table(Recipe({"a": True, "e": True}, ("b",)), ["a/2"], None)
    assert (a["psnr_db"], a["quantised"]) == (None, True)
    assert "smoothed" not in b and not b["quantised"] and not e["quantised"]
