"""What a recording keeps of each activation: a histogram of its magnitudes and the largest of each channel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..export.int8_ranges import Histogram


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
