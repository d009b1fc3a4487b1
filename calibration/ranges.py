"""From a histogram of |x| to a range, and from a range to the scale of symmetric INT8: pure functions.

Symmetric means zero point 0 and values q in [-127, 127] for x = q · scale, TensorRT's rule. A range is the largest
magnitude that is represented; what is beyond it is clipped. Exact zeros take part in percentiles alone, since no scale
harms them.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from ..errors import UsageError
from .histogram import Histogram

LARGEST = 127  # of an INT8 value; -128 is left out
SHARE = 0.9999  # of the values, for ``percentile``
_TRIED = 512  # ranges that a search tries over the whole histogram


def minmax(histogram: Histogram) -> float:
    """The largest magnitude that was seen: nothing is clipped."""
    return histogram.maximum


def percentile(histogram: Histogram, share: float = SHARE) -> float:
    """The least upper edge of a bin below which at least ``share`` of all values lie, zeros among them.

    Raises:
        UsageError: ``share`` is not above 0 and at most 1.
    """
    if not 0 < share <= 1:
        raise UsageError(f"share of a percentile is {share}: give a number above 0, at most 1")
    below = np.cumsum(histogram.counts) + histogram.zeros
    bins = int(np.searchsorted(below, share * histogram.total)) + 1
    return min(bins * histogram.width, histogram.maximum)


def entropy(histogram: Histogram, levels: int = LARGEST + 1) -> float:
    """The range whose quantised distribution has the least Kullback-Leibler divergence from what was seen.

    The search of TensorRT's entropy calibrator (S. Migacz, "8-bit inference with TensorRT", GTC 2017): the reference P
    is the bins inside the range, all that is clipped added to the last; Q is the same bins without the clipped,
    merged into ``levels`` and spread again over those of them that are not empty. A range whose last bin is empty
    but for the clipped is passed over, its divergence being infinite. No range below a sixteenth of the maximum is
    tried, as there, where 128 of 2048 bins are the least.
    """
    counts = histogram.counts.astype(np.float64)
    used = _used(histogram)
    best, least = histogram.maximum, np.inf
    for bins in _candidates(histogram, max(levels, used // 16)):
        inside = counts[:bins]
        clipped = counts[bins:used].sum()
        if inside[-1] == 0 and clipped:
            continue
        reference = inside.copy()
        reference[-1] += clipped
        level = np.arange(bins) * levels // bins
        mass = np.bincount(level, inside, levels)
        filled = np.bincount(level, inside > 0, levels)
        spread = np.where(inside > 0, mass[level] / np.maximum(filled[level], 1), 0)
        seen = reference > 0
        p, q = reference[seen] / reference.sum(), spread[seen] / spread.sum()
        divergence = float((p * np.log(p / q)).sum())
        if divergence < least:
            best, least = min(bins * histogram.width, histogram.maximum), divergence
    return best


def mean_squared_error(histogram: Histogram, largest: int = LARGEST) -> float:
    """The range with the least mean squared error of rounding and clipping, each bin taken at its centre.

    Ranges narrower than ``largest`` bins are not tried: what rounding does inside them, the histogram cannot see.
    """
    used = _used(histogram)
    counts = histogram.counts[:used].astype(np.float64)
    centres = (np.arange(used) + 0.5) * histogram.width
    best, least = histogram.maximum, np.inf
    for bins in _candidates(histogram, largest):
        limit = min(bins * histogram.width, histogram.maximum)
        scale = limit / largest
        quantised = np.minimum(np.rint(centres / scale), largest) * scale
        error = float((counts * (centres - quantised) ** 2).sum())
        if error < least:
            best, least = limit, error
    return best


METHODS: dict[str, Callable[[Histogram], float]] = {
    "minmax": minmax,
    "percentile": percentile,
    "entropy": entropy,
    "mse": mean_squared_error,
}


def activation_scale(name: str, histogram: Histogram, method: str) -> float:
    """The scale of activation ``name`` by a method of ``METHODS``; above 0, also as float32.

    Raises:
        UsageError: an unknown method, or a range that is zero or not finite; the message names the tensor.
    """
    if method not in METHODS:
        raise UsageError(f"unknown range method {method!r}: choose one of {', '.join(METHODS)}")
    return _scale(f"activation {name}", METHODS[method](histogram))


def weight_scales(name: str, weight: np.ndarray, axis: int) -> npt.NDArray[np.float32]:
    """Scales (C,) of a weight, one for each of the C channels along ``axis``, nothing clipped.

    A channel of zeros, which any scale represents, gets the largest of the others'.

    Raises:
        UsageError: all of the weight is zero, or a value is not finite; the message names the tensor.
    """
    maxima = channel_maxima(weight, axis)
    whole = _scale(f"weight {name}", float(maxima.max(initial=0)))  # a NaN is passed on by max
    scales = (maxima / LARGEST).astype(np.float32)
    return np.where(scales > 0, scales, np.float32(whole))


def channel_maxima(values: np.ndarray, axis: int) -> npt.NDArray[np.float32]:
    """Largest |x| of each channel along ``axis``: (C,)."""
    others = tuple(a for a in range(values.ndim) if a != axis % values.ndim)
    return np.abs(values).max(axis=others).astype(np.float32)


def _scale(what: str, limit: float) -> float:
    if not np.isfinite(limit):
        raise UsageError(f"the range of {what} is {limit}, not finite: leave its node out of INT8, or export it again")
    scale = float(np.float32(limit / LARGEST))
    if not scale > 0:
        raise UsageError(
            f"the range of {what} is {limit:g}, which has no scale: leave its node out of INT8, or calibrate on other "
            "pictures"
        )
    return scale


def _used(histogram: Histogram) -> int:
    """Bins up to the last that is not empty."""
    return int(np.flatnonzero(histogram.counts)[-1]) + 1 if histogram.counts.any() else 0


def _candidates(histogram: Histogram, least: int) -> list[int]:
    """Numbers of bins to try as a range, the whole one among them; none where it has no more than ``least``."""
    used = _used(histogram)
    tried = list(range(least, used, max(1, len(histogram.counts) // _TRIED)))
    return [*tried, used] if used > least else []
