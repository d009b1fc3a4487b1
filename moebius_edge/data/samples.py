"""Training samples from pictures: a square crop with a mask, drawn from the sample's number alone.

Sample i is a function of (seed, i), so runs resume exactly and any process may draw any sample. Every epoch passes
through all pictures once, in an order of its own.
"""

from __future__ import annotations

import json
import os
import tempfile
import weakref
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from ..errors import MachineError, UsageError
from ..system.files import atomic_write
from .masks import sample_mask
from .pictures import Pictures

_SAMPLE, _ORDER = 1, 2  # what a generator is for: part of its seed
_TRIES = 10  # crops drawn until one shows the given mask, and again as many laid over its edge


class Unreadable:
    """Names of pictures with the reasons why they could not be read, of this process and of all forked from it.

    They are noted in a nameless temporary file: pictures are read in loading processes, and what those note in memory
    never reaches the process that reports it.
    """

    def __init__(self) -> None:
        # Open as long as the object lives, and appended to, so that lines of several processes do not mix.
        self._file = tempfile.TemporaryFile("a+b", buffering=0)  # noqa: SIM115
        weakref.finalize(self, self._file.close)

    def add(self, name: str, reason: str) -> None:
        self._file.write((json.dumps([name, reason]) + "\n").encode())

    def entries(self) -> dict[str, str]:
        """The first reason that was met, by the picture's name."""
        descriptor = self._file.fileno()
        lines = os.pread(descriptor, os.fstat(descriptor).st_size, 0).splitlines()
        return dict(map(json.loads, reversed(lines)))

    def write(self, path: Path) -> int:
        """Add the entries to the list at ``path``, NAME, a tab and REASON a line; return how many it then has.

        A resumed run thereby keeps what it met before. Nothing is written where there is nothing to list.
        """
        lines = {} if not path.exists() else dict.fromkeys(path.read_text("utf-8", "surrogateescape").splitlines())
        names, before = {line.partition("\t")[0] for line in lines}, len(lines)
        for name, reason in sorted(self.entries().items()):
            if _one_line(name) not in names:
                lines[f"{_one_line(name)}\t{_one_line(reason)}"] = None
        if len(lines) > before:
            with atomic_write(path) as temporary:
                temporary.write_text("\n".join(lines) + "\n", "utf-8", "surrogateescape")
        return len(lines)


def _one_line(text: str) -> str:
    """A file's name may hold anything: line breaks and other control characters are written as escapes."""
    return "".join(c if c.isprintable() or "\ud800" <= c <= "\udfff" else repr(c)[1:-1] for c in text)


@dataclass(frozen=True)
class Transform:
    """How a picture becomes a sample.

    Attributes:
        resolution: side of the sample in pixels, a multiple of 8.
        min_scale: side of the smallest crop as a share of the picture's shorter side, above 0 and at most 1. No crop
            is smaller than ``resolution`` where the picture is not: it would be blown up without need.
        flip: mirror every second sample.
        presets: the kinds of masks drawn, of ``masks.PRESETS``.
        coverage: smallest and largest share of the sample that a drawn mask covers. A given mask covers what it does.
    """

    resolution: int = 512
    min_scale: float = 0.5
    flip: bool = True
    presets: tuple[str, ...] = ("thin", "medium", "thick", "box")
    coverage: tuple[float, float] = (0.05, 0.5)


class MaskedPictures:
    """Samples by their number, for any number from 0 on; ``unreadable`` lists the pictures that were passed over."""

    def __init__(self, pictures: Pictures, transform: Transform, seed: int) -> None:
        self.pictures, self.transform, self.seed = pictures, transform, seed
        self.unreadable = Unreadable()
        self._reasons: dict[int, str] = {}  # of this process, by the picture's number
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def sample_masks(self, index: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Sample ``index`` with ``count`` masks: uint8 RGB (S, S, 3) and bool (count, S, S), True where to fill.

        A picture with a mask of its own has it ``count`` times; for another they are drawn.

        Raises:
            UsageError: no picture at all can be read, or no drawn mask covers what it should.
        """
        image, mask = self._read(index)
        t, rng = self.transform, np.random.default_rng([self.seed, _SAMPLE, index])
        image, mask = _crop(rng, image, mask, t)
        if t.flip and rng.random() < 0.5:
            image = image[:, ::-1]
            mask = None if mask is None else mask[:, ::-1]
        masks = [sample_mask(rng, t.resolution, t.coverage, t.presets) if mask is None else mask for _ in range(count)]
        return np.ascontiguousarray(image), np.stack(masks)

    def identity(self) -> dict[str, Any]:
        """All that decides the samples, ready for JSON: equal if and only if they are the same."""
        pictures = {"number": len(self.pictures), "names_and_sizes": self.pictures.fingerprint()}
        return {"pictures": pictures, "transform": asdict(self.transform), "seed": self.seed}

    def _read(self, index: int) -> tuple[np.ndarray, np.ndarray | None]:
        """The picture whose turn it is, or where that cannot be read the next of the epoch's order that can."""
        total = len(self.pictures)
        epoch, turn = divmod(index, total)
        if self._epoch != epoch:
            self._epoch, self._order = epoch, np.random.default_rng([self.seed, _ORDER, epoch]).permutation(total)
        for later in range(total):
            i = int(self._order[(turn + later) % total])
            if i in self._reasons:
                continue
            try:
                return self.pictures.read(i)
            except (UsageError, MachineError) as error:
                self._reasons[i] = str(error)
                self.unreadable.add(self.pictures.name(i), str(error))
        reasons = "; ".join(list(self._reasons.values())[:3])
        raise UsageError(f"none of the {total} pictures of {self.pictures.source} can be read: {reasons}")


def _crop(
    rng: np.random.Generator, image: np.ndarray, mask: np.ndarray | None, transform: Transform
) -> tuple[np.ndarray, np.ndarray | None]:
    """A square of random side and place, brought to the resolution; the mask, cut alike, is neither empty nor full.

    Where random crops keep missing the hole, or what is around it, the next ones are laid over places of its edge.
    Only known parts too thin to cover a pixel of the sample may still leave it full.
    """
    height, width = image.shape[:2]
    shortest = min(height, width)
    smallest = max(int(transform.min_scale * shortest), min(transform.resolution, shortest))
    for attempt in range(2 * _TRIES):
        side = int(rng.integers(smallest, shortest + 1))
        if mask is not None and attempt >= _TRIES:
            y, x = _corner_on_edge(rng, mask, side)
        else:
            y, x = (int(rng.integers(0, n - side + 1)) for n in (height, width))
        window = np.s_[y : y + side, x : x + side]
        part = None if mask is None else _resize_mask(mask[window], transform.resolution)
        if part is None or (part.any() and not part.all()):
            break
    return resize_square(image[window], transform.resolution), part


def resize_square(pixels: np.ndarray, size: int) -> np.ndarray:
    """uint8 (S, S, 3) to (size, size, 3)."""
    interpolation = cv2.INTER_AREA if len(pixels) > size else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(pixels, (size, size), interpolation=interpolation))


def _corner_on_edge(rng: np.random.Generator, mask: np.ndarray, side: int) -> tuple[int, int]:
    """A random corner (y, x) from which a square of ``side`` covers a random pair of neighbours on the hole's edge."""
    down, right = (np.argwhere(np.diff(mask, axis=axis)) for axis in (0, 1))
    number = int(rng.integers(len(down) + len(right)))
    first, step = (down[number], (1, 0)) if number < len(down) else (right[number - len(down)], (0, 1))
    corner = []
    for place, ahead, length in zip(first.tolist(), step, mask.shape, strict=True):
        corner.append(int(rng.integers(max(0, place + ahead - side + 1), min(place, length - side) + 1)))
    return corner[0], corner[1]


def _resize_mask(mask: np.ndarray, size: int) -> np.ndarray:
    """bool (H, H) to bool (size, size); shrunk, a pixel is masked if any part of it is, so that no hole is lost."""
    if len(mask) <= size:
        return np.asarray(cv2.resize(mask.view(np.uint8), (size, size), interpolation=cv2.INTER_NEAREST)) > 0
    return np.asarray(cv2.resize(mask.astype(np.float32), (size, size), interpolation=cv2.INTER_AREA)) > 0
