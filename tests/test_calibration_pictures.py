"""What a recording is made from: pairs, drawn holes, and the sources that are refused."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from moebius_edge.calibration.statistics import MASK_SIZES
from moebius_edge.data.calibration_pictures import Photographs, draw_hole, open_calibration, picture_and_hole
from moebius_edge.data.photographs import HELD_OUT
from moebius_edge.errors import MachineError, UsageError
from moebius_edge.imaging.masks import latent_mask


def write(path: Path, value: int, hole: bool = False) -> None:
    path.parent.mkdir(exist_ok=True)
    pixels = np.full((20, 30, 3), value, np.uint8)
    if hole:
        pixels[:] = 0
        pixels[5:10, 5:10] = 255
    cv2.imwrite(str(path), pixels)


def folder_of(tmp_path: Path, number: int) -> Path:
    for i in range(number):
        write(tmp_path / "pictures" / f"{i}.png", 10 * i)
    return tmp_path / "pictures"


def test_a_folder_of_pictures_gets_drawn_holes_of_every_size(tmp_path: Path) -> None:
    pictures, notes = open_calibration(folder_of(tmp_path, 6))
    assert notes == [
        "6 calibration pictures are few: ranges may be too narrow for others, 16 are better",
        "6 of 6 calibration pictures have no mask: holes are drawn for them",
    ]
    sizes = []
    for i in range(6):
        pixels, hole = picture_and_hole(pictures, i, 64, seed=3)
        assert pixels.shape == (64, 64, 3) and pixels.dtype == np.uint8 and (pixels == 10 * i).all()
        assert hole.shape == (64, 64) and hole.dtype == np.bool_
        sizes.append(int(np.searchsorted(MASK_SIZES[:-1], latent_mask(hole, 8).mean())))
    assert sizes == [0, 1, 2, 0, 1, 2]


def test_holes_follow_the_seed() -> None:
    assert np.array_equal(draw_hole(1, 2, 64), draw_hole(1, 2, 64))
    assert not np.array_equal(draw_hole(1, 2, 64), draw_hole(2, 2, 64))
    assert not np.array_equal(draw_hole(1, 2, 64), draw_hole(1, 5, 64))


def test_a_mask_beside_its_picture_is_no_picture(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, 5)
    write(folder / "2_mask.png", 0, hole=True)
    pictures, notes = open_calibration(folder)
    assert notes[1] == "4 of 5 calibration pictures have no mask: holes are drawn for them"
    assert [pictures.name(i) for i in range(len(pictures))] == ["0.png", "1.png", "2.png", "3.png", "4.png"]
    pixels, hole = picture_and_hole(pictures, 2, 64, seed=0)
    assert pixels.shape == (20, 30, 3) and hole.sum() == 25, "with a mask of its own, a picture is left as it is"


def test_masks_of_a_folder_belong_to_their_pictures(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, 16)
    for i in range(16):
        write(tmp_path / "masks" / f"{i}.png", 0, hole=True)
    pictures, notes = open_calibration(folder, tmp_path / "masks")
    assert notes == [] and picture_and_hole(pictures, 9, 64, seed=0)[1].sum() == 25
    (tmp_path / "masks" / "11.png").unlink()
    with pytest.raises(UsageError, match=r"picture 11\.png has no mask in .*masks: put 11\.png there"):
        open_calibration(folder, tmp_path / "masks")


def test_too_few_pictures_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="too few calibration pictures, 3: give at least 5"):
        open_calibration(folder_of(tmp_path, 3))


def test_masks_need_their_pictures(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="go with pictures of yours"):
        open_calibration(None, tmp_path)
    with pytest.raises(MachineError, match="there is no"):
        open_calibration(tmp_path / "nowhere")


def test_without_pictures_photographs_are_used_and_it_is_said() -> None:
    pictures, notes = open_calibration(None)
    names = [pictures.name(i) for i in range(len(pictures))]
    assert len(names) == 12 and not set(names) & set(HELD_OUT)
    assert len(notes) == 2 and "calibrating on 12 photographs" in notes[0] and "12 calibration pictures" in notes[1]
    pixels, hole = picture_and_hole(pictures, names.index("camera"), 64, seed=0)
    assert pixels.shape == (64, 64, 3) and pixels.std() > 20 and hole.any()


def test_fingerprints_tell_pictures_apart() -> None:
    assert Photographs(("china", "flower")).fingerprint() != Photographs().fingerprint()
