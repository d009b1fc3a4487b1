"""Which blocks are quantised: each one's sensitivity alone, then the most multiply-adds that stay above a floor.

A block's sensitivity is measured: it alone is quantised, and short trajectories are compared in the hole. Blocks join
in the order of squared error over multiply-adds; how many of them may, whole trajectories say. The errors of blocks add
up only roughly, hence the second measurement.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx

from ..errors import QualityError
from ..progress import Progress, no_progress
from ..spec import DENOISER
from ..system.files import scratch_directory
from ..system.fingerprint import ResultCache
from .blocks import Block, Recipe
from .evaluate import CandidateEvaluator, CaseMetrics, mean_hole_psnr_db
from .quantise import Quantiser

MARGIN_DB = 1.0  # a recipe is chosen on few pictures, and judged on others
SMOOTHING_GAIN_DB = 0.5  # what smoothing must bring a block alone
_RESULT = "sensitivity"

# Block -> ``psnr_db`` in the hole with it alone quantised, and ``smoothed_psnr_db`` with its norm's outliers migrated.
Sensitivity = dict[str, dict[str, float]]


def smoothing_helps(row: dict[str, float]) -> bool:
    """Whether smoothing pays before a block with these measurements."""
    return row.get("smoothed_psnr_db", -1.0) >= row["psnr_db"] + SMOOTHING_GAIN_DB


def best_psnr_db(row: dict[str, float]) -> float:
    """The PSNR of a block with these measurements, with smoothing where it helps."""
    return row["smoothed_psnr_db"] if smoothing_helps(row) else row["psnr_db"]


def measure_sensitivity(
    quantiser: Quantiser,
    evaluator: CandidateEvaluator,
    names: list[str],
    cache: ResultCache,
    facts: dict[str, Any],
    progress: Progress,
) -> Sensitivity:
    """The sensitivity of each block of ``names``, kept in ``cache`` block by block: an interrupted search goes on.

    ``facts`` say, in plain JSON, what the measurements depend on.
    """
    sensitivity: Sensitivity = cache.get(_RESULT, facts) or {}
    trials = [(name, "psnr_db") for name in names]
    trials += [(name, "smoothed_psnr_db") for name in names if name in quantiser.smoothable]
    for done, (name, key) in enumerate(trials):
        row = sensitivity.setdefault(name, {})
        if key in row:
            continue
        smoothed = key == "smoothed_psnr_db"
        what = f"sensitivity of {name}{', smoothed' if smoothed else ''}"
        recipe = Recipe({name: True}, (name,) if smoothed else ())
        progress(what, done, len(trials))
        row[key] = mean_hole_psnr_db(try_recipe(quantiser, evaluator, recipe, cache, what, no_progress))
        cache.put(_RESULT, facts, sensitivity)
    return sensitivity


def choose_recipe(
    quantiser: Quantiser,
    sensitivity: Sensitivity,
    evaluator: CandidateEvaluator,
    min_psnr_db: float,
    cache: ResultCache,
    progress: Progress,
) -> Recipe:
    """The recipe with the most quantised multiply-adds whose worst case stays ``MARGIN_DB`` above the floor.

    A block that is below that alone takes no part, however much it brings: with others it can only be worse.

    Raises:
        QualityError: not one block may be quantised.
    """
    least = min_psnr_db + MARGIN_DB
    alone = {block.name: best_psnr_db(sensitivity[block.name]) for block in quantiser.candidates}

    def error_per_mac(block: Block) -> float:
        return float(10 ** (-alone[block.name] / 10) / block.macs)

    passing = [block for block in quantiser.candidates if alone[block.name] >= least]
    order = [block.name for block in sorted(passing, key=error_per_mac)]
    smoothed = [name for name in order if smoothing_helps(sensitivity[name])]
    tried = []

    def recipe(number: int) -> Recipe:
        chosen = order[:number]
        return Recipe({b.name: b.name in chosen for b in quantiser.blocks}, tuple(s for s in smoothed if s in chosen))

    def passes(number: int) -> bool:
        tried.append(number)
        what = f"recipe {len(tried)}, {number} of {len(order)} blocks"
        worst = min(m.hole_psnr_db for m in try_recipe(quantiser, evaluator, recipe(number), cache, what, progress))
        if number == 1:
            alone[order[0]] = worst
        return worst >= least

    number = _largest_passing(len(order), passes)
    if number == 0:
        best = max(order[:1] or alone, key=alone.__getitem__, default=None)
        problem = "there is no block to quantise" if best is None else f"{best} alone has {alone[best]:.2f}"
        raise QualityError(
            f"no block can be quantised: {least:g} dB in the hole are wanted ({min_psnr_db:g} and a margin of "
            f"{MARGIN_DB:g}), {problem}; nothing was saved",
            "lower --min-psnr, or use --precision fp16",
        )
    return recipe(number)


def try_recipe(
    quantiser: Quantiser,
    evaluator: CandidateEvaluator,
    recipe: Recipe,
    cache: ResultCache,
    what: str,
    progress: Progress,
) -> list[CaseMetrics]:
    """The metrics of a recipe's denoiser, which lies beside the cache for as long as it is tried."""
    with scratch_directory(cache.folder) as folder:
        onnx.save(quantiser.quantise(recipe)[0], str(folder / f"{DENOISER}.onnx"))
        return evaluator.evaluate_denoiser(folder, what, progress)


def _largest_passing(largest: int, passes: Callable[[int], bool]) -> int:
    """The largest number that passes, if every smaller one passes too; ``largest`` is tried first."""
    if largest and passes(largest):
        return largest
    low, high = 0, largest  # low passes, high does not
    while high - low > 1:
        middle = (low + high) // 2
        if passes(middle):
            low = middle
        else:
            high = middle
    return low
