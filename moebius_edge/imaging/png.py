"""PNG files: read chunk by chunk, within limits, and written at any depth.

Pillow alone would call a file with a long text or profile damaged, and knows no chunks of colours but the oldest; and
neither it nor OpenCV tells where pixels are missing.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Sequence
from typing import BinaryIO

import numpy as np

from .first_picture import MAX_PARTS, FirstPicture, Unreadable, check_size
from .metadata import PNG_COLOUR_BYTES

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
LEVEL = 3  # of deflate; 6 takes three times as long for 8% on photographs
_COLOUR_TYPES = {1: 0, 2: 4, 3: 2, 4: 6}  # by channels
_UP = 2  # PNG's filter "difference to the row above": within a few percent of the best choice, and fast
_BLOCK_BYTES = 1 << 20  # inflated or deflated at a time
_MAX_ICC_BYTES = 32 << 20
_MAX_EXIF_BYTES = 1 << 20
_NEEDED = (b"IHDR", b"PLTE", b"tRNS", b"IDAT")  # by the decoders
_METADATA = (b"iCCP", b"pHYs", b"eXIf", *PNG_COLOUR_BYTES)
_XMP_TEXT = b"XML:com.adobe.xmp"
_PASSES = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]


class _Pixels:
    """Counts the bytes that a PNG's coded pixels inflate to; of more than there are pixels, nothing is inflated."""

    def __init__(self, header: bytes) -> None:
        if len(header) != 13:
            raise Unreadable("its header is damaged")
        width, height, self.depth, colour_type, _, _, interlaced = struct.unpack(">IIBBBBB", header)
        check_size(width, height)
        bits = self.depth * {2: 3, 4: 2, 6: 4}.get(colour_type, 1)
        self.missing = 0  # bytes
        for x, y, step_x, step_y in _PASSES if interlaced else [(0, 0, 1, 1)]:  # first column and row, steps
            columns, rows = -(-(width - x) // step_x), -(-(height - y) // step_y)
            self.missing += rows * (1 + (columns * bits + 7) // 8) if columns > 0 and rows > 0 else 0
        self._excess = 2 * self.missing + _BLOCK_BYTES
        self._inflate = zlib.decompressobj()

    def add(self, coded: bytes) -> None:
        """Take the body of an IDAT chunk."""
        self._excess -= len(coded)
        if self._excess < 0:
            raise Unreadable("it has more coded data than its pixels can take")
        while coded and self.missing > 0:
            try:
                self.missing -= len(self._inflate.decompress(coded, _BLOCK_BYTES))
            except zlib.error:
                raise Unreadable("its pixels are damaged") from None
            coded = self._inflate.unconsumed_tail


def first_png(stream: BinaryIO) -> FirstPicture:
    """The PNG file in ``stream``, without the chunks that its pixels do not need.

    Raises:
        Unreadable: the file is damaged, lacks pixels, or asks for far too much work.
    """
    picture, pixels = FirstPicture(io.BytesIO(), ended=False), None
    picture.file.write(PNG_SIGNATURE)
    stream.seek(len(PNG_SIGNATURE))
    seen = set()  # of metadata, the first chunk of each kind counts
    for _ in range(MAX_PARTS):
        head = stream.read(8)
        length, name = int.from_bytes(head[:4], "big"), head[4:]
        picture.ended = name == b"IEND"
        if len(head) < 8 or picture.ended:
            break
        picture.several |= name == b"acTL"
        needed, described = name in _NEEDED, name in _METADATA and (name != b"eXIf" or length < _MAX_EXIF_BYTES)
        if not needed and (not described or name in seen):
            start = stream.read(min(length, len(_XMP_TEXT)))
            picture.xmp |= name == b"iTXt" and start == _XMP_TEXT
            stream.seek(length - len(start) + 4, io.SEEK_CUR)
            continue
        body, checksum = stream.read(length), stream.read(4)
        sound = len(checksum) < 4 or zlib.crc32(body, zlib.crc32(name)) == int.from_bytes(checksum, "big")
        if needed and (not sound or (name != b"IDAT" and len(checksum) < 4)):
            raise Unreadable(f"its {name.decode()} chunk is damaged")
        if not needed:
            seen.add(name)
            if not sound or not _take_metadata(picture, name, body):
                picture.notes.append(f"has a damaged {name.decode()} chunk: left out")
                continue
        if name == b"IHDR":
            pixels = _Pixels(body)
        elif name == b"tRNS" and pixels is not None and pixels.depth == 16:
            raise Unreadable("a transparent colour at 16 bits is not supported, an alpha channel is")
        elif name == b"IDAT" and pixels is not None:
            pixels.add(body)
        if needed or name == b"pHYs":  # of the others Pillow limits some, and some it does not know
            picture.file.write(png_chunk(name, body))
    else:
        raise Unreadable(f"it has more than {MAX_PARTS} chunks")
    if pixels is None or pixels.missing > 0:
        raise Unreadable("it is truncated")
    picture.bits = max(8, pixels.depth)
    picture.file.write(png_chunk(b"IEND", b""))
    return picture


def _take_metadata(picture: FirstPicture, name: bytes, body: bytes) -> bool:
    """Take a chunk of ``_METADATA``; whether it is sound."""
    if name == b"iCCP":
        start = body.find(b"\0") + 2  # after the profile's name and the method of compression
        try:
            picture.icc = zlib.decompressobj().decompress(body[start:], _MAX_ICC_BYTES)
        except zlib.error:
            picture.icc = b""  # it will not fit the pixels
    elif name == b"eXIf":
        picture.exif = body
    elif name in PNG_COLOUR_BYTES:
        if len(body) != PNG_COLOUR_BYTES[name]:
            return False
        picture.png_colour.append((name, body))
    return True


def png_chunk(name: bytes, body: bytes) -> bytes:
    """A chunk of a PNG file: length, name, body and checksum."""
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(body, zlib.crc32(name)))


def write_png(stream: BinaryIO, samples: np.ndarray, metadata: Sequence[tuple[bytes, bytes]] = ()) -> None:
    """Write a PNG file.

    Args:
        samples: (H, W, C) uint8 or uint16, with C = 1 grey, 2 grey and alpha, 3 RGB, 4 RGB and alpha.
        metadata: chunks (name, body) that stand before the pixels.
    """
    height, width, channels = samples.shape
    header = struct.pack(">IIBBBBB", width, height, 8 * samples.itemsize, _COLOUR_TYPES[channels], 0, 0, 0)
    stream.write(PNG_SIGNATURE + b"".join(png_chunk(*chunk) for chunk in [(b"IHDR", header), *metadata]))
    deflate = zlib.compressobj(LEVEL)
    row_bytes = width * channels * samples.itemsize
    above = np.zeros((1, row_bytes), np.uint8)
    step = max(1, _BLOCK_BYTES // row_bytes)
    for start in range(0, height, step):
        rows = samples[start : start + step]
        raw = np.ascontiguousarray(rows, rows.dtype.newbyteorder(">")).view(np.uint8).reshape(-1, row_bytes)
        filtered = np.full((len(raw), 1 + row_bytes), _UP, np.uint8)
        filtered[:, 1:] = raw - np.concatenate([above, raw[:-1]])
        above = raw[-1:]
        if compressed := deflate.compress(filtered.data):
            stream.write(png_chunk(b"IDAT", compressed))
    stream.write(png_chunk(b"IDAT", deflate.flush()) + png_chunk(b"IEND", b""))
