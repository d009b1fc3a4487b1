"""The growing histogram and the statistics of a tensor against numpy on all values at once."""

from __future__ import annotations

import json

import numpy as np
import pytest

from moebius_edge.calibration.statistics import TensorStatistics
from moebius_edge.export.int8_ranges import Histogram


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
        assert histogram.zeros == 1000 and histogram.maximum == whole.max()


def test_edges_zeros_extremes_and_size() -> None:
    histogram = filled([np.array([0.5, 1.0, 1.9999, 2.0])], bins=4)
    assert histogram.limit == 4 and histogram.counts.tolist() == [1, 2, 1, 0], "a bin begins with its lower edge"
    histogram = filled([np.zeros((2, 3)), np.zeros(0)])
    assert (histogram.limit, histogram.maximum, histogram.zeros, histogram.counts.sum()) == (0, 0, 6, 0)
    histogram = filled([np.array([1e-45, 1e-30]), np.array([3.4e38])])
    assert histogram.counts[0] == 2 and histogram.counts[-1] == 1 == histogram.counts[1:].sum()
    assert filled([np.ones((3, 1 << 20))]).counts.sum() == 3 << 20, "more than is counted at a time"


@pytest.mark.parametrize("axis", [1, -1, None])
def test_what_is_kept_comes_back_from_json_and_goes_on_alike(axis: int | None) -> None:
    rng = np.random.default_rng(1)
    calls = [rng.standard_normal((2, 5, 4, 3)).astype(np.float32) * (1 + i) for i in range(3)]
    tensor = TensorStatistics(axis)
    tensor.update(calls[0])
    restored = TensorStatistics.from_dict(json.loads(json.dumps(tensor.to_dict(), allow_nan=False)))
    everything = np.stack(calls)  # (calls, 2, 5, 4, 3)
    for one in (tensor, restored):
        for values in calls[1:]:
            one.update(values)
        assert one.histogram.maximum == np.abs(everything).max() and one.histogram.counts.sum() == everything.size
        assert np.array_equal(one.histogram.counts, tensor.histogram.counts) and one.axis == axis
        if axis is None:
            assert one.channels is None
        else:
            expected = np.abs(everything).max(axis=(0, 1, 3, 4) if axis == 1 else (0, 1, 2, 3))
            assert one.channels is not None and np.array_equal(one.channels, expected)
            assert one.channels.dtype == np.float32


def test_a_tensor_that_was_not_seen_comes_back_and_half_precision_is_taken() -> None:
    tensor = TensorStatistics.from_dict(TensorStatistics(1).to_dict())
    assert tensor.channels is None and tensor.histogram.limit == 0
    tensor.update(np.array([[-60000.0, 1.5]], np.float16))
    assert tensor.channels is not None and tensor.channels.tolist() == [float(np.float16(60000)), 1.5]
