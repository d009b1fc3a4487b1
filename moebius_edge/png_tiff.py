"""PNG and TIFF where Pillow stops: 16-bit colour in; any depth, alpha and ICC profile out.

Samples are arrays (H, W, C) of uint8 or uint16 with C = 1 grey, 2 grey and alpha, 3 RGB, 4 RGB and alpha.
Reading decodes the compressed rows with OpenCV and leaves the picture as stored, orientation not applied.
Only baseline features are written: no palettes, no interlacing, no metadata but the profile.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from typing import BinaryIO

import cv2
import numpy as np

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_COLOUR_TYPE = {1: 0, 2: 4, 3: 2, 4: 6}  # channels -> colour type
_UP = 2  # PNG's filter "difference to the row above": within a few percent of the best choice, and fast
_LEVEL = 3  # deflate; 6 takes three times as long for 8% on photographs
_BLOCK_BYTES = 1 << 20  # compressed at a time

# TIFF tags, by the names of the specification (TIFF 6.0)
_SHORT, _LONG, _UNDEFINED = 3, 4, 7
_ORIENTATION = 274


class Unreadable(Exception):
    """The file is damaged, or uses a feature that cannot be read without loss; the text says which."""


def png_chunks(data: bytes) -> dict[bytes, bytes]:
    """The chunks of a PNG file by name, IDAT left out (it may be long); every CRC is checked.

    libpng would print its own complaint about a damaged file, so it is found before libpng sees it.
    """
    chunks: dict[bytes, bytes] = {}
    at = len(PNG_SIGNATURE)
    while b"IEND" not in chunks:
        if at + 12 > len(data):
            raise Unreadable("it is truncated")
        (length,) = struct.unpack_from(">I", data, at)
        name, end = data[at + 4 : at + 8], at + 12 + length
        if end > len(data):
            raise Unreadable("it is truncated")
        if zlib.crc32(memoryview(data)[at + 4 : end - 4]) != struct.unpack_from(">I", data, end - 4)[0]:
            raise Unreadable(f"its {name.decode('latin-1')} chunk is damaged")
        if name != b"IDAT":
            chunks[name] = data[at + 8 : end - 4]
        at = end
    return chunks


def decode_png16(data: bytes) -> np.ndarray:
    """The samples of a 16-bit PNG. A transparent colour (tRNS) becomes an alpha channel."""
    chunks = png_chunks(data)
    colour_type = chunks[b"IHDR"][9]
    decoded = _decode(data)
    if colour_type == 4:  # OpenCV spreads grey and alpha over four channels
        return np.ascontiguousarray(decoded[..., [0, 3]])
    if colour_type == 6:
        return decoded
    colour = decoded[..., : 1 if colour_type == 0 else 3]
    if b"tRNS" not in chunks:
        return np.ascontiguousarray(colour)
    key = np.frombuffer(chunks[b"tRNS"], ">u2").astype(np.uint16)
    if key.size != colour.shape[2]:
        raise Unreadable("its tRNS chunk is damaged")
    alpha = np.where((colour == key).all(axis=2), 0, 65535).astype(np.uint16)
    return np.dstack([colour, alpha])


def decode_tiff16(data: bytes) -> np.ndarray:
    """The samples of a 16-bit grey, RGB or RGBA TIFF (unsigned, interleaved: the caller has checked it)."""
    return _decode(_with_orientation_1(data))


def _decode(data: bytes) -> np.ndarray:
    """(H, W, C) uint16 in RGB order, whatever OpenCV makes of the orientation tag kept out."""
    set_log_level = cv2.setLogLevel if hasattr(cv2, "setLogLevel") else cv2.utils.logging.setLogLevel  # 4.8, 5.0
    level = set_log_level(0)  # silent: it would report a damaged file on stderr
    try:
        decoded = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error:
        decoded = None
    finally:
        set_log_level(level)
    if decoded is None:
        raise Unreadable("it is truncated or damaged")
    if decoded.dtype != np.uint16:
        raise Unreadable("its kind of 16-bit samples is not supported")
    if decoded.ndim == 2:
        return decoded[..., None]
    order = {3: cv2.COLOR_BGR2RGB, 4: cv2.COLOR_BGRA2RGBA}
    return cv2.cvtColor(decoded, order[decoded.shape[2]])


def _with_orientation_1(data: bytes) -> bytes:
    """Overwrite the orientation tag: some versions of OpenCV turn a TIFF by it and some do not."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(data[:4])
    if order is None:
        raise Unreadable("16-bit BigTIFF is not supported")
    try:
        (directory,) = struct.unpack_from(order + "I", data, 4)
        (count,) = struct.unpack_from(order + "H", data, directory)
        for entry in range(directory + 2, directory + 2 + 12 * count, 12):
            if struct.unpack_from(order + "H", data, entry)[0] == _ORIENTATION:
                return data[: entry + 8] + struct.pack(order + "H", 1) + data[entry + 10 :]
    except struct.error:
        raise Unreadable("it is truncated") from None
    return data


def write_png(stream: BinaryIO, samples: np.ndarray, icc: bytes | None = None) -> None:
    """Write ``samples`` as PNG of their own depth."""
    height, width, channels = samples.shape
    bits = 8 * samples.itemsize

    def chunk(name: bytes, body: bytes) -> None:
        stream.write(struct.pack(">I", len(body)) + name + body)
        stream.write(struct.pack(">I", zlib.crc32(body, zlib.crc32(name))))

    stream.write(PNG_SIGNATURE)
    chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, _PNG_COLOUR_TYPE[channels], 0, 0, 0))
    if icc is not None:
        chunk(b"iCCP", b"ICC Profile\0\0" + zlib.compress(icc))
    deflate = zlib.compressobj(_LEVEL)
    above = np.zeros((1, width * channels * samples.itemsize), np.uint8)
    for _, rows in _row_blocks(samples):
        raw = rows.astype(rows.dtype.newbyteorder(">"), copy=False).view(np.uint8)
        filtered = np.empty((len(raw), 1 + raw.shape[1]), np.uint8)
        filtered[:, 0] = _UP
        np.subtract(raw[:1], above, out=filtered[:1, 1:])
        np.subtract(raw[1:], raw[:-1], out=filtered[1:, 1:])
        above = raw[-1:]
        if body := deflate.compress(filtered.data):
            chunk(b"IDAT", body)
    chunk(b"IDAT", deflate.flush())
    chunk(b"IEND", b"")


def write_tiff(stream: BinaryIO, samples: np.ndarray, icc: bytes | None = None) -> None:
    """Write ``samples`` as a little-endian TIFF of their own depth, deflated with horizontal differences."""
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
    tags: list[tuple[int, int, list[int] | bytes]] = [
        (256, _LONG, [width]),
        (257, _LONG, [height]),
        (258, _SHORT, [8 * samples.itemsize] * channels),
        (259, _SHORT, [8]),  # compression: deflate
        (262, _SHORT, [1 if channels < 3 else 2]),  # photometric: black is zero, or RGB
        (273, _LONG, offsets),
        (277, _SHORT, [channels]),
        (278, _LONG, [rows_per_strip]),
        (279, _LONG, sizes),
        (284, _SHORT, [1]),  # interleaved
        (317, _SHORT, [2]),  # predictor: horizontal differences
    ]
    if channels in (2, 4):
        tags.append((338, _SHORT, [2]))  # extra sample: alpha, colours not multiplied by it
    if icc is not None:
        tags.append((34675, _UNDEFINED, icc))
    _write_directory(stream, tags)


def _write_directory(stream: BinaryIO, tags: list[tuple[int, int, list[int] | bytes]]) -> None:
    """Append the values that do not fit an entry, then the directory; point the header to it."""
    entries = []
    for tag, kind, values in tags:
        code = {_SHORT: "H", _LONG: "I"}.get(kind, "B")
        body = struct.pack(f"<{len(values)}{code}", *values)
        if len(body) > 4:
            place = stream.tell()
            stream.write(body + b"\0" * (len(body) % 2))
            body = struct.pack("<I", place)
        entries.append(struct.pack("<HHI", tag, kind, len(values)) + body.ljust(4, b"\0"))
    directory = stream.tell()
    stream.write(struct.pack("<H", len(entries)) + b"".join(entries) + b"\0\0\0\0")
    stream.seek(4)
    stream.write(struct.pack("<I", directory))


def _row_blocks(samples: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """(first row, contiguous rows as (n, W * C)), about a megabyte each."""
    height = len(samples)
    step = max(1, _BLOCK_BYTES // (samples[0].size * samples.itemsize))
    for start in range(0, height, step):
        yield start, np.ascontiguousarray(samples[start : start + step]).reshape(-1, samples[0].size)
