"""Thumbnails: what part is shown, how differences are amplified, and what stands where a picture cannot be read."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image
from report_sample import draw_pictures, sample_results

from moebius_edge.report import thumbnails
from moebius_edge.report.thumbnails import RESULT, TO_REFERENCE, TO_TRUTH, Thumbnail, shown_inputs

FLOAT32, FLOAT16 = (f"sample-{kind}_onnxruntime-cpu_ddim-20_g2_image" for kind in ("float32", "float16"))


@pytest.fixture
def results(tmp_path: Path) -> dict[str, Any]:
    """The sample's first input only, with its pictures in ``tmp_path``."""
    document = sample_results()
    document["inputs"] = document["inputs"][:1]
    draw_pictures(document, tmp_path)
    return document


def cells(results: dict[str, Any], folder: Path) -> dict[str, Thumbnail]:
    ((_, cells),) = shown_inputs(results, folder)
    return {cell.configuration["id"] if cell.configuration else cell.caption: cell for cell in cells}


def pixels(uri: str) -> np.ndarray:
    head, data = uri.split(",")
    assert head == "data:image/jpeg;base64"
    decoded = cv2.imdecode(np.frombuffer(base64.b64decode(data), np.uint8), cv2.IMREAD_COLOR)
    assert decoded is not None
    return np.asarray(decoded[..., ::-1])


def test_the_hole_and_its_surroundings_are_shown(results: dict[str, Any], tmp_path: Path) -> None:
    found = cells(results, tmp_path)
    assert list(found)[:4] == ["image", "mask", "ground truth", FLOAT32]
    mask = pixels(found["mask"].views[RESULT])[..., 0] > 127
    assert 0.1 < mask.mean() < 0.5, "the mask of the whole picture is smaller"
    assert {pixels(cell.views[RESULT]).shape for cell in found.values()} == {mask.shape + (3,)}
    assert max(mask.shape) <= 240
    assert found[FLOAT16].link == f"pictures/{FLOAT16}/beach.png"


def test_without_a_mask_everything_is_shown(results: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "pictures/inputs/beach_mask.png").unlink()
    found = cells(results, tmp_path)
    assert pixels(found["image"].views[RESULT]).shape == (120, 160, 3)
    assert "pictures/inputs/beach_mask.png" in found["mask"].problem
    assert str(tmp_path) not in found["mask"].problem


def test_differences_are_amplified_before_scaling(results: dict[str, Any], tmp_path: Path) -> None:
    flat = np.full((120, 160, 3), 100, np.uint8)
    for path, value in ((f"pictures/{FLOAT32}", 100), (f"pictures/{FLOAT16}", 110), ("pictures/truth", 20)):
        Image.fromarray(np.full_like(flat, value)).save(tmp_path / path / "beach.png")
    found = cells(results, tmp_path)
    assert np.abs(pixels(found[FLOAT16].views[TO_REFERENCE]).astype(int) - 40).max() <= 2
    assert pixels(found[FLOAT16].views[TO_TRUTH]).min() >= 253  # 4 x 90 is clipped
    assert TO_REFERENCE not in found[FLOAT32].views, "the reference has no difference to itself"
    assert TO_REFERENCE not in found["telea"].views


def test_pictures_of_other_kinds_are_compared_as_8_bit_colour(results: dict[str, Any], tmp_path: Path) -> None:
    grey = tmp_path / f"pictures/{FLOAT16}/beach.png"
    cv2.imwrite(str(grey), np.full((120, 160), 40 << 8, np.uint16))
    assert np.abs(pixels(cells(results, tmp_path)[FLOAT16].views[RESULT]).astype(int) - 40).max() <= 1


def test_a_size_that_differs_has_no_difference(results: dict[str, Any], tmp_path: Path) -> None:
    Image.new("RGB", (32, 24)).save(tmp_path / f"pictures/{FLOAT16}/beach.png")
    assert set(cells(results, tmp_path)[FLOAT16].views) == {RESULT}


@pytest.mark.parametrize(
    "path", ["../secret.png", "/etc/passwd", "pictures/missing.png", "pictures/damaged.png", "pictures", "a\0b"]
)
def test_a_picture_that_cannot_be_had_is_a_sentence(results: dict[str, Any], tmp_path: Path, path: str) -> None:
    folder = tmp_path / "report"
    (tmp_path / "pictures").rename(tmp_path / "kept")
    folder.mkdir()
    (tmp_path / "kept").rename(folder / "pictures")
    Image.new("RGB", (640, 480)).save(tmp_path / "secret.png")
    (folder / "pictures/damaged.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    results["configurations"][1]["pictures"]["beach.jpg"] = path
    cell = cells(results, folder)[FLOAT16]
    assert cell.views == {} and not cell.link
    assert cell.problem and "\0" not in cell.problem


def test_a_page_has_no_more_thumbnails_than_it_can_hold(
    results: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results["inputs"] *= 5
    each = 3 + 2 * len(results["configurations"])
    for most, shown in ((1, 1), (2 * each, 2), (10 * each, 5)):
        monkeypatch.setattr(thumbnails, "MOST_THUMBNAILS", most)
        assert len(list(shown_inputs(results, tmp_path))) == shown
