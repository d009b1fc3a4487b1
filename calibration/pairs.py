"""The pairs of QuantizeLinear and DequantizeLinear themselves: their numbers, their constants, their names.

Numbers are symmetric, q = clip(round(x / scale)): weights to -127..127 with one scale a channel of the output (one in
all for a batch of matrices), activations with one scale a tensor. Scales have the type of what they scale.

Two forms of activations, the same but for an offset:

- INT8 with zero point 0: TensorRT takes no other.
- ``unsigned``, UINT8 with zero point 128: what the integer kernels of ONNX Runtime read on a CPU with VNNI. It turns
  INT8 into this by itself, but not where one tensor has two readers, and then computes in float32 after all. What a
  ReLU made has zero point 0 and half the scale, all 255 steps above zero, so that the ReLU is the rounding itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from ..errors import BundleError, UsageError
from ..export.onnx_graph import outline

LARGEST = 127  # of a symmetric INT8: -128 has no positive twin
_SMALLEST_SCALE = 2.0**-24  # of weights: the smallest FP16 above 0


class PairWriter:
    """Collects ``nodes`` and ``made`` constants; a pair made for one product serves the next that reads the same."""

    def __init__(self, model: ModelProto, scales: Mapping[str, float], unsigned: bool) -> None:
        self.nodes: list[NodeProto] = []
        self.made: dict[str, TensorProto] = {}
        self.constants = {t.name: t for t in model.graph.initializer}
        self._scales, self._unsigned = scales, unsigned
        self._producers = producers(model)
        self._relus = {n.output[0] for n in model.graph.node if n.op_type == "Relu"}
        self._dequantised: dict[str, str] = {}
        graph = onnx.shape_inference.infer_shapes(outline(model), data_prop=True).graph
        typed = (*graph.input, *graph.output, *graph.value_info)
        self._types = {v.name: v.type.tensor_type.elem_type for v in typed}

    def weight(self, node: NodeProto, index: int, data: str) -> str:
        """The name of input ``index`` of ``node``, a constant, dequantised from INT8; ``data`` is its other input."""
        name = node.input[index]
        values = numpy_helper.to_array(self.constants[name])
        axis = weight_axis(node, values.ndim)
        whole, scale = quantise_weight(values, axis, name, self._least_scale(node, data))
        # Of a weight that two products share, each gets its own: the axis may differ, and the least scale.
        stem = f"{name}_int8" if f"{name}_int8" not in self.made else f"{name}_{node.name}_int8"
        inputs = [self._constant(stem, whole), self._constant(f"{stem}_scale", scale)]
        return self._node("DequantizeLinear", inputs, f"{stem}_dequantised", axis)

    def activation(self, name: str) -> str:
        """The name of the tensor ``name`` rounded to 8 bits, for the one who asks."""
        if name not in self._dequantised:
            self._dequantised[name] = self._pair(name, name, f"{name}_dequantised")
        return self._dequantised[name]

    def output(self, node: NodeProto) -> None:
        """Rounds what ``node``, the last one in ``nodes``, makes to 8 bits for all who read it."""
        name = node.output[0]
        node.output[0] = f"{name}_unrounded"
        self._dequantised[name] = self._pair(name, node.output[0], name)

    def _pair(self, name: str, read: str, result: str) -> str:
        """``read`` rounded to 8 bits by the scale of the tensor ``name`` -> ``result``."""
        zero: np.generic = np.int8(0)
        if self._unsigned:
            zero = np.uint8(0 if name in self._relus else 128)
        constants = [
            self._constant(f"{name}_scale", self._scale(name)),
            self._constant(f"zero_point_{zero}", np.asarray(zero)),
        ]
        whole = self._node("QuantizeLinear", [read, *constants], f"{name}_int8")
        return self._node("DequantizeLinear", [whole, *constants], result)

    def _scale(self, name: str) -> np.ndarray:
        """The scale of the tensor ``name`` in its type."""
        kind = self._types.get(name)
        if kind not in (TensorProto.FLOAT, TensorProto.FLOAT16):
            raise BundleError(f"the type of tensor {name!r} is not known: export the bundle again")
        origin = source(name, self._producers)
        if origin not in self._scales:
            raise UsageError(f"there is no range for tensor {origin}: record the calibration again")
        given = self._scales[origin] * (LARGEST / 255 if self._unsigned and name in self._relus else 1)
        with np.errstate(over="ignore"):
            scale = np.asarray(given, helper.tensor_dtype_to_np_dtype(kind))
        if not (math.isfinite(scale) and scale > 0):
            raise UsageError(
                f"the scale of tensor {origin} is {self._scales[origin]:g} and must be finite and above 0 in "
                f"{scale.dtype}: calibrate with other pictures, or leave its block out of the recipe"
            )
        return scale

    def _least_scale(self, node: NodeProto, data: str) -> np.ndarray | float:
        """The least scale that the weights of ``node`` may have, (C,) or one for all.

        ONNX Runtime rounds a bias to INT32 in units of both inputs' scales, and clips what does not fit.
        """
        if not self._unsigned or len(node.input) < 3 or node.input[2] not in self.constants:
            return 0.0
        bias = numpy_helper.to_array(self.constants[node.input[2]])
        least: np.ndarray = np.abs(bias) / (self._scale(data).astype(np.float64) * 2.0**30)
        return least

    def _node(self, kind: str, inputs: list[str], output: str, axis: int | None = None) -> str:
        node = helper.make_node(kind, inputs, [output], f"{output}/{kind}")
        if axis is not None:
            node.attribute.append(helper.make_attribute("axis", axis))
        self.nodes.append(node)
        return output

    def _constant(self, name: str, value: np.ndarray) -> str:
        self.made[name] = numpy_helper.from_array(value, name)
        return name


def producers(model: ModelProto) -> dict[str, NodeProto]:
    """Tensor -> the node that makes it."""
    return {name: node for node in model.graph.node for name in node.output}


def source(name: str, made_by: Mapping[str, NodeProto]) -> str:
    """The tensor that ``name`` is a rounded or widened copy of, as FP16 files have them; itself as a rule."""
    while name in made_by and made_by[name].op_type == "Cast":
        name = made_by[name].input[0]
    return name


def weight_axis(node: NodeProto, rank: int) -> int | None:
    """The axis of a product's weights, of this rank, that counts output channels; None for a batch of matrices."""
    if node.op_type == "Conv":
        return 0
    if node.op_type == "ConvTranspose":
        return 1
    if rank != 2:
        return None
    return 0 if any(a.name == "transB" and a.i for a in node.attribute) else 1


def quantise_weight(
    values: np.ndarray, axis: int | None, name: str, least: np.ndarray | float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Weights -> INT8 of the same shape, and scales of ``values``' type: (C,) along ``axis``, or a scalar.

    The scale of a channel is its largest magnitude over 127, at least ``least``, and 1 where all is 0.

    Raises:
        BundleError: a weight is not finite.
    """
    if not np.isfinite(values).all():
        raise BundleError(f"weight {name} has values that are not finite: export from a sound checkpoint")
    others = tuple(i for i in range(values.ndim) if i != axis)
    largest = np.abs(values.astype(np.float64)).max(others, initial=0.0)
    scale = np.maximum(largest / LARGEST, np.maximum(_SMALLEST_SCALE, least)).astype(values.dtype)
    scale = np.where(largest == 0, np.ones_like(scale), scale)
    along = scale if axis is None else scale.reshape([-1 if i == axis else 1 for i in range(values.ndim)])
    whole = np.clip(np.rint(values / along.astype(np.float64)), -LARGEST, LARGEST).astype(np.int8)
    return whole, scale
