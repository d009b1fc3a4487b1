"""What INT8 is calibrated on and judged by: masks, drawn holes, the held-out share, and what is refused."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from moebius_edge.data.calibration_pictures import MASK_SIZES, draw_hole, open_calibration, picture_and_hole
from moebius_edge.data.pictures import Pictures
from moebius_edge.errors import MachineError, UsageError
from moebius_edge.imaging.masks import latent_mask


def write(path: Path, value: int) -> None:
    """A picture of one grey value, or where its name says so a mask of 25 pixels."""
    path.parent.mkdir(exist_ok=True)
    pixels = np.full((20, 30, 3), value, np.uint8)
    if "mask" in str(path.relative_to(path.parents[1])):
        pixels[:] = 0
        pixels[5:10, 5:10] = 255
    cv2.imwrite(str(path), pixels)


def folder_of(tmp_path: Path, number: int) -> str:
    for i in range(number):
        write(tmp_path / "pictures" / f"{i:03}.png", i)
    return str(tmp_path / "pictures")


def names(pictures: Pictures) -> list[str]:
    return [pictures.name(i) for i in range(len(pictures))]


def test_a_folder_of_pictures_gets_drawn_holes_of_every_size(tmp_path: Path) -> None:
    recorded, _, notes = open_calibration(folder_of(tmp_path, 8))
    assert notes == [
        "8 calibration pictures are few: ranges may be too narrow for others, give 20",
        "8 of 8 calibration pictures have no mask: holes are drawn for them",
    ]
    sizes = []
    for i in range(6):
        pixels, hole = picture_and_hole(recorded, i, 64, seed=3)
        assert pixels.shape == (64, 64, 3) and pixels.dtype == np.uint8 and (pixels == i + (i > 3)).all()
        assert hole.shape == (64, 64) and hole.dtype == np.bool_
        sizes.append(int(np.searchsorted(MASK_SIZES[:-1], latent_mask(hole, 8).mean())))
    assert sizes == [0, 1, 2, 0, 1, 2]
    first, *others = (draw_hole(*seeds, 64) for seeds in ((1, 2), (1, 2), (2, 2), (1, 5)))
    assert [np.array_equal(first, other) for other in others] == [True, False, False]


@pytest.mark.parametrize(("number", "held"), [(5, ["004.png"]), (11, ["004.png", "009.png"])])
def test_every_fifth_picture_is_held_out(tmp_path: Path, number: int, held: list[str]) -> None:
    recorded, held_out, _ = open_calibration(folder_of(tmp_path, number))
    assert names(held_out) == held and (held_out.read(0)[0] == 4).all()
    assert sorted(names(recorded) + held) == [f"{i:03}.png" for i in range(number)]
    assert recorded.fingerprint() != held_out.fingerprint()


def test_at_most_sixteen_are_held_out_and_none_is_lost(tmp_path: Path) -> None:
    recorded, held_out, notes = open_calibration(folder_of(tmp_path, 100))
    assert len(held_out) == 16 and len(set(names(recorded) + names(held_out))) == 100 and len(notes) == 1


def test_a_mask_beside_its_picture_is_no_picture(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, 5)
    write(tmp_path / "pictures" / "002_mask.png", 0)
    recorded, held_out, notes = open_calibration(folder)
    assert notes[1] == "4 of 5 calibration pictures have no mask: holes are drawn for them"
    assert names(recorded) + names(held_out) == [f"{i:03}.png" for i in range(5)]
    pixels, hole = picture_and_hole(recorded, 2, 64, seed=0)
    assert pixels.shape == (20, 30, 3) and hole.sum() == 25, "with a mask of its own, a picture is left as it is"


def test_masks_of_a_folder_belong_to_their_pictures(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, 20)
    for i in range(20):
        write(tmp_path / "masks" / f"{i:03}.png", 0)
    recorded, held_out, notes = open_calibration(folder, str(tmp_path / "masks"))
    assert notes == [] and picture_and_hole(recorded, 9, 64, seed=0)[1].sum() == 25
    assert picture_and_hole(held_out, 3, 64, seed=0)[1].sum() == 25


def test_too_few_pictures_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="too few calibration pictures, 4: give at least 5, better 20 or more; one in"):
        open_calibration(folder_of(tmp_path, 4))
    with pytest.raises(MachineError, match="there is no"):
        open_calibration(str(tmp_path / "nowhere"))
