"""Writes PNG and TIFF of any depth, decodes their 16-bit kinds, and reads and writes TIFF directories.

Samples are arrays (H, W, C) of uint8 or uint16 with C = 1 grey, 2 grey and alpha, 3 RGB, 4 RGB and alpha. Pillow
cannot hold 16-bit colour, so OpenCV decodes the compressed rows here; the picture is left as stored, orientation not
applied. Only baseline features are written: no palettes and no interlacing.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Sequence
from typing import BinaryIO, Union

import cv2
import numpy as np

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_COLOUR_TYPE = {1: 0, 2: 4, 3: 2, 4: 6}  # channels -> colour type
_UP = 2  # PNG's filter "difference to the row above": within a few percent of the best choice, and fast
_LEVEL = 3  # deflate; 6 takes three times as long for 8% on photographs
_BLOCK_BYTES = 1 << 20  # compressed at a time

Buffer = bytes | memoryview

# Tags of a directory: its type's number and the values as little-endian bytes, or a directory within it.
Directory = dict[int, Union[tuple[int, bytes], "Directory"]]
ASCII, SHORT, LONG, RATIONAL, UNDEFINED = 2, 3, 4, 5, 7  # types, by the names of the specification (TIFF 6.0)
_TYPE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
_INTEGERS = {1: "u1", 3: "<u2", 4: "<u4", 6: "i1", 8: "<i2", 9: "<i4", 13: "<u4", 16: "<u8", 18: "<u8"}
_ICC_TAG = 34675
MAX_ICC_BYTES = 32 << 20
_MAX_TAG_BYTES = 1 << 20  # of any other tag; the places of 131072 strips need as much
_MAX_ENTRIES = 65535


class Unreadable(Exception):
    """The file is damaged, or uses a feature that cannot be read without loss; the text says which."""


def decode_png16(data: Buffer, key: bytes | None) -> np.ndarray:
    """The samples of a 16-bit PNG. ``key`` is the body of its tRNS chunk: that colour gets an alpha of 0."""
    colour_type = data[25]
    decoded = decode16(data)
    if colour_type == 4:  # OpenCV spreads grey and alpha over four channels
        return np.ascontiguousarray(decoded[..., [0, 3]])
    if colour_type == 6:
        return decoded
    colour = decoded[..., : 1 if colour_type == 0 else 3]
    if key is None:
        return np.ascontiguousarray(colour)
    values = np.frombuffer(key[: len(key) // 2 * 2], ">u2").astype(np.uint16)
    if values.size != colour.shape[2]:
        raise Unreadable("its tRNS chunk is damaged")
    alpha = np.where((colour == values).all(axis=2), 0, 65535).astype(np.uint16)
    return np.dstack([colour, alpha])


def decode16(data: Buffer) -> np.ndarray:
    """The samples of a 16-bit PNG or TIFF, (H, W, C) in RGB order. A TIFF must not have an orientation tag."""
    decoded = decode_with_opencv(data, cv2.IMREAD_UNCHANGED)
    if decoded.dtype != np.uint16:
        raise Unreadable("its kind of 16-bit samples is not supported")
    return decoded


def decode_with_opencv(data: Buffer, flags: int = cv2.IMREAD_COLOR) -> np.ndarray:
    """The samples of a file, (H, W, C) in RGB order."""
    set_log_level = cv2.setLogLevel if hasattr(cv2, "setLogLevel") else cv2.utils.logging.setLogLevel  # 4.8, 5.0
    level = set_log_level(0)  # silent: it would report a damaged file on stderr
    try:
        decoded = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error:
        decoded = None
    finally:
        set_log_level(level)
    if decoded is None:
        raise Unreadable("it is truncated or damaged")
    if decoded.ndim == 2:
        return decoded[..., None]
    order = {3: cv2.COLOR_BGR2RGB, 4: cv2.COLOR_BGRA2RGBA}[decoded.shape[2]]
    step = max(1, _BLOCK_BYTES // decoded[0].nbytes)
    for start in range(0, len(decoded), step):  # a second array might be gigabytes
        decoded[start : start + step] = cv2.cvtColor(decoded[start : start + step], order)
    return decoded


def read_directory(
    stream: BinaryIO, place: int, order: str, wanted: frozenset[int], big: bool = False
) -> tuple[Directory, int]:
    """The ``wanted`` tags of the TIFF directory at ``place``, and the place of the next one, 0 for none.

    A tag whose values lie outside the file, or take more than the limit, counts as absent.

    Args:
        order: "<" or ">", the byte order of the file.
        big: the file is a BigTIFF.

    Raises:
        Unreadable: the directory itself lies outside the file.
    """
    head, entry, tail = (order + code for code in (("Q", "HHQ8s", "Q") if big else ("H", "HHI4s", "I")))
    (count,) = struct.unpack(head, _read(stream, place, struct.calcsize(head)))
    size = struct.calcsize(entry)
    table = stream.read(size * min(count, _MAX_ENTRIES))
    following = stream.read(struct.calcsize(tail))
    directory: Directory = {}
    for tag, kind, number, value in struct.iter_unpack(entry, table[: len(table) // size * size]):
        length = number * _TYPE_BYTES.get(kind, 0)
        limit = MAX_ICC_BYTES if tag == _ICC_TAG else _MAX_TAG_BYTES
        if tag not in wanted or tag in directory or not 0 < length <= limit:
            continue
        if length > len(value):
            value = _read(stream, struct.unpack(tail, value)[0], length, strict=False)
        if len(value) >= length:
            directory[tag] = _classic(kind, _swapped(kind, value[:length], order))
    if len(table) < size:
        raise Unreadable("it is truncated")
    complete = count <= _MAX_ENTRIES and len(following) == struct.calcsize(tail)
    return directory, struct.unpack(tail, following)[0] if complete else 0


def _classic(kind: int, values: bytes) -> tuple[int, bytes]:
    """Numbers of 64 bits, which only BigTIFF has, become 32 bits; larger ones become the largest of these."""
    if kind not in (16, 18):
        return kind, values
    return LONG, np.minimum(np.frombuffer(values, "<u8"), 2**32 - 1).astype("<u4").tobytes()


def integers(directory: Directory, tag: int, default: Sequence[int] = ()) -> list[int]:
    """The values of ``tag``, or ``default`` where it is absent or holds no whole numbers."""
    entry = directory.get(tag)
    if isinstance(entry, tuple) and entry[0] in _INTEGERS:
        values: list[int] = np.frombuffer(entry[1], _INTEGERS[entry[0]]).tolist()
        return values
    return list(default)


def _read(stream: BinaryIO, place: int, length: int, strict: bool = True) -> bytes:
    data = b""
    if place < 1 << 62:  # larger numbers would overflow in ``seek``
        stream.seek(place)
        data = stream.read(length)
    if strict and len(data) < length:
        raise Unreadable("it is truncated")
    return data


def _swapped(kind: int, values: bytes, order: str) -> bytes:
    """``values`` between little-endian and ``order``, either way."""
    word = 4 if kind in (5, 10) else _TYPE_BYTES[kind]  # a rational is a pair of numbers
    return values if order == "<" or word == 1 else np.frombuffer(values, f"u{word}").byteswap().tobytes()


def png_chunk(name: bytes, body: bytes) -> bytes:
    """A chunk of a PNG file: length, name, body and checksum."""
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(body, zlib.crc32(name)))


def write_png(stream: BinaryIO, samples: np.ndarray, metadata: Sequence[tuple[bytes, bytes]] = ()) -> None:
    """Write ``samples`` as PNG of their own depth, with the chunks (name, body) of ``metadata`` before the pixels."""
    height, width, channels = samples.shape
    bits = 8 * samples.itemsize

    def chunk(name: bytes, body: bytes) -> None:
        stream.write(png_chunk(name, body))

    stream.write(PNG_SIGNATURE)
    chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, _PNG_COLOUR_TYPE[channels], 0, 0, 0))
    for name, body in metadata:
        chunk(name, body)
    deflate = zlib.compressobj(_LEVEL)
    above = np.zeros((1, width * channels * samples.itemsize), np.uint8)
    for _, rows in _row_blocks(samples):
        raw = rows.astype(rows.dtype.newbyteorder(">"), copy=False).view(np.uint8)
        filtered = np.empty((len(raw), 1 + raw.shape[1]), np.uint8)
        filtered[:, 0] = _UP
        np.subtract(raw[:1], above, out=filtered[:1, 1:])
        np.subtract(raw[1:], raw[:-1], out=filtered[1:, 1:])
        above = raw[-1:]
        if compressed := deflate.compress(filtered.data):
            chunk(b"IDAT", compressed)
    chunk(b"IDAT", deflate.flush())
    chunk(b"IEND", b"")


def write_tiff(stream: BinaryIO, samples: np.ndarray, metadata: Directory | None = None) -> None:
    """Write ``samples`` as a little-endian TIFF of their own depth, deflated with horizontal differences.

    ``metadata`` holds further tags.
    """
    height, width, channels = samples.shape
    stream.write(b"II*\0\0\0\0\0")  # the directory's place is filled in at the end
    offsets, sizes, rows_per_strip = [], [], height
    for start, rows in _row_blocks(samples):
        if start == 0:
            rows_per_strip = len(rows)
        pixels = rows.reshape(len(rows), width, channels)
        differences = pixels.copy()
        differences[:, 1:] -= pixels[:, :-1]  # wraps around, as the format wants it
        strip = zlib.compress(differences.astype(rows.dtype.newbyteorder("<"), copy=False).tobytes(), _LEVEL)
        offsets.append(stream.tell())
        sizes.append(len(strip))
        stream.write(strip + b"\0" * (len(strip) % 2))  # every part begins at an even offset
    directory: Directory = {
        256: longs(width),
        257: longs(height),
        258: shorts(*[8 * samples.itemsize] * channels),
        259: shorts(8),  # compression: deflate
        262: shorts(1 if channels < 3 else 2),  # photometric: black is zero, or RGB
        273: longs(*offsets),
        277: shorts(channels),
        278: longs(rows_per_strip),
        279: longs(*sizes),
        284: shorts(1),  # interleaved
        317: shorts(2),  # predictor: horizontal differences
    }
    if channels in (2, 4):
        directory[338] = shorts(2)  # extra sample: alpha, colours not multiplied by it
    place = write_directory(stream, directory | (metadata or {}))
    stream.seek(4)
    stream.write(struct.pack("<I", place))


def shorts(*values: int) -> tuple[int, bytes]:
    return SHORT, struct.pack(f"<{len(values)}H", *values)


def longs(*values: int) -> tuple[int, bytes]:
    return LONG, struct.pack(f"<{len(values)}I", *values)


def write_directory(stream: BinaryIO, directory: Directory, order: str = "<") -> int:
    """Append the values that do not fit an entry, the directories within, then the directory; return its place."""
    entries = []
    for tag, entry in sorted(directory.items()):
        kind, values = longs(write_directory(stream, entry, order)) if isinstance(entry, dict) else entry
        number = len(values) // _TYPE_BYTES[kind]
        body = _swapped(kind, values, order)
        if len(body) > 4:
            place = stream.tell()
            stream.write(body + b"\0" * (len(body) % 2))
            body = struct.pack(order + "I", place)
        entries.append(struct.pack(order + "HHI", tag, kind, number) + body.ljust(4, b"\0"))
    place = stream.tell()
    stream.write(struct.pack(order + "H", len(entries)) + b"".join(entries) + b"\0\0\0\0")
    return place


def _row_blocks(samples: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, contiguous rows as (n, W * C)), about a megabyte each."""
    height = len(samples)
    step = max(1, _BLOCK_BYTES // (samples[0].size * samples.itemsize))
    for start in range(0, height, step):
        yield start, np.ascontiguousarray(samples[start : start + step]).reshape(-1, samples[0].size)
