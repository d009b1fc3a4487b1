"""Pictures to files, in their own depth, with alpha and metadata; what reads them is at hand here too."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image

from ..errors import UsageError
from ..system.files import atomic_write
from .decoding import MAX_PIXELS, read_picture
from .metadata import exif_block
from .picture import Picture
from .png import write_png
from .tiff import write_tiff

__all__ = [
    "MAX_PIXELS",
    "OUTPUT_FORMATS",
    "Picture",
    "check_output",
    "encode_picture",
    "missing_in",
    "read_picture",
    "write_picture",
]

OUTPUT_FORMATS = {  # by extension
    **{".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".tif": "TIFF", ".tiff": "TIFF", ".webp": "WEBP", ".bmp": "BMP"}
}
JPEG_QUALITY = 95
_LONGEST_EXIF = 65_000  # bytes, in a JPEG
_LONGEST_SIDE = {"JPEG": 65500, "WEBP": 16383}  # limits of the formats


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
    if lacks := missing_in(form, picture):
        raise UsageError(f"output {path}: {form} cannot hold {lacks}: use .png")
    return form


def missing_in(form: str, picture: Picture) -> str:
    """What the format ``form`` cannot hold of ``picture``; empty if it holds all, as PNG always does."""
    longest = max(picture.size)
    if form not in ("PNG", "TIFF") and picture.bits == 16:
        return "16-bit samples"
    if form in ("JPEG", "BMP") and not picture.opaque:
        return "an alpha channel"
    if longest > _LONGEST_SIDE.get(form, longest):
        return f"a side of {longest} pixels"
    if form == "TIFF" and picture.bits == 16 and picture.samples.shape[2] == 2:
        return "16-bit grey with alpha that other programs can read"
    return ""


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
        notes = encode_picture(stream, form, picture)
    return tuple(f"{path} is {note}" for note in notes)


def encode_picture(stream: BinaryIO, form: str, picture: Picture) -> tuple[str, ...]:
    """Write ``picture`` to ``stream`` in a format that holds it; return notes such as "JPEG, which is lossy"."""
    if form == "PNG":
        write_png(stream, picture.samples, picture.metadata.png_chunks())
    elif form == "TIFF":
        write_tiff(stream, picture.samples, picture.metadata.exif_with_resolution(), picture.metadata.icc)
    else:
        stream.write(_encoded(form, picture))
    return tuple(f"{form}, {note}" for note in _losses(form, picture))


def _losses(form: str, picture: Picture) -> list[str]:
    """What a file in the format ``form`` does not keep of ``picture``; none of it for PNG."""
    metadata, grey = picture.metadata, picture.pixels.shape[2] == 1
    losses = []
    if form == "JPEG":
        losses.append("which is lossy: pixels outside the mask change slightly; .png keeps them")
    if metadata.icc is not None and (form == "BMP" or (form == "WEBP" and grey)):
        of_what = " for grey" if form == "WEBP" else ""
        losses.append(f"which holds no ICC profile{of_what}: colours may look different; .png keeps it")
    if form != "PNG" and (chunk := metadata.special_colour()):
        losses.append(f"which holds no {chunk}: colours may look different; .png keeps it")
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
