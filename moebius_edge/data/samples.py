"""Training samples from pictures: a square crop with a mask, drawn from the sample's number alone.

Sample i is a function of (seed, i), so runs resume exactly and any process may draw any sample. Every epoch
passes through all pictures once, in an order of its own.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Protocol

import cv2
import numpy as np

from ..errors import MachineError, UsageError
from ..spec import LATENT_DOWNSCALE
from .masks import PRESETS, draw_mask, sample_mask
from .pictures import Pictures
from .unreadable import Unreadable

_SAMPLE, _ORDER = 1, 2  # what a generator is for: part of its seed
_TRIES = 10  # crops drawn until one shows the given mask, and again as many laid over its edge
_DRAWS = 1000  # masks drawn until one covers what it should: at five in a hundred, a miss is out of the question


class Sample(NamedTuple):
    """``image`` uint8 RGB (S, S, 3); ``mask`` bool (S, S), True where to fill."""

    image: np.ndarray
    mask: np.ndarray


class Samples(Protocol):
    """What latents are encoded from."""

    unreadable: Unreadable

    def sample_masks(self, index: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Picture ``index`` with ``count`` masks: uint8 RGB (S, S, 3) and bool (count, S, S)."""
        ...

    def identity(self) -> dict[str, Any]:
        """All that decides the samples, to be written as JSON: equal if and only if they are the same."""
        ...


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

    Raises:
        UsageError: values outside of these, or presets that hardly ever cover such a share.
    """

    resolution: int = 512
    min_scale: float = 0.5
    flip: bool = True
    presets: tuple[str, ...] = ("thin", "medium", "thick", "box")
    coverage: tuple[float, float] = (0.05, 0.5)

    def __post_init__(self) -> None:
        if self.resolution <= 0 or self.resolution % LATENT_DOWNSCALE:
            raise UsageError(f"resolution is {self.resolution}: give a multiple of {LATENT_DOWNSCALE}")
        if not 0 < self.min_scale <= 1:
            raise UsageError(f"min_scale is {self.min_scale}: give a share above 0 and at most 1")
        unknown = [preset for preset in self.presets if preset not in PRESETS]
        if unknown or not self.presets:
            raise UsageError(f"mask presets are {list(self.presets)}: give some of {', '.join(PRESETS)}")
        least, most = self.coverage
        if not 0 < least < most < 1:
            raise UsageError(f"coverage is {least} to {most}: give two rising shares between 0 and 1")
        rng = np.random.default_rng(0)
        shares = [draw_mask(rng, 64, self.presets[i % len(self.presets)]).mean() for i in range(200)]
        hits = sum(least <= share <= most for share in shares)
        if hits < 10:
            raise UsageError(
                f"coverage is {least} to {most}, which {hits} of 200 masks of the presets {', '.join(self.presets)} "
                "have: widen the range, or give other presets"
            )


class MaskedPictures:
    """``sample(i)`` for any i from 0 on; ``unreadable`` lists what was passed over."""

    def __init__(self, pictures: Pictures, transform: Transform, seed: int) -> None:
        self.pictures, self.transform, self.seed = pictures, transform, seed
        self.unreadable = Unreadable()
        self._known: dict[int, str] = {}  # by this process: number of the picture -> reason
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    def sample(self, index: int) -> Sample:
        """Sample ``index``; the mask is the picture's own, or drawn where it has none. Raises as ``sample_masks``."""
        image, masks = self.sample_masks(index, 1)
        return Sample(image, masks[0])

    def sample_masks(self, index: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Sample ``index`` with ``count`` masks: uint8 RGB (S, S, 3) and bool (count, S, S).

        The first mask is that of ``sample``. A picture with a mask of its own has it ``count`` times.

        Raises:
            UsageError: no picture at all can be read.
        """
        image, mask = self._read(index)
        t, rng = self.transform, np.random.default_rng([self.seed, _SAMPLE, index])
        image, mask = _crop(rng, image, mask, t)
        if t.flip and rng.random() < 0.5:
            image = image[:, ::-1]
            mask = None if mask is None else mask[:, ::-1]
        if mask is not None:
            masks = np.stack([mask] * count)
        else:
            masks = np.stack(
                [sample_mask(rng, t.resolution, t.coverage, t.presets, attempts=_DRAWS) for _ in range(count)]
            )
        return np.ascontiguousarray(image), masks

    def identity(self) -> dict[str, Any]:
        pictures = {"number": len(self.pictures), "names_and_sizes": self.pictures.fingerprint()}
        return {"pictures": pictures, "transform": asdict(self.transform), "seed": self.seed}

    def _read(self, index: int) -> tuple[np.ndarray, np.ndarray | None]:
        """The picture whose turn it is, or where that cannot be read the next of the epoch's order that can."""
        total = len(self.pictures)
        epoch, turn = divmod(index, total)
        if self._order[0] != epoch:
            self._order = epoch, np.random.default_rng([self.seed, _ORDER, epoch]).permutation(total)
        for later in range(total):
            i = int(self._order[1][(turn + later) % total])
            if i in self._known:
                continue
            try:
                return self.pictures.read(i)
            except (UsageError, MachineError) as error:
                self._known[i] = str(error)
                self.unreadable.add(self.pictures.name(i), str(error))
        reasons = "; ".join(list(self._known.values())[:3])
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
    size = (transform.resolution, transform.resolution)
    interpolation = cv2.INTER_AREA if side > transform.resolution else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(image[window], size, interpolation=interpolation)), part


def _corner_on_edge(rng: np.random.Generator, mask: np.ndarray, side: int) -> tuple[int, int]:
    """A random corner from which a square of ``side`` covers both pixels of a random pair, one in the hole and its
    neighbour outside; (H, W) -> (y, x)."""
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
