"""The figures of two runs and of a fill: known differences in closed form, SSIM against scikit-image's."""

from __future__ import annotations

import math

import numpy as np
import pytest
from pictures import noise, square
from skimage.metrics import structural_similarity

from moebius_edge.metrics.fidelity import (
    compare,
    fill_figures,
    hole_psnr_db,
    hole_ssim,
    planes,
    psnr_db,
    ssim,
    texture_ratio,
    worst_pixel,
)
from moebius_edge.metrics.trajectory import Trajectory, draw_scene


def test_figures_of_a_known_difference() -> None:
    zeros, ones = np.zeros((1, 3, 16, 16), np.float32), np.ones((1, 4, 2, 2), np.float32)
    one_off = np.ones_like(ones)
    one_off[0, 1, 0, 1] = 0.6
    before = Trajectory(ones, [ones, 2 * ones, ones], zeros)
    after = Trajectory(ones + 0.5, [ones, 2.25 * ones, one_off], zeros + 0.02)
    figures = compare(after, before)
    assert figures["psnr_db"] == 40.0  # 20 log10(2 / 0.02)
    assert figures["latent_drift"] == [0.0, 0.25, 0.4] and figures["latent_max_difference"] == 0.4
    assert figures["latent_rms_drift"] == [0.0, 0.25, 0.1]  # 0.4 / √16
    assert figures["encoded_max_difference"] == 0.5 and figures["steps_executed"] == 3
    luminance = (2 * 1.02 + 0.0004) / (1 + 1.02**2 + 0.0004)  # flat: this term alone, of brightness from 0 to 2
    assert figures["ssim"] == pytest.approx(luminance, abs=1e-6)
    assert psnr_db(zeros, zeros) == 200.0


@pytest.mark.parametrize("kind", ["noise", "shift", "contrast", "equal"])
@pytest.mark.parametrize("shape", [(3, 64, 64), (1, 3, 40, 57)])
def test_ssim_is_scikit_images(shape: tuple[int, ...], kind: str) -> None:
    generator = np.random.default_rng(3)
    height, width = shape[-2:]
    reference = draw_scene(64)[0][..., :height, :width].reshape(shape)
    changed = {
        "noise": reference + generator.normal(0, 0.2, shape),
        "shift": np.roll(reference, 2, axis=-1),
        "contrast": 0.6 * reference + 0.1,
        "equal": reference,
    }[kind].astype(np.float32)
    planes = [a.reshape(3, height, width) + 1 for a in (changed, reference)]
    expected = structural_similarity(
        *planes, channel_axis=0, data_range=2.0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
    )
    assert ssim(changed, reference) == pytest.approx(expected, abs=1e-5)
    assert (expected > 0.999999) == (kind == "equal"), "the changes are no changes to SSIM"
    for a, b in ((changed[..., :10, :], reference[..., :10, :]), (changed, reference[..., :-1])):
        with pytest.raises(ValueError, match="one shape, 11 or more each way, got"):
            ssim(a, b)


def test_the_worst_pixel_is_found() -> None:
    reference = np.full((1, 3, 16, 24), 0.25, np.float32)
    image = reference + 0.01
    image[0, 2, 5, 21] = -0.75
    assert worst_pixel(image, reference) == {
        "x": 21,
        "y": 5,
        "channel": 2,
        "value": -0.75,
        "reference": 0.25,
        "difference": 1.0,
        "levels": 128.0,  # 127.5 to three digits
    }


# --- a fill ------------------------------------------------------------------------------------------------


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
    thin = np.zeros((64, 64), bool)
    thin[30:32] = True
    for without_inside_or_surroundings in (thin, np.ones((64, 64), bool)):
        assert math.isnan(texture_ratio(noise(), without_inside_or_surroundings))


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
    np.testing.assert_allclose(planes(np.array([[[0, 51, 255]]], np.uint8))[:, 0, 0], [-1, -0.6, 1], atol=1e-6)
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
