"""The figures of a fill on pictures whose answer is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from pictures import noise, square

from moebius_edge.metrics.fidelity import fill_figures, hole_psnr_db, hole_ssim, planes, ssim, texture_ratio


def flat(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    return np.where(mask[..., None], np.uint8(128), image)


def test_psnr_counts_the_hole_alone() -> None:
    truth, mask = np.full((64, 64, 3), 100, np.uint8), square()
    result = truth.copy()
    result[~mask] = 0  # what lies outside is no concern
    result[mask] = 110
    assert hole_psnr_db(result, truth, mask) == pytest.approx(10 * np.log10(255**2 / 100))
    result[mask] = 90  # uint8 must not wrap
    assert hole_psnr_db(result, truth, mask) == pytest.approx(10 * np.log10(255**2 / 100))
    assert hole_psnr_db(truth, truth, mask) > 100


def test_texture_is_one_where_it_goes_on_and_none_where_it_is_flat() -> None:
    mask, image = square(96, 32, 64), noise(96)
    assert texture_ratio(image, mask) == pytest.approx(1, abs=0.2)
    assert texture_ratio(flat(image, mask), mask) < 0.02
    half = image.copy()
    half[mask] = (128 + (image[mask].astype(float) - 128) / 2).astype(np.uint8)
    assert texture_ratio(half, mask) / texture_ratio(image, mask) == pytest.approx(0.25, abs=0.02)


def test_a_hole_without_an_inside_or_without_surroundings_has_no_texture() -> None:
    thin = np.zeros((64, 64), bool)
    thin[30:32] = True
    assert math.isnan(texture_ratio(noise(), thin))
    assert math.isnan(texture_ratio(noise(), np.ones((64, 64), bool)))


def test_ssim_of_the_hole_is_that_of_its_box() -> None:
    image, mask = noise(), square()
    a, b = planes(image), planes(flat(image, mask))
    assert hole_ssim(a, b, mask) == pytest.approx(ssim(a[:, 14:50, 14:50], b[:, 14:50, 14:50]))
    assert hole_ssim(a, b, mask) < ssim(a, b) < 1 and hole_ssim(a, a, mask) == 1


@pytest.mark.parametrize("where", [(0, 0), (0, 63), (63, 63), (30, 2)])
def test_a_hole_of_one_pixel_has_an_ssim_wherever_it_is(where: tuple[int, int]) -> None:
    image, mask = noise(), np.zeros((64, 64), bool)
    mask[where] = True
    assert 0 < hole_ssim(planes(image), planes(flat(image, mask)), mask) < 1
    with pytest.raises(ValueError, match="an empty hole has no SSIM"):
        hole_ssim(planes(image), planes(image), np.zeros((64, 64), bool))


def test_all_figures_of_a_fill() -> None:
    image, mask = noise(), square()
    changed = image.copy()
    changed[mask] = changed[mask] // 2
    figures = fill_figures(planes(changed), planes(image), mask)
    assert figures["hole_psnr_db"] == hole_psnr_db(changed, image, mask)
    share = mask.mean()
    assert figures["psnr_db"] == pytest.approx(figures["hole_psnr_db"] - 10 * np.log10(share))
    assert figures["hole_ssim"] < figures["ssim"] < 1
    small = fill_figures(planes(changed[20:30]), planes(image[20:30]), mask[20:30])
    assert small["ssim"] is small["hole_ssim"] is None and small["hole_psnr_db"] > 0


def test_a_shade_brighter_is_nearly_the_same_whatever_the_grey() -> None:
    """SSIM on [-1, 1] would call it another picture where the grey is near 0."""
    mask = square()
    for level in (60, 127, 200):
        image = (noise().astype(int) - 128 + level).clip(0, 245).astype(np.uint8)
        brighter = np.where(mask[..., None], image + 10, image).astype(np.uint8)
        assert fill_figures(planes(brighter), planes(image), mask)["hole_ssim"] > 0.9


def test_planes_span_minus_one_to_one() -> None:
    values = planes(np.array([[[0, 51, 255]]], np.uint8))
    np.testing.assert_allclose(values[:, 0, 0], [-1, -0.6, 1], atol=1e-6)
