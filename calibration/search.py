"""Which blocks are quantised: each one's sensitivity alone, then the most multiply-adds that stay above a floor.

A block's sensitivity is measured: it alone is quantised, and short trajectories are compared in the hole. Blocks join
in the order of squared error over multiply-adds; how many of them may, whole trajectories say. The errors of blocks add
up only roughly, hence the second measurement.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Any

import onnx

from ..errors import QualityError
from ..progress import Progress, no_progress
from ..spec import DENOISER
from ..system.files import scratch_directory
from ..system.fingerprint import ResultCache
from .blocks import Recipe
from .evaluate import CandidateEvaluator, Metrics, mean_hole_psnr_db
from .quantise import Quantiser

MARGIN_DB = 1.0  # a recipe is chosen on few pictures, and judged on others
SEARCH_STEPS = 5  # of the trajectories that tell a block's sensitivity
SMOOTHING_GAIN_DB = 0.5  # what smoothing must bring a block alone
PLAIN, SMOOTHED = "psnr_db", "smoothed_psnr_db"
Evaluators = Callable[[int], CandidateEvaluator]  # by the steps of a trajectory


def smoothing_helps(sensitivity: dict[str, float]) -> bool:
    """Whether smoothing pays before a block of this sensitivity."""
    return sensitivity.get(SMOOTHED, -1.0) >= sensitivity[PLAIN] + SMOOTHING_GAIN_DB


def best_psnr_db(sensitivity: dict[str, float]) -> float:
    """The PSNR with a block of this sensitivity quantised, smoothed if that helps."""
    return sensitivity[SMOOTHED if smoothing_helps(sensitivity) else PLAIN]


class Search:
    """Looks for the best recipe of ``quantiser``, which whole trajectories of ``steps`` decide.

    ``sensitivity`` has, for each block that was measured, ``psnr_db`` in the hole with the block alone quantised, and
    ``smoothed_psnr_db`` with outliers migrated as well, where that can be done.
    """

    def __init__(
        self, quantiser: Quantiser, evaluator: Evaluators, cache: ResultCache, progress: Progress, steps: int
    ) -> None:
        self.quantiser, self.cache, self.progress, self.steps = quantiser, cache, progress, steps
        self.sensitivity: dict[str, dict[str, float]] = {}
        self._evaluator = evaluator
        self._facts: dict[str, Any] = {"recording": quantiser.facts, "steps": SEARCH_STEPS}

    def measure(self, names: Sequence[str]) -> None:
        """Measure the sensitivity of each block of ``names``, kept block by block: an interrupted search goes on."""
        self.sensitivity = self.cache.get("sensitivity", self._facts) or {}
        trials = [(name, PLAIN) for name in names]
        trials += [(name, SMOOTHED) for name in names if name in self.quantiser.smoothable]
        evaluator = self._evaluator(SEARCH_STEPS)
        for done, (name, key) in enumerate(trials):
            row = self.sensitivity.setdefault(name, {})
            if key in row:
                continue
            self.progress(f"sensitivity of {name}{', smoothed' if key == SMOOTHED else ''}", done, len(trials))
            recipe = Recipe({name: True}, (name,) if key == SMOOTHED else ())
            row[key] = mean_hole_psnr_db(self._try(evaluator, recipe, "", no_progress))
            self.cache.put("sensitivity", self._facts, self.sensitivity)

    def find_recipe(self, min_psnr_db: float) -> Recipe:
        """The recipe with the most multiply-adds in INT8 whose worst case stays ``MARGIN_DB`` above the floor.

        A block that is below that alone takes no part, however much it brings: with others it can only be worse.

        Raises:
            QualityError: not one block may be quantised.
        """
        self.measure([block.name for block in self.quantiser.blocks])
        least = min_psnr_db + MARGIN_DB
        alone = {block.name: best_psnr_db(self.sensitivity[block.name]) for block in self.quantiser.candidates}
        passing = [block for block in self.quantiser.candidates if alone[block.name] >= least]
        order = [b.name for b in sorted(passing, key=lambda block: 10 ** (-alone[block.name] / 10) / block.macs)]
        tried: dict[int, float] = {}  # number of blocks -> PSNR of the worst case
        evaluator = self._evaluator(self.steps)

        def fails(number: int) -> bool:
            what = f"recipe {len(tried) + 1}, {number} of {len(order)} blocks"
            metrics = self._try(evaluator, self._recipe(order[:number]), what, self.progress)
            tried[number] = min(m["hole_psnr_db"] for m in metrics)
            return not tried[number] >= least

        number = len(order)
        if number and fails(number):
            number = bisect_left(range(1, number), True, key=fails)  # the fewer the blocks, the smaller the errors
        if number == 0:
            alone = {order[0]: tried[1]} if order else alone
            best = max(alone, key=alone.__getitem__, default=None)
            problem = "there is no block to quantise" if best is None else f"{best} alone has {alone[best]:.2f}"
            raise QualityError(
                f"no block can be quantised: {least:g} dB in the hole are wanted ({min_psnr_db:g} and a margin of "
                f"{MARGIN_DB:g}), {problem}; nothing was saved",
                "lower --min-psnr, or use --precision fp16",
            )
        return self._recipe(order[:number])

    def _recipe(self, chosen: Sequence[str]) -> Recipe:
        smoothed = tuple(name for name in chosen if smoothing_helps(self.sensitivity[name]))
        return Recipe({block.name: block.name in chosen for block in self.quantiser.blocks}, smoothed)

    def _try(self, evaluator: CandidateEvaluator, recipe: Recipe, what: str, progress: Progress) -> list[Metrics]:
        """The metrics of a recipe's denoiser, which lies beside the cache for as long as it is tried."""
        with scratch_directory(self.cache.folder) as folder:
            onnx.save(self.quantiser.quantise(recipe)[0], str(folder / f"{DENOISER}.onnx"))
            return evaluator.evaluate(folder, what, progress)
