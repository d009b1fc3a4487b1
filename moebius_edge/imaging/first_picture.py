"""What the readers of the file formats have in common: the first picture of a file, and the limits of what is read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import BinaryIO

MAX_PIXELS = 250_000_000  # above the largest camera sensors (200 MP), below what a hostile header would claim
MAX_PARTS = 1_000_000  # chunks of a PNG, segments of a JPEG: reading so many takes a second or two
_MAX_SCANS = 20  # of a JPEG of any size; the usual script for progressive CMYK has 18
_MAX_SCANNED_PIXELS = 1_500_000_000  # pixels times scans, where there are more scans; two or three seconds of work


class Unreadable(Exception):
    """The file is damaged, or uses a feature that cannot be read without loss; the text says which."""


class TooLarge(Unreadable):
    """The picture has too many pixels; the text gives its size and the limit."""


@dataclass
class FirstPicture:
    """The first picture of a file.

    Attributes:
        file: a file that the decoders read: the file itself, or one of the same format that holds that picture alone.
        bits: of one sample in the file, 8 for less.
        ended: the end of the picture is marked, or its length is checked.
        several: the file holds further pictures (frames or pages).
        icc, png_colour: as of ``Metadata``; the profile unchecked.
        exif: the EXIF block of a PNG or JPEG.
        xmp: the file has XMP or IPTC metadata, which are not kept.
        notes: what was left out, each the end of a sentence that begins with the file's name.
    """

    file: BinaryIO
    bits: int = 8
    ended: bool = True
    several: bool = False
    icc: bytes | None = None
    exif: bytes | None = None
    png_colour: list[tuple[bytes, bytes]] = field(default_factory=list)
    xmp: bool = False
    notes: list[str] = field(default_factory=list)

    def contents(self) -> bytes:
        """All of ``file``."""
        self.file.seek(0)
        return self.file.read()


def check_size(width: int, height: int, most: int = MAX_PIXELS, of_what: str = "") -> None:
    """Raise ``TooLarge`` where a picture of this size has more pixels than ``most``."""
    if width * height > most:
        size = f"{width}x{height}, {width * height / 1e6:.0f} megapixels"
        raise TooLarge(f"{size}: at most {most / 1e6:.0f}{of_what} are read")


def check_scans(scans: int, pixels: int) -> None:
    """Raise ``Unreadable`` where so many scans of a JPEG of so many pixels would take too long."""
    if scans > _MAX_SCANS and scans * pixels > _MAX_SCANNED_PIXELS:
        raise Unreadable(f"it has {scans} scans of {pixels / 1e6:.1f} megapixels, which take too long to decode")
