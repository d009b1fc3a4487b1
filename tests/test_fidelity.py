"""The figures two runs are compared by: known differences in closed form, SSIM against scikit-image's."""

from __future__ import annotations

import numpy as np
import pytest
from skimage.metrics import structural_similarity

from moebius_edge.metrics.fidelity import compare, psnr_db, ssim, worst_pixel
from moebius_edge.metrics.trajectory import Trajectory, draw_scene


def test_figures_of_a_known_difference() -> None:
    zeros, ones = np.zeros((1, 3, 16, 16), np.float32), np.ones((1, 4, 2, 2), np.float32)
    before = Trajectory(ones, [ones, 2 * ones], zeros)
    after = Trajectory(ones + 0.5, [ones, 2.25 * ones], zeros + 0.02)
    figures = compare(after, before)
    assert figures["psnr_db"] == 40.0  # 20 log10(2 / 0.02)
    assert figures["latent_drift"] == [0.0, 0.25] and figures["latent_max_difference"] == 0.25
    assert figures["latent_rms_drift"] == [0.0, 0.25]
    assert figures["encoded_max_difference"] == 0.5 and figures["steps_executed"] == 2
    luminance = (2 * 1.02 + 0.0004) / (1 + 1.02**2 + 0.0004)  # flat: this term alone, of brightness from 0 to 2
    assert figures["ssim"] == pytest.approx(luminance, abs=1e-6)
    assert psnr_db(zeros, zeros) == 200.0


def test_rms_and_largest_drift_are_told_apart() -> None:
    zeros = np.zeros((1, 4, 2, 2), np.float32)
    one_off = zeros.copy()
    one_off[0, 1, 0, 1] = -0.4
    image = np.zeros((1, 3, 16, 16), np.float32)
    figures = compare(Trajectory(zeros, [one_off], image), Trajectory(zeros, [zeros], image))
    assert (figures["latent_drift"], figures["latent_rms_drift"]) == ([0.4], [0.1])  # 0.4 / √16


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


def test_ssim_needs_a_window() -> None:
    small = np.zeros((3, 10, 64), np.float32)
    with pytest.raises(ValueError, match=r"one shape, 11 or more each way, got \(3, 10, 64\)"):
        ssim(small, small)
    with pytest.raises(ValueError, match="one shape"):
        ssim(np.zeros((3, 16, 16)), np.zeros((1, 16, 16)))


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
