"""Calls of local functions replaced by the functions' bodies, so that the products inside can be quantised.

``onnx.inliner`` inlines every call of a function or none; here the caller chooses call by call, so that a block that
stays unquantised keeps its lambda operator as one node. Names are made from the call's, hence the same for the same
file at any time: a range that was recorded in one inlined copy finds its tensor in another. What a body computes from
constants alone (the kernels that a tile sees, say) becomes an initializer, for a weight must be one to be quantised.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from onnx import AttributeProto, FunctionProto, ModelProto, NodeProto, numpy_helper
from onnx.reference import ReferenceEvaluator

FUNCTION = "function"  # the metadata that names the function a node came from


def inline(model: ModelProto, wanted: Callable[[NodeProto], bool]) -> None:
    """Replaces, in place, every call of a local function in the graph for which ``wanted(call)`` holds."""
    functions = {(f.domain, f.name): f for f in model.functions}
    constants = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    nodes: list[NodeProto] = []
    for node in model.graph.node:
        function = functions.get((node.domain, node.op_type))
        if function is None or not wanted(node):
            nodes.append(node)
            continue
        for made in _body(node, function):
            folded = _value(made, constants)
            if folded is None:
                nodes.append(made)
            else:
                constants[made.output[0]] = folded
                model.graph.initializer.append(numpy_helper.from_array(folded, made.output[0]))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    drop_unused(model)


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
