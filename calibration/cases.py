"""Pictures for calibration parted into those that are recorded and those that are held out, and the latter as cases.

A case is one trajectory: a picture at the network's size with its hole. Quality is judged on pictures that calibration
has not seen, at least ``HELD_OUT_CASES`` of them with their holes: where fewer are held out, each gets several holes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..data.calibration_pictures import CalibrationPictures, Photographs, draw_hole, square
from ..data.photographs import HELD_OUT
from ..errors import UsageError
from ..metrics.trajectory import Scene, cut_scene

HELD_OUT_CASES = 16
_FOLD = 5  # one picture of so many is held out


@dataclass(frozen=True, eq=False)
class Case:
    """``scene`` is the picture, (1, 3, R, R) float32 in [-1, 1], and the hole, bool (R, R)."""

    name: str
    scene: Scene


class Part:
    """Some of the pictures of a collection, in its order."""

    def __init__(self, pictures: CalibrationPictures, indices: Sequence[int]) -> None:
        self._pictures, self._indices = pictures, tuple(indices)

    def __len__(self) -> int:
        return len(self._indices)

    def name(self, i: int) -> str:
        return self._pictures.name(self._indices[i])

    def read(self, i: int) -> tuple[np.ndarray, np.ndarray | None]:
        """As the collection's."""
        return self._pictures.read(self._indices[i])

    def fingerprint(self) -> str:
        return hashlib.sha256(f"{self._pictures.fingerprint()} {self._indices}".encode()).hexdigest()


def part(pictures: CalibrationPictures) -> tuple[CalibrationPictures, CalibrationPictures]:
    """What is recorded, and what is held out: every fifth picture, at most ``HELD_OUT_CASES``.

    Of the photographs that come with packages, those that ``tiny`` was not trained on are held out.
    """
    if isinstance(pictures, Photographs):
        return pictures, Photographs(tuple(HELD_OUT))
    held = list(range(_FOLD - 1, len(pictures), _FOLD))[:HELD_OUT_CASES]
    if not held:
        raise UsageError(
            f"too few calibration pictures, {len(pictures)}: give at least {_FOLD}, better 20 or more; one in {_FOLD} "
            "is held out to judge by"
        )
    return Part(pictures, [i for i in range(len(pictures)) if i not in held]), Part(pictures, held)


def make_cases(pictures: CalibrationPictures, number: int, resolution: int, seed: int) -> list[Case]:
    """``number`` cases, the pictures in turn; in the first round with the masks of their own.

    Raises:
        UsageError, MachineError: as ``CalibrationPictures.read``.
    """
    cases = []
    for k in range(number):
        turn, i = divmod(k, len(pictures))
        pixels, hole = pictures.read(i)
        if hole is None or turn:
            pixels, hole = square(pixels, resolution), draw_hole(seed, k, resolution)
        name = pictures.name(i) if not turn else f"{pictures.name(i)}, hole {turn + 1}"
        cases.append(Case(name, cut_scene(pixels, hole, resolution)[0]))
    return cases
