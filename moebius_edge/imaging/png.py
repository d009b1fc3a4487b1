"""PNG files: read chunk by chunk, within limits, and written at any depth.

Pillow alone would call a file with a long text or profile damaged, compares no checksum of pixels, and knows no chunks
of colours but the oldest.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import BinaryIO

import numpy as np

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
LEVEL = 3  # of deflate; 6 takes three times as long for 8% on photographs
_COLOUR_TYPES = {1: 0, 2: 4, 3: 2, 4: 6}  # by channels
_UP = 2  # PNG's filter "difference to the row above": within a few percent of the best choice, and fast
_BLOCK_BYTES = 1 << 20  # deflated at a time
_MAX_CHUNKS = 1_000_000  # reading so many takes a second or two
_MAX_ICC_BYTES = 32 << 20
_NEEDED = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"pHYs")  # by the decoders
_COLOUR = (b"gAMA", b"cHRM", b"sRGB", b"cICP", b"mDCV", b"cLLI")
_MAX_COLOUR_BYTES = 32
_MAX_EXIF_BYTES = 1 << 20
_XMP_TEXT = b"XML:com.adobe.xmp"


@dataclass
class PngFile:
    """A PNG file taken apart.

    Attributes:
        file: a PNG file with those chunks alone that the decoders need.
        bits: of one sample, 8 for less.
        chunks: the bodies of those that describe the pixels, by name; of several of a name the first.
        animated: the file holds further frames.
        xmp: it has XMP metadata, which are not kept.
    """

    file: BinaryIO = field(default_factory=io.BytesIO)
    bits: int = 8
    chunks: dict[bytes, bytes] = field(default_factory=dict)
    animated: bool = False
    xmp: bool = False

    def icc(self) -> bytes | None:
        """The ICC profile, as it is; empty where it is damaged."""
        body = self.chunks.get(b"iCCP")
        if body is None:
            return None
        try:  # it comes after its name and the method of compression
            return zlib.decompressobj().decompress(body[body.find(b"\0") + 2 :], _MAX_ICC_BYTES)
        except zlib.error:
            return b""

    def colour(self) -> tuple[tuple[bytes, bytes], ...]:
        """The chunks (name, body) that say what the samples mean, besides the profile."""
        return tuple((name, self.chunks[name]) for name in _COLOUR if name in self.chunks)


def read_png(stream: BinaryIO) -> PngFile:
    """The PNG file in ``stream``. Raises ``ValueError`` where it is truncated or damaged, or has chunks without end."""
    png = PngFile()
    png.file.write(PNG_SIGNATURE)
    stream.seek(len(PNG_SIGNATURE))
    for _ in range(_MAX_CHUNKS):
        length, name = struct.unpack(">I4s", _read(stream, 8))
        png.animated |= name == b"acTL"
        longest = {b"iCCP": _MAX_ICC_BYTES, b"eXIf": _MAX_EXIF_BYTES} | dict.fromkeys(_COLOUR, _MAX_COLOUR_BYTES)
        described = length <= longest.get(name, -1) and name not in png.chunks
        if name not in _NEEDED and not described:
            start = stream.read(min(length, len(_XMP_TEXT)))
            png.xmp |= name == b"iTXt" and start == _XMP_TEXT
            stream.seek(length - len(start) + 4, io.SEEK_CUR)
            continue
        body, (checksum,) = _read(stream, length), struct.unpack(">I", _read(stream, 4))
        if zlib.crc32(body, zlib.crc32(name)) != checksum:
            raise ValueError(f"its {name.decode()} chunk is damaged")
        if described:
            png.chunks[name] = body
        else:
            png.file.write(png_chunk(name, body))
        if name == b"IHDR":
            png.bits = max(8, body[8])
        elif name == b"tRNS" and png.bits == 16:
            raise ValueError("a transparent colour at 16 bits is not supported, an alpha channel is")
        elif name == b"IEND":
            return png
    raise ValueError(f"it has more than {_MAX_CHUNKS} chunks")


def _read(stream: BinaryIO, length: int) -> bytes:
    data = stream.read(length)
    if len(data) < length:
        raise ValueError("it is truncated")
    return data


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
