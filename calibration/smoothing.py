"""SmoothQuant in a graph: what a layer norm makes is divided by a factor a channel, what reads it multiplied by it.

The factors are ``migration``'s. They go into the norm's gain and bias and into the weights of the products behind it,
so nothing is computed that was not before, and the float32 result stays the same but for rounding. A norm takes part
where products with constant weights alone read it, directly or through nodes that only move data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper

from .blocks import block_of
from .migration import migration_factors
from .pairs import LARGEST

_MOVING = ("Transpose", "Reshape", "Cast")


@dataclass(frozen=True)
class Norm:
    """A layer norm, the products that read it, and the tensors by which they do; ``block`` is the products'."""

    node: NodeProto
    block: str
    products: tuple[NodeProto, ...]
    tensors: tuple[str, ...]


def norms(model: ModelProto) -> list[Norm]:
    """The layer norms whose outliers can be migrated, in the order of the network."""
    weights = {t.name: t for t in model.graph.initializer}
    readers: dict[str, list[NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    found = []
    for node in model.graph.node:
        if node.op_type != "LayerNormalization" or not weights.keys() >= {*node.input[1:3]}:
            continue
        products = _products(node.output[0], readers)
        gain = weights[node.input[1]]
        if products is None or not all(_weighs(p, weights.get(p.input[1]), gain) for p in products):
            continue
        names = {block_of(p) for p in products}
        own = [*node.input[1:3], *(p.input[1] for p in products)]  # weights that nothing else reads
        if len(names) == 1 and all(len(readers[name]) == 1 for name in own):
            found.append(Norm(node, names.pop(), tuple(products), tuple({p.input[0]: None for p in products})))
    return found


def smooth(
    model: ModelProto, chosen: frozenset[str], channels: Mapping[str, npt.NDArray[np.float32]]
) -> dict[str, float]:
    """Migrates, in place, the outliers before the blocks ``chosen``; returns the new scales, nothing clipped.

    ``channels`` holds the largest magnitude of each channel of the products' inputs, by the tensors' names.

    Raises:
        UsageError: a maximum is not finite.
    """
    weights = {t.name: t for t in model.graph.initializer}
    scales: dict[str, float] = {}
    for norm in norms(model):
        if norm.block not in chosen:
            continue
        largest = channels[norm.tensors[0]]
        arrays = [numpy_helper.to_array(weights[p.input[1]]) for p in norm.products]
        reach = np.max([np.abs(w).max(_others(p, w)) for p, w in zip(norm.products, arrays, strict=True)], axis=0)
        factors = migration_factors(norm.tensors[0], largest, reach)
        for name in norm.node.input[1:3]:
            _replace(weights[name], numpy_helper.to_array(weights[name]) / factors)
        for product, values in zip(norm.products, arrays, strict=True):
            along = [-1 if i == _axis(product) else 1 for i in range(values.ndim)]
            _replace(weights[product.input[1]], values * factors.reshape(along))
        scales.update(dict.fromkeys(norm.tensors, float((largest / factors).max()) / LARGEST))
    return scales


def _products(name: str, readers: Mapping[str, list[NodeProto]]) -> list[NodeProto] | None:
    """The products that read a tensor, None where something else does too."""
    found: list[NodeProto] = []
    for node in readers.get(name, []):
        if node.op_type in _MOVING:
            behind = _products(node.output[0], readers)
            if behind is None:
                return None
            found += behind
        elif node.op_type in ("MatMul", "Conv"):
            found.append(node)
        else:
            return None
    return found or None


def _weighs(product: NodeProto, weight: TensorProto | None, gain: TensorProto) -> bool:
    """Whether the weight is a constant with a row for each value of the gain; a grouped convolution has fewer."""
    flat = product.op_type == "Conv" or (weight is not None and len(weight.dims) == 2)
    return weight is not None and flat and [weight.dims[_axis(product)]] == list(gain.dims)


def _axis(product: NodeProto) -> int:
    """The axis of a product's weights that counts input channels."""
    return 1 if product.op_type == "Conv" else 0


def _others(product: NodeProto, weights: np.ndarray) -> tuple[int, ...]:
    return tuple(i for i in range(weights.ndim) if i != _axis(product))


def _replace(tensor: TensorProto, values: np.ndarray) -> None:
    tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float32), tensor.name))
