"""Which blocks are quantised: each one's harm alone, then the most arithmetic that stays above a floor.

A block's harm is measured, not guessed: it alone is quantised, and short trajectories are compared in the hole. Blocks
join in the order of harm for what they bring, squared error over multiplications; how many of them may, whole
trajectories say. The errors of blocks add up only roughly, hence the second measurement.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from ..errors import QualityError
from ..system.files import atomic_write
from .quantiser import Quantiser
from .recipe import Recipe
from .trials import Figures, Progress, Trials, mean_hole_psnr_db

MARGIN_DB = 1.0  # a recipe is chosen on few pictures, and judged on others
_GAIN_DB = 0.5  # what smoothing must bring a block alone
_FILE = "sensitivity.json"


@dataclass
class Sensitivity:
    """PSNR in the hole, in dB, with one block quantised, by block; ``smoothed``: with its norm's outliers migrated."""

    plain: dict[str, float]
    smoothed: dict[str, float]

    def best(self, name: str) -> float:
        """With smoothing where it helps."""
        return max(self.plain[name], self.smoothed[name]) if self.helps(name) else self.plain[name]

    def helps(self, name: str) -> bool:
        """Whether smoothing pays before this block."""
        return self.smoothed.get(name, -1.0) >= self.plain[name] + _GAIN_DB


def measure_sensitivity(
    quantiser: Quantiser, trials: Trials, names: list[str], folder: Path, key: dict[str, Any], progress: Progress
) -> Sensitivity:
    """The harm of each block of ``names``. Kept in ``folder`` block by block, so that an interrupted search goes on.

    ``key`` says, in plain JSON, what the figures depend on; figures of another key are measured anew.
    """
    file = folder / _FILE
    known = _load(file, key)
    wanted = [(name, False) for name in names]
    wanted += [(name, True) for name in names if name in quantiser.smoothable]
    for done, (name, smoothed) in enumerate(wanted):
        found = known.smoothed if smoothed else known.plain
        if name in found:
            continue
        recipe = Recipe({name: True}, (name,) if smoothed else ())
        label = f"sensitivity of {name}{', smoothed' if smoothed else ''}"
        figures = try_recipe(quantiser, trials, recipe, folder, label, _whole(progress, done, len(wanted)))
        found[name] = mean_hole_psnr_db(figures)
        _save(file, key, known)
    return known


def choose_recipe(
    quantiser: Quantiser,
    sensitivity: Sensitivity,
    trials: Trials,
    min_psnr_db: float,
    folder: Path,
    progress: Progress,
) -> Recipe:
    """The recipe with the most quantised multiplications whose worst case stays ``MARGIN_DB`` above the floor.

    A block that is below that alone takes no part, however much it brings: with others it can only be worse.

    Raises:
        QualityError: not one block may be quantised.
    """
    least = min_psnr_db + MARGIN_DB
    able = [block for block in quantiser.candidates if sensitivity.best(block.name) >= least]

    def cost(name: str, multiplications: int) -> float:
        return float(10 ** (-sensitivity.best(name) / 10) / multiplications)

    order = [b.name for b in sorted(able, key=lambda b: cost(b.name, b.multiplications))]
    smoothed = tuple(name for name in order if sensitivity.helps(name))

    def recipe(number: int) -> Recipe:
        chosen = set(order[:number])
        return Recipe({b.name: b.name in chosen for b in quantiser.blocks}, tuple(s for s in smoothed if s in chosen))

    worst: dict[int, float] = {}  # by number of blocks

    def passes(number: int) -> bool:
        label = f"recipe {len(worst) + 1}, {number} of {len(order)} blocks"
        figures = try_recipe(quantiser, trials, recipe(number), folder, label, progress)
        worst[number] = min(f.hole_psnr_db for f in figures)
        return worst[number] >= least

    number = _most(len(order), passes)
    if number == 0:
        alone = {order[0]: worst[1]} if order else {b.name: sensitivity.best(b.name) for b in quantiser.candidates}
        best = max(alone, key=alone.__getitem__, default=None)
        found = "there is no block to quantise" if best is None else f"{best} alone has {alone[best]:.2f}"
        raise QualityError(
            f"no block can be quantised: {least:g} dB in the hole are wanted ({min_psnr_db:g} and a margin of "
            f"{MARGIN_DB:g}), {found}; nothing was saved: lower --min-psnr, or use --precision fp16"
        )
    return recipe(number)


def try_recipe(
    quantiser: Quantiser, trials: Trials, recipe: Recipe, folder: Path, label: str, progress: Progress
) -> list[Figures]:
    """The figures of a recipe's denoiser, which lies in ``folder`` for as long as it is tried."""
    file = folder / "candidate.onnx"
    try:
        onnx.save(quantiser.make(recipe)[0], str(file))
        return trials.denoiser(file, label, progress)
    finally:
        file.unlink(missing_ok=True)


def _most(largest: int, passes: Callable[[int], bool]) -> int:
    """The largest number that passes, where those below one that passes do; all of them are tried first."""
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


def _whole(progress: Progress, done: int, total: int) -> Progress:
    """Progress through all blocks rather than through one."""
    return lambda label, _, __: progress(label, done, total)


def _load(file: Path, key: dict[str, Any]) -> Sensitivity:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["key"] == json.loads(json.dumps(key)):
            return Sensitivity(content["plain_psnr_db"], content["smoothed_psnr_db"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # none yet, or not one of ours: it is measured
    return Sensitivity({}, {})


def _save(file: Path, key: dict[str, Any], known: Sensitivity) -> None:
    content = {"key": key, "plain_psnr_db": known.plain, "smoothed_psnr_db": known.smoothed}
    with atomic_write(file) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
