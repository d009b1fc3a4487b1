"""Mask files: read with any program's way of marking a hole, turned as the picture is, inverted and grown."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO, NamedTuple

from ..errors import UsageError
from .decoding import Decoded, decode, upright
from .mask_reading import MaskContent, read_hole
from .masks import Mask
from .masks import dilate as dilated
from .pictures import Picture

MOSTLY = 0.5  # a mask that fills more of the picture may be meant the other way round


class MaskFile(NamedTuple):
    """The hole, bool (H, W), True where to fill, and notes on how the file was understood, a sentence each."""

    hole: Mask
    notes: tuple[str, ...]


def read_mask(
    path: str | os.PathLike[str],
    picture: Picture,
    invert: bool = False,
    dilate: float = 0,
    source: str | None = None,
    contents: BinaryIO | None = None,
) -> MaskFile:
    """Read the mask of ``picture`` from a file of any kind that ``imaging.read_picture`` reads.

    ``mask_reading`` says what is taken for the hole. A mask without an orientation of its own that has the size of the
    picture before its EXIF orientation swapped its sides is turned as the picture was.

    Args:
        invert: fill the other part.
        dilate: grow the part to fill by so many pixels, after inverting.
        source: a value of --mask-from (see ``mask_reading.check_source``); None finds out.
        contents: as for ``read_picture``.

    Raises:
        MachineError, UsageError: as ``read_picture`` and ``mask_reading.read_hole``; also for another size than the
            picture's, and for ``dilate`` below 0.
    """
    name = f"mask {path}"
    decoded = decode(Path(path), contents)
    notes = []  # what the decoder says of metadata and colours matters to a picture alone
    if _is_raw(decoded, picture):
        notes.append(f"{name} has the sides of the picture before its EXIF rotation: turned with it")
        decoded = _turned(decoded, picture.orientation)
    height, width = decoded.samples.shape[:2]
    if (width, height) != picture.size:
        size = f"{picture.size[0]}x{picture.size[1]}"
        raise UsageError(f"{name} is {width}x{height} and the picture is {size}: resize the mask to {size}")
    colours = 1 if decoded.samples.shape[2] < 3 else 3
    alpha = decoded.samples[..., colours] if decoded.samples.shape[2] > colours else None
    hole, note = read_hole(MaskContent(decoded.samples[..., :colours], alpha, decoded.indices), name, source)
    hole = ~hole if invert else hole
    share = float(hole.mean())
    notes += [note] if note else []
    if share > MOSTLY:
        advice = "leave out --invert-mask if white marks" if invert else "add --invert-mask if black marks"
        notes.append(f"{name} fills {share:.0%} of the picture: {advice} the hole")
    return MaskFile(dilated(hole, dilate), tuple(notes))


def _is_raw(mask: Decoded, picture: Picture) -> bool:
    """Whether the mask was drawn on the picture as it is stored, with its sides swapped."""
    size = mask.samples.shape[1::-1]
    return picture.orientation >= 5 and mask.orientation == 1 and size != picture.size and size == picture.size[::-1]


def _turned(mask: Decoded, orientation: int) -> Decoded:
    indices = None if mask.indices is None else upright(mask.indices, orientation)
    return replace(mask, samples=upright(mask.samples, orientation), orientation=orientation, indices=indices)
