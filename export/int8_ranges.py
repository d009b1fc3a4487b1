"""From the magnitudes of an activation to the scale of symmetric INT8: a histogram of |x|, and ranges found in it.

Symmetric means zero point 0 and values q in [-127, 127] for x = q · scale, which is TensorRT's rule. A range is the
largest magnitude that is represented; what is beyond it is clipped. Zeros count in percentiles alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from ..errors import UsageError

LARGEST = 127  # of a symmetric INT8 value: -128 has no positive twin
SHARE = 0.9999  # of the values, for ``percentile``
_TRIED = 512  # ranges that a search tries over the whole histogram
BINS = 4096  # at least half are in use, so that a step of INT8 over the whole range spans 16 bins or more
_SMALLEST_LIMIT = 2.0**-100  # finer values fall into the first bin, and bins / limit stays within float32
_CHUNK = 1 << 20  # values counted at a time, so that temporary arrays stay at a few MB whatever the tensor's size


class Histogram:
    """Counts of magnitudes in ``bins`` (a power of two) equal bins over [0, ``limit``), exact zeros apart.

    The limit is a power of two and grows by doubling, when neighbouring bins are merged in pairs. So a value's bin is
    exact in float32, and the order of the data changes nothing. Zeros are apart because every symmetric scale
    represents them: in a bin they would pass for small values, and after a ReLU they are the majority.
    """

    def __init__(self, bins: int = BINS) -> None:
        self.counts: npt.NDArray[np.int64] = np.zeros(bins, np.int64)
        self.limit = 0.0  # 0 while nothing but zeros was seen
        self.zeros = 0
        self.maximum = 0.0  # the largest magnitude

    @property
    def width(self) -> float:
        """The width of one bin."""
        return self.limit / len(self.counts)

    def add(self, magnitudes: npt.NDArray[np.float32]) -> None:
        """Count the values of an array of any shape, finite and not negative."""
        flat = magnitudes.reshape(-1)
        for start in range(0, flat.size, _CHUNK):
            self._add(flat[start : start + _CHUNK])

    def _add(self, magnitudes: npt.NDArray[np.float32]) -> None:
        zeros = magnitudes.size - int(np.count_nonzero(magnitudes))
        self.zeros += zeros
        if zeros == magnitudes.size:
            return
        largest = float(magnitudes.max())
        self.maximum = max(self.maximum, largest)
        needed = max(math.ldexp(1.0, math.frexp(largest)[1]), _SMALLEST_LIMIT)
        self.limit = self.limit or needed
        while self.limit < needed:
            pairs = self.counts.reshape(-1, 2).sum(axis=1)
            self.counts = np.concatenate([pairs, np.zeros_like(pairs)])
            self.limit *= 2
        bins = len(self.counts)
        index = (magnitudes * np.float32(bins / self.limit)).astype(np.int32)
        self.counts += np.bincount(index, minlength=bins)
        self.counts[0] -= zeros


def percentile(histogram: Histogram, share: float = SHARE) -> float:
    """The smallest upper edge of a bin below which at least ``share`` (0 to 1) of all values lie, zeros among them."""
    below = np.cumsum(histogram.counts) + histogram.zeros
    bins = int(np.searchsorted(below, share * below[-1])) + 1
    return min(bins * histogram.width, histogram.maximum)


def entropy(histogram: Histogram, levels: int = LARGEST + 1) -> float:
    """The range whose quantised distribution has the least Kullback-Leibler divergence from what was seen.

    The search of TensorRT's entropy calibrator (S. Migacz, "8-bit inference with TensorRT", GTC 2017): the reference P
    is the bins inside the range, all that is clipped added to the last; Q is the same bins without the clipped,
    merged into ``levels`` and spread again over those of them that are not empty. As there, no range below a sixteenth
    of the maximum is tried.
    """
    counts = np.trim_zeros(histogram.counts, "b").astype(np.float64)

    def divergence(bins: int) -> float:
        inside, clipped = counts[:bins], counts[bins:].sum()
        if inside[-1] == 0 and clipped:  # then Q is 0 where P is not
            return np.inf
        reference = inside.copy()
        reference[-1] += clipped
        level = np.arange(bins) * levels // bins
        mass, filled = np.bincount(level, inside, levels), np.bincount(level, inside > 0, levels)
        spread = np.where(inside > 0, mass[level] / np.maximum(filled[level], 1), 0)
        seen = reference > 0
        p, q = reference[seen] / reference.sum(), spread[seen] / spread.sum()
        return float((p * np.log(p / q)).sum())

    return _best_range(histogram, max(levels, len(counts) // 16), divergence)


def mean_squared_error(histogram: Histogram) -> float:
    """The range with the least mean squared error of rounding and clipping, each bin taken at its centre."""
    counts = np.trim_zeros(histogram.counts, "b").astype(np.float64)
    centres = (np.arange(len(counts)) + 0.5) * histogram.width

    def error(bins: int) -> float:
        scale = min(bins * histogram.width, histogram.maximum) / LARGEST
        quantised = np.minimum(np.rint(centres / scale), LARGEST) * scale
        return float((counts * (centres - quantised) ** 2).sum())

    return _best_range(histogram, LARGEST, error)  # what rounding does inside a bin, no histogram can see


METHODS: dict[str, Callable[[Histogram], float]] = {
    "minmax": lambda histogram: histogram.maximum,
    "percentile": percentile,
    "entropy": entropy,
    "mse": mean_squared_error,
}


def activation_scale(name: str, histogram: Histogram, method: str) -> float:
    """The scale of activation ``name`` by a method of ``METHODS``; above 0, also as float32.

    Raises:
        UsageError: the range is zero or not finite; the message names the tensor.
    """
    limit = METHODS[method](histogram)
    scale = float(np.float32(limit / LARGEST))
    if not (np.isfinite(scale) and scale > 0):
        remedy = "leave its block out of the recipe, or calibrate on other pictures"
        raise UsageError(f"the range of activation {name} is {limit:g}, which has no scale", remedy)
    return scale


def _best_range(histogram: Histogram, least: int, cost: Callable[[int], float]) -> float:
    """The range of ``least`` bins or more, all used ones among them, at which ``cost(bins)`` is smallest."""
    used = len(np.trim_zeros(histogram.counts, "b"))
    best, lowest = histogram.maximum, np.inf
    if used > least:
        for bins in (*range(least, used, max(1, len(histogram.counts) // _TRIED)), used):
            if (value := cost(bins)) < lowest:
                best, lowest = min(bins * histogram.width, histogram.maximum), value
    return best
