"""A list of pictures with random access, some of them with a mask of their own.

Where they lie, a folder, a list or shards, is the business of ``sources``; here they are places in files.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Sequence
from typing import BinaryIO, NamedTuple

import numpy as np

from ..errors import MachineError, UsageError
from ..imaging.mask_files import read_mask
from ..imaging.pictures import Picture, read_picture

SMALLEST_SIDE = 8  # pixels: one cell of the latent grid
BACKGROUND, FOREGROUND = 0, 1  # the branches of the network, as the bundle's input ``branch`` numbers them


class Place(NamedTuple):
    """A whole file, or ``size`` bytes from ``offset`` on of an archive; ``name`` is the same wherever the data lie."""

    name: str
    file: str
    offset: int = 0
    size: int | None = None

    @property
    def shown(self) -> str:
        """What an error calls it."""
        return self.file if self.size is None else f"{self.file}:{self.name.partition(':')[2]}"

    def contents(self) -> BinaryIO | None:
        """The bytes in the archive, None for a whole file. Raises MachineError if it cannot be read or has shrunk."""
        if self.size is None:
            return None
        try:
            with open(self.file, "rb") as stream:  # opened anew: loading processes would share a file's position
                stream.seek(self.offset)
                data = stream.read(self.size)
        except OSError as error:
            raise MachineError(f"cannot read {self.file}: {error.strerror}: is it still there?") from None
        if len(data) < self.size:
            raise MachineError(f"{self.file} has become shorter since it was opened: run the same command again")
        return io.BytesIO(data)

    def file_size(self) -> int:
        """Bytes; -1 for a file that is missing."""
        if self.size is not None:
            return self.size
        try:
            return os.stat(self.file).st_size
        except OSError:
            return -1


class Pictures:
    """``pictures[i]`` belongs to ``masks[i]``, which is None where there is none; ``source`` is what the user named.

    ``branches[i]`` says what the mask hides, ``BACKGROUND`` or a ``FOREGROUND`` object, None where nobody said.
    """

    def __init__(
        self,
        source: str,
        pictures: Sequence[Place],
        masks: Sequence[Place | None],
        branches: Sequence[int | None] | None = None,
    ) -> None:
        self.source, self.pictures, self.masks = source, pictures, masks
        self.branches = [None] * len(pictures) if branches is None else branches

    def __len__(self) -> int:
        return len(self.pictures)

    def name(self, i: int) -> str:
        """Relative to the source, with forward slashes; a shard's name and a colon before its members'."""
        return self.pictures[i].name

    def read(self, i: int) -> tuple[np.ndarray, np.ndarray | None]:
        """uint8 RGB (H, W, 3), and the mask, bool (H, W), True where to fill, or None; both upright.

        16 bits are rounded to 8, grey becomes three equal channels, alpha and ICC profile are left out.

        Raises:
            MachineError, UsageError: as ``imaging.read_picture`` and ``mask_files.read_mask``; also for a picture of
                which a side is below ``SMALLEST_SIDE``, and for a mask that fills nothing, or everything.
        """
        place, given = self.pictures[i], self.masks[i]
        picture = read_picture(place.shown, place.contents())
        width, height = picture.size
        if min(width, height) < SMALLEST_SIDE:
            raise UsageError(f"picture {place.shown} is {width}x{height}: give at least {SMALLEST_SIDE} pixels a side")
        if given is None:
            return _rgb8(picture), None
        mask = read_mask(given.shown, picture, contents=given.contents()).hole
        if not mask.any():
            raise UsageError(f"mask {given.shown} is all black, it fills nothing: mark the hole white")
        if mask.all():
            raise UsageError(f"mask {given.shown} is all white, it leaves nothing to go by: mark only the hole white")
        return _rgb8(picture), mask

    def fingerprint(self) -> str:
        """SHA-256 over the names and sizes in bytes of all files, and the branches, in order."""
        digest = hashlib.sha256()
        for picture, mask, branch in zip(self.pictures, self.masks, self.branches, strict=True):
            for place in (picture, mask):
                entry = "\0\0" if place is None else f"{place.name}\0{place.file_size()}\0"
                digest.update(entry.encode("utf-8", "surrogateescape"))
            digest.update(b"" if branch is None else bytes([branch]))
        return digest.hexdigest()


def _rgb8(picture: Picture) -> np.ndarray:
    pixels = picture.pixels
    if picture.bits == 16:
        pixels = ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(pixels, (*pixels.shape[:2], 3)))
