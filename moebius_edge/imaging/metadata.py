"""What a picture file says besides its samples: colours, resolution and EXIF, made safe to keep.

EXIF is built anew from the fields of its standard. Thumbnails, maker notes and whatever else may hold a small copy of
the picture are left out, for that copy would still show what has been removed from the picture.
"""

from __future__ import annotations

import math
import struct
import warnings
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

Fields = dict[int, Any]  # EXIF's by their numbers, as Pillow has them; the fields of an inner directory in a dictionary

_ORIENTATION, _X_RESOLUTION, _Y_RESOLUTION, _RESOLUTION_UNIT = 274, 282, 283, 296
_EXIF_IFD, _GPS_IFD = 34665, 34853
# The maker note, the size before the picture was turned upright, and directories.
_LEFT_OUT = {0x927C, 0xA002, 0xA003, 0xA005, _GPS_IFD}
_METRES_PER_INCH = 0.0254
_MAX_EXIF_VALUE = 60_000  # bytes
_PICTURE_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG", b"WEBPVP8", b"ftypavif", b"ftypheic")

# What is kept of each directory, by the numbers of EXIF 3.0.
_DESCRIPTION = frozenset([269, 270, 271, 272, 305, 306, 315, 316, 33432, 0x4746, 0x4749, *range(0x9C9B, 0x9CA0)])
_EXIF_RANGES = (range(0x829A, 0x829E), range(0x8822, 0x8836), range(0x9000, 0x9406), range(0xA000, 0xA501))
_KEPT = {
    _EXIF_IFD: {n for numbers in _EXIF_RANGES for n in numbers} - _LEFT_OUT,
    _GPS_IFD: set(range(32)),
}

_SRGB_CODE_POINTS = b"\1\x0d\0\1"  # cICP: BT.709 primaries, sRGB's curve, RGB, full range
_SRGB_GAMMA = struct.pack(">I", 45455)  # gAMA, in 1/100 000


@dataclass(frozen=True)
class Metadata:
    """What is kept of a file besides its samples.

    Attributes:
        icc: the ICC profile that the samples are meant in.
        dpi: pixels per inch across and down.
        png_colour: the chunks (name, body) of a PNG that say what its samples mean.
        exif: the fields of the first directory of the EXIF block, the others within it; without thumbnails.
    """

    icc: bytes | None = None
    dpi: tuple[float, float] | None = None
    png_colour: tuple[tuple[bytes, bytes], ...] = ()
    exif: Fields = field(default_factory=dict)

    def png_chunks(self) -> list[tuple[bytes, bytes]]:
        """All of it as chunks of a PNG file."""
        chunks = list(self.png_colour)
        if self.icc is not None:
            chunks.append((b"iCCP", b"ICC Profile\0\0" + zlib.compress(self.icc)))
        if self.dpi is not None:
            per_metre = [min(round(value / _METRES_PER_INCH), 2**31 - 1) for value in self.dpi]
            chunks.append((b"pHYs", struct.pack(">IIB", *per_metre, 1)))
        if self.exif:
            chunks.append((b"eXIf", exif_block(self.exif).removeprefix(b"Exif\0\0")))
        return chunks

    def exif_with_resolution(self) -> Fields:
        """The EXIF fields and the resolution among them, for files that have no other place for it."""
        resolution = {} if self.dpi is None else dict(zip((_X_RESOLUTION, _Y_RESOLUTION), self.dpi, strict=True))
        return self.exif | resolution | ({_RESOLUTION_UNIT: 2} if resolution else {})

    def special_colour(self) -> str:
        """The name of the PNG chunk that a viewer of another format would miss, for this is no sRGB; else empty."""
        chunks = dict(self.png_colour)
        if b"cICP" in chunks:  # it takes precedence over the others
            return "" if chunks[b"cICP"] == _SRGB_CODE_POINTS else "cICP"
        described = self.icc is not None or b"sRGB" in chunks
        return "" if described or chunks.get(b"gAMA", _SRGB_GAMMA) == _SRGB_GAMMA else "gAMA"


def plausible_dpi(x: float, y: float) -> tuple[float, float] | None:
    """(x, y), or None where one is not a resolution that a format could hold."""
    return (x, y) if all(math.isfinite(value) and 0.1 <= value <= 400_000 for value in (x, y)) else None


def is_profile(icc: object, space: bytes) -> bool:
    """Whether ``icc`` is a whole ICC profile, by its header, for samples in a colour space such as b"RGB "."""
    if not isinstance(icc, bytes) or len(icc) < 128 or not 128 <= int.from_bytes(icc[:4], "big") <= len(icc):
        return False
    return icc[36:40] == b"acsp" and icc[16:20] == space


def read_exif(image: Image.Image, block: bytes | None) -> tuple[Fields, int, tuple[float, float] | None, bool]:
    """What is kept of the EXIF ``block`` of ``image``; where it is None, of that which Pillow names, or a TIFF's tags.

    Returns:
        The fields, without the orientation and the resolution; the orientation, 1 to 8, 1 being upright; pixels per
        inch, None where there are none; and whether the block was undamaged.
    """
    exif, kept, sound = Image.Exif(), Fields(), True
    with warnings.catch_warnings(record=True) as complaints:
        warnings.simplefilter("always")
        try:
            if image.format == "TIFF":
                exif = image.getexif()
            else:
                exif.load(block or image.info.get("exif", b""))
            kept = _kept(exif, _DESCRIPTION)
            for pointer, numbers in _KEPT.items():
                if inner := _kept(exif.get_ifd(pointer), numbers):
                    kept[pointer] = inner
            exif_block(kept)
        except Exception:  # Pillow meets damage, and values that it cannot write, with any exception at all
            kept, sound = Fields(), False
        orientation, dpi = _orientation_and_dpi(exif)
    return kept, orientation, dpi, sound and not complaints


def _kept(fields: Mapping[int, Any], numbers: frozenset[int] | set[int]) -> Fields:
    """Those of ``numbers``, without values that are too long for a field or hold a picture, as private uses might."""
    kept = {}
    for number in numbers.intersection(fields):
        value = fields[number]
        data = value.encode("latin-1", "ignore") if isinstance(value, str) else value
        if isinstance(data, bytes):
            if len(data) > _MAX_EXIF_VALUE or any(mark in data for mark in _PICTURE_SIGNATURES):
                continue
            # Pillow writes text of other than ASCII as question marks, but bytes as they are.
            value = value if isinstance(value, str) and value.isascii() else data
        kept[number] = value
    return kept


def _orientation_and_dpi(exif: Mapping[int, Any]) -> tuple[int, tuple[float, float] | None]:
    values = []
    for number, default in ((_ORIENTATION, 1), (_RESOLUTION_UNIT, 2), (_X_RESOLUTION, 0), (_Y_RESOLUTION, 0)):
        try:
            values.append(float(exif.get(number, default)))
        except (TypeError, ValueError, ZeroDivisionError):
            values.append(0.0)
    orientation, unit, x, y = values
    scale = {2.0: 1.0, 3.0: 2.54}.get(unit, 0.0)  # inches, centimetres
    return int(orientation) if orientation in range(1, 9) else 1, plausible_dpi(x * scale, y * scale)


def exif_block(fields: Fields) -> bytes:
    """``fields`` as an EXIF block."""
    exif = Image.Exif()
    exif.update(fields)
    return exif.tobytes()
