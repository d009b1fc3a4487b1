"""Pictures from files and to files: upright, in their own depth, with alpha and metadata.

``metadata`` says which of a file's metadata are kept: none that may hold a copy of what was removed. Nothing here
knows of networks or windows, and how a file is decoded is ``decoding``'s business.
"""

from __future__ import annotations

import io
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from ..errors import UsageError
from ..system.files import atomic_write
from .decoding import decode
from .first_picture import MAX_PIXELS
from .masks import Mask
from .metadata import Metadata, exif_block
from .png import write_png
from .tiff import write_tiff

__all__ = ["MAX_PIXELS", "OUTPUT_FORMATS", "Picture", "check_output", "read_picture", "write_picture"]

OUTPUT_FORMATS = {  # by extension
    **{".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".tif": "TIFF", ".tiff": "TIFF", ".webp": "WEBP", ".bmp": "BMP"}
}
JPEG_QUALITY = 95
_LONGEST_EXIF = 65_000  # bytes, in a JPEG
_LONGEST_SIDE = {"JPEG": 65500, "WEBP": 16383}  # limits of the formats


@dataclass(frozen=True, eq=False)
class Picture:
    """An upright picture.

    Attributes:
        pixels: (H, W, C), uint8 or uint16; C is 1 for grey, 3 for RGB.
        alpha: (H, W) of the same type, or None. Colours are not multiplied by it.
        metadata: the ICC profile and what else says how the pixels are meant; EXIF.
        notes: what the reader changed or left out, a sentence each.
        orientation: the EXIF orientation that the reader undid; a mask may have been drawn before that.
    """

    pixels: np.ndarray
    alpha: np.ndarray | None = None
    metadata: Metadata = field(default_factory=Metadata)
    notes: tuple[str, ...] = field(default=())
    orientation: int = 1

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
    picture = Picture.from_array(decoded.samples, decoded.metadata, decoded.notes)
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
    longest = max(picture.size)
    lacks = ""
    if form not in ("PNG", "TIFF") and picture.bits == 16:
        lacks = "16-bit samples"
    elif form in ("JPEG", "BMP") and not picture.opaque:
        lacks = "an alpha channel"
    elif longest > _LONGEST_SIDE.get(form, longest):
        lacks = f"a side of {longest} pixels"
    elif form == "TIFF" and picture.bits == 16 and picture.samples.shape[2] == 2:
        lacks = "16-bit grey with alpha that other programs can read"
    if lacks:
        raise UsageError(f"output {path}: {form} cannot hold {lacks}: use .png")
    return form


def write_picture(path: str | os.PathLike[str], picture: Picture) -> tuple[str, ...]:
    """Write in the format of the extension, whole or not at all; return notes on what the file does not keep.

    PNG, TIFF, BMP and WebP (in its lossless form, where grey becomes RGB) keep every sample, JPEG does not. PNG holds
    all of the metadata, the others a part.

    Raises:
        UsageError: as ``check_output``.
        MachineError: the folder is missing, read-only or full.
    """
    form = check_output(path, picture)
    with atomic_write(path) as temporary, temporary.open("wb") as stream:
        if form == "PNG":
            write_png(stream, picture.samples, picture.metadata.png_chunks())
        elif form == "TIFF":
            write_tiff(stream, picture.samples, picture.metadata.exif_with_resolution(), picture.metadata.icc)
        else:
            stream.write(_encoded(form, picture))
    return tuple(f"{path} is {form}, {note}" for note in _losses(form, picture))


def _losses(form: str, picture: Picture) -> list[str]:
    """What a file in the format ``form`` does not keep of ``picture``; none of it for PNG."""
    metadata, grey = picture.metadata, picture.pixels.shape[2] == 1
    losses = []
    if form == "JPEG":
        losses.append("which is lossy: pixels outside the mask change slightly; .png keeps them")
    if metadata.icc is not None and (form == "BMP" or (form == "WEBP" and grey)):
        of_what = " for grey" if form == "WEBP" else ""
        losses.append(f"which holds no ICC profile{of_what}: colours may look different; .png keeps it")
    if form != "PNG" and (chunks := metadata.special_colours()):
        losses.append(f"which holds no {' and '.join(chunks)}: colours may look different; .png keeps them")
    if metadata.exif and (form == "BMP" or (form == "JPEG" and len(exif_block(metadata.exif)) > _LONGEST_EXIF)):
        losses.append("which holds no EXIF metadata of this length: left out; .png keeps them")
    return losses


def _encoded(form: str, picture: Picture) -> bytes:
    """A JPEG, BMP or WebP file; in memory, since Pillow does not tell a full disk from a fault of its own."""
    metadata = picture.metadata
    samples = picture.samples if form == "WEBP" else picture.pixels
    image = Image.fromarray(samples[..., 0] if samples.shape[2] == 1 else samples)
    options: dict[str, Any] = {} if metadata.dpi is None else {"dpi": metadata.dpi}
    # WebP has no other place for the resolution.
    exif = metadata.exif_with_resolution() if form == "WEBP" else metadata.exif
    if exif and len(block := exif_block(exif)) <= _LONGEST_EXIF:
        options["exif"] = block
    if form == "JPEG":  # 4:4:4, or the colours of a filled edge would bleed
        options |= {"quality": JPEG_QUALITY, "subsampling": 0, "icc_profile": metadata.icc}
    elif form == "WEBP":  # exact: also what lies under full transparency
        image = image.convert("RGB" if picture.alpha is None else "RGBA")
        icc = metadata.icc if picture.pixels.shape[2] == 3 else None  # a profile for grey does not fit RGB
        options |= {"lossless": True, "exact": True, "quality": 40, "method": 2, "icc_profile": icc}
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()
