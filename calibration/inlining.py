"""Calls of local functions replaced by the functions' bodies, so that the products inside can be quantised.

``onnx.inliner`` inlines every call of a function or none; here the caller chooses call by call, so that a block that
stays unquantised keeps its lambda operator as one node. Names are made from the call's, hence the same for the same
file at any time: a range that was recorded in one inlined copy finds its tensor in another. What a body computes from
constants alone (the kernels that a tile sees, say) becomes an initializer, for a weight must be one to be quantised.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from onnx import AttributeProto, FunctionProto, ModelProto, NodeProto, TensorProto, numpy_helper
from onnx.reference import ReferenceEvaluator

FUNCTION = "function"  # the metadata that names the function a node came from
_LARGEST_SHAPE = 64  # elements; shapes and the like, whose values decide other shapes, are no larger


def inline(model: ModelProto, wanted: Callable[[NodeProto], bool], fold: bool = True) -> None:
    """Replaces, in place, every call of a local function in the graph for which ``wanted(call)`` holds.

    ``fold`` makes initializers of what a body computes from constants.
    """
    functions = {(f.domain, f.name): f for f in model.functions}
    weights = {t.name: t for t in model.graph.initializer}
    constants: dict[str, np.ndarray] = {}  # those that a body has read or made
    nodes: list[NodeProto] = []
    for node in model.graph.node:
        function = functions.get((node.domain, node.op_type))
        if function is None or not wanted(node):
            nodes.append(node)
            continue
        if fold:
            constants.update({n: numpy_helper.to_array(weights[n]) for n in node.input if n in weights})
        for made in _body(node, function):
            folded = _value(made, constants) if fold else None
            if folded is None:
                nodes.append(made)
            else:
                constants[made.output[0]] = folded
                model.graph.initializer.append(numpy_helper.from_array(folded, made.output[0]))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    drop_unused(model)


def outline(model: ModelProto) -> ModelProto:
    """A copy without the contents of large initializers: all that inferring shapes and types needs, and light."""
    made = ModelProto()
    made.opset_import.extend(model.opset_import)
    made.functions.extend(model.functions)
    made.ir_version = model.ir_version
    graph = model.graph
    made.graph.name = graph.name
    made.graph.node.extend(graph.node)
    made.graph.input.extend(graph.input)
    made.graph.output.extend(graph.output)
    for tensor in graph.initializer:
        if math.prod(tensor.dims) <= _LARGEST_SHAPE:
            made.graph.initializer.append(tensor)
        else:
            made.graph.initializer.append(TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims))
    return made


def drop_unused(model: ModelProto) -> None:
    """Removes initializers that no node reads and functions that no node calls."""
    read = {name for node in model.graph.node for name in node.input} | {o.name for o in model.graph.output}
    called = {(n.domain, n.op_type) for n in [*model.graph.node, *(n for f in model.functions for n in f.node)]}
    weights = [t for t in model.graph.initializer if t.name in read]
    functions = [f for f in model.functions if (f.domain, f.name) in called]
    del model.graph.initializer[:], model.functions[:]
    model.graph.initializer.extend(weights)
    model.functions.extend(functions)


def _body(call: NodeProto, function: FunctionProto) -> list[NodeProto]:
    """The function's nodes with the call's tensors for the formal ones, and a prefix for all others."""
    names = dict(zip(function.input, call.input, strict=True))
    names.update(zip(function.output, call.output, strict=True))
    made = []
    for index, inner in enumerate(function.node):
        if any(a.ref_attr_name or a.type == AttributeProto.GRAPH for a in inner.attribute):
            raise RuntimeError(f"function {function.name} reads attributes or holds graphs, which is not inlined")
        node = NodeProto()
        node.CopyFrom(inner)
        node.name = f"{call.name}/{inner.op_type}_{index}"
        for side, originals in ((node.input, inner.input), (node.output, inner.output)):
            del side[:]
            side.extend(name and names.get(name, f"{call.name}/{name}") for name in originals)
        del node.metadata_props[:]
        node.metadata_props.extend(call.metadata_props)
        node.metadata_props.add(key=FUNCTION, value=function.name)
        made.append(node)
    return made


def _value(node: NodeProto, constants: dict[str, np.ndarray]) -> np.ndarray | None:
    """What ``node`` computes where all it reads is constant, else None."""
    if any(name and name not in constants for name in node.input):
        return None
    made: Any = ReferenceEvaluator(node).run(None, {name: constants[name] for name in node.input if name})
    return np.asarray(made[0])
