"""What the readers of the file formats have in common: the first picture of a file, and the limits of what is read.

The parts of a file that describe it are a decoder's most fragile ones: text that inflates to gigabytes, a hundred
thousand directories, a profile of the wrong type. ``png`` and ``jpeg`` take the coded pixels of the first picture and
its metadata out of a file, so that decoders see nothing else, and ``tiff`` checks what they will see. Work that no
picture needs is refused before it is done.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from typing import BinaryIO

from .metadata import read_exif
from .tiff_tags import Directory, Unreadable

MAX_PIXELS = 250_000_000  # above the largest camera sensors (200 MP), below what a hostile header would claim
MAX_PARTS = 1_000_000  # chunks of a PNG, segments of a JPEG: reading so many takes a second or two
_MAX_SCANS = 20  # of a JPEG of any size; the usual script for progressive CMYK has 18
_MAX_SCANNED_PIXELS = 1_500_000_000  # pixels times scans, where there are more scans; two or three seconds of work


class TooLarge(Unreadable):
    """The picture has too many pixels; the text gives its size and the limit."""


def check_size(width: int, height: int, most: int = MAX_PIXELS, of_what: str = "") -> None:
    """Raise ``TooLarge`` where a picture of this size has more pixels than ``most``."""
    if width * height > most:
        size = f"{width}x{height}, {width * height / 1e6:.0f} megapixels"
        raise TooLarge(f"{size}: at most {most / 1e6:.0f}{of_what} are read")


def check_scans(scans: int, pixels: int) -> None:
    """Raise ``Unreadable`` where so many scans of a JPEG of so many pixels would take too long."""
    if scans > _MAX_SCANS and scans * pixels > _MAX_SCANNED_PIXELS:
        raise Unreadable(f"it has {scans} scans of {pixels / 1e6:.1f} megapixels, which take too long to decode")


@dataclass
class FirstPicture:
    """The first picture of a file.

    Attributes:
        file: a file that the decoders read: the file itself, or one of the same format that holds that picture alone.
        bits: of one sample in the file, 8 for less.
        ended: the end of the picture is marked, or its length is checked.
        several: the file holds further pictures (frames or pages).
        transparent_colour: body of a PNG's tRNS chunk.
        icc, dpi, png_colour: as of ``Metadata``; the profile unchecked.
        exif, exif_sound: as ``metadata.read_exif`` returns them; of several blocks the first counts.
        xmp: the file has XMP or IPTC metadata, which are not kept.
        notes: what was left out, each the end of a sentence that begins with the file's name.
    """

    file: BinaryIO
    bits: int = 8
    ended: bool = True
    several: bool = False
    transparent_colour: bytes | None = None
    icc: bytes | None = None
    dpi: tuple[float, float] | None = None
    png_colour: list[tuple[bytes, bytes]] = field(default_factory=list)
    exif: Directory | None = None
    exif_sound: bool = True
    xmp: bool = False
    notes: list[str] = field(default_factory=list)

    def contents(self) -> bytes | memoryview:
        """All of ``file``."""
        if isinstance(self.file, io.BytesIO):
            return self.file.getbuffer()
        self.file.seek(0)
        return self.file.read()

    def take_exif(self, block: bytes) -> None:
        """Read an EXIF block into ``exif``, unless there was one before."""
        if self.exif is None:
            self.exif, self.exif_sound = read_exif(block)
