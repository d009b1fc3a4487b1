"""SmoothQuant's factors against the paper's equation channel by channel, and what they are for."""

from __future__ import annotations

import numpy as np
import pytest

from moebius_edge.calibration.migration import migration_factors
from moebius_edge.calibration.ranges import channel_maxima, weight_scales
from moebius_edge.errors import UsageError


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5, 0.85, 1.0])
def test_factors_are_the_papers(alpha: float) -> None:
    rng = np.random.default_rng(0)
    x, w = rng.uniform(0.1, 50, 6), rng.uniform(0.01, 2, 6)
    expected = [x[j] ** alpha / w[j] ** (1 - alpha) for j in range(6)]
    np.testing.assert_allclose(migration_factors("x", x, w, alpha), expected, rtol=1e-6)


def test_a_dead_channel_stays_as_it_is() -> None:
    assert migration_factors("x", [0, 2, 8], [3, 0, 2]).tolist() == [1, 1, 2]


def test_the_product_stays_and_its_quantisation_improves() -> None:
    rng = np.random.default_rng(1)
    x = rng.standard_normal((64, 16))
    x[:, 3] *= 40  # an outlier
    w = rng.standard_normal((16, 8))
    s = migration_factors("x", channel_maxima(x, 1), channel_maxima(w, 0)).astype(np.float64)
    np.testing.assert_allclose((x / s) @ (s[:, None] * w), x @ w, atol=1e-9)

    def error(a: np.ndarray, b: np.ndarray) -> float:
        step, steps = np.abs(a).max() / 127, weight_scales("w", b, 1)
        return float(np.abs((np.rint(a / step) * step) @ (np.rint(b / steps) * steps) - x @ w).mean())

    assert error(x / s, s[:, None] * w) < 0.5 * error(x, w)


@pytest.mark.parametrize("alpha", [-0.1, 1.5, np.nan])
def test_alpha_is_a_share(alpha: float) -> None:
    with pytest.raises(UsageError, match="alpha of the migration is"):
        migration_factors("x", [1], [1], alpha)


def test_maxima_that_are_not_finite_name_their_tensor() -> None:
    with pytest.raises(UsageError, match="activation silu_3 or of its weight is not finite"):
        migration_factors("silu_3", [1, np.nan], [1, 1])


def test_both_sides_have_the_same_channels() -> None:
    with pytest.raises(ValueError, match="x has maxima of shape"):
        migration_factors("x", [1, 2], [1])
