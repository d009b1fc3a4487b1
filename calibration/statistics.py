"""What a recording keeps of each activation: a histogram of its magnitudes and the largest of each channel."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

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


class TensorStatistics:
    """The histogram of |x| of an activation, and float32 ``channels`` (C,), the largest |x| of each channel.

    ``axis`` is that of the channels, or None if there is no constant weight that sums over it; without it, and before
    the first values, ``channels`` is None.
    """

    def __init__(self, axis: int | None) -> None:
        self.axis = axis
        self.histogram = Histogram()
        self.channels: npt.NDArray[np.float32] | None = None

    def update(self, values: np.ndarray) -> None:
        """Take in the values of one call, of any shape, all of them finite."""
        magnitudes = np.abs(values).astype(np.float32, copy=False)
        self.histogram.add(magnitudes)
        if self.axis is not None:
            others = tuple(a for a in range(values.ndim) if a != self.axis % values.ndim)
            largest = magnitudes.max(axis=others)
            self.channels = largest if self.channels is None else np.maximum(self.channels, largest)

    def to_dict(self) -> dict[str, Any]:
        """The statistics as plain JSON, from which ``from_dict`` restores every bit."""
        histogram = {**vars(self.histogram), "counts": self.histogram.counts.tolist()}
        channels = None if self.channels is None else self.channels.tolist()
        return {"axis": self.axis, "channels": channels, "histogram": histogram}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> TensorStatistics:
        """What ``to_dict`` returned."""
        tensor = cls(content["axis"])
        vars(tensor.histogram).update(content["histogram"])
        tensor.histogram.counts = np.array(content["histogram"]["counts"], np.int64)
        if content["channels"] is not None:
            tensor.channels = np.array(content["channels"], np.float32)
        return tensor


@dataclass
class Statistics:
    """A recording: ``facts`` are what it was made from and how, in plain JSON; ``tensors`` has the statistics by the
    names of tensors in the denoiser with its local functions inlined."""

    facts: dict[str, Any]
    tensors: dict[str, TensorStatistics]
