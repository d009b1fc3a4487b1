"""SmoothQuant in a graph: outliers of activations are moved into the weights, where each channel has its own scale.

X · W = (X / s) · (s W) for a factor s of each input channel. The division goes into the gain and bias of the layer norm
that gives X, the multiplication into the weights of the operators that read it, so that the float32 result stays the
same but for rounding. A norm takes part if only convolutions and matrix products with constant weights read it,
directly or through nodes that merely move data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper

from ..errors import UsageError
from .blocks import block_of
from .ranges import LARGEST

ALPHA = 0.5  # the paper's for most of its networks
_MOVING = ("Transpose", "Reshape", "Cast")
_WEIGHT_AXIS = {"MatMul": 0, "Conv": 1}  # the axis of an operator's weights that counts input channels


@dataclass(frozen=True)
class Norm:
    """A layer norm, the operators of ``block`` that read it, and the tensors by which they do."""

    node: NodeProto
    block: str
    readers: tuple[NodeProto, ...]
    tensors: tuple[str, ...]


def norms(model: ModelProto) -> list[Norm]:
    """The layer norms whose outliers can be migrated, in the order of the network."""
    weights = {t.name: t for t in model.graph.initializer}
    readers = tensor_readers(model)
    result = []
    for node in model.graph.node:
        if node.op_type != "LayerNormalization" or not weights.keys() >= {*node.input[1:3]}:
            continue
        operators = _operators_behind(node.output[0], readers)
        gain = weights[node.input[1]]
        if operators is None or not all(_matches(n, weights.get(n.input[1]), gain) for n in operators):
            continue
        names = {block_of(n) for n in operators}
        changed = [*node.input[1:3], *(n.input[1] for n in operators)]
        if len(names) == 1 and all(len(readers[name]) == 1 for name in changed):
            result.append(Norm(node, names.pop(), tuple(operators), tuple({n.input[0]: None for n in operators})))
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
        largest = channels[norm.tensors[0]]
        factors = migration_factors(norm.tensors[0], largest, reach)
        for name in norm.node.input[1:3]:
            _replace(weights[name], numpy_helper.to_array(weights[name]) / factors)
        for node, values, rest in zip(norm.readers, arrays, others, strict=True):
            _replace(weights[node.input[1]], values * np.expand_dims(factors, rest))
        scales.update(dict.fromkeys(norm.tensors, float((largest / factors).max()) / LARGEST))
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


def tensor_readers(model: ModelProto) -> dict[str, list[NodeProto]]:
    """Every tensor that is read, with the nodes that read it."""
    readers: dict[str, list[NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    return readers


def _operators_behind(tensor: str, readers: Mapping[str, list[NodeProto]]) -> list[NodeProto] | None:
    """The convolutions and matrix products that read ``tensor``; None if there are none, or if others read it too."""
    operators: list[NodeProto] = []
    for node in readers.get(tensor, []):
        if node.op_type in _WEIGHT_AXIS:
            operators.append(node)
        elif node.op_type in _MOVING and (behind := _operators_behind(node.output[0], readers)):
            operators += behind
        else:
            return None
    return operators or None


def _matches(node: NodeProto, weight: TensorProto | None, gain: TensorProto) -> bool:
    """Whether the weight is a constant with one row for each value of the gain: a grouped convolution has fewer."""
    if weight is None or (node.op_type == "MatMul" and len(weight.dims) != 2):
        return False
    return [weight.dims[_WEIGHT_AXIS[node.op_type]]] == list(gain.dims)


def _replace(tensor: TensorProto, values: np.ndarray) -> None:
    tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float32), tensor.name))
