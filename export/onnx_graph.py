"""Helpers that read and rewrite ONNX graphs: operators that multiply, shapes, constants, inlined functions.

The lambda operators are calls of local functions. ``onnx.inliner`` inlines every call of a function or none; ``inline``
lets the caller choose call by call, so that a block that stays unquantised keeps its lambda operator as one node. The
names that it gives depend on the call's name alone: a range recorded in one inlined copy finds its tensor in another.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import onnx
from onnx import (
    AttributeProto,
    FunctionProto,
    GraphProto,
    ModelProto,
    NodeProto,
    TensorProto,
    ValueInfoProto,
    helper,
    numpy_helper,
)
from onnx.reference import ReferenceEvaluator

# Operator type -> the axis of its first input that it sums over, which are a convolution's input channels.
SUMMED_AXIS = {"Conv": 1, "ConvTranspose": 1, "MatMul": -1, "Gemm": -1}
PRODUCTS = tuple(SUMMED_AXIS)  # the operators whose multiply-adds are counted and that may be quantised
FUNCTION = "function"  # the metadata of an inlined node that names the function it came from
_LARGEST_SHAPE = 64  # elements of a constant that may decide another tensor's shape


def attribute(node: NodeProto, name: str, default: Any) -> Any:
    """The value of an attribute of ``node``, or ``default`` where it has none of that name."""
    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


def signature(value: ValueInfoProto) -> tuple[str, str, tuple[int | str, ...]]:
    """The name, the element type and the shape of an input or output of a graph, a free size by its name."""
    tensor = value.type.tensor_type
    dtype = helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
    return value.name, dtype, tuple(d.dim_value or d.dim_param for d in tensor.shape.dim)


def tensor_readers(model: ModelProto) -> dict[str, list[NodeProto]]:
    """Every tensor that is read, with the nodes that read it."""
    readers: dict[str, list[NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    return readers


def summed_axis(node: NodeProto) -> int:
    """The axis of the first input of a convolution or matrix product that it sums over."""
    return 0 if node.op_type == "Gemm" and attribute(node, "transA", 0) else SUMMED_AXIS[node.op_type]


def multiplications(node: NodeProto, shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """Multiply-adds of one of ``PRODUCTS``: the elements of its output times the terms that each is a sum of.

    A transposed convolution is counted from its input, each of whose elements meets every tap. The result is None where
    a shape in ``shapes`` (tensor name -> sizes, 0 for unknown) is missing.
    """
    left, right, out = (shapes.get(name, ()) for name in (*node.input[:2], node.output[0]))
    if not (left and right and out) or 0 in (*left, *right, *out):
        return None
    if node.op_type == "Conv":
        return math.prod(out) * math.prod(right[1:])
    if node.op_type == "ConvTranspose":
        return math.prod(left) * math.prod(right[1:])
    return math.prod(out) * left[summed_axis(node)]


def constant_tensors(graph: GraphProto) -> set[str]:
    """The names of the tensors that depend on weights and constants alone, through any number of nodes."""
    constant = {tensor.name for tensor in graph.initializer}
    for node in graph.node:
        if all(name in constant for name in node.input if name):
            constant.update(node.output)
    return constant


def infer_tensors(model: ModelProto, rows: int) -> dict[str, tuple[tuple[int, ...], int]]:
    """The shape and element type (``onnx.TensorProto.DataType``) of every tensor of a model without function calls.

    The free batch is ``rows``; a size that cannot be inferred is 0.
    """
    copy = outline(model)
    for value in (*copy.graph.input, *copy.graph.output):
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.dim_param:
                dimension.dim_value = rows
    graph = onnx.shape_inference.infer_shapes(copy, data_prop=True).graph
    tensors = {t.name: (tuple(t.dims), t.data_type) for t in graph.initializer}
    for value in (*graph.input, *graph.output, *graph.value_info):
        kind = value.type.tensor_type
        tensors[value.name] = (tuple(d.dim_value for d in kind.shape.dim), kind.elem_type)
    return tensors


def infer_shapes(model: ModelProto, rows: int) -> dict[str, tuple[int, ...]]:
    """The shapes of ``infer_tensors`` alone."""
    return {name: shape for name, (shape, _) in infer_tensors(model, rows).items()}


def outline(model: ModelProto) -> ModelProto:
    """A copy without the values of large initializers: light, and all that inferring shapes and types needs."""
    copy = ModelProto(ir_version=model.ir_version, opset_import=model.opset_import, functions=model.functions)
    graph = model.graph
    copy.graph.CopyFrom(GraphProto(name=graph.name, node=graph.node, input=graph.input, output=graph.output))
    for tensor in graph.initializer:
        if math.prod(tensor.dims) <= _LARGEST_SHAPE:
            copy.graph.initializer.append(tensor)
        else:
            copy.graph.initializer.append(TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims))
    return copy


def cut(model: ModelProto, number: int, rows: int) -> list[ModelProto]:
    """``model`` for a batch of ``rows`` as ``number`` models that run one after the other, cut where least crosses.

    What one computes and a later one reads is an output of the one and an input of the other, under the same name.
    """
    tensors, nodes = infer_tensors(model, rows), list(model.graph.node)
    weights = {t.name: t for t in model.graph.initializer}
    made = {name: index for index, node in enumerate(nodes) for name in node.output}
    last = {name: index for index, node in enumerate(nodes) for name in node.input if name and name not in weights}
    last |= {value.name: len(nodes) for value in model.graph.output}
    crossing = np.zeros(len(nodes) + 1, np.int64)  # elements that the nodes before an index hand on to those after it
    for name, index in last.items():
        crossing[made.get(name, -1) + 1 : index + 1] += math.prod(tensors[name][0])
    length = len(nodes) / number
    windows = [(math.ceil((k - 0.5) * length), math.ceil((k + 0.5) * length)) for k in range(1, number)]
    edges = [0, *(low + int(np.argmin(crossing[low:high])) for low, high in windows), len(nodes)]
    parts = []

    def values(names: Iterable[str]) -> list[ValueInfoProto]:
        return [helper.make_tensor_value_info(name, tensors[name][1], tensors[name][0]) for name in names]

    for start, end in pairwise(edges):
        read = dict.fromkeys(name for node in nodes[start:end] for name in node.input if name)
        inputs = [name for name in read if name not in weights and made.get(name, -1) < start]
        outputs = [name for node in nodes[start:end] for name in node.output if last.get(name, -1) >= end]
        constants = [weights[name] for name in read if name in weights]
        part = ModelProto(ir_version=model.ir_version, opset_import=model.opset_import, functions=model.functions)
        graph = helper.make_graph(nodes[start:end], f"{start} to {end}", values(inputs), values(outputs), constants)
        part.graph.CopyFrom(graph)
        drop_unused(part)
        parts.append(part)
    return parts


def drop_unused(model: ModelProto) -> None:
    """Remove, in place, the initializers that no node reads and the functions that no node calls."""
    read = {name for node in model.graph.node for name in node.input} | {o.name for o in model.graph.output}
    called = {(n.domain, n.op_type) for n in [*model.graph.node, *(n for f in model.functions for n in f.node)]}
    weights = [t for t in model.graph.initializer if t.name in read]
    functions = [f for f in model.functions if (f.domain, f.name) in called]
    del model.graph.initializer[:], model.functions[:]
    model.graph.initializer.extend(weights)
    model.functions.extend(functions)


def inline(model: ModelProto, wanted: Callable[[NodeProto], bool], fold: bool = True) -> None:
    """Replace, in place, every call of a local function for which ``wanted(call)`` holds by the function's nodes.

    With ``fold``, what a body computes from constants alone (the kernels that a tile sees, say) becomes an initializer,
    for a weight must be one to be quantised.
    """
    functions = {(f.domain, f.name): f for f in model.functions}
    weights = {t.name: t for t in model.graph.initializer}
    constants: dict[str, np.ndarray] = {}  # those that an inlined body has read or computed
    nodes: list[NodeProto] = []
    for call in model.graph.node:
        function = functions.get((call.domain, call.op_type))
        if function is None or not wanted(call):
            nodes.append(call)
            continue
        if fold:
            constants.update({n: numpy_helper.to_array(weights[n]) for n in call.input if n in weights})
        for node in _body(call, function):
            if fold and all(name in constants for name in node.input if name):
                value = _evaluate(node, constants)
                constants[node.output[0]] = value
                model.graph.initializer.append(numpy_helper.from_array(value, node.output[0]))
            else:
                nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    drop_unused(model)


def _body(call: NodeProto, function: FunctionProto) -> list[NodeProto]:
    """The function's nodes with the call's tensors for the formal ones, and a prefix for all other names."""
    names = dict(zip([*function.input, *function.output], [*call.input, *call.output], strict=True))
    nodes = []
    for index, inner in enumerate(function.node):
        if any(a.ref_attr_name or a.type == AttributeProto.GRAPH for a in inner.attribute):
            raise RuntimeError(f"function {function.name} reads attributes or holds graphs, which is not inlined")
        node = NodeProto()
        node.CopyFrom(inner)
        node.name = f"{call.name}/{inner.op_type}_{index}"
        node.input[:] = [name and names.get(name, f"{call.name}/{name}") for name in inner.input]
        node.output[:] = [name and names.get(name, f"{call.name}/{name}") for name in inner.output]
        del node.metadata_props[:]
        node.metadata_props.extend(call.metadata_props)
        node.metadata_props.add(key=FUNCTION, value=function.name)
        nodes.append(node)
    return nodes


def _evaluate(node: NodeProto, constants: Mapping[str, np.ndarray]) -> np.ndarray:
    """What ``node``, all of whose inputs are constant, computes."""
    outputs: Any = ReferenceEvaluator(node).run(None, {name: constants[name] for name in node.input if name})
    return np.asarray(outputs[0])
