"""Directories of tags, which TIFF files and EXIF blocks consist of: read within limits, and written.

The values stay bytes with the number of their type, so that what is read is written again without a loss.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Mapping, Sequence
from typing import BinaryIO

import numpy as np

Tags = dict[int, tuple[int, bytes]]  # of a directory: its type's number and the values as little-endian bytes
Directory = dict[int, tuple[int, bytes] | Tags]  # with the directories within it
SHORT, LONG, RATIONAL, UNDEFINED = 3, 4, 5, 7  # types, by the names of the specification (TIFF 6.0)
ICC_TAG = 34675
MAX_ICC_BYTES = 32 << 20
_TYPE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
_INTEGERS = {1: "u1", 3: "<u2", 4: "<u4", 6: "i1", 8: "<i2", 9: "<i4", 13: "<u4", 16: "<u8", 18: "<u8"}
_MAX_TAG_BYTES = 1 << 20  # of any other tag; the places of 131072 strips need as much


class Unreadable(Exception):
    """The file is damaged, or uses a feature that cannot be read without loss; the text says which."""


def read_directory(
    stream: BinaryIO, place: int, order: str, tags: Collection[int], big: bool = False
) -> tuple[Tags, int]:
    """The ``tags`` of the TIFF directory at ``place``, and the place of the next directory, 0 for none.

    A tag whose values lie outside the file, or take more than the limit, counts as absent.

    Args:
        order: "<" or ">", the byte order of the file.
        big: whether the file is a BigTIFF.

    Raises:
        Unreadable: the directory itself lies outside the file.
    """
    head, entry, tail = (order + code for code in (("Q", "HHQ8s", "Q") if big else ("H", "HHI4s", "I")))
    count = int.from_bytes(_read(stream, place, struct.calcsize(head)), "little" if order == "<" else "big")
    size = struct.calcsize(entry)
    table = stream.read(size * min(count, 65535))
    following = stream.read(struct.calcsize(tail))
    directory: Tags = {}
    for tag, kind, number, value in struct.iter_unpack(entry, table[: len(table) // size * size]):
        length = number * _TYPE_BYTES.get(kind, 0)
        if tag not in tags or not 0 < length <= (MAX_ICC_BYTES if tag == ICC_TAG else _MAX_TAG_BYTES):
            continue
        if length > len(value):
            value = _read(stream, struct.unpack(tail, value)[0], length)
        if len(value) >= length:
            value = _swapped(kind, value[:length], order)
            if kind in (16, 18):  # numbers of 64 bits, which only BigTIFF has
                kind, value = LONG, np.minimum(np.frombuffer(value, "<u8"), 2**32 - 1).astype("<u4").tobytes()
            directory.setdefault(tag, (kind, value))
    if len(table) < size:
        raise Unreadable("it is truncated")
    return directory, struct.unpack(tail, following)[0] if len(following) == struct.calcsize(tail) else 0


def write_directory(stream: BinaryIO, directory: Mapping[int, tuple[int, bytes] | Tags], order: str = "<") -> int:
    """Append the values that do not fit an entry, the directories within, then the directory; return its place."""
    entries = []
    for tag, entry in sorted(directory.items()):
        kind, values = longs(write_directory(stream, entry, order)) if isinstance(entry, dict) else entry
        number = len(values) // _TYPE_BYTES[kind]
        values = _swapped(kind, values, order)
        if len(values) > 4:
            place = stream.tell()
            stream.write(values + b"\0" * (len(values) % 2))
            values = struct.pack(order + "I", place)
        entries.append(struct.pack(order + "HHI", tag, kind, number) + values.ljust(4, b"\0"))
    place = stream.tell()
    stream.write(struct.pack(order + "H", len(entries)) + b"".join(entries) + b"\0\0\0\0")
    return place


def integers(directory: Mapping[int, object], tag: int, default: Sequence[int] = ()) -> list[int]:
    """The values of ``tag``, or ``default`` where it is absent or holds no whole numbers."""
    entry = directory.get(tag)
    if isinstance(entry, tuple) and entry[0] in _INTEGERS:
        values: list[int] = np.frombuffer(entry[1], _INTEGERS[entry[0]]).tolist()
        return values
    return list(default)


def shorts(*values: int) -> tuple[int, bytes]:
    return SHORT, struct.pack(f"<{len(values)}H", *values)


def longs(*values: int) -> tuple[int, bytes]:
    return LONG, struct.pack(f"<{len(values)}I", *values)


def _read(stream: BinaryIO, place: int, length: int) -> bytes:
    """So many bytes, or fewer where the file ends."""
    if place >= 1 << 62:  # would overflow in ``seek``
        return b""
    stream.seek(place)
    return stream.read(length)


def _swapped(kind: int, values: bytes, order: str) -> bytes:
    """``values`` between little-endian and ``order``, either way."""
    word = 4 if kind in (5, 10) else _TYPE_BYTES[kind]  # a rational is a pair of numbers
    return values if order == "<" or word == 1 else np.frombuffer(values, f"u{word}").byteswap().tobytes()
