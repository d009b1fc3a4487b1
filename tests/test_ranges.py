"""Each range against a search by hand that looks at the values, or writes the published loop out."""

from __future__ import annotations

import math

import numpy as np
import pytest

from moebius_edge.errors import UsageError
from moebius_edge.export.int8_ranges import (
    METHODS,
    Histogram,
    activation_scale,
    entropy,
    mean_squared_error,
    percentile,
)


def histogram_of(values: np.ndarray, bins: int = 4096) -> Histogram:
    histogram = Histogram(bins)
    histogram.add(np.abs(values).astype(np.float32))
    return histogram


def heavy_tailed(seed: int, size: int = 20000) -> np.ndarray:
    return np.random.default_rng(seed).standard_t(4, size).astype(np.float32)


@pytest.mark.parametrize("share", [0.5, 0.99, 0.9999, 1.0])
def test_percentile_is_the_values_own_to_a_bin(share: float) -> None:
    values = heavy_tailed(1)
    values[:4000] = 0  # zeros count
    histogram = histogram_of(values)
    exact = np.sort(np.abs(values))[math.ceil(share * len(values)) - 1]
    assert exact <= percentile(histogram, share) <= exact + histogram.width
    assert percentile(histogram, share) <= histogram.maximum


def divergence_by_hand(counts: list[int], bins: int, levels: int) -> float:
    """The published loop, bin by bin."""
    reference = [float(c) for c in counts[:bins]]
    reference[-1] += sum(counts[bins:])
    spread = [0.0] * bins
    for level in range(levels):
        members = [k for k in range(bins) if k * levels // bins == level]
        filled = [k for k in members if counts[k]]
        for k in filled:
            spread[k] = sum(counts[m] for m in members) / len(filled)
    total, candidate = sum(reference), sum(spread)
    divergence = 0.0
    for p, q in zip(reference, spread, strict=True):
        if p:
            if not q:
                return math.inf
            divergence += p / total * math.log((p / total) / (q / candidate))
    return divergence


@pytest.mark.parametrize("seed", range(5))
def test_entropy_finds_the_least_divergence(seed: int) -> None:
    histogram = histogram_of(heavy_tailed(seed, 600), bins=64)
    counts = histogram.counts.tolist()
    used = max(k for k, c in enumerate(counts) if c) + 1
    by_hand = {bins: divergence_by_hand(counts, bins, 8) for bins in range(8, used + 1)}
    best = min(by_hand, key=lambda bins: by_hand[bins])
    assert entropy(histogram, levels=8) == min(best * histogram.width, histogram.maximum)


def rounding_error(values: np.ndarray, limit: float) -> float:
    scale = limit / 127
    return float(((np.clip(np.rint(values / scale), -127, 127) * scale - values) ** 2).mean())


@pytest.mark.parametrize("seed", range(3))
def test_mean_squared_error_finds_the_least_error_of_the_values(seed: int) -> None:
    values = np.append(np.random.default_rng(seed).standard_normal(200_000), 16)
    best = min(rounding_error(values, limit) for limit in np.linspace(0.1, 1, 100) * 16)
    found = mean_squared_error(histogram_of(values))
    assert rounding_error(values, found) <= 1.01 * best
    assert best < 0.7 * rounding_error(values, 16), "the data must make it worth while"


def test_few_bins_leave_nothing_to_search() -> None:
    histogram = histogram_of(np.array([0.9, 0.1]), bins=64)
    assert entropy(histogram) == mean_squared_error(histogram) == histogram.maximum


@pytest.mark.parametrize("method", METHODS)
def test_scales_are_ranges_over_127(method: str) -> None:
    values = heavy_tailed(5)
    histogram = histogram_of(values)
    scale = activation_scale("relu", histogram, method)
    assert scale == np.float32(METHODS[method](histogram) / 127) and scale > 0


@pytest.mark.parametrize("method", METHODS)
def test_a_tensor_without_a_range_is_named(method: str) -> None:
    for values in (np.zeros(10), np.full(10, 1e-44)):  # the second has a range, but no scale in float32
        with pytest.raises(UsageError, match="the range of activation dead_relu is"):
            activation_scale("dead_relu", histogram_of(values), method)
