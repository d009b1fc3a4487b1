"""Reads encoded training pictures: latents of the picture and of the picture with its hole greyed.

The encoder costs more than the denoiser's step, so every pair is made once (``encoding``) and read many times,
each time with other noise at another timestep. What lies in a folder stays there until it is asked for: a cache
may be larger than the memory.
"""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import BundleError, MachineError, UsageError

FORMAT = 1
INDEX = "index.json"
ARRAYS = ("clean", "masked", "mask")
CROP_COVERAGE = (0.05, 0.7)  # share of the hole in a crop
_CROP_TRIES = 16


def shard_name(number: int) -> str:
    return f"{number:06d}"


class Rows:
    """An array over several ``.npy`` files, ``rows`` in each but the last, of which only what is asked for is read.

    ``array[i]`` and ``array[i, j]`` work, iteration and ``len`` do, and ``shape`` is that of the whole. Every access
    opens its file, so that thousands of them need no thousands of descriptors or mappings.

    Raises:
        ValueError: a file is no array, or not as long as it should be. OSError: it is missing or may not be read.
    """

    def __init__(self, files: Sequence[Path], rows: int, count: int) -> None:
        first: Any = np.load(files[0], mmap_mode="r")
        if not isinstance(first, np.memmap) or not first.flags.c_contiguous or first.dtype.hasobject:
            raise ValueError(f"{files[0]} is no array")
        self.files, self.rows, self.dtype = files, rows, first.dtype
        self.shape = (count, *first.shape[1:])
        self._header = int(first.offset)
        row_bytes = first.dtype.itemsize * math.prod(first.shape[1:])
        for i, file in enumerate(files):
            expected = self._header + row_bytes * min(rows, count - i * rows)
            if (size := file.stat().st_size) != expected:
                raise ValueError(f"{file} has {size} bytes, not {expected}")

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, place: int | tuple[int, ...]) -> np.ndarray:
        indices = place if isinstance(place, tuple) else (place,)
        if not all(0 <= i < length for i, length in zip(indices, self.shape, strict=False)):
            raise IndexError(f"{place} lies outside of {self.shape}")
        inner = self.shape[len(indices) :]
        number, row = divmod(int(indices[0]), self.rows)
        block = int(np.ravel_multi_index((row, *indices[1:]), (self.rows, *self.shape[1 : len(indices)])))
        count = math.prod(inner)
        offset = self._header + block * count * self.dtype.itemsize
        return np.fromfile(self.files[number], self.dtype, count, offset=offset).reshape(inner)


@dataclass(frozen=True)
class LatentCache:
    """``clean`` (P, 4, h, w), ``masked`` (P, M, 4, h, w) float16, both scaled; ``mask`` (P, M, h, w) uint8."""

    clean: np.ndarray | Rows
    masked: np.ndarray | Rows
    mask: np.ndarray | Rows

    @classmethod
    def open(cls, path: Path) -> LatentCache:
        """The folder that ``encoding.encode_latents`` wrote, left on the disk; or an older single ``.npz``, read whole.

        Raises:
            MachineError: it is missing or may not be read. UsageError: its encoding has not come to its end.
            BundleError: it is damaged, or of a newer version.
        """
        mending = f"remove {path}, and the same command encodes anew"
        try:
            if not path.is_dir():
                with np.load(path) as data:
                    return cls(*(data[name] for name in ARRAYS))
            index = json.loads((path / INDEX).read_text())
            if index["format"] != FORMAT:
                raise BundleError(f"latents {path} have format {index['format']}, not {FORMAT}: {mending}")
            count, rows = int(index["parts"]["count"]), int(index["parts"]["shard_size"])
            shards = [path / shard_name(i) for i in range(-(-count // rows))]
            there = sum(shard.is_dir() for shard in shards)
            if there < len(shards):
                raise UsageError(
                    f"latents {path} have {there} of {len(shards)} shards: encode on with the same command as before"
                )
            return cls(*(Rows([shard / f"{name}.npy" for shard in shards], rows, count) for name in ARRAYS))
        except FileNotFoundError as error:
            raise MachineError(f"there are no latents {error.filename}: encode them, or check the path") from None
        except PermissionError as error:
            raise MachineError(f"no right to read {error.filename}: run `chmod u+r {error.filename}`") from None
        except (OSError, EOFError, ValueError, KeyError, TypeError, ZeroDivisionError, zipfile.BadZipFile) as error:
            raise BundleError(f"latents {path} are damaged ({' '.join(str(error).split())}): {mending}") from error

    def __len__(self) -> int:
        """Pictures, each with ``self.mask.shape[1]`` masks."""
        return len(self.clean)

    def pair(self, rng: np.random.Generator, size: int | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """A random picture with one of its masks: clean (4, h, w), masked (4, h, w), mask (1, h, w), float32.

        With ``size`` a random square of so many latent positions, h = w = size, laid over some place of the hole so
        that the hole covers 5 to 70 percent of it; where no try does, the one that comes nearest.

        Raises:
            UsageError: ``size`` is larger than the latents.
        """
        i, j = int(rng.integers(len(self.clean))), int(rng.integers(self.mask.shape[1]))
        mask = self.mask[i, j]
        y, x = np.s_[:, :] if size is None else _crop(rng, mask, size)
        clean, masked = self.clean[i][:, y, x], self.masked[i, j][:, y, x]
        return clean.astype(np.float32), masked.astype(np.float32), mask[y, x][None].astype(np.float32)


def _crop(rng: np.random.Generator, mask: np.ndarray, size: int) -> tuple[slice, slice]:
    height, width = mask.shape
    if not 0 < size <= min(height, width):
        most = min(height, width)
        raise UsageError(f"a crop of {size} does not fit into latents of {width}x{height}: give 1 to {most}")
    hole = np.argwhere(mask)
    if not len(hole):
        hole = np.argwhere(mask == 0)  # nothing to look for: anywhere
    best: tuple[float, tuple[slice, slice]] | None = None
    for _ in range(_CROP_TRIES):
        places = zip(hole[int(rng.integers(len(hole)))].tolist(), mask.shape, strict=True)
        y, x = (int(rng.integers(max(0, place - size + 1), min(place, n - size) + 1)) for place, n in places)
        window = np.s_[y : y + size, x : x + size]
        share = float(np.mean(mask[window] != 0))
        miss = max(CROP_COVERAGE[0] - share, share - CROP_COVERAGE[1], 0.0)
        if best is None or miss < best[0]:
            best = miss, window
        if miss == 0:
            break
    assert best is not None
    return best[1]
