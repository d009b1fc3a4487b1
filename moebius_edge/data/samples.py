"""Training samples from pictures: a square crop with a mask, drawn from the sample's number alone.

Sample i is a function of (seed, i), so runs resume exactly and any process may draw any sample. Every epoch passes
through all pictures once, in an order of its own.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from ..errors import MachineError, UsageError
from .masks import LAMA, Frame, sample_mask, widen_mask
from .pictures import BACKGROUND, FOREGROUND, Pictures

_SAMPLE, _ORDER = 1, 2  # what a generator is for: part of its seed
_TRIES = 10  # crops drawn until one shows the given mask, and again as many laid over its edge


def note_unreadable(path: Path, name: str, reason: str) -> None:
    """Add NAME, a tab and REASON to the list at ``path``, unless it has the name.

    Pictures are read in several processes: a line is appended as a whole, and what an earlier run met stays.
    """
    if (line := _one_line(name)) not in listed_names(path):
        with suppress(OSError), open(path, "ab", buffering=0) as file:
            file.write(f"{line}\t{_one_line(reason)}\n".encode("utf-8", "surrogateescape"))


def listed_names(path: Path) -> set[str]:
    """The names in a list of unreadable pictures, which need not be there."""
    lines = path.read_text("utf-8", "surrogateescape").splitlines() if path.exists() else ()
    return {line.partition("\t")[0] for line in lines}


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
        presets: the kinds of masks drawn, of ``masks.PRESETS`` or ``lama-medium``.
        coverage: smallest and largest share of the sample that a drawn mask covers. A given mask covers what it does.
        widen: grow nearly every mask by a few pixels, see ``masks.widen_mask``.
    """

    resolution: int = 512
    min_scale: float = 0.5
    flip: bool = True
    presets: tuple[str, ...] = (LAMA,)
    coverage: tuple[float, float] = (0.0, 1.0)
    widen: bool = True


class MaskedPictures:
    """Samples by their number, for any number from 0 on; pictures passed over are listed in the file ``unreadable``."""

    def __init__(self, pictures: Pictures, transform: Transform, seed: int, unreadable: Path | None = None) -> None:
        self.pictures, self.transform, self.seed, self.unreadable = pictures, transform, seed, unreadable
        self._reasons: dict[int, str] = {}  # of this process, by the picture's number
        self._epoch, self._order = -1, np.empty(0, np.int64)
        self._foreground = [i for i, branch in enumerate(pictures.branches) if branch == FOREGROUND]

    def sample(self, index: int) -> tuple[np.ndarray, np.ndarray, np.int64]:
        """Sample ``index``: uint8 RGB (S, S, 3), its mask, bool (S, S), True where to fill, and its branch or -1.

        The mask is the picture's own, else drawn. A sample said to be background gets, as upstream's do, a drawn one in
        half of the cases, and in half of the cases what of it lies in the shape of a foreground sample's: else the
        shape of the hole would tell what is in it.

        Raises:
            UsageError: no picture at all can be read, or no drawn mask covers what it should.
        """
        i, image, given = self._next_readable(index)
        branch = self.pictures.branches[i]
        t, rng = self.transform, np.random.default_rng([self.seed, _SAMPLE, index])
        if branch == BACKGROUND and rng.random() < 0.5:
            given = None
        image, mask, frame = _crop(rng, image, given, t)
        if mask is None:
            mask = sample_mask(rng, t.resolution, t.coverage, t.presets, frame=frame)
        if branch == BACKGROUND and rng.random() < 0.5:
            mask = self._cut_by_foreground(rng, mask)
        if t.flip and rng.random() < 0.5:
            image, mask = image[:, ::-1], mask[:, ::-1]
        if t.widen and not (widened := widen_mask(rng, mask)).all():
            mask = widened
        return np.ascontiguousarray(image), np.ascontiguousarray(mask), np.int64(-1 if branch is None else branch)

    def _cut_by_foreground(self, rng: np.random.Generator, mask: np.ndarray) -> np.ndarray:
        """What of ``mask`` lies in a random foreground sample's; all of it where there is none, or they do not meet."""
        if not self._foreground:
            return mask
        read = self._read(self._foreground[int(rng.integers(len(self._foreground)))])
        if read is None or read[1] is None:
            return mask
        shape = cv2.resize(read[1].astype(np.uint8), mask.shape, interpolation=cv2.INTER_NEAREST) > 0
        return mask & shape if (mask & shape).any() else mask

    def identity(self) -> dict[str, Any]:
        """All that decides the samples, ready for JSON: equal if and only if they are the same."""
        pictures = {"number": len(self.pictures), "names_and_sizes": self.pictures.fingerprint()}
        return {"pictures": pictures, "transform": asdict(self.transform), "seed": self.seed}

    def _next_readable(self, index: int) -> tuple[int, np.ndarray, np.ndarray | None]:
        """The picture whose turn it is, or where that cannot be read the next of the epoch's order that can."""
        total = len(self.pictures)
        epoch, turn = divmod(index, total)
        if self._epoch != epoch:
            self._epoch, self._order = epoch, np.random.default_rng([self.seed, _ORDER, epoch]).permutation(total)
        for later in range(total):
            i = int(self._order[(turn + later) % total])
            if (read := self._read(i)) is not None:
                return i, *read
        reasons = "; ".join(list(self._reasons.values())[:3])
        raise UsageError(f"none of the {total} pictures of {self.pictures.source} can be read: {reasons}")

    def _read(self, i: int) -> tuple[np.ndarray, np.ndarray | None] | None:
        """Picture ``i`` with its mask, or None where it cannot be read; that is noted."""
        if i in self._reasons:
            return None
        try:
            return self.pictures.read(i)
        except (UsageError, MachineError) as error:
            self._reasons[i] = str(error)
            if self.unreadable is not None:
                note_unreadable(self.unreadable, self.pictures.name(i), str(error))
            return None


def _crop(
    rng: np.random.Generator, image: np.ndarray, mask: np.ndarray | None, transform: Transform
) -> tuple[np.ndarray, np.ndarray | None, Frame | None]:
    """A square of random side and place, brought to the resolution; the mask, cut alike, is neither empty nor full.

    A square as large as the picture allows also has its frame: the whole picture at the square's scale.

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
    scale = transform.resolution / side
    frame = (round(height * scale), round(width * scale), round(y * scale), round(x * scale))
    return resize_square(image[window], transform.resolution), part, frame if side == shortest else None


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
