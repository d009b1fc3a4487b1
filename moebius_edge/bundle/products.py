"""The ONNX operators that multiply: which they are, which axis they sum over, and how many multiplications one takes.

A multiplication is a multiply-add: one product and its addition to a sum. Works on ``onnx.NodeProto`` objects and does
not import the package, so that it may stand on the device path.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

# Operator type -> the axis of its first input that it sums over, which are a convolution's input channels.
SUMMED_AXIS = {"Conv": 1, "ConvTranspose": 1, "MatMul": -1, "Gemm": -1}
PRODUCTS = tuple(SUMMED_AXIS)


def summed_axis(node: Any) -> int:
    """The axis of the first input of a product that it sums over."""
    return 0 if node.op_type == "Gemm" and attribute(node, "transA", 0) else SUMMED_AXIS[node.op_type]


def multiplications(node: Any, shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """Multiply-adds of a product: the elements of its output times the terms each is a sum of.

    A transposed convolution is counted from its input, each of whose elements meets every tap. None where a shape in
    ``shapes`` (tensor name -> sizes, 0 for unknown) is missing.
    """
    left, right, out = (shapes.get(name, ()) for name in (*node.input[:2], node.output[0]))
    if not (left and right and out) or 0 in (*left, *right, *out):
        return None
    if node.op_type == "Conv":
        return math.prod(out) * math.prod(right[1:])
    if node.op_type == "ConvTranspose":
        return math.prod(left) * math.prod(right[1:])
    return math.prod(out) * left[summed_axis(node)]


def attribute(node: Any, name: str, default: int) -> int:
    """An integer attribute of a node."""
    return next((int(a.i) for a in node.attribute if a.name == name), default)
