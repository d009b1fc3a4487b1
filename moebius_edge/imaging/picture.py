"""A picture in memory: upright samples in their own depth, with what its file said besides."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from ..errors import UsageError
from .masks import Mask
from .metadata import Metadata


@dataclass(frozen=True, eq=False)
class Picture:
    """An upright picture.

    Attributes:
        pixels: (H, W, C), uint8 or uint16; C is 1 for grey, 3 for RGB.
        alpha: (H, W) of the same type, or None. Colours are not multiplied by it.
        metadata: the ICC profile and what else says how the pixels are meant; EXIF.
        notes: what the reader changed or left out, a sentence each.
        orientation: the EXIF orientation that the reader undid; a mask may have been drawn before that.
        indices: (H, W), of a palette picture that was read.
    """

    pixels: np.ndarray
    alpha: np.ndarray | None = None
    metadata: Metadata = field(default_factory=Metadata)
    notes: tuple[str, ...] = ()
    orientation: int = 1
    indices: np.ndarray | None = None

    @classmethod
    def from_array(cls, array: np.ndarray, metadata: Metadata | None = None, notes: tuple[str, ...] = ()) -> Picture:
        """From (H, W) or (H, W, C), C being 1 grey, 2 grey and alpha, 3 RGB, 4 RGB and alpha.

        Raises:
            UsageError: another shape, or another type than uint8 and uint16.
        """
        if array.dtype not in (np.uint8, np.uint16):
            raise UsageError(f"the picture has type {array.dtype}: give uint8 (0..255) or uint16 (0..65535)")
        samples = array[..., None] if array.ndim == 2 else array
        if samples.ndim != 3 or samples.shape[2] not in (1, 2, 3, 4) or 0 in samples.shape:
            raise UsageError(f"the picture has shape {array.shape}: give (height, width, 1 to 4 channels)")
        colours = 1 if samples.shape[2] < 3 else 3
        alpha = samples[..., -1] if samples.shape[2] > colours else None
        return cls(samples[..., :colours], alpha, metadata or Metadata(), notes)

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels."""
        return self.pixels.shape[1], self.pixels.shape[0]

    @property
    def bits(self) -> int:
        """Bits of one sample: 8 or 16."""
        return 8 * self.pixels.itemsize

    @property
    def samples(self) -> np.ndarray:
        """Pixels and alpha in one array, (H, W, 1 to 4); the inverse of ``from_array``."""
        return self.pixels if self.alpha is None else np.dstack([self.pixels, self.alpha])

    @property
    def opaque(self) -> bool:
        """There is no alpha, or none that shows."""
        return self.alpha is None or bool((self.alpha == np.iinfo(self.alpha.dtype).max).all())

    def opaque_in(self, hole: Mask) -> Picture:
        """The picture with full alpha in ``hole``: what is filled there is meant to be seen. A note says so.

        Outside of the hole alpha stays as it is, in the seam too: there it says where the picture itself ends.
        """
        if self.alpha is None or not (hole & (self.alpha < np.iinfo(self.alpha.dtype).max)).any():
            return self
        alpha = self.alpha.copy()
        alpha[hole] = np.iinfo(alpha.dtype).max
        note = f"transparent pixels to fill, {(alpha != self.alpha).sum()}, become opaque"
        return replace(self, alpha=alpha, notes=(*self.notes, note))
