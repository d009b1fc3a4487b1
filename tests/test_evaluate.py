"""The figures of a fill on images whose answer is known, and the held-out cases they are taken on."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from pictures import noise, square
from training_toys import STUDENT

from moebius_edge.data.photographs import HELD_OUT, TRAINING
from moebius_edge.errors import MachineError
from moebius_edge.metrics.fidelity import hole_psnr_db
from moebius_edge.model import build_student
from moebius_edge.training import evaluate
from moebius_edge.training.autoencoder import AutoencoderRecipe, build_autoencoder
from moebius_edge.training.evaluate import Case, border_mean, figures, fill, held_out_cases


def test_the_border_mean_is_that_of_the_ring() -> None:
    mask = square()
    image = np.zeros((64, 64, 3), np.uint8)
    image[12:52, 12:52] = (10, 20, 30)  # the ring of eight pixels
    image[12:52, 12:32] = (30, 20, 10)  # half of it
    image[mask] = 255
    filled = border_mean(image, mask)
    assert (filled[mask] == 20).all()
    assert np.array_equal(filled[~mask], image[~mask]) and (image[mask] == 255).all()


def test_held_out_cases_repeat_and_are_new_to_the_model() -> None:
    first, second = held_out_cases(2, 64), held_out_cases(2, 64)
    assert [c.name for c in first] == [f"{name}-{i}" for name in HELD_OUT for i in range(2)]
    for a, b in zip(first, second, strict=True):
        assert np.array_equal(a.image, b.image) and np.array_equal(a.mask, b.mask)
        assert a.image.shape == (64, 64, 3) and a.image.dtype == np.uint8 and a.mask.dtype == bool
        assert 0.1 <= a.mask.mean() <= 0.4
    other = held_out_cases(2, 64, seed=1)
    assert not any(np.array_equal(a.mask, b.mask) for a, b in zip(first, other, strict=True))
    assert not set(HELD_OUT) & set(TRAINING)


def test_figures_of_a_perfect_and_of_a_flat_fill() -> None:
    cases = [Case("a", noise(), square()), Case("b", noise()[::-1].copy(), square(low=24, high=50))]
    perfect = figures([c.image for c in cases], cases)
    assert perfect["hole_psnr_db"] > 100 and perfect["hole_ssim"] == pytest.approx(1)
    assert perfect["perceptual_distance"] == 0 and perfect["texture_ratio"] == pytest.approx(1, abs=0.2)
    flat = figures([border_mean(c.image, c.mask) for c in cases], cases)
    expected = np.mean([hole_psnr_db(border_mean(c.image, c.mask), c.image, c.mask) for c in cases])
    assert flat["hole_psnr_db"] == pytest.approx(expected)
    assert flat["hole_ssim"] < 0.7 and flat["perceptual_distance"] > 0.1 and flat["texture_ratio"] < 0.01


def test_a_network_fills_the_hole_from_noise_and_sees_nothing_of_it() -> None:
    torch.manual_seed(0)
    student = build_student(STUDENT)
    vae = build_autoencoder(AutoencoderRecipe(block_out_channels=(8, 8, 8, 8), norm_num_groups=4)).eval()
    case = Case("a", noise(), square())
    other = Case("a", np.where(case.mask[..., None], np.uint8(7), case.image), case.mask)
    first, second = (fill(student, vae, [c], steps=2)[0] for c in (case, other))
    assert np.array_equal(first[~case.mask], case.image[~case.mask])
    assert not np.array_equal(first[case.mask], case.image[case.mask])
    assert np.array_equal(first, second)


class FakeInpainter:
    """Answers with the truth for one start and with black for the others."""

    def __init__(self, bundle: str | Path) -> None:
        assert bundle == "some-bundle"
        self.bundle = SimpleNamespace(defaults={"steps": 20, "start": "prefill"})

    def __enter__(self) -> FakeInpainter:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def inpaint(
        self, image: np.ndarray, mask: np.ndarray, *, start: str, seed: int = 0, steps: int = 20
    ) -> FakeInpainter:
        self.image = image if start == "image" else np.zeros_like(image)
        return self


@pytest.fixture
def few_cases(monkeypatch: pytest.MonkeyPatch) -> list[Case]:
    cases = [Case(f"case-{i}", np.roll(noise(96), i, 0), square(96, 32, 64)) for i in range(3)]
    monkeypatch.setattr(evaluate, "held_out_cases", lambda: cases)
    monkeypatch.setattr(evaluate, "Inpainter", FakeInpainter)
    return cases


def test_every_start_and_baseline_has_its_figures(few_cases: list[Case], tmp_path: Path) -> None:
    sheet = tmp_path / "sheet.jpg"
    figures = evaluate.evaluate("some-bundle", sheet, ("noise", "image"))
    assert list(figures) == ["border mean", "Telea", "defaults", "noise", "image"]
    assert figures["image"]["hole_psnr_db"] > 100 > figures["border mean"]["hole_psnr_db"] > 5
    assert figures["noise"]["hole_psnr_db"] < figures["border mean"]["hole_psnr_db"]
    assert figures["image"]["texture_ratio"] == pytest.approx(1, abs=0.2)
    assert figures["noise"]["texture_ratio"] == 0
    picture = cv2.imread(str(sheet))
    assert picture is not None and picture.shape == (28 + 3 * 96, 7 * 96, 3)
    assert [p.name for p in tmp_path.iterdir()] == ["sheet.jpg"]


def test_a_sheet_that_cannot_be_written_is_an_error(few_cases: list[Case], tmp_path: Path) -> None:
    with pytest.raises(MachineError, match=r"sheet.jpg: the folder .*missing does not exist: run `mkdir -p"):
        evaluate.evaluate("some-bundle", tmp_path / "missing" / "sheet.jpg", ("noise",))
