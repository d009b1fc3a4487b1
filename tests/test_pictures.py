"""Pictures by number: what of a file becomes RGB, masks of their own, members of archives, fingerprints."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moebius_edge.data.pictures import Pictures, Place
from moebius_edge.errors import MachineError, UsageError
from moebius_edge.imaging.pictures import Picture, write_picture

COLOURS = np.random.default_rng(0).integers(0, 256, (12, 20, 3)).astype(np.uint8)
HOLE = np.zeros((12, 20), np.uint8)
HOLE[2:7, 3:9] = 255


def save(path: Path, samples: np.ndarray) -> Place:
    write_picture(path, Picture.from_array(samples))
    return Place(path.name, str(path))


def read(place: Place, mask: Place | None = None) -> tuple[np.ndarray, np.ndarray | None]:
    return Pictures("here", [place], [mask]).read(0)


def test_every_kind_of_picture_becomes_rgb_of_eight_bits(tmp_path: Path) -> None:
    grey, alpha = COLOURS[..., 0], np.full((12, 20, 1), 7, np.uint8)
    cases = {
        "rgb.png": (COLOURS, COLOURS),
        "grey.png": (grey, np.dstack([grey] * 3)),
        "alpha.png": (np.dstack([COLOURS, alpha]), COLOURS),
        "deep.png": (np.minimum(COLOURS, 254).astype(np.uint16) * 257 + 128, np.minimum(COLOURS, 254)),
    }
    for name, (samples, expected) in cases.items():
        image, mask = read(save(tmp_path / name, samples))
        assert image.dtype == np.uint8 and image.flags.c_contiguous and mask is None
        np.testing.assert_array_equal(image, expected, err_msg=name)


def test_a_picture_lying_on_its_side_is_turned_and_its_mask_fits_the_upright_one(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise
    Image.fromarray(COLOURS).save(tmp_path / "a.png", exif=exif)
    mask = save(tmp_path / "m.png", np.rot90(HOLE, -1))
    image, found = read(Place("a.png", str(tmp_path / "a.png")), mask)
    np.testing.assert_array_equal(image, np.rot90(COLOURS, -1))
    assert found is not None and found.dtype == bool
    np.testing.assert_array_equal(found, np.rot90(HOLE > 0, -1))


def test_a_member_of_an_archive_is_read_from_its_place_alone(tmp_path: Path) -> None:
    save(tmp_path / "a.png", COLOURS)
    save(tmp_path / "m.png", HOLE)
    first, second = ((tmp_path / name).read_bytes() for name in ("a.png", "m.png"))
    (tmp_path / "x.tar").write_bytes(b"before" + first + b"between" + second)
    file = str(tmp_path / "x.tar")
    place = Place("x.tar:a.png", file, 6, len(first))
    mask = Place("x.tar:a.mask.png", file, 6 + len(first) + 7, len(second))
    image, found = read(place, mask)
    np.testing.assert_array_equal(image, COLOURS)
    np.testing.assert_array_equal(found, HOLE > 0)
    with pytest.raises(UsageError, match=r"x.tar:a.png .*not a picture of a known kind"):
        read(place._replace(offset=0))
    with pytest.raises(MachineError, match=r"x.tar has become shorter since it was opened: run the same command"):
        read(place._replace(offset=9000))
    Path(file).unlink()
    with pytest.raises(MachineError, match=r"cannot read .*x.tar: No such file or directory"):
        read(place)


def test_pictures_and_masks_without_use_are_errors(tmp_path: Path) -> None:
    good = save(tmp_path / "a.png", COLOURS)
    cases = {
        r"mask .*m.png is all black, it fills nothing: mark the hole white": HOLE * 0,
        r"mask .*m.png is all white, it leaves nothing to go by": HOLE * 0 + 255,
        r"mask .*m.png is 20x11 and the picture is 20x12: resize the mask to 20x12": HOLE[:11],
    }
    for message, samples in cases.items():
        with pytest.raises(UsageError, match=message):
            read(good, save(tmp_path / "m.png", samples))
    with pytest.raises(UsageError, match=r"picture .*thin.png is 20x7: give at least 8 pixels a side"):
        read(save(tmp_path / "thin.png", COLOURS[:7]))
    with pytest.raises(MachineError, match=r"there is no picture .*gone.png"):
        read(good, Place("gone.png", str(tmp_path / "gone.png")))


def test_a_fingerprint_is_of_names_sizes_and_order_wherever_the_files_lie(tmp_path: Path) -> None:
    (tmp_path / "moved").mkdir()
    places = []
    for folder in (tmp_path, tmp_path / "moved"):
        for name, size in (("a", 3), ("b", 4)):
            (folder / name).write_bytes(bytes(size))
            places.append(Place(name, str(folder / name)))
    a, b, moved_a, moved_b = places

    def of(pictures: list[Place], masks: list[Place | None]) -> str:
        return Pictures("x", pictures, masks).fingerprint()

    ours = of([a, b], [None, None])
    assert of([moved_a, moved_b], [None, None]) == ours
    others = [of([b, a], [None, None]), of([a, b], [b, None]), of([a, b], [None, b])]
    others += [of([a._replace(name="c"), b], [None, None]), of([a, Place("b", "x.tar", 0, 5)], [None, None])]
    (tmp_path / "a").write_bytes(bytes(9))
    others.append(of([a, b], [None, None]))
    assert len({ours, *others}) == 1 + len(others)
