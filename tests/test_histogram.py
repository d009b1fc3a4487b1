"""The growing histogram against numpy's, which sees all data at once."""

from __future__ import annotations

import numpy as np
import pytest

from moebius_edge.calibration.histogram import Histogram


def filled(parts: list[np.ndarray], bins: int = 64) -> Histogram:
    histogram = Histogram(bins)
    for part in parts:
        histogram.add(part.astype(np.float32))
    return histogram


def test_it_counts_as_numpy_does_whatever_the_order() -> None:
    rng = np.random.default_rng(0)
    parts = [np.abs(rng.standard_normal(1000)) * scale for scale in (0.01, 30, 1, 0)]
    whole = np.concatenate(parts).astype(np.float32)
    for order in ([0, 1, 2, 3], [3, 2, 0, 1], [1, 3, 0, 2]):
        histogram = filled([parts[i] for i in order])
        assert histogram.limit == 128 and histogram.width == 2  # the largest of them is about 100
        expected, _ = np.histogram(whole[whole > 0], bins=64, range=(0, 128))
        assert np.array_equal(histogram.counts, expected)
        assert histogram.zeros == 1000 and histogram.total == 4000
        assert histogram.maximum == whole.max()


def test_a_bin_begins_with_its_lower_edge() -> None:
    histogram = filled([np.array([0.5, 1.0, 1.9999, 2.0])], bins=4)
    assert histogram.limit == 4  # 2.0 itself must lie inside
    assert histogram.counts.tolist() == [1, 2, 1, 0]


def test_zeros_alone_have_no_range() -> None:
    histogram = filled([np.zeros((2, 3)), np.zeros(0)])
    assert (histogram.limit, histogram.maximum, histogram.zeros, histogram.total) == (0, 0, 6, 6)


def test_extreme_magnitudes_are_counted() -> None:
    histogram = filled([np.array([1e-45, 1e-30]), np.array([3.4e38])])
    assert histogram.total == 3 and histogram.counts[0] == 2 and histogram.counts[-1] == 1


def test_bins_are_a_power_of_two() -> None:
    with pytest.raises(ValueError, match="48 bins"):
        Histogram(48)
