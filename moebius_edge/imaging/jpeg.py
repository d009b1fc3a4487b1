"""JPEG files: a chain of segments, of which the decoders see those of the first picture alone.

The scans are counted and weighed against the picture's size: a file of a few kilobytes may claim a hundred megapixels,
or ask for thousands of scans.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from typing import BinaryIO

from .first_picture import MAX_PARTS, FirstPicture, Unreadable, check_scans, check_size

END = b"\xff\xd9"
# A marker: none of the bytes that stand in coded data, which are stuffing (0) and restarts (D0 to D7).
_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
_APP0, _APP15, _COMMENT, _SCAN, _EOI = 0xE0, 0xEF, 0xFE, 0xDA, 0xD9
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_LEFT_TO_PILLOW = (b"JFIF\0", b"Adobe", b"ICC_PROFILE\0")
_MAX_BYTES = 1 << 29  # of a file
_MAX_PIXELS_IN_SCANS = 140_000_000  # of several scans all numbers are kept in memory


def first_jpeg(stream: BinaryIO) -> FirstPicture:
    """The first picture of the JPEG file in ``stream``; those that cameras append are previews and depth maps.

    Raises:
        Unreadable: the file is damaged, lacks scans, or asks for far too much work.
    """
    data = memoryview(stream.read(_MAX_BYTES))
    picture = FirstPicture(io.BytesIO(), ended=False)
    picture.file.write(data[:2])
    width = height = scans = coded_bytes = 0
    coefficients: set[tuple[int, int]] = set()  # (component, number) of those that lack digits
    for code, segment, coded in _segments(data):
        body = bytes(segment[4:])
        if _APP0 <= code <= _APP15 or code == _COMMENT:
            picture.xmp |= code == 0xED or body.startswith(b"http://ns.adobe.com/")
            if body.startswith(b"Exif\0\0"):
                picture.exif = picture.exif or body  # of several blocks the first counts
            if not body.startswith(_LEFT_TO_PILLOW):
                continue
        elif code in _FRAMES:
            if len(body) < 6 or len(body) < 6 + 3 * body[5]:
                raise Unreadable("its header is damaged")
            height, width = int.from_bytes(body[1:3], "big"), int.from_bytes(body[3:5], "big")
            coefficients = {(component, n) for component in body[6 : 6 + 3 * body[5] : 3] for n in range(64)}
        elif code == _SCAN:
            scans, coded_bytes = scans + 1, coded_bytes + len(coded)
            coefficients -= _finished(body)
        picture.ended |= code == _EOI
        picture.file.write(segment)
        picture.file.write(coded)
    check_size(width, height, *((_MAX_PIXELS_IN_SCANS, " of JPEG in several scans") if scans > 1 else ()))
    check_scans(scans, width * height)
    # A Huffman code takes a bit or more for a block of the finest component: 8x8 pixels, of a quarter of them.
    too_short = width * height > 8 * 256 * coded_bytes + (1 << 16)
    if not scans or too_short or (coefficients and not picture.ended):
        raise Unreadable(f"it is truncated: {coded_bytes} bytes cannot hold its pixels")
    picture.file.write(b"" if picture.ended else END)
    return picture


def _finished(header: bytes) -> set[tuple[int, int]]:
    """The coefficients (component, number) of which a scan with this header holds the last digit, or all of them."""
    count = header[0] if header else 0
    if len(header) < 4 + 2 * count:
        return set()
    first, last, position = header[1 + 2 * count : 4 + 2 * count]
    if position & 15:
        return set()
    return {(component, n) for component in header[1 : 1 + 2 * count : 2] for n in range(first, min(last, 63) + 1)}


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
        if code == _EOI:
            yield code, data[place:at], nothing
            return
        length = int.from_bytes(data[at : at + 2], "big")
        at += length
        if length < 2 or at > len(data):
            return
        segment, coded = data[place:at], nothing
        if code == _SCAN:
            following = _MARKER.search(data, at)
            stop = following.start() if following else len(data)
            coded, at = data[at:stop], stop
        yield code, segment, coded
    raise Unreadable(f"it has more than {MAX_PARTS} segments")
