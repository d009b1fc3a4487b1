"""Which tensors of a component are recorded, and graphs that return them in groups of bounded size.

Recorded are the inputs of convolutions and matrix products that are not constant: what INT8 quantises beside the
weights; for the target ``cpu`` what convolutions make, too. Local functions (the lambda operators) are inlined first,
so that the products inside them count as well; the names of tensors are those of ``blocks.inlined``, by which
``quantise`` finds their ranges.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import helper

from ..errors import BundleError
from ..export.onnx_graph import PRODUCTS, constant_tensors, infer_shapes, summed_axis
from .blocks import inlined
from .quantise import rounded_outputs

_OUTPUT_BYTES = 4  # of a value, whatever the file's precision: float32 or less


@dataclass(frozen=True)
class Activation:
    """A tensor to record: its channels' axis (None where no constant weight sums over one), and bytes a call."""

    name: str
    axis: int | None
    bytes: int


def load_inlined(path: Path) -> onnx.ModelProto:
    """The model at ``path`` without local functions.

    Raises:
        BundleError: it is no ONNX model.
    """
    try:
        return inlined(onnx.load(str(path)))
    except Exception as error:  # protobuf's, and onnx's own
        raise BundleError(f"{path} is no valid ONNX file: export the bundle again") from error


def find_activations(model: onnx.ModelProto, rows: int, target: str = "tensorrt") -> list[Activation]:
    """The tensors to record of an inlined model, in the order in which they are computed; sizes for ``rows`` rows.

    ``target`` is one of ``quantise.TARGETS``.

    Raises:
        BundleError: the model has no convolution or matrix product on something that is not constant, or the shape of
            such a tensor cannot be inferred.
    """
    constant = constant_tensors(model.graph)
    axes: dict[str, set[int | None]] = {}
    for node in model.graph.node:
        if node.op_type not in PRODUCTS or node.domain:
            continue
        first, second = node.input[:2]
        weighted = first not in constant and second in constant
        if first not in constant:
            axes.setdefault(first, set()).add(summed_axis(node) if weighted else None)
        if second not in constant:
            axes.setdefault(second, set()).add(None)
    products = {node.name for node in model.graph.node if node.op_type in PRODUCTS}
    for name in rounded_outputs(model, products, target):
        axes.setdefault(name, set()).add(None)
    if not axes:
        raise BundleError(f"{model.graph.name} has no convolution or matrix product to calibrate: export it again")
    shapes = infer_shapes(model, rows)
    if unknown := next((name for name in axes if 0 in shapes.get(name, (0,))), None):
        raise BundleError(f"the shape of tensor {unknown!r} is not known: export the bundle again")
    computed = [v.name for v in model.graph.input] + [name for node in model.graph.node for name in node.output]
    return [
        Activation(name, axes[name].pop() if len(axes[name]) == 1 else None, _OUTPUT_BYTES * math.prod(shapes[name]))
        for name in computed
        if name in axes
    ]


def group(activations: list[Activation], limit_bytes: int) -> list[list[Activation]]:
    """Consecutive runs of ``activations`` of up to ``limit_bytes``; a larger one stands alone."""
    groups: list[list[Activation]] = []
    room = 0
    for activation in activations:
        if activation.bytes > room:
            groups.append([])
            room = limit_bytes
        groups[-1].append(activation)
        room -= activation.bytes
    return groups


def graphs(model: onnx.ModelProto, groups: list[list[Activation]]) -> Iterator[tuple[bytes, list[str]]]:
    """For each group a serialised model that returns its tensors, and their names; the last returns the model's too.

    Each holds the nodes up to its last tensor and no more. The model's inputs are left out of the names: they cannot
    be returned, and need not be.
    """
    given = {value.name for value in model.graph.input}
    own = [value.name for value in model.graph.output]
    for number, members in enumerate(groups, 1):
        part = onnx.ModelProto()
        part.CopyFrom(model)
        graph = part.graph
        last = number == len(groups)
        names = [a.name for a in members if a.name not in given]
        if not last:
            ends = [i for i, node in enumerate(graph.node) if set(names) & set(node.output)]
            del graph.node[max(ends, default=-1) + 1 :], graph.output[:]
        graph.output.extend(helper.make_empty_tensor_value_info(name) for name in names if not last or name not in own)
        yield part.SerializeToString(), names
