"""Protobuf messages, such as an ONNX file, field by field: read where they lie, and written.

A device need not have the onnx package, and nothing but what is asked for is decoded or copied. Fields go by their
numbers, which onnx.proto gives. The encoding is protobuf's own (its documentation, "Encoding").
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from typing import NamedTuple

VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # the wire types
Data = mmap.mmap | bytes


class Field(NamedTuple):
    """One field of a message, from ``start`` to ``end``; after its tag and length its ``content`` begins.

    ``value`` is what a field that holds a number says.
    """

    number: int
    wire_type: int
    value: int
    start: int
    content: int
    end: int


def read_fields(data: Data, at: int, end: int) -> Iterator[Field]:
    """The fields of the message between two bytes. Raises ``ValueError`` where that is none."""
    while at < end:
        start = at
        tag, at = _read_varint(data, at, end)
        number, wire_type = tag >> 3, tag & 7
        if not number or wire_type not in (VARINT, _FIXED64, _BYTES, _FIXED32):
            raise ValueError(f"no field of a model at byte {at}")
        value, length, content = 0, 8 if wire_type == _FIXED64 else 4, at
        if wire_type == VARINT:
            value, at = _read_varint(data, at, end)
            length = 0
        elif wire_type == _BYTES:
            length, at = _read_varint(data, at, end)
            content = at
        if at + length > end:
            raise ValueError("it is cut short")
        at += length
        yield Field(number, wire_type, value, start, content, at)


def _read_varint(data: Data, at: int, end: int) -> tuple[int, int]:
    """The number whose first byte is at ``at``, and where it ends."""
    value = shift = 0
    while at < end:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("a number is too long")
    raise ValueError("it is cut short")


def read_contents(data: Data, at: int, end: int) -> dict[int, list[bytes]]:
    """The contents of the fields of the message between two bytes, by their numbers."""
    contents: dict[int, list[bytes]] = {}
    for field in read_fields(data, at, end):
        contents.setdefault(field.number, []).append(data[field.content : field.end])
    return contents


def write_field(number: int, content: bytes) -> bytes:
    """A field that holds a text or a message."""
    return field_head(number, len(content)) + content


def field_head(number: int, length: int) -> bytes:
    """The tag and the length before the content of a field."""
    return _varint(number << 3 | 2) + _varint(length)


def _varint(value: int) -> bytes:
    low, rest = value & 0x7F, value >> 7
    return bytes([low | 0x80]) + _varint(rest) if rest else bytes([low])
