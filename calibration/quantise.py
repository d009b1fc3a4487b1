"""A denoiser in INT8: explicit QuantizeLinear and DequantizeLinear at the operators of the blocks that a recipe names.

The insertion is our own: onnxruntime's ``quantize_static`` ties ranges to it, does not look into functions and loses
the nodes' module paths. Numbers are symmetric, q = clip(round(x / scale)) with zero point 0, with one scale for each
output channel of a weight (one in all for a batch of matrices) and one for an activation. The pairs stand on both
inputs of a convolution or matrix product. Outputs stay in their type, for what follows is a norm, SiLU or a sum, and so
do biases. That is what TensorRT and OpenVINO read alike.
"""

from __future__ import annotations

import math
from collections import ChainMap
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from ..errors import BundleError, UsageError
from ..export.int8_ranges import LARGEST, activation_scale
from ..export.onnx_graph import PRODUCTS, attribute, drop_unused, infer_tensors
from ..export.precision import convert, read_model
from .blocks import Block, Recipe, block_of, blocks, inlined
from .smoothing import norms, smooth
from .statistics import Statistics

# Kinds of blocks that are no faster in INT8: docs/int8.md has the measurements. A recipe may name them nevertheless.
SLOW = (".depthwise", ".lambda")
MIN_MAC_SHARE = 0.002  # a block with a smaller share of the multiply-adds is not worth its rounding errors
_SMALLEST_SCALE = 2.0**-24  # of weights: the smallest FP16 above 0


class Quantiser:
    """Quantises the float32 denoiser ``file`` by one recipe after another, with ranges by ``method``.

    A search may quantise the ``candidates`` among the ``blocks``, and migrate outliers before those in ``smoothable``.
    """

    def __init__(self, file: Path, statistics: Statistics, method: str) -> None:
        self.model = read_model(file)
        self.method = method
        self.facts = {**statistics.facts, "ranges": method}  # what a result of this quantiser depends on
        self.blocks: list[Block] = blocks(self.model)
        self.smoothable = frozenset(norm.block for norm in norms(self.model))
        self.candidates = [b for b in self.blocks if self.share(b) >= MIN_MAC_SHARE and not b.name.endswith(SLOW)]
        self._scales = _Scales(statistics, method)
        self._channels = {name: t.channels for name, t in statistics.tensors.items() if t.channels is not None}

    def share(self, block: Block) -> float:
        """The block's share of all multiply-adds of a call."""
        return block.macs / sum(b.macs for b in self.blocks)

    def quantise(
        self, recipe: Recipe, half: bool = False, part: ModelProto | None = None
    ) -> tuple[ModelProto, dict[str, list[str]]]:
        """The denoiser by ``recipe``, or a ``part`` of it alone, as ``cut`` returns them.

        With ``half`` the rest is in FP16, but for the nodes returned by operator type.

        Raises as ``quantise``, ``activation_scale`` and ``convert``.
        """
        model = ModelProto()
        model.CopyFrom(self.model if part is None else part)
        smoothed = smooth(model, recipe.chosen.intersection(recipe.smoothed), self._channels)
        float32_operators: dict[str, list[str]] = {}
        if half:
            model = onnx.shape_inference.infer_shapes(model, check_type=True, data_prop=True)
            float32_operators = convert(model)
            model = onnx.shape_inference.infer_shapes(model, check_type=True, data_prop=True)
        return quantise(model, recipe, ChainMap(smoothed, self._scales)), float32_operators


class _Scales(dict[str, float]):
    """The scale of each recorded activation, computed when it is first asked for."""

    def __init__(self, statistics: Statistics, method: str) -> None:
        super().__init__()
        self._tensors, self._method = statistics.tensors, method

    def __missing__(self, name: str) -> float:
        self[name] = activation_scale(name, self._tensors[name].histogram, self._method)
        return self[name]


def quantise(model: ModelProto, recipe: Recipe, scales: Mapping[str, float]) -> ModelProto:
    """A copy of ``model``, in float32 or FP16, with the recipe's blocks in INT8.

    ``scales`` holds the step of INT8 of every activation that is rounded, by its name in ``inlined(model)``, for an
    FP16 file by that in the float32 file it was made from.

    Raises:
        UsageError: a scale is missing, not finite, or not above 0 in the type of its tensor.
        BundleError: a weight that is to be quantised is not finite.
    """
    copy = inlined(model, recipe.chosen)
    chosen = {n.name for n in copy.graph.node if n.op_type in PRODUCTS and block_of(n) in recipe.chosen}
    inserter = QDQInserter(copy, scales)
    for node in copy.graph.node:
        if node.name in chosen:
            node.input[:2] = [inserter.quantised_input(node, i) for i in (0, 1)]
        inserter.nodes.append(node)
    del copy.graph.node[:]
    copy.graph.node.extend(inserter.nodes)
    copy.graph.initializer.extend(inserter.constants.values())
    drop_unused(copy)
    onnx.checker.check_model(copy, full_check=True)
    return copy


def quantised_nodes(model: ModelProto) -> list[str]:
    """The names of the convolutions and matrix products whose two inputs are dequantised."""
    origins = {name: node.op_type for node in model.graph.node for name in node.output}
    return [
        node.name
        for node in model.graph.node
        if node.op_type in PRODUCTS and all(origins.get(name) == "DequantizeLinear" for name in node.input[:2])
    ]


class QDQInserter:
    """Collects ``nodes`` and new ``constants``; operators that read the same activation share one pair."""

    def __init__(self, model: ModelProto, scales: Mapping[str, float]) -> None:
        self.nodes: list[NodeProto] = []
        self.constants: dict[str, TensorProto] = {}
        self._scales = scales
        self._weights = {t.name: t for t in model.graph.initializer}
        self._producers = {name: node for node in model.graph.node for name in node.output}
        self._dequantised: dict[str, str] = {}
        self._types = {name: kind for name, (_, kind) in infer_tensors(model, rows=1).items()}

    def quantised_input(self, node: NodeProto, index: int) -> str:
        """The name of input ``index`` of ``node``, dequantised from 8 bits."""
        name = node.input[index]
        if name in self._weights:
            return self._weight(node, name)
        if name not in self._dequantised:
            self._dequantised[name] = self._pair(name, name, f"{name}_dequantised")
        return self._dequantised[name]

    def _weight(self, node: NodeProto, name: str) -> str:
        values = numpy_helper.to_array(self._weights[name])
        matrix_axis = None if values.ndim != 2 else 0 if attribute(node, "transB", 0) else 1
        axis = 0 if node.op_type == "Conv" else matrix_axis
        integers, scale = quantise_weight(values, axis, name)
        # Each operator that reads a weight gets its own integers: their axes may differ.
        stem = f"{name}_int8" if f"{name}_int8" not in self.constants else f"{name}_{node.name}_int8"
        inputs = [self._constant(stem, integers), self._constant(f"{stem}_scale", scale)]
        return self._node("DequantizeLinear", inputs, f"{stem}_dequantised", axis)

    def _pair(self, name: str, source: str, result: str) -> str:
        """``source`` rounded to 8 bits by the scale of the tensor ``name`` -> ``result``."""
        scale = self._constant(f"{name}_scale", self._scale(name))
        constants = [scale, self._constant("zero_point_0", np.asarray(np.int8(0)))]
        integers = self._node("QuantizeLinear", [source, *constants], f"{name}_int8")
        return self._node("DequantizeLinear", [integers, *constants], result)

    def _scale(self, name: str) -> np.ndarray:
        """The scale of the tensor ``name`` in its type."""
        origin = name
        while origin in self._producers and self._producers[origin].op_type == "Cast":  # FP16 files have them
            origin = self._producers[origin].input[0]
        try:
            recorded = self._scales[origin]
        except KeyError:
            raise UsageError(f"there is no range for tensor {origin}", "record the calibration again") from None
        with np.errstate(over="ignore"):
            scale = np.asarray(recorded, helper.tensor_dtype_to_np_dtype(self._types[name]))
        if not (math.isfinite(scale) and scale > 0):
            problem = f"the scale of tensor {origin} is {recorded:g} and must be finite and above 0 in {scale.dtype}"
            raise UsageError(problem, "calibrate with other pictures, or leave its block out of the recipe")
        return scale

    def _node(self, kind: str, inputs: list[str], output: str, axis: int | None = None) -> str:
        self.nodes.append(helper.make_node(kind, inputs, [output], f"{output}/{kind}", axis=axis))
        return output

    def _constant(self, name: str, value: np.ndarray) -> str:
        self.constants[name] = numpy_helper.from_array(value, name)
        return name


def quantise_weight(values: np.ndarray, axis: int | None, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Weights -> INT8 of the same shape, and scales of the weights' type: (C,) along ``axis``, or a scalar.

    The scale of a channel is its largest magnitude over 127, and 1 if all of it is 0.

    Raises:
        BundleError: a weight is not finite.
    """
    if not np.isfinite(values).all():
        raise BundleError(f"weight {name} has values that are not finite", "export from a sound checkpoint")
    others = tuple(i for i in range(values.ndim) if i != axis)
    largest = np.abs(values.astype(np.float64)).max(others, initial=0.0)
    scale = np.maximum(largest / LARGEST, _SMALLEST_SCALE).astype(values.dtype)
    scale = np.where(largest == 0, np.ones_like(scale), scale)
    along = scale if axis is None else scale.reshape([-1 if i == axis else 1 for i in range(values.ndim)])
    integers = np.clip(np.rint(values / along.astype(np.float64)), -LARGEST, LARGEST).astype(np.int8)
    return integers, scale
