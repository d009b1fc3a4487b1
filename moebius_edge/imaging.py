"""Pictures from files and to files: upright, in their own depth, with alpha and ICC profile.

Of the metadata only the ICC profile is kept: EXIF may hold a thumbnail that still shows what was removed.
Nothing here knows of networks or regions, and how a file is decoded is ``decoding``'s business.
"""

from __future__ import annotations

import io
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from .decoding import MAX_PIXELS, decode
from .errors import UsageError
from .files import atomic_write
from .png_tiff import write_png, write_tiff

__all__ = [
    "MAX_PIXELS",
    "OUTPUT_FORMATS",
    "Picture",
    "check_output",
    "read_picture",
    "write_picture",
]

OUTPUT_FORMATS = {  # by extension
    **{".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".tif": "TIFF", ".tiff": "TIFF", ".webp": "WEBP"},
    ".bmp": "BMP",
}
JPEG_QUALITY = 95
_LONGEST_SIDE = {"JPEG": 65500, "WEBP": 16383}  # limits of the formats


@dataclass(frozen=True, eq=False)
class Picture:
    """An upright picture.

    Attributes:
        pixels: (H, W, C), uint8 or uint16; C is 1 for grey, 3 for RGB.
        alpha: (H, W) of the same type, or None. Colours are not multiplied by it.
        icc: the ICC profile the pixels are meant in, or None.
        notes: what the reader changed or left out, a sentence each.
        orientation: the EXIF orientation that the reader undid; a mask may have been drawn before that.
    """

    pixels: np.ndarray
    alpha: np.ndarray | None = None
    icc: bytes | None = None
    notes: tuple[str, ...] = field(default=())
    orientation: int = 1

    def __post_init__(self) -> None:
        if self.pixels.ndim != 3 or self.pixels.shape[2] not in (1, 3) or 0 in self.pixels.shape:
            raise ValueError(f"pixels must be (H, W, 1 or 3), got {self.pixels.shape}")
        if self.pixels.dtype not in (np.uint8, np.uint16):
            raise ValueError(f"pixels must be uint8 or uint16, got {self.pixels.dtype}")
        if self.alpha is not None and (self.alpha.shape, self.alpha.dtype) != (
            self.pixels.shape[:2],
            self.pixels.dtype,
        ):
            raise ValueError(f"alpha {self.alpha.shape} {self.alpha.dtype} does not fit the pixels")

    @classmethod
    def from_array(cls, array: np.ndarray, icc: bytes | None = None, notes: tuple[str, ...] = ()) -> Picture:
        """From (H, W) or (H, W, C), C being 1 grey, 2 grey and alpha, 3 RGB, 4 RGB and alpha.

        Raises:
            UsageError: another shape, or another type than uint8 and uint16.
        """
        if array.dtype not in (np.uint8, np.uint16):
            raise UsageError(f"the picture has type {array.dtype}: give uint8 (0..255) or uint16 (0..65535)")
        samples = array[..., None] if array.ndim == 2 else array
        if samples.ndim != 3 or samples.shape[2] not in (1, 2, 3, 4) or 0 in samples.shape:
            raise UsageError(f"the picture has shape {array.shape}: give (height, width, 1 to 4 channels)")
        if samples.shape[2] in (1, 3):
            return cls(samples, None, icc, notes)
        return cls(samples[..., :-1], samples[..., -1], icc, notes)

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


def read_picture(path: str | os.PathLike[str], contents: BinaryIO | None = None) -> Picture:
    """Read a PNG, JPEG, TIFF, WebP, BMP or GIF file, turned upright by its EXIF orientation.

    Grey stays grey and 16 bits stay 16. Palettes become RGB, a transparent colour becomes alpha, 1 bit
    becomes 8. CMYK becomes sRGB, by its profile if it has one, and of several frames the first is read: these
    two leave a note. With ``contents`` they are read in place of a file, as from a member of an archive, and
    ``path`` is their name in errors.

    Raises:
        MachineError: the file is missing or may not be read.
        UsageError: it is no picture, damaged, larger than ``MAX_PIXELS``, or of a kind that would lose depth.
    """
    decoded = decode(Path(path), contents)
    picture = Picture.from_array(decoded.samples, decoded.icc, decoded.notes)
    return replace(picture, orientation=decoded.orientation)


def check_output(path: str | os.PathLike[str], picture: Picture) -> str:
    """The format that ``path`` names by its extension; to be asked before the work is done.

    Raises:
        UsageError: the extension is unknown, or its format cannot hold the picture's depth, alpha or size.
    """
    suffix = Path(path).suffix
    form = OUTPUT_FORMATS.get(suffix.lower())
    if form is None:
        what = f"extension {suffix}" if suffix else "no extension"
        raise UsageError(f"output {path} has {what}: use one of {', '.join(OUTPUT_FORMATS)}")
    longest, grey_alpha = max(picture.size), picture.alpha is not None and picture.pixels.shape[2] == 1
    lacks = ""
    if form not in ("PNG", "TIFF") and picture.bits == 16:
        lacks = "16-bit samples"
    elif form in ("JPEG", "BMP") and picture.alpha is not None:
        lacks = "an alpha channel"
    elif longest > _LONGEST_SIDE.get(form, longest):
        lacks = f"a side of {longest} pixels"
    elif form == "TIFF" and picture.bits == 16 and grey_alpha:
        lacks = "16-bit grey with alpha that other programs can read"
    if lacks:
        raise UsageError(f"output {path}: {form} cannot hold {lacks}: use .png")
    return form


def write_picture(path: str | os.PathLike[str], picture: Picture) -> tuple[str, ...]:
    """Write in the format of the extension, whole or not at all; return notes on what the file does not keep.

    PNG, TIFF, BMP and WebP (in its lossless form, where grey becomes RGB) keep every sample. JPEG does not,
    and BMP has no ICC profile: the notes say so.

    Raises:
        UsageError: as ``check_output``.
        MachineError: the folder is missing, read-only or full.
    """
    form = check_output(path, picture)
    with atomic_write(path) as temporary, temporary.open("wb") as stream:
        if form == "PNG":
            write_png(stream, picture.samples, picture.icc)
        elif form == "TIFF":
            write_tiff(stream, picture.samples, picture.icc)
        else:
            stream.write(_encoded(form, picture))
    if form == "JPEG":
        return (f"{path} is JPEG, which is lossy: pixels outside the mask change slightly; .png keeps them",)
    if form == "BMP" and picture.icc is not None:
        return (f"{path} is BMP, which holds no ICC profile: colours may look different; .png keeps it",)
    return ()


def _encoded(form: str, picture: Picture) -> bytes:
    """A JPEG, BMP or WebP file; in memory, since Pillow does not tell a full disk from a fault of its own."""
    samples = picture.samples
    image = Image.fromarray(samples[..., 0] if samples.shape[2] == 1 else samples)
    buffer = io.BytesIO()
    if form == "JPEG":  # 4:4:4, or the colours of a filled edge would bleed
        image.save(buffer, form, quality=JPEG_QUALITY, subsampling=0, icc_profile=picture.icc)
    elif form == "BMP":
        image.save(buffer, form)
    else:  # exact: also what lies under full transparency
        image = image.convert("RGB" if picture.alpha is None else "RGBA")
        icc = picture.icc if picture.pixels.shape[2] == 3 else None  # a profile for grey does not fit RGB
        image.save(buffer, form, lossless=True, exact=True, quality=40, method=2, icc_profile=icc)
    return buffer.getvalue()
