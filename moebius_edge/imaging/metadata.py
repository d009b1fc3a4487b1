"""What a picture file says besides its samples: colours, resolution and EXIF, made safe to keep.

EXIF is built anew from the fields of its standard. Thumbnails, maker notes and whatever else may hold a small copy of
the picture are left out, for that copy would still show what has been removed from the picture.
"""

from __future__ import annotations

import io
import math
import struct
import zlib
from dataclasses import dataclass, field
from typing import BinaryIO

import numpy as np

from .tiff_tags import (
    ICC_TAG,
    RATIONAL,
    UNDEFINED,
    Directory,
    Tags,
    Unreadable,
    integers,
    longs,
    read_directory,
    shorts,
    write_directory,
)

_ORIENTATION, _X_RESOLUTION, _Y_RESOLUTION, _RESOLUTION_UNIT = 274, 282, 283, 296
_EXIF_IFD, _GPS_IFD, _MAKER_NOTE = 34665, 34853, 0x927C
_SIZE = (0xA002, 0xA003)  # width and height, of the EXIF directory
_METRES_PER_INCH = 0.0254
_MAX_EXIF_VALUE = 60_000  # bytes
_PICTURE_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG", b"WEBPVP8", b"ftypavif", b"ftypheic")

# What is kept of each directory, by the numbers of EXIF 3.0.
_DESCRIPTION = frozenset([269, 270, 271, 272, 305, 306, 315, 316, 33432, 0x4746, 0x4749, *range(0x9C9B, 0x9CA0)])
_EXIF_RANGES = (range(0x829A, 0x829E), range(0x8822, 0x8836), range(0x9000, 0x9406), range(0xA000, 0xA501))
_KEPT = {
    _EXIF_IFD: {tag for tags in _EXIF_RANGES for tag in tags} - {_MAKER_NOTE, _GPS_IFD, 0xA005},
    _GPS_IFD: set(range(32)),
}
EXIF_TAGS = _DESCRIPTION | {_ORIENTATION, _X_RESOLUTION, _Y_RESOLUTION, _RESOLUTION_UNIT, _EXIF_IFD, _GPS_IFD}

PNG_COLOUR_BYTES = {b"gAMA": 4, b"cHRM": 32, b"sRGB": 1, b"cICP": 4, b"mDCV": 24, b"cLLI": 8}  # lengths of the chunks
_SRGB_CODE_POINTS = b"\1\x0d\0\1"  # cICP: BT.709 primaries, sRGB's curve, RGB, full range
_SRGB_VALUES = {b"gAMA": (45455,), b"cHRM": (31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000)}  # in 1/100 000


@dataclass(frozen=True)
class Metadata:
    """What is kept of a file besides its samples.

    Attributes:
        icc: the ICC profile that the samples are meant in.
        dpi: pixels per inch across and down.
        png_colour: the chunks (name, body) of a PNG that say what its samples mean.
        exif: the first directory of the EXIF block, the others within it; without thumbnails.
    """

    icc: bytes | None = None
    dpi: tuple[float, float] | None = None
    png_colour: tuple[tuple[bytes, bytes], ...] = ()
    exif: Directory = field(default_factory=dict)

    def png_chunks(self) -> list[tuple[bytes, bytes]]:
        """All of it as chunks of a PNG file."""
        chunks = list(self.png_colour)
        if self.icc is not None:
            chunks.append((b"iCCP", b"ICC Profile\0\0" + zlib.compress(self.icc)))
        if self.dpi is not None:
            per_metre = [min(round(value / _METRES_PER_INCH), 2**31 - 1) for value in self.dpi]
            chunks.append((b"pHYs", struct.pack(">IIB", *per_metre, 1)))
        if self.exif:
            chunks.append((b"eXIf", exif_block(self.exif)))
        return chunks

    def tiff_tags(self) -> Directory:
        """All that a TIFF file can hold, as tags of its directory."""
        tags = self.exif | self.resolution_tags()
        return tags if self.icc is None else tags | {ICC_TAG: (UNDEFINED, self.icc)}

    def resolution_tags(self) -> Directory:
        """The resolution as tags of a TIFF or EXIF directory."""
        if self.dpi is None:
            return {}
        x, y = (struct.pack("<II", min(round(value * 10_000), 2**32 - 1), 10_000) for value in self.dpi)
        return {_X_RESOLUTION: (RATIONAL, x), _Y_RESOLUTION: (RATIONAL, y), _RESOLUTION_UNIT: shorts(2)}

    def special_colours(self) -> list[str]:
        """The names of the PNG chunks that a viewer of another format would miss: they say that this is not sRGB."""
        chunks = dict(self.png_colour)
        if b"cICP" in chunks:  # each of these takes precedence over those below
            return [] if chunks[b"cICP"] == _SRGB_CODE_POINTS else ["cICP"]
        if self.icc is not None or b"sRGB" in chunks:
            return []
        special = []
        for name, srgb in _SRGB_VALUES.items():
            values = np.frombuffer(chunks.get(name, np.array(srgb, ">u4").tobytes()), ">u4").astype(np.int64)
            if np.abs(values - srgb).max() > 500:
                special.append(name.decode())
        return special


def png_resolution(body: bytes) -> tuple[float, float] | None:
    """The resolution in a pHYs chunk, in pixels per inch; None where it gives no unit."""
    if len(body) != 9 or body[8] != 1:
        return None
    x, y = struct.unpack(">II", body[:8])
    return plausible_dpi(x * _METRES_PER_INCH, y * _METRES_PER_INCH)


def plausible_dpi(x: float, y: float) -> tuple[float, float] | None:
    """(x, y), or None where one is not a resolution that a format could hold."""
    return (x, y) if all(math.isfinite(value) and 0.1 <= value <= 400_000 for value in (x, y)) else None


def is_profile(icc: bytes, space: bytes) -> bool:
    """Whether ``icc`` is a whole ICC profile, by its header, for samples in a colour space such as b"RGB "."""
    complete = len(icc) >= 128 and 128 <= int.from_bytes(icc[:4], "big") <= len(icc)
    return complete and icc[36:40] == b"acsp" and icc[16:20] == space


def read_exif(block: bytes) -> tuple[Directory, bool]:
    """What is kept of an EXIF block, with its orientation and resolution; and whether it was undamaged."""
    block = block.removeprefix(b"Exif\0\0")
    stream, order = io.BytesIO(block), {b"II": "<", b"MM": ">"}.get(block[:2])
    if order is None or len(block) < 8:
        return {}, False
    try:
        directory, _ = read_directory(stream, struct.unpack_from(order + "I", block, 4)[0], order, EXIF_TAGS)
    except Unreadable:
        return {}, False
    return with_inner_directories(stream, directory, order)


def with_inner_directories(stream: BinaryIO, directory: Tags, order: str, big: bool = False) -> tuple[Directory, bool]:
    """``directory`` with the EXIF and GPS directories that it points to; and whether these were undamaged.

    Values that are too long for a field or hold a picture, as private uses might, are left out.
    """
    kept: Directory = {**_without_pictures(directory)}
    sound = True
    for pointer, tags in _KEPT.items():
        if pointer in kept:
            place = next(iter(integers(kept, pointer)), 0)
            del kept[pointer]
            try:
                inner, _ = read_directory(stream, place, order, tags, big)
                if inner := _without_pictures(inner):
                    kept[pointer] = inner
            except Unreadable:
                sound = False
    return kept, sound


def _without_pictures(tags: Tags) -> Tags:
    return {
        tag: (kind, values)
        for tag, (kind, values) in tags.items()
        if len(values) <= _MAX_EXIF_VALUE and not any(mark in values for mark in _PICTURE_SIGNATURES)
    }


def take_orientation(directory: Directory) -> int:
    """Remove the orientation from ``directory`` and return it, 1 to 8; 1 is upright."""
    (orientation, *_) = integers(directory, _ORIENTATION, (1,))
    directory.pop(_ORIENTATION, None)
    return orientation if 1 <= orientation <= 8 else 1


def take_resolution(directory: Directory) -> tuple[float, float] | None:
    """Remove the resolution from ``directory`` and return it in pixels per inch; None where it is in no unit."""
    (unit, *_) = integers(directory, _RESOLUTION_UNIT, (2,))
    values = [directory.pop(tag, None) for tag in (_X_RESOLUTION, _Y_RESOLUTION)]
    directory.pop(_RESOLUTION_UNIT, None)
    dots = []
    for value in values:
        if isinstance(value, tuple) and value[0] == RATIONAL and unit in (2, 3):
            numerator, denominator = struct.unpack_from("<II", value[1])
            dots.append(numerator / max(denominator, 1) * (2.54 if unit == 3 else 1))
    return plausible_dpi(dots[0], dots[1]) if len(dots) == 2 else None


def set_size(directory: Directory, width: int, height: int) -> None:
    """Correct the size that an EXIF block repeats: it was given before the picture was turned upright."""
    inner = directory.get(_EXIF_IFD)
    if isinstance(inner, dict):
        inner.update({tag: longs(value) for tag, value in zip(_SIZE, (width, height), strict=True) if tag in inner})


def exif_block(directory: Directory) -> bytes:
    """``directory`` as the body of an eXIf chunk, or of another format's EXIF block."""
    stream = io.BytesIO(b"II*\0\0\0\0\0")
    stream.seek(8)
    place = write_directory(stream, directory)
    block = bytearray(stream.getvalue())
    struct.pack_into("<I", block, 4, place)
    return bytes(block)
