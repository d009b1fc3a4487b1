"""The opset of an ONNX file, read without the onnx package, which a Jetson need not have; and what is parsed.

An ONNX file is one protobuf message: fields follow each other, each with a number and, for what is asked here, a
length. Everything but field 8 (``opset_import``) is skipped over, so gigabytes of weights are never read.
"""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import BinaryIO

from ..errors import BundleError

_OPSET_IMPORT = 8  # of ModelProto; in each: 1 is the domain, 2 the version
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def max_opset(flavour: str, version: tuple[int, int]) -> int:
    """The highest opset that ``flavour`` (as in ``FLAVOURS``) of (major, minor) ``version`` is known to parse."""
    if flavour == "tensorrt-rtx":
        return 23  # the highest that was tried with 1.7, whose parser refuses none by number
    if version >= (11, 0):
        return 25
    return 24 if version >= (10, 15) else 20


def opset_of(path: Path) -> int:
    """The version of the standard operators that the file declares; 1 where it declares none.

    Raises:
        BundleError: it is no ONNX file.
    """
    try:
        with open(path, "rb") as stream:
            size, version = os.fstat(stream.fileno()).st_size, 1
            while stream.tell() < size:
                number, value = _field(stream, size)
                if number == _OPSET_IMPORT and isinstance(value, bytes):
                    domain, found = _operator_set(value)
                    version = found if domain in ("", "ai.onnx") else version
    except (EOFError, ValueError) as error:
        raise BundleError(f"{path} is no ONNX file ({error}): export the bundle again") from None
    return version


def _operator_set(data: bytes) -> tuple[str, int]:
    stream, domain, version = io.BytesIO(data), "", 1
    while stream.tell() < len(data):
        number, value = _field(stream, len(data), keep=True)
        if number == 1 and isinstance(value, bytes):
            domain = value.decode()
        if number == 2 and isinstance(value, int):
            version = value
    return domain, version


def _field(stream: BinaryIO, size: int, keep: bool = False) -> tuple[int, int | bytes]:
    """The next field's number and value. Large values are skipped (and empty) unless ``keep``."""
    tag = _varint(stream)
    number, kind = tag >> 3, tag & 7
    lengths = {_FIXED64: 8, _FIXED32: 4}
    if not number or kind not in (_VARINT, _BYTES, *lengths):
        raise ValueError(f"no field of a model at byte {stream.tell()}")
    if kind == _VARINT:
        return number, _varint(stream)
    length = lengths.get(kind) or _varint(stream)
    if stream.tell() + length > size:
        raise EOFError("it is cut short")
    if keep or number == _OPSET_IMPORT:
        return number, stream.read(length)
    stream.seek(length, os.SEEK_CUR)
    return number, b""


def _varint(stream: BinaryIO) -> int:
    value, shift = 0, 0
    while True:
        byte = stream.read(1)
        if not byte:
            raise EOFError("it is cut short")
        value |= (byte[0] & 0x7F) << shift
        if byte[0] < 0x80:
            return value
        shift += 7
        if shift > 63:
            raise ValueError("a number is too long")
