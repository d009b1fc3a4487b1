"""What became of a quantisation: the gate's figures, its refusal, and the table of blocks."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from ..errors import QualityError
from .quantiser import Quantiser
from .recipe import Recipe
from .search import Sensitivity
from .trials import Figures, mean_hole_psnr_db


def gate_figures(figures: Sequence[Figures], floor: float, settings: dict[str, Any]) -> dict[str, Any]:
    """The worst figures of all cases, and the mean in the hole."""
    worst = min(figures, key=lambda f: f.hole_psnr_db)
    drift = [max(values) for values in zip(*(f.latent_rms_drift for f in figures), strict=True)]
    return {
        "hole_psnr_db": worst.hole_psnr_db,
        "hole_ssim": min(f.hole_ssim for f in figures),
        "mean_hole_psnr_db": mean_hole_psnr_db(figures),
        "psnr_db": min(f.psnr_db for f in figures),
        "ssim": min(f.ssim for f in figures),
        "latent_rms_drift": drift,
        "min_psnr_db": floor,
        "cases": len(figures),
        "start": "image",
        **settings,
    }


def missed(
    figures: Sequence[Figures], recipe: Recipe, sensitivity: Sensitivity, floor: float, recipe_file: Path
) -> QualityError:
    """The error for a gate that was missed: the worst case, and the three blocks that cost most alone."""
    worst = min(figures, key=lambda f: f.hole_psnr_db)
    blocks = sorted(recipe.chosen, key=sensitivity.best)[:3]
    named = ", ".join(f"{block} ({sensitivity.best(block):.1f} dB alone)" for block in blocks)
    return QualityError(
        f"quality gate missed: in the hole of {worst.name} INT8 is {worst.hole_psnr_db:.2f} dB from float32, {floor:g} "
        f"dB is the floor (mean of {len(figures)} held-out cases {mean_hole_psnr_db(figures):.2f} dB); the blocks that "
        f"cost most: {named}; nothing was saved: set them to false in {recipe_file} and pass it with --int8-recipe, "
        "give more calibration pictures, or lower --min-psnr"
    )


def block_table(
    quantiser: Quantiser, recipe: Recipe, products: Collection[str], known: Sensitivity | None
) -> list[dict[str, Any]]:
    """Each block: PSNR alone (None where it was not measured), share of the multiplications, whether quantised.

    ``products`` are the nodes that really are: a recipe may name blocks that the target computes in floating point.
    """
    rows = []
    for block in quantiser.blocks:
        row: dict[str, Any] = {"name": block.name, "psnr_db": None, "share": round(quantiser.share(block), 5)}
        if known is not None and block.name in known.plain:
            row["psnr_db"] = known.plain[block.name]
            if block.name in known.smoothed:
                row["smoothed_psnr_db"] = known.smoothed[block.name]
        row["quantised"] = not set(products).isdisjoint(block.nodes)
        if row["quantised"] and block.name in recipe.smoothed:
            row["smoothed"] = True
        rows.append(row)
    return rows
