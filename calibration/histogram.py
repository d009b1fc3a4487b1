"""A histogram of |x| whose range grows with the data: memory is fixed, and the order of the data changes nothing.

The range is a power of two and grows by doubling, when neighbouring bins are merged in pairs. So are the bins'
widths, and a value's bin is exact in float32; what was counted before a doubling lies where it would lie after it.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

BINS = 4096  # at least half are in use, so that a step of INT8 over the whole range spans 16 bins or more
_LEAST = 2.0**-100  # the smallest range: what is finer falls into the first bin, and bins / range stays in float32


class Histogram:
    """Counts of magnitudes in ``BINS`` equal bins over [0, ``limit``), exact zeros apart.

    Zeros are apart because every symmetric scale represents them exactly: in a bin they would pass for small values,
    and after a ReLU they are the majority.

    Attributes:
        counts: int64 (bins,), magnitudes above zero.
        limit: upper end of the last bin, a power of two; 0 while nothing but zeros was seen.
        zeros: how many values were exactly zero.
        maximum: the largest magnitude.
    """

    def __init__(self, bins: int = BINS) -> None:
        if bins < 2 or bins & (bins - 1):
            raise ValueError(f"{bins} bins: give a power of two, at least 2")
        self.counts: npt.NDArray[np.int64] = np.zeros(bins, np.int64)
        self.limit = 0.0
        self.zeros = 0
        self.maximum = 0.0

    @property
    def width(self) -> float:
        """Of a bin."""
        return self.limit / len(self.counts)

    @property
    def total(self) -> int:
        """How many values were counted, zeros among them."""
        return int(self.counts.sum()) + self.zeros

    def add(self, magnitudes: npt.NDArray[np.float32]) -> None:
        """Count the values of an array of any shape, finite and not negative."""
        if magnitudes.size == 0:
            return
        largest = float(magnitudes.max())
        zeros = magnitudes.size - int(np.count_nonzero(magnitudes))
        self.zeros += zeros
        if largest == 0:
            return
        self.maximum = max(self.maximum, largest)
        self._grow(largest)
        bins = len(self.counts)
        index = (magnitudes.reshape(-1) * np.float32(bins / self.limit)).astype(np.int32)
        self.counts += np.bincount(index, minlength=bins)
        self.counts[0] -= zeros

    def _grow(self, value: float) -> None:
        """Make the range the smallest power of two above ``value``, unless it is larger already."""
        wanted = max(math.ldexp(1.0, math.frexp(value)[1]), _LEAST)
        self.limit = self.limit or wanted
        while self.limit < wanted:
            pairs = self.counts.reshape(-1, 2).sum(axis=1)
            self.counts = np.concatenate([pairs, np.zeros_like(pairs)])
            self.limit *= 2
