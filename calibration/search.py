"""Which blocks are quantised: the error that each adds in one call, then the most multiply-adds above a floor.

A block alone is quantised, and the noise that the denoiser predicts at a few points of the float32 network's own
trajectories is compared in the hole. Errors of blocks are nearly independent, so the squared error of a recipe is about
the sum of its blocks', times a factor that whole trajectories of one recipe tell. The next recipe is the one that this
predicts to be at the floor; a few are tried at most, so that the work is known beforehand.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx

from ..errors import QualityError
from ..imaging.masks import Mask, latent_mask
from ..metrics.trajectory import SEED
from ..pipeline.inpainter import STRENGTH
from ..pipeline.loop import initial_noise
from ..progress import Progress
from ..runtimes.base import Arrays, branches
from ..sampling.scheduler import DDIM
from ..spec import DENOISER
from ..system.files import scratch_directory
from ..system.fingerprint import ResultCache
from ..text import counted
from .blocks import Recipe
from .evaluate import CandidateEvaluator
from .quantise import Quantiser
from .sensitivity import PartedDenoiser

MARGIN_DB = 1.0  # a recipe is chosen on few pictures, and judged on others
POINTS = (0.25, 0.65)  # of a trajectory, the cases in turn
MAX_RECIPES = 5  # that whole trajectories measure
LEAST_SLOPE_DB = 3.0  # what a tenfold error in the noise costs at least
SMOOTHING_GAIN_DB = 0.5  # what smoothing must bring a block alone
PLAIN, SMOOTHED = "plain", "smoothed"


class Search:
    """Looks for the best recipe of ``quantiser``, which the trajectories of ``evaluator`` decide.

    ``errors`` has, for each block that was measured, the mean squared error of the noise in the hole with the block
    alone quantised, ``plain`` and, where that can be done, ``smoothed``. ``factor`` turns it into 10^(-PSNR/10) of the
    picture's hole; it is None until a recipe was measured.
    """

    def __init__(
        self, quantiser: Quantiser, evaluator: CandidateEvaluator, cache: ResultCache, progress: Progress
    ) -> None:
        self.quantiser, self.evaluator, self.cache, self.progress = quantiser, evaluator, cache, progress
        self.errors: dict[str, dict[str, float]] = {}
        self.factor: float | None = None
        self.reached_db = math.nan  # in the hole, of the worst case, by the recipe that was found
        self._measured: list[tuple[float, float]] = []  # log10 of a recipe's sum of errors, and its worst PSNR

    def measure(self, names: Sequence[str]) -> None:
        """Measure the error of each block of ``names``, kept block by block: an interrupted search goes on."""
        facts: dict[str, Any] = {"recording": self.quantiser.facts, "points": POINTS}
        self.errors = self.cache.get("sensitivity", facts) or {}
        trials = [(name, PLAIN) for name in names]
        trials += [(name, SMOOTHED) for name in names if name in self.quantiser.smoothable]
        missing = [(name, kind) for name, kind in trials if kind not in self.errors.get(name, {})]
        if not missing:
            return
        network, holes, minutes = self._prepare(missing)
        self.progress(f"search, at most about {minutes:.0f} min with all trajectories", 0, 0)
        for done, (name, kind) in enumerate(missing, len(trials) - len(missing)):
            self.progress(f"sensitivity of {name}{', smoothed' if kind == SMOOTHED else ''}", done, len(trials))
            difference = self._guided(network.noise_with(name, kind == SMOOTHED) - network.noise)
            squares = [np.square(d[:, h], dtype=np.float64).mean() for d, h in zip(difference, holes, strict=True)]
            self.errors.setdefault(name, {})[kind] = float(np.mean(squares))
            self.cache.put("sensitivity", facts, self.errors)

    def _prepare(self, trials: Sequence[tuple[str, str]]) -> tuple[PartedDenoiser, list[Mask], float]:
        """The denoiser at ``POINTS``, the hole in the latent at each, and for how many minutes all is going to take."""
        started = time.perf_counter()
        references = self.evaluator.references("search", self.progress)
        sampling_s, started = time.perf_counter() - started, time.perf_counter()
        scheduler, rows = DDIM(self.evaluator.steps, STRENGTH), 1 if self.evaluator.guidance.sampled == 1 else 2
        samples, timesteps, holes = [], [], []
        for number, share in enumerate(POINTS):
            case = number % len(references)
            reference, hole = references[case], self.evaluator.cases[case][1][1]
            index = round(share * (len(scheduler.timesteps) - 1))
            start, masked = reference.encoded[:1], reference.encoded[1:]
            noised = scheduler.add_noise(start, initial_noise(SEED, 0, start.shape))
            holes.append(latent_mask(hole, start.shape[-1]))
            mask = holes[-1][None, None].astype(np.float32)
            samples.append(np.concatenate([reference.latents[index - 1] if index else noised, mask, masked], axis=1))
            timesteps.append(scheduler.timesteps[index])
        feeds: Arrays = {
            "sample": np.concatenate(samples * rows).astype(np.float32),
            "timestep": np.array(timesteps * rows, np.float32),
            "branch": branches(rows, len(POINTS)),
        }
        network = PartedDenoiser(self.quantiser, feeds)
        call_s = time.perf_counter() - started  # opens all parts and runs them: about what a trial does with its own
        trials_s = call_s * sum(network.share(name) for name, _ in trials)
        return network, holes, (trials_s + MAX_RECIPES * sampling_s) / 60

    def _guided(self, noise: np.ndarray) -> np.ndarray:
        """The noise (P, c, h, w) with guidance, as the sampler combines its rows."""
        unconditional, conditional = noise[: len(POINTS)], noise[-len(POINTS) :]  # the same where there is one branch
        return unconditional + np.float32(self.evaluator.guidance.sampled) * (conditional - unconditional)

    def find_recipe(self, min_psnr_db: float) -> Recipe:
        """The recipe with the most multiply-adds in INT8 whose worst case stays ``MARGIN_DB`` above the floor.

        A second search, for another floor, goes on from what the first has measured.

        Raises:
            QualityError: no recipe that was tried is that good.
        """
        self.measure([block.name for block in self.quantiser.candidates])
        least, best, failed = min_psnr_db + MARGIN_DB, Recipe({}), math.inf
        limit = predict_limit(self._measured, least) if self._measured else math.inf
        tried: list[str] = []
        while len(tried) < MAX_RECIPES:
            recipe = self._largest_recipe(min(limit, failed * (1 - 1e-9)))
            if self._macs(recipe) <= self._macs(best):
                break
            psnr_db = self._worst_psnr_db(recipe, f"recipe {len(tried) + 1} of at most {MAX_RECIPES}")
            tried.append(f"{counted(len(recipe.chosen), 'block')} had {psnr_db:.2f}")
            error = sum(self.error(name) for name in recipe.chosen)
            self.factor = 10 ** (-psnr_db / 10) / error
            if psnr_db >= least:
                best, self.reached_db = recipe, psnr_db
            else:
                failed = error
            self._measured.append((math.log10(error), psnr_db))
            limit = predict_limit(self._measured, least)
        if not best.chosen:
            raise QualityError(
                f"no recipe is good enough: {least:g} dB in the hole are wanted ({min_psnr_db:g} and a margin of "
                f"{MARGIN_DB:g}), {', '.join(tried) or 'and there is no block to quantise'}; nothing was saved",
                "lower --min-psnr, or use --precision fp16",
            )
        return best

    def error(self, name: str) -> float:
        """The squared error of the noise with the block ``name`` quantised, smoothed if that helps."""
        return self.errors[name][SMOOTHED if self._smoothing_helps(name) else PLAIN]

    def sensitivity(self) -> dict[str, dict[str, float]]:
        """For each measured block the PSNR in the hole that it alone is estimated to have, smoothed too; or nothing."""
        if self.factor is None:
            return {}
        keys = {PLAIN: "psnr_db", SMOOTHED: "smoothed_psnr_db"}
        return {
            name: {
                keys[kind]: round(-10 * math.log10(max(error * self.factor, 1e-20)), 2) for kind, error in row.items()
            }
            for name, row in self.errors.items()
        }

    def _smoothing_helps(self, name: str) -> bool:
        row = self.errors[name]
        return row.get(SMOOTHED, math.inf) * 10 ** (SMOOTHING_GAIN_DB / 10) <= row[PLAIN]

    def _largest_recipe(self, limit: float) -> Recipe:
        """Blocks in the order of error over multiply-adds, each that still fits below the sum of errors ``limit``."""
        chosen: list[str] = []
        total = 0.0
        for block in sorted(self.quantiser.candidates, key=lambda block: self.error(block.name) / block.macs):
            if total + self.error(block.name) <= limit:
                total += self.error(block.name)
                chosen.append(block.name)
        smoothed = tuple(name for name in chosen if self._smoothing_helps(name))
        return Recipe({block.name: block.name in chosen for block in self.quantiser.blocks}, smoothed)

    def _macs(self, recipe: Recipe) -> int:
        return sum(block.macs for block in self.quantiser.blocks if block.name in recipe.chosen)

    def _worst_psnr_db(self, recipe: Recipe, what: str) -> float:
        """The PSNR in the hole of the worst case, by whole trajectories of a recipe's denoiser in a file."""
        with scratch_directory(self.cache.folder) as folder:
            onnx.save(self.quantiser.quantise(recipe)[0], str(folder / f"{DENOISER}.onnx"))
            return min(m["hole_psnr_db"] for m in self.evaluator.evaluate(folder, what, self.progress))


def predict_limit(measured: Sequence[tuple[float, float]], least: float) -> float:
    """The sum of errors at which a recipe is predicted to have ``least`` dB, from log10 of the sum and dB of others.

    By the last one if errors add up, 10 dB for each tenfold; two say how much less it is, where the sampler mends some.
    """
    logarithm, psnr_db = measured[-1]
    slope = 10.0
    if len(measured) > 1:
        before, its_psnr_db = measured[-2]
        slope = min(slope, max(LEAST_SLOPE_DB, (its_psnr_db - psnr_db) / (logarithm - before)))
    return 10 ** (logarithm + (psnr_db - least) / slope)
