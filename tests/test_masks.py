"""Thresholds on arrays, growing, and the latent grid."""

from __future__ import annotations

import numpy as np
import pytest

from moebius_edge.errors import UsageError
from moebius_edge.imaging.masks import bounds, dilate, distance_outside, latent_mask, threshold


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[False, True]]), [False, True]),
        (np.array([[127, 128]], np.uint8), [False, True]),
        (np.array([[32767, 32768]], np.uint16), [False, True]),
        (np.array([[0.5, 0.51]]), [False, True]),
        (np.array([[[0], [255]]], np.uint8), [False, True]),
        (np.array([[0, 1]], np.uint8), [False, True]),
        (np.array([[0, 1]]), [False, True]),
        (np.array([[0, 300]], np.uint16), [False, True]),
        (np.array([[0, 7]], np.int32), [False, True]),
        (np.array([[0, 0]]), [False, False]),
        (np.array([[0, 0.001]], np.float32), [False, True]),
        (np.array([[0, 10, 40, 102]], np.uint8), [False, False, False, True]),  # a soft brush at 40%
        (np.array([[0, 60, 102]], np.uint8), [False, True, True]),
        (np.array([[0, 3, 5]], np.uint8), [False, False, False]),  # black, saved as JPEG
        (np.array([[0, 100, 255]], np.uint8), [False, False, True]),
        (np.array([[0.0, 254.0, 255.0]]), [False, True, True]),
    ],
)
def test_threshold(values: np.ndarray, expected: list[bool]) -> None:
    assert threshold(values).tolist() == [expected]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.array([[0.0, np.nan]]), "values that are not finite"),
        (np.array([[0, 1, 2]]), "type int64: convert it to bool"),
        (np.array([[-1, 0]]), "type int64: convert it to bool"),
        (np.array([["a"]]), "type <U1: convert it to bool"),
        (np.zeros((2, 2, 3), np.uint8), r"shape \(2, 2, 3\): give one value a pixel"),
    ],
)
def test_threshold_refuses(values: np.ndarray, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        threshold(values)


def test_distance_is_euclidean_and_dilation_agrees() -> None:
    rng = np.random.default_rng(0)
    mask = rng.random((40, 50)) < 0.005
    points = np.argwhere(mask)
    y, x = np.mgrid[:40, :50]
    expected = np.min([np.hypot(y - a, x - b) for a, b in points], axis=0)
    np.testing.assert_array_equal(distance_outside(mask), expected.astype(np.float32))
    for radius in (1, 2.5, 6):
        np.testing.assert_array_equal(dilate(mask, radius), expected <= radius)


def test_dilate_keeps_its_input_and_bounds_hold_it() -> None:
    mask = np.zeros((20, 20), bool)
    assert bounds(mask) is None and not dilate(mask, 3).any()
    mask[10, 9] = mask[12, 13] = True
    assert bounds(mask) == (10, 9, 13, 14) and bounds(dilate(mask, 4)) == (6, 5, 17, 18)
    assert mask.sum() == 2


def test_latent_mask_of_solid_shapes_is_nearest() -> None:
    """As upstream: the top left pixel of each cell decides, wherever a whole cell fits in the shape."""
    rng = np.random.default_rng(1)
    for _ in range(50):
        mask = np.zeros((128, 128), bool)
        for _ in range(3):
            top, left = rng.integers(0, 110, 2)
            height, width = rng.integers(8, 60, 2)
            mask[top : min(128, top + height), left : min(128, left + width)] = True
        mask[-8:] &= mask[-8:].all(axis=0)  # a sliver at the edge is thin
        mask[:, -8:] &= mask[:, -8:].all(axis=1)[:, None]
        np.testing.assert_array_equal(latent_mask(mask, 16), mask[::8, ::8])


def test_latent_mask_keeps_thin_strokes_whole() -> None:
    """A line of 3 pixels covers every cell it passes, and nearest alone would lose most of them."""
    y, x = np.mgrid[:64, :64]
    edge, speck = x >= 60, (y == 35) & (x == 13)  # narrower than a cell
    for mask in (abs(y - x) <= 1, edge, speck):
        np.testing.assert_array_equal(latent_mask(mask, 8), mask.reshape(8, 8, 8, 8).any(axis=(1, 3)))


def test_latent_mask_of_nothing_everything_and_a_grid_that_does_not_divide() -> None:
    assert not latent_mask(np.zeros((64, 64), bool), 8).any()
    assert latent_mask(np.ones((64, 64), bool), 8).all()
    with pytest.raises(ValueError, match="60x64 does not divide into a grid of 8"):
        latent_mask(np.zeros((64, 60), bool), 8)
