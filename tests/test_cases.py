"""Pictures parted into recorded and held-out ones, and trajectories made of them: none is on both sides."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from moebius_edge.calibration.cases import HELD_OUT_CASES, make_cases, part
from moebius_edge.data.calibration_pictures import Photographs, draw_hole, open_calibration, square
from moebius_edge.data.photographs import HELD_OUT, TRAINING
from moebius_edge.errors import UsageError


class Numbered:
    """Pictures of one grey value each; ``masks`` maps some of them to a mask of their own."""

    def __init__(self, number: int, masks: dict[int, np.ndarray] | None = None) -> None:
        self.number, self.masks = number, masks or {}

    def __len__(self) -> int:
        return self.number

    def name(self, i: int) -> str:
        return f"{i}.png"

    def read(self, i: int) -> tuple[np.ndarray, np.ndarray | None]:
        return np.full((100, 120, 3), i, np.uint8), self.masks.get(i)

    def fingerprint(self) -> str:
        return f"{self.number} pictures"


def names(pictures: object) -> list[str]:
    return [pictures.name(i) for i in range(len(pictures))]  # type: ignore[attr-defined,arg-type]


def test_every_fifth_picture_is_held_out() -> None:
    recorded, held_out = part(Numbered(5))
    assert names(recorded) == ["0.png", "1.png", "2.png", "3.png"] and names(held_out) == ["4.png"]
    assert held_out.read(0)[0][0, 0, 0] == 4 and recorded.read(3)[0][0, 0, 0] == 3
    recorded, held_out = part(Numbered(11))
    assert names(held_out) == ["4.png", "9.png"] and len(recorded) == 9


def test_no_picture_is_on_both_sides_and_none_is_lost() -> None:
    recorded, held_out = part(Numbered(200))
    assert len(held_out) == HELD_OUT_CASES == 16
    assert sorted(names(recorded) + names(held_out)) == sorted(names(Numbered(200)))


def test_fewer_than_five_are_refused() -> None:
    with pytest.raises(UsageError, match="too few calibration pictures, 4: give at least 5, better 20 or more; one in"):
        part(Numbered(4))


def test_of_the_photographs_those_are_held_out_that_tiny_never_saw() -> None:
    recorded, held_out = part(Photographs())
    assert names(recorded) == list(TRAINING) and names(held_out) == list(HELD_OUT)


def test_a_recording_knows_its_part() -> None:
    """The same pictures parted otherwise, or others parted alike, are another recording."""
    prints = {p.fingerprint() for number in (10, 11) for p in part(Numbered(number))}
    assert len(prints) == 4
    assert part(Numbered(10))[0].fingerprint() in prints


def own_mask() -> np.ndarray:
    """Two holes far apart, the second the larger one."""
    hole = np.zeros((100, 120), bool)
    hole[4:8, 4:8] = True
    hole[80:92, 90:110] = True
    return hole


def test_a_case_is_the_network_sized_part_with_the_largest_hole() -> None:
    (case,) = make_cases(Numbered(1, {0: own_mask()}), 1, 32, seed=0)
    image, hole = case.scene
    assert case.name == "0.png" and image.shape == (1, 3, 32, 32) and image.dtype == np.float32
    assert hole.shape == (32, 32) and hole.dtype == np.bool_
    assert 0 < hole.sum() < 0.5 * hole.size and hole.sum() > 16, "not the hole of 4 x 4"
    assert np.allclose(image, -1), "grey 0 is -1"


def test_own_masks_first_and_drawn_ones_in_the_next_rounds() -> None:
    pictures = Numbered(2, {0: own_mask()})
    cases = make_cases(pictures, 5, 32, seed=7)
    assert [c.name for c in cases] == ["0.png", "1.png", "0.png, hole 2", "1.png, hole 2", "0.png, hole 3"]
    for k in (1, 2, 3, 4):
        assert np.array_equal(cases[k].scene[1], draw_hole(7, k, 32)), k
    assert not np.array_equal(cases[0].scene[1], cases[2].scene[1])
    assert {float(c.scene[0][0, 0, 0, 0]) for c in cases} == {-1.0, float(np.float32(2 / 255) - 1)}


def test_the_same_seed_draws_the_same_cases() -> None:
    def holes(seed: int) -> list[np.ndarray]:
        return [c.scene[1] for c in make_cases(Numbered(3), 6, 64, seed)]

    assert all(np.array_equal(a, b) for a, b in zip(holes(1), holes(1), strict=True))
    assert not any(np.array_equal(a, b) for a, b in zip(holes(1), holes(2), strict=True))


def test_pixels_become_the_networks_range(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for i in range(5):
        cv2.imwrite(str(tmp_path / f"{i}.png"), rng.integers(0, 256, (70, 90, 3), np.uint8))
    pictures, _ = open_calibration(tmp_path)
    (case,) = make_cases(pictures, 1, 64, seed=0)
    wanted = square(pictures.read(0)[0], 64).astype(np.float64).transpose(2, 0, 1)[None] / 127.5 - 1
    assert np.abs(case.scene[0] - wanted).max() < 1e-6
    assert case.scene[0].min() < -0.8 and case.scene[0].max() > 0.8
