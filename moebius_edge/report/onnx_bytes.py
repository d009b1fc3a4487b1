"""Two small ONNX models, written as bytes: matrix products in a row, and negations in a row.

A device need not have the onnx package, and the fields of so small a file are few: their numbers are those of
``onnx.proto``.
"""

from __future__ import annotations

from typing import Any

import numpy as np

TYPES = {"float32": 1, "float16": 10, "int8": 2}  # TensorProto.DataType; INT8 products take unsigned inputs: 2 is uint8
_FLOAT, _UINT8, _INT8 = 1, 2, 3
_OPSET, _IR_VERSION = 20, 9


def matrix_products(precision: str, side: int, count: int) -> bytes:
    """``x`` (side, side) times one constant matrix, ``count`` times over -> ``y``; the values keep their scale.

    ``precision`` is a key of ``TYPES``. INT8 is ONNX's QLinearMatMul with zero point 128: integers in, integers out.
    """
    matrix = np.random.default_rng(1).standard_normal((side, side)) / side**0.5
    if precision == "int8":
        step = 4 / 127 / side**0.5  # of the matrix; 1/8 is that of what is multiplied by it
        weights = [
            _tensor("w", np.clip(np.rint(matrix / step), -127, 127).astype(np.int8), _INT8),
            _tensor("ws", np.float32(step), _FLOAT),
            _tensor("wz", np.int8(0), _INT8),
            _tensor("xs", np.float32(1 / 8), _FLOAT),
            _tensor("xz", np.uint8(128), _UINT8),
        ]
        kind, rest = "QLinearMatMul", ["xs", "xz", "w", "ws", "wz", "xs", "xz"]
    else:
        weights = [_tensor("w", matrix.astype(precision), TYPES[precision])]
        kind, rest = "MatMul", ["w"]
    nodes = [_node(kind, [a, *rest], b) for a, b in _links(count)]
    return _model(nodes, weights, [side, side], TYPES[precision])


def negations(elements: int, count: int) -> bytes:
    """``x`` (elements,), float32, negated ``count`` times over -> ``y``."""
    return _model([_node("Neg", [a], b) for a, b in _links(count)], [], [elements], _FLOAT)


def _links(count: int) -> list[tuple[str, str]]:
    """The input and output of each of ``count`` nodes in a row, from ``x`` to ``y``."""
    names = ["x", *(f"h{i}" for i in range(1, count)), "y"]
    return list(zip(names, names[1:], strict=False))


def _model(nodes: list[bytes], weights: list[bytes], shape: list[int], kind: int) -> bytes:
    graph = b"".join(_message(1, node) for node in nodes) + _message(2, b"peak")
    graph += b"".join(_message(5, weight) for weight in weights)
    graph += _message(11, _value("x", shape, kind)) + _message(12, _value("y", shape, kind))
    return _number(1, _IR_VERSION) + _message(7, graph) + _message(8, _number(2, _OPSET))


def _node(kind: str, inputs: list[str], output: str) -> bytes:
    names = b"".join(_message(1, name.encode()) for name in inputs)
    return names + _message(2, output.encode()) + _message(4, kind.encode())


def _tensor(name: str, values: Any, kind: int) -> bytes:
    array = np.asarray(values)
    sizes = b"".join(_number(1, size) for size in array.shape)
    return sizes + _number(2, kind) + _message(8, name.encode()) + _message(9, array.tobytes())


def _value(name: str, shape: list[int], kind: int) -> bytes:
    sizes = b"".join(_message(1, _number(1, size)) for size in shape)
    return _message(1, name.encode()) + _message(2, _message(1, _number(1, kind) + _message(2, sizes)))


def _message(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(content)) + content


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _varint(value: int) -> bytes:
    made = bytearray()
    while value > 0x7F:
        made.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*made, value])
