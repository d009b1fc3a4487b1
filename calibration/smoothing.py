"""SmoothQuant in a graph: outliers of activations are moved into the weights, where each channel has its own scale.

X · W = (X / s) · (s W) for a factor s of each input channel. The division goes into the gain and bias of the layer norm
that gives X, the multiplication into the weights of the operators that read it, so that the float32 result stays the
same but for rounding. A norm takes part if only convolutions and matrix products with constant weights read it,
directly or through nodes that merely move data.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper

from ..errors import UsageError
from ..export.int8_ranges import LARGEST
from ..export.onnx_graph import tensor_readers
from .blocks import block_of

ALPHA = 0.5  # the paper's for most of its networks
_MOVING = ("Transpose", "Reshape", "Cast")
_WEIGHT_AXIS = {"MatMul": 0, "Conv": 1}  # the axis of an operator's weights that counts input channels


class Norm(NamedTuple):
    """A layer norm and the operators of ``block`` that read it."""

    node: NodeProto
    block: str
    readers: list[NodeProto]


def norms(model: ModelProto) -> list[Norm]:
    """The layer norms whose outliers can be migrated, in the order of the network."""
    weights = {t.name: t for t in model.graph.initializer}
    readers = tensor_readers(model)
    result = []
    for node in model.graph.node:
        if node.op_type != "LayerNormalization":
            continue
        operators = _operators_behind(node.output[0], readers)
        changed = [*node.input[1:3], *(n.input[1] for n in operators)]
        if not all(name in weights and len(readers[name]) == 1 for name in changed):
            continue
        gain, names = weights[node.input[1]], {block_of(n) for n in operators}
        if len(names) == 1 and all(_matches(n, weights[n.input[1]], gain) for n in operators):
            result.append(Norm(node, names.pop(), operators))
    return result


def smooth(
    model: ModelProto, chosen: frozenset[str], channels: Mapping[str, npt.NDArray[np.float32]]
) -> dict[str, float]:
    """Migrate, in place, the outliers before the blocks ``chosen``; return the new scales, with nothing clipped.

    ``channels`` holds, by tensor, the largest magnitude of each channel of what the blocks read.

    Raises:
        UsageError: a maximum is not finite.
    """
    weights = {t.name: t for t in model.graph.initializer}
    scales: dict[str, float] = {}
    for norm in norms(model):
        if norm.block not in chosen:
            continue
        arrays = [numpy_helper.to_array(weights[n.input[1]]) for n in norm.readers]
        axes = [_WEIGHT_AXIS[n.op_type] for n in norm.readers]
        others = [tuple(i for i in range(w.ndim) if i != axis) for w, axis in zip(arrays, axes, strict=True)]
        reach = np.max([np.abs(w).max(rest) for w, rest in zip(arrays, others, strict=True)], axis=0)
        tensors = list(dict.fromkeys(n.input[0] for n in norm.readers))
        largest = channels[tensors[0]]
        factors = migration_factors(tensors[0], largest, reach)
        for name in norm.node.input[1:3]:
            _replace(weights[name], numpy_helper.to_array(weights[name]) / factors)
        for node, values, rest in zip(norm.readers, arrays, others, strict=True):
            _replace(weights[node.input[1]], values * np.expand_dims(factors, rest))
        scales.update(dict.fromkeys(tensors, float((largest / factors).max()) / LARGEST))
    return scales


def migration_factors(name: str, activations: npt.ArrayLike, weights: npt.ArrayLike) -> npt.NDArray[np.float32]:
    """s (C,) by which channel j of the activations is divided, and of the weights multiplied.

    s_j = max|X_j|^α / max|W_j|^(1 - α) with α = ``ALPHA``, equation 4 of Xiao et al., arXiv 2211.10438, of the largest
    magnitudes (C,) of the activation called ``name`` and of the weights. A channel that is zero on either side has
    nothing to move: its factor is 1. Raises UsageError for a maximum that is not finite.
    """
    x, w = np.asarray(activations, np.float64), np.asarray(weights, np.float64)
    if not (np.isfinite(x).all() and np.isfinite(w).all()):
        problem = f"a channel of activation {name} or of its weight is not finite"
        raise UsageError(problem, "take its block out of the recipe")
    alive = (x > 0) & (w > 0)
    factors = np.where(alive, x, 1) ** ALPHA / np.where(alive, w, 1) ** (1 - ALPHA)
    return factors.astype(np.float32)


def _operators_behind(tensor: str, readers: Mapping[str, list[NodeProto]]) -> list[NodeProto]:
    """The convolutions and matrix products that read ``tensor``; none if anything else reads it too."""
    operators: list[NodeProto] = []
    for node in readers.get(tensor, []):
        behind = _operators_behind(node.output[0], readers) if node.op_type in _MOVING else []
        if not behind and node.op_type not in _WEIGHT_AXIS:
            return []
        operators += behind or [node]
    return operators


def _matches(node: NodeProto, weight: TensorProto, gain: TensorProto) -> bool:
    """Whether the weight has one row for each value of the gain: that of a grouped convolution has fewer."""
    matrix = node.op_type == "Conv" or len(weight.dims) == 2
    return matrix and [weight.dims[_WEIGHT_AXIS[node.op_type]]] == list(gain.dims)


def _replace(tensor: TensorProto, values: np.ndarray) -> None:
    tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float32), tensor.name))
