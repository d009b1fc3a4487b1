"""What a recording keeps of the activations: running figures of each tensor, never the activations themselves.

Saved after each picture, whole or not at all, with a key that says what they were recorded from: the same command
goes on where it was interrupted. ``statistics.npz`` is what is read again, ``statistics.json`` is for people.
"""

from __future__ import annotations

import json
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..data.calibration_pictures import MASK_SIZES
from ..errors import BundleError, MachineError, UsageError
from ..system.files import atomic_write
from .histogram import BINS, Histogram

STATE_FILE, SUMMARY_FILE = "statistics.npz", "statistics.json"
BRANCHES = 2
_FORMAT = 1
_CHUNK = 1 << 20  # values at a time: temporary arrays stay at a few MB whatever the tensor's size

Strata = list[tuple[int, int, int]]  # for each row of a call: index of the timestep, branch, index in MASK_SIZES


class TensorStatistics:
    """Running figures of one activation.

    Args:
        axis: where its channels are, if it is multiplied by a constant weight there; None otherwise.
        timesteps: how many calls a trajectory has.

    Attributes:
        histogram: of |x|. minimum, maximum: of x.
        channels: float32 (C,), largest |x| of each channel; None without ``axis``, or before the first values.
        strata: float32 (timesteps, branches, mask sizes), largest |x| of each kind of row; 0 where none was seen.
    """

    def __init__(self, axis: int | None, timesteps: int) -> None:
        self.axis = axis
        self.histogram = Histogram()
        self.minimum, self.maximum = np.inf, -np.inf
        self.channels: npt.NDArray[np.float32] | None = None
        self.strata = np.zeros((timesteps, BRANCHES, len(MASK_SIZES)), np.float32)

    @property
    def count(self) -> int:
        """How many values were seen."""
        return self.histogram.total

    def update(self, values: np.ndarray, strata: Strata) -> bool:
        """Take in one call's values, of which the first axis is a whole multiple of ``len(strata)`` rows.

        Returns False, and takes in nothing, where a value is not finite.
        """
        rows = values.reshape(len(strata), -1)
        low, high = rows.min(axis=1).astype(np.float32), rows.max(axis=1).astype(np.float32)
        if not (np.isfinite(low).all() and np.isfinite(high).all()):
            return False
        self.minimum, self.maximum = min(self.minimum, float(low.min())), max(self.maximum, float(high.max()))
        for where, magnitude in zip(strata, np.maximum(high, -low), strict=True):
            self.strata[where] = max(self.strata[where], magnitude)
        if self.axis is not None:
            others = tuple(a for a in range(values.ndim) if a != self.axis % values.ndim)
            largest = np.maximum(values.max(axis=others), -values.min(axis=others)).astype(np.float32)
            self.channels = largest if self.channels is None else np.maximum(self.channels, largest)
        flat = rows.reshape(-1)
        for start in range(0, flat.size, _CHUNK):
            self.histogram.add(np.abs(flat[start : start + _CHUNK]).astype(np.float32, copy=False))
        return True


@dataclass
class Statistics:
    """A recording, complete or not.

    Attributes:
        key: what it was recorded from and how, plain JSON.
        timesteps: of a trajectory's calls, in order.
        tensors: by the tensors' names in the component with its local functions inlined.
        rows: int64 (timesteps, branches, mask sizes), how many rows of each kind the network was called with.
        done: how many pictures are in it.
    """

    key: dict[str, Any]
    timesteps: tuple[int, ...]
    tensors: dict[str, TensorStatistics]
    rows: npt.NDArray[np.int64] = field(init=False)
    done: int = 0

    def __post_init__(self) -> None:
        self.rows = np.zeros((len(self.timesteps), BRANCHES, len(MASK_SIZES)), np.int64)

    def save(self, folder: Path) -> None:
        """Write both files into ``folder``. Raises MachineError where that cannot be done."""
        entries = list(self.tensors.values())
        channels = [np.zeros(0, np.float32) if t.channels is None else t.channels for t in entries]
        head = {
            "format": _FORMAT,
            "key": self.key,
            "timesteps": self.timesteps,
            "names": list(self.tensors),
            "axes": [t.axis for t in entries],
            "done": self.done,
        }
        with atomic_write(folder / STATE_FILE) as temporary, temporary.open("wb") as stream:
            np.savez(
                stream,
                head=np.frombuffer(json.dumps(head).encode(), np.uint8),
                rows=self.rows,
                counts=np.stack([t.histogram.counts for t in entries]),
                limits=np.array([t.histogram.limit for t in entries]),
                zeros=np.array([t.histogram.zeros for t in entries], np.int64),
                range=np.array([(t.minimum, t.maximum) for t in entries]),
                strata=np.stack([t.strata for t in entries]),
                channels=np.concatenate(channels),
                channel_counts=np.array([len(c) for c in channels], np.int64),
            )
        with atomic_write(folder / SUMMARY_FILE) as temporary:
            temporary.write_text(json.dumps(self._summary(), indent=2) + "\n", encoding="utf-8")

    def _summary(self) -> dict[str, Any]:
        return {
            "key": self.key,
            "pictures_done": self.done,
            "timesteps": self.timesteps,
            "mask_sizes": MASK_SIZES,
            "rows": self.rows.tolist(),
            "tensors": {
                name: {"minimum": t.minimum, "maximum": t.maximum, "count": t.count}
                for name, t in self.tensors.items()
                if t.count  # a recording that is interrupted at once has none, and JSON no infinity
            },
        }

    @classmethod
    def load(cls, folder: Path, key: dict[str, Any] | None = None) -> Statistics | None:
        """The recording in ``folder``, None if there is none.

        Raises:
            UsageError: it was recorded from something else than ``key`` says.
            BundleError: it is damaged. MachineError: it cannot be read.
        """
        path = folder / STATE_FILE
        try:
            with np.load(path, allow_pickle=False) as stored:
                arrays = {name: stored[name] for name in stored.files}
            head = json.loads(arrays["head"].tobytes())
            loaded = cls._restored(head, arrays)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise MachineError(f"{path} cannot be read: {error.strerror or error}: run `chmod u+r {path}`") from error
        except (ValueError, KeyError, TypeError, IndexError, EOFError, zipfile.BadZipFile) as error:
            raise BundleError(f"{path} is damaged: remove it, and the same command records anew") from error
        if key is not None and (other := sorted(k for k in key | loaded.key if key.get(k) != loaded.key.get(k))):
            raise UsageError(
                f"{path} was recorded with another {', '.join(other)}: remove it or name another folder"
            )
        return loaded

    @classmethod
    def _restored(cls, head: dict[str, Any], arrays: dict[str, np.ndarray]) -> Statistics:
        if head["format"] != _FORMAT or arrays["counts"].shape != (len(head["names"]), BINS):
            raise ValueError("not this version's")
        timesteps = tuple(head["timesteps"])
        parts = np.split(arrays["channels"], np.cumsum(arrays["channel_counts"])[:-1])
        tensors = {}
        for i, (name, axis) in enumerate(zip(head["names"], head["axes"], strict=True)):
            tensor = TensorStatistics(axis, len(timesteps))
            tensor.minimum, tensor.maximum = arrays["range"][i].tolist()
            tensor.strata = arrays["strata"][i].copy()
            tensor.channels = parts[i].copy() if len(parts[i]) else None
            histogram = tensor.histogram
            histogram.counts = arrays["counts"][i].copy()
            histogram.limit, histogram.zeros = float(arrays["limits"][i]), int(arrays["zeros"][i])
            if tensor.count:
                histogram.maximum = max(tensor.maximum, -tensor.minimum)
            tensors[name] = tensor
        loaded = cls(head["key"], timesteps, tensors, done=head["done"])
        loaded.rows = arrays["rows"].copy()
        return loaded
