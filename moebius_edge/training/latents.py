"""Reads encoded training pictures: latents of the picture and of the picture with its hole greyed.

The autoencoder costs more than the denoiser's step, so every pair is made once (``encoding``) and read many times, each
time with other noise at another timestep. What lies in a folder stays there until it is asked for: a cache may be
larger than the memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn, Protocol

import numpy as np
from torch import Tensor
from typing_extensions import TypedDict

from ..documents import JsonObject, Sha256, read_document
from ..errors import BundleError, MachineError, UsageError

INDEX = "index.json"
ARRAYS = ("clean", "masked", "mask")
CROP_COVERAGE = (0.05, 0.7)  # the share of the hole in a crop
_CROP_TRIES = 16


class Index(TypedDict):
    """``index.json``: what a folder's latents were made from."""

    format: Literal[1]
    key: Sha256
    parts: JsonObject


class Source(Protocol):
    """Where samples come from. ``draw`` is called in a loading process, ``latents`` on what it drew, stacked."""

    def draw(self, number: int, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
        """Sample ``number``, from it and ``rng`` alone."""

    def latents(self, drawn: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """Clean and masked latents (N, 4, h, w) and the mask (N, 1, h, w), float32."""


def shard_name(number: int) -> str:
    return f"{number:06d}"


def read_index(folder: Path) -> Index:
    """What the latents in ``folder`` were made from. Raises MachineError if it is missing, BundleError if damaged."""
    index: Index = read_document(folder / INDEX, Index, BundleError, f"remove {folder}, and encode anew")
    return index


class Rows:
    """An array over several ``.npy`` files, ``rows`` rows in each but the last; ``array[i]`` and ``array[i, j]`` work.

    Every access opens its file and reads what was asked for, so that thousands of files need no thousands of
    descriptors. Raises ValueError or OSError for a file that is missing, no array, or not as long as it should be.
    """

    def __init__(self, files: Sequence[Path], rows: int, count: int) -> None:
        self.files, self.rows = files, rows
        for number, file in enumerate(files):
            array = np.load(file, mmap_mode="r")
            if len(array) != (expected := min(rows, count - number * rows)):
                raise ValueError(f"{file} has {len(array)} rows, not {expected}")
            self.shape = (count, *array.shape[1:])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, place: int | tuple[int, ...]) -> np.ndarray:
        first, *others = place if isinstance(place, tuple) else (place,)
        if not 0 <= first < len(self):
            raise IndexError(f"{place} lies outside of {self.shape}")
        number, row = divmod(first, self.rows)
        array: np.ndarray = np.load(self.files[number], mmap_mode="r")
        return np.array(array[row][tuple(others)])


@dataclass(frozen=True)
class LatentCache:
    """``clean`` (P, 4, h, w), ``masked`` (P, M, 4, h, w) float16, both scaled; ``mask`` (P, M, h, w) uint8.

    A ``Source`` of random pictures with one of their masks, cut to ``side`` latent positions where that is given.
    """

    clean: np.ndarray | Rows
    masked: np.ndarray | Rows
    mask: np.ndarray | Rows
    side: int | None = None

    @classmethod
    def open(cls, folder: Path, side: int | None = None) -> LatentCache:
        """The folder that ``encoding.encode_latents`` wrote, left on the disk.

        Raises:
            MachineError: it is missing or may not be read. UsageError: its encoding has not come to its end, or the
                latents are smaller than ``side``. BundleError: it is damaged, or of another version.
        """
        parts = read_index(folder)["parts"]
        try:
            count, rows = (int(parts[name]) for name in ("count", "shard_size"))  # type: ignore[arg-type]
            shards = [folder / shard_name(i) for i in range(-(-count // rows))]
            if missing := sum(not shard.is_dir() for shard in shards):
                lacking = f"latents {folder} lack {missing} of {len(shards)} shards"
                raise UsageError(f"{lacking}: encode on with the same command as before")
            arrays = {name: Rows([shard / f"{name}.npy" for shard in shards], rows, count) for name in ARRAYS}
            cache = cls(**arrays, side=side)
            height, width = cache.mask.shape[2:]
        except PermissionError as error:
            raise MachineError(f"no right to read {error.filename}: run `chmod u+r {error.filename}`") from None
        except (OSError, EOFError, ValueError, KeyError, TypeError, ArithmeticError, AttributeError) as error:
            _damaged(folder, error)
        if side is not None and not 0 < side <= min(height, width):
            raise UsageError(f"a crop of {side} does not fit into latents of {width}x{height}: encode larger pictures")
        return cache

    def __len__(self) -> int:
        """Pictures, each with ``self.mask.shape[1]`` masks."""
        return len(self.clean)

    def draw(self, number: int, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
        """A random picture with one of its masks: clean (4, h, w), masked (4, h, w), mask (1, h, w), float32.

        With ``side``, a random square is cut over some place of the hole, so that the hole covers 5 to 70 percent of
        it; where no try does, the one that comes nearest.
        """
        i, j = int(rng.integers(len(self.clean))), int(rng.integers(self.mask.shape[1]))
        mask = self.mask[i, j]
        y, x = np.s_[:, :] if self.side is None else _crop(rng, mask, self.side)
        clean, masked = self.clean[i][:, y, x], self.masked[i, j][:, y, x]
        return clean.astype(np.float32), masked.astype(np.float32), mask[y, x][None].astype(np.float32)

    def latents(self, drawn: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """What was drawn, for it is encoded already."""
        clean, masked, mask = drawn
        return clean, masked, mask


def _damaged(folder: Path, error: Exception) -> NoReturn:
    remedy = f"remove {folder}, and the same command encodes anew"
    raise BundleError(f"latents {folder} are damaged ({' '.join(str(error).split())}): {remedy}") from error


def _crop(rng: np.random.Generator, mask: np.ndarray, size: int) -> tuple[slice, slice]:
    """The rows and columns of a random square of ``size`` positions over the hole, see ``LatentCache.draw``."""
    hole = np.argwhere(mask)
    if not len(hole):
        hole = np.argwhere(mask == 0)  # there is no hole to look for: anywhere
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
