"""A denoiser in INT8: explicit QuantizeLinear and DequantizeLinear at the operators of the blocks that a recipe names.

The insertion is our own: onnxruntime's ``quantize_static`` ties ranges to it, does not look into functions, loses the
nodes' module paths, and knows one placement. Numbers are symmetric, q = clip(round(x / scale)), with one scale for each
output channel of a weight (one in all for a batch of matrices) and one for an activation. Where the pairs stand:

- ``tensorrt``: on both inputs of a convolution or matrix product. Outputs stay in
  their type, for what follows is a norm, SiLU or a sum, and so do biases. Activations are INT8 with zero point 0.
- ``cpu`` (ONNX Runtime): a convolution in integers exists with a quantised output only, so each also gets a pair on its
  output, or behind the ReLU that alone reads it. Gemm and transposed convolutions have no kernel in integers and stay
  float32 (in a denoiser 0.02% of the multiply-adds). Activations are UINT8 with zero point 128, which the kernels read:
  ONNX Runtime turns INT8 into this by itself, but not where one tensor has two readers, and then computes in float32.
  What a ReLU gave has zero point 0 and half the scale, all 255 steps above zero.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections import ChainMap, Counter
from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from ..errors import BundleError, MachineError, UsageError
from ..export.int8_ranges import LARGEST, activation_scale
from ..export.onnx_graph import PRODUCTS, attribute, drop_unused, infer_tensors, tensor_readers
from ..export.precision import convert
from ..system.files import utf8_path
from .blocks import Block, Recipe, block_of, blocks, inlined
from .smoothing import norms, smooth
from .statistics import Statistics

# Target -> the operators that it computes in INT8.
TARGETS: dict[str, tuple[str, ...]] = {"tensorrt": PRODUCTS, "cpu": ("Conv", "MatMul")}
# Kinds of blocks that are no faster in INT8: docs/int8.md has the measurements. A recipe may name them nevertheless.
SLOW = (".depthwise", ".lambda")
MIN_MAC_SHARE = 0.002  # a block with a smaller share of the multiply-adds is not worth its rounding errors
INTEGER_KERNELS = ("QLinearConv", "MatMulIntegerToFloat", "QLinearMatMul", "MatMulInteger", "ConvInteger", "QGemm")
_SMALLEST_SCALE = 2.0**-24  # of weights: the smallest FP16 above 0


class Quantiser:
    """Quantises the float32 denoiser ``file`` for ``target`` by one recipe after another, with ranges by ``method``.

    A search may quantise the ``candidates`` among the ``blocks``, and migrate outliers before those in ``smoothable``.
    """

    def __init__(self, file: Path, statistics: Statistics, method: str, target: str) -> None:
        self.model = onnx.load(str(file))
        self.method, self.target = method, target
        self.facts = {**statistics.facts, "ranges": method}  # what a result of this quantiser depends on
        self.blocks: list[Block] = blocks(self.model)
        self.smoothable = frozenset(norm.block for norm in norms(self.model))
        matter = [b for b in self.blocks if self.share(b) >= MIN_MAC_SHARE and not b.name.endswith(SLOW)]
        self.candidates = [b for b in matter if b.operators.intersection(TARGETS[target])]
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
        return quantise(model, recipe, ChainMap(smoothed, self._scales), self.target), float32_operators


class _Scales(dict[str, float]):
    """The scale of each recorded activation, computed when it is first asked for."""

    def __init__(self, statistics: Statistics, method: str) -> None:
        super().__init__()
        self._tensors, self._method = statistics.tensors, method

    def __missing__(self, name: str) -> float:
        self[name] = activation_scale(name, self._tensors[name].histogram, self._method)
        return self[name]


def quantise(model: ModelProto, recipe: Recipe, scales: Mapping[str, float], target: str = "tensorrt") -> ModelProto:
    """A copy of ``model``, in float32 or FP16, with the recipe's blocks in INT8 for ``target``.

    ``scales`` holds the step of INT8 of every activation that is rounded, by its name in ``inlined(model)``, for an
    FP16 file by that in the float32 file it was made from.

    Raises:
        UsageError: a scale is missing, not finite, or not above 0 in the type of its tensor.
        BundleError: a weight that is to be quantised is not finite.
    """
    copy = inlined(model, recipe.chosen)
    chosen = {n.name for n in copy.graph.node if n.op_type in TARGETS[target] and block_of(n) in recipe.chosen}
    outputs = rounded_outputs(copy, chosen, target)
    inserter = QDQInserter(copy, scales, unsigned=target == "cpu")
    for node in copy.graph.node:
        if node.name in chosen:
            node.input[:2] = [inserter.quantised_input(node, i) for i in (0, 1)]
        inserter.nodes.append(node)
        if outputs.intersection(node.output):
            inserter.round_output(node)
    del copy.graph.node[:]
    copy.graph.node.extend(inserter.nodes)
    copy.graph.initializer.extend(inserter.constants.values())
    drop_unused(copy)
    if target == "cpu":
        fuse_silu(copy)
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


def rounded_outputs(model: ModelProto, chosen: Collection[str], target: str) -> set[str]:
    """The tensors that are rounded where they are computed when the nodes named ``chosen`` are quantised."""
    if target != "cpu":
        return set()
    readers, outputs = tensor_readers(model), set()
    for node in model.graph.node:
        if node.name in chosen and node.op_type == "Conv":
            behind = readers.get(node.output[0], [])
            outputs.add(behind[0].output[0] if [n.op_type for n in behind] == ["Relu"] else node.output[0])
    return outputs


class QDQInserter:
    """Collects ``nodes`` and new ``constants``; operators that read the same activation share one pair.

    With ``unsigned`` activations are UINT8, as the target ``cpu`` has them, else INT8.
    """

    def __init__(self, model: ModelProto, scales: Mapping[str, float], unsigned: bool) -> None:
        self.nodes: list[NodeProto] = []
        self.constants: dict[str, TensorProto] = {}
        self._scales, self._unsigned = scales, unsigned
        self._weights = {t.name: t for t in model.graph.initializer}
        self._producers = {name: node for node in model.graph.node for name in node.output}
        self._relus = {name for name, node in self._producers.items() if node.op_type == "Relu"}
        self._dequantised: dict[str, str] = {}
        self._types = {name: kind for name, (_, kind) in infer_tensors(model, rows=1).items()}

    def quantised_input(self, node: NodeProto, index: int) -> str:
        """The name of input ``index`` of ``node``, dequantised from 8 bits."""
        name = node.input[index]
        if name in self._weights:
            return self._weight(node, name, data=node.input[1 - index])
        if name not in self._dequantised:
            self._dequantised[name] = self._pair(name, name, f"{name}_dequantised")
        return self._dequantised[name]

    def round_output(self, node: NodeProto) -> None:
        """Round what ``node``, the last one in ``nodes``, computes to 8 bits for all that read it."""
        name = node.output[0]
        node.output[0] = f"{name}_unrounded"
        self._dequantised[name] = self._pair(name, node.output[0], name)

    def _weight(self, node: NodeProto, name: str, data: str) -> str:
        values = numpy_helper.to_array(self._weights[name])
        matrix_axis = None if values.ndim != 2 else 0 if attribute(node, "transB", 0) else 1
        axis = 0 if node.op_type == "Conv" else matrix_axis
        integers, scale = quantise_weight(values, axis, name, self._smallest_scale(node, data))
        # Each operator that reads a weight gets its own integers: their axes may differ, and their smallest scales.
        stem = f"{name}_int8" if f"{name}_int8" not in self.constants else f"{name}_{node.name}_int8"
        inputs = [self._constant(stem, integers), self._constant(f"{stem}_scale", scale)]
        return self._node("DequantizeLinear", inputs, f"{stem}_dequantised", axis)

    def _pair(self, name: str, source: str, result: str) -> str:
        """``source`` rounded to 8 bits by the scale of the tensor ``name`` -> ``result``."""
        zero = np.uint8(0 if name in self._relus else 128) if self._unsigned else np.int8(0)
        scale = self._constant(f"{name}_scale", self._scale(name))
        constants = [scale, self._constant(f"zero_point_{zero}", np.asarray(zero))]
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
        factor = LARGEST / 255 if self._unsigned and name in self._relus else 1
        with np.errstate(over="ignore"):
            scale = np.asarray(recorded * factor, helper.tensor_dtype_to_np_dtype(self._types[name]))
        if not (math.isfinite(scale) and scale > 0):
            problem = f"the scale of tensor {origin} is {recorded:g} and must be finite and above 0 in {scale.dtype}"
            raise UsageError(problem, "calibrate with other pictures, or leave its block out of the recipe")
        return scale

    def _smallest_scale(self, node: NodeProto, data: str) -> np.ndarray | float:
        """What the weights' scales must not be below, (C,) or one for all, so that a bias fits into INT32 in units of
        both inputs' scales, as ONNX Runtime rounds it."""
        if not self._unsigned or len(node.input) < 3 or node.input[2] not in self._weights:
            return 0.0
        bias = numpy_helper.to_array(self._weights[node.input[2]])
        return np.asarray(np.abs(bias) / (self._scale(data).astype(np.float64) * 2.0**30))

    def _node(self, kind: str, inputs: list[str], output: str, axis: int | None = None) -> str:
        self.nodes.append(helper.make_node(kind, inputs, [output], f"{output}/{kind}", axis=axis))
        return output

    def _constant(self, name: str, value: np.ndarray) -> str:
        self.constants[name] = numpy_helper.from_array(value, name)
        return name


def quantise_weight(
    values: np.ndarray, axis: int | None, name: str, smallest_scale: np.ndarray | float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Weights -> INT8 of the same shape, and scales of the weights' type: (C,) along ``axis``, or a scalar.

    The scale of a channel is its largest magnitude over 127, at least ``smallest_scale``, and 1 if all of it is 0.

    Raises:
        BundleError: a weight is not finite.
    """
    if not np.isfinite(values).all():
        raise BundleError(f"weight {name} has values that are not finite", "export from a sound checkpoint")
    others = tuple(i for i in range(values.ndim) if i != axis)
    largest = np.abs(values.astype(np.float64)).max(others, initial=0.0)
    scale = np.maximum(largest / LARGEST, np.maximum(_SMALLEST_SCALE, smallest_scale)).astype(values.dtype)
    scale = np.where(largest == 0, np.ones_like(scale), scale)
    along = scale if axis is None else scale.reshape([-1 if i == axis else 1 for i in range(values.ndim)])
    integers = np.clip(np.rint(values / along.astype(np.float64)), -LARGEST, LARGEST).astype(np.int8)
    return integers, scale


def fuse_silu(model: ModelProto) -> int:
    """Rewrite, in place, each SiLU on a dequantised tensor as one node; return how many there were.

    x · sigmoid(x) reads its input twice, for which ONNX Runtime would dequantise it twice and multiply in another pass.
    As its ``QuickGelu``, x · sigmoid(1 x), it stays one.
    """
    dequantised = {n.output[0] for n in model.graph.node if n.op_type == "DequantizeLinear"}
    readers = tensor_readers(model)
    removed = []
    for node in model.graph.node:
        behind = readers.get(node.output[0], [])
        if node.op_type != "Sigmoid" or [n.op_type for n in behind] != ["Mul"]:
            continue
        (x,), (product,) = node.input, behind
        if x in dequantised and sorted(product.input) == sorted((x, node.output[0])):
            product.op_type, product.domain = "QuickGelu", "com.microsoft"
            product.input[:] = [x]
            product.attribute.append(helper.make_attribute("alpha", 1.0))
            removed.append(node)
    for node in removed:
        model.graph.node.remove(node)
    if removed:
        model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return len(removed)


def integer_kernels(path: Path) -> dict[str, int]:
    """How many nodes of each of ``INTEGER_KERNELS`` ONNX Runtime's CPU has in the file ``path`` after optimising it.

    Raises:
        MachineError: they are fewer than the quantised operators. The others would run in float32, slower than before.
    """
    expected = len(quantised_nodes(onnx.load(str(path))))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # it warns that an optimised file is for this machine alone
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = os.path.join(folder, "optimised.onnx")
        with utf8_path(path) as name:
            onnxruntime.InferenceSession(name, options, providers=["CPUExecutionProvider"])
        types = Counter(node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node)
    kernels = {kind: types[kind] for kind in INTEGER_KERNELS if types[kind]}
    if sum(kernels.values()) < expected:
        problem = f"ONNX Runtime computes {sum(kernels.values())} of the {expected} quantised operators of {path} in "
        raise MachineError(f"{problem}integers", "update onnxruntime, or export for the target cpu")
    return kernels
