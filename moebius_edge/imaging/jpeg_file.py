"""Takes the first picture out of a JPEG file: its coded pixels and its metadata, as ``containers`` does for others.

A JPEG is a chain of segments. Those that describe the picture are taken out, and the scans are counted and weighed
against the picture's size: a file of a few kilobytes may claim a hundred megapixels, or ask for thousands of scans.
"""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

from .containers import MAX_PARTS, SLACK, FirstPicture, check_size
from .metadata import plausible_dpi
from .png_tiff import Unreadable

END = b"\xff\xd9"
# A marker: none of the bytes that stand in coded data, which are stuffing (0) and restarts (D0 to D7).
_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
_MAX_BYTES = 1 << 29  # of a file
_MAX_MEMORY = 1_000_000_000  # bytes while it is decoded, above those of its pixels
_MAX_SCANS = 20  # of a picture of any size; the usual script for progressive CMYK has 18
_MAX_SCANNED_PIXELS = 1_500_000_000  # pixels times scans, where there are more scans; two or three seconds of work


@dataclass
class _Frame:
    """What a JPEG says of its pixels, and what of them is there.

    Attributes:
        stored: numbers that are kept for a pixel until the last scan is read.
        unfinished: by component, a bit for each coefficient that lacks its last binary digit.
    """

    width: int = 0
    height: int = 0
    arithmetic: bool = False
    stored: float = 0
    unfinished: dict[int, int] = field(default_factory=dict)
    scans: int = 0
    coded_bytes: int = 0

    def begin(self, code: int, header: bytes) -> None:
        """Take the header of the frame, a SOF segment."""
        if len(header) < 6 or len(header) < 6 + 3 * header[5] or not header[5]:
            raise Unreadable("its header is damaged")
        self.height, self.width = struct.unpack_from(">HH", header, 1)
        check_size(self.width, self.height)
        self.arithmetic = code > 0xC8
        components = header[6 : 6 + 3 * header[5]]
        across, down = [factor >> 4 for factor in components[1::3]], [factor & 15 for factor in components[1::3]]
        finest = max(across) * max(down) or 1
        self.stored = sum(x * y for x, y in zip(across, down, strict=True)) / finest
        self.unfinished = dict.fromkeys(components[::3], 2**64 - 1)

    def scan(self, header: bytes, coded_bytes: int) -> None:
        """Take a scan by its header and its length: strike out the coefficients that it finishes."""
        self.scans += 1
        self.coded_bytes += coded_bytes
        count = header[0] if header else 0
        if len(header) < 4 + 2 * count:
            return
        first, last, position = header[1 + 2 * count : 4 + 2 * count]
        if position & 15 == 0 and first <= last < 64:  # the last digit of each, or all of them at once
            for component in header[1 : 1 + 2 * count : 2]:
                if component in self.unfinished:
                    self.unfinished[component] &= ~((2 << last) - (1 << first))

    def check(self, ended: bool) -> None:
        """Raise ``Unreadable`` where pixels are missing for certain, or would take too much memory or time."""
        pixels = self.width * self.height
        if not self.scans or (not ended and any(self.unfinished.values())):
            raise Unreadable("it is truncated")
        if self.scans > 1:  # two bytes for each number, and four for each pixel; three of these are needed
            check_size(self.width, self.height, int(_MAX_MEMORY / (2 * self.stored + 1)), " in several scans")
        check_scans(self.scans, pixels)
        # A Huffman code takes a bit or more for each block of the finest component: 8x8 pixels, of a quarter of them.
        if not self.arithmetic and pixels > 8 * 256 * self.coded_bytes + SLACK:
            raise Unreadable(f"it is truncated: {self.coded_bytes} bytes cannot hold its pixels")


def first_jpeg(stream: BinaryIO) -> FirstPicture:
    """The first picture of the JPEG file in ``stream``; those that cameras append are previews and depth maps.

    Raises:
        Unreadable: the file is damaged, or asks for far too much work.
    """
    data = memoryview(stream.read(_MAX_BYTES))
    found, frame = FirstPicture(io.BytesIO(), ended=False), _Frame()
    found.file.write(data[:2])
    profile: dict[int, bytes] = {}  # its parts by number
    for code, segment, coded in _segments(data):
        body = bytes(segment[4:])
        if code == 0xD9:
            found.ended = True
        if 0xE0 <= code <= 0xEF or code == 0xFE:
            _take_metadata(found, profile, code, body)
            if not body.startswith((b"JFIF\0", b"Adobe")):  # these say how the colours are coded
                continue
        if 0xC0 <= code <= 0xCF and code not in (0xC4, 0xC8, 0xCC):
            frame.begin(code, body)
        if code == 0xDA:
            frame.scan(body, len(coded))
        found.file.write(segment)
        found.file.write(coded)
    frame.check(found.ended)
    if profile:
        found.icc = b"".join(profile[number] for number in sorted(profile))
    found.file.write(b"" if found.ended else END)
    return found


def _segments(data: memoryview) -> Iterator[tuple[int, memoryview, memoryview]]:
    """(code, the segment with its marker, the coded data that follow it) up to the end of the first picture."""
    nothing = data[:0]
    at = 2
    for _ in range(MAX_PARTS):
        marker = _MARKER.search(data, at)
        if marker is None:
            return
        place, code = marker.start(), data[marker.start() + 1]
        at = marker.end()
        if code in (0x01, 0xD8):  # without a length
            continue
        if code == 0xD9:
            yield code, data[place:at], nothing
            return
        length = int.from_bytes(data[at : at + 2], "big")
        at += length
        if length < 2 or at > len(data):
            return
        segment, coded = data[place:at], nothing
        if code == 0xDA:
            following = _MARKER.search(data, at)
            stop = following.start() if following else len(data)
            coded, at = data[at:stop], stop
        yield code, segment, coded
    raise Unreadable(f"it has more than {MAX_PARTS} segments")


def check_scans(scans: int, pixels: int) -> None:
    """Raise ``Unreadable`` where so many scans of a JPEG of so many pixels would take too long."""
    if scans > _MAX_SCANS and scans * pixels > _MAX_SCANNED_PIXELS:
        raise Unreadable(f"it has {scans} scans of {pixels / 1e6:.1f} megapixels, which take too long to decode")


def _take_metadata(found: FirstPicture, profile: dict[int, bytes], code: int, body: bytes) -> None:
    if code == 0xE0 and body.startswith(b"JFIF\0") and len(body) >= 12 and body[7] in (1, 2):
        scale = 1 if body[7] == 1 else 2.54
        x, y = struct.unpack_from(">HH", body, 8)
        found.dpi = plausible_dpi(x * scale, y * scale)
    elif code == 0xE1 and body.startswith(b"Exif\0\0"):
        found.take_exif(body)
    elif code == 0xE1 and body.startswith(b"http://ns.adobe.com/") or code == 0xED:
        found.xmp = True
    elif code == 0xE2 and body.startswith(b"ICC_PROFILE\0") and len(body) > 14:
        profile.setdefault(body[12], body[14:])
