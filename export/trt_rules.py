"""What an ONNX file must keep to for the oldest TensorRT that is supported: 10.3, of JetPack 6.

``problems`` is a pure function over the model. TensorRT's parser finds most violations too, but each version its
own, on the device, and one of them (a name that a function's body shares with the graph) it does not find: it
computes something else. The sources of the rules are TensorRT's release notes and support matrices, by version.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from onnx import AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto, TensorProto, numpy_helper

from ..bundle.products import PRODUCTS  # TensorRT fuses each with the pairs before it
from ..runtimes.engine_files import max_opset

OLDEST = (10, 3)
_DEFAULT_DOMAINS = ("", "ai.onnx")
_FUNCTIONS_BY_DOMAIN = (10, 8)  # before, the parser tells functions apart by name only

# Operator -> why it is refused.
FORBIDDEN = {
    "Einsum": "mixed types are rejected, and broadcasting before 10.12: write it as MatMul",
    "GroupNormalization": "its scale is mishandled before 10.9: write it as InstanceNormalization",
    "DynamicQuantizeLinear": "quantisation is explicit: write QuantizeLinear with a constant scale",
    "ConvInteger": "quantisation is explicit: write QuantizeLinear and DequantizeLinear before Conv",
    "MatMulInteger": "quantisation is explicit: write QuantizeLinear and DequantizeLinear before MatMul",
    "QLinearConv": "quantisation is explicit: write QuantizeLinear and DequantizeLinear before Conv",
    "QLinearMatMul": "quantisation is explicit: write QuantizeLinear and DequantizeLinear before MatMul",
}
_QUANTISERS = ("QuantizeLinear", "DequantizeLinear")
_WEIGHT_AXIS = {"Conv": 0, "ConvTranspose": 1, "MatMul": 1}


def problems(model: ModelProto, flavour: str = "tensorrt", version: tuple[int, int] = OLDEST) -> list[str]:
    """Every violation, each a phrase that names the node (or function) and says what to do instead.

    Weights are looked at only where a rule concerns them: the scales and zero points of quantisation.
    """
    found = list(_opset(model, max_opset(flavour, version)))
    outer = {name for graph in _graphs(model.graph) for name in _names(graph)}
    functions = {(f.domain, f.name): f for f in model.functions}
    found += _function_names(model, outer, version if flavour == "tensorrt" else _FUNCTIONS_BY_DOMAIN)
    for where, node in _nodes(model):
        title = f"{where}node {node.name or node.output[0]!r} ({node.op_type})"
        function = functions.get((node.domain, node.op_type))
        if function is not None:
            found += _call(title, node, function)
        elif node.domain not in _DEFAULT_DOMAINS:
            found.append(f"{title}: domain {node.domain!r} has no function of that name in the file")
        elif node.op_type in FORBIDDEN:
            found.append(f"{title}: {FORBIDDEN[node.op_type]}")
        elif where and node.op_type in _QUANTISERS:
            found.append(f"{title}: quantisation in a function is not seen: inline the function")
    found += _quantisation(model)
    return found


def _opset(model: ModelProto, highest: int) -> Iterator[str]:
    for entry in [*model.opset_import, *(o for f in model.functions for o in f.opset_import)]:
        if entry.domain in _DEFAULT_DOMAINS and entry.version > highest:
            yield f"opset {entry.version} is newer than {highest}, the highest that is parsed: export with opset 20"
            return


def _function_names(model: ModelProto, outer: set[str], version: tuple[int, int]) -> Iterator[str]:
    """Bodies must be told apart by name, and share no name with the graph that calls them."""
    if version >= _FUNCTIONS_BY_DOMAIN:
        return
    for name, count in Counter(f.name for f in model.functions).items():
        if count > 1:
            yield f"function {name} exists {count} times: names must differ, the domain is ignored"
    for function in model.functions:
        names = {*function.input, *(n for node in function.node for n in [*node.input, *node.output])}
        if clash := sorted((names & outer) - {""}):
            yield (
                f"function {function.name}: its tensor {clash[0]!r} has the name of one in the graph and would "
                "take its value: give every name in a body a prefix of its own, or inline the function"
            )


def _call(title: str, node: NodeProto, function: FunctionProto) -> Iterator[str]:
    given, wanted = len(node.input), len(function.input)
    if given != wanted or "" in node.input:
        given = sum(bool(name) for name in node.input)
        yield f"{title}: has {given} inputs where its function takes {wanted}: pass all of them"


def _quantisation(model: ModelProto) -> Iterator[str]:
    """Constant scales above 0, zero points 0, no INT32 through DequantizeLinear, one scale a channel of weights; pairs
    directly before products and on both their inputs."""
    constants = {t.name: t for t in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant" and node.attribute and node.attribute[0].name == "value":
            constants[node.output[0]] = node.attribute[0].t
    users: dict[str, list[NodeProto]] = {}
    dequantised: dict[str, NodeProto] = {}
    for node in model.graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)
        if node.op_type == "DequantizeLinear":
            dequantised[node.output[0]] = node
    for node in model.graph.node:
        title = f"node {node.name or node.output[0]!r} ({node.op_type})"
        if node.op_type in PRODUCTS:
            yield from _inputs(title, node, dequantised, constants)
        if node.op_type not in _QUANTISERS:
            continue
        scale = constants.get(node.input[1])
        if scale is None:
            yield f"{title}: its scale {node.input[1]!r} is not a constant: store it as an initializer"
        else:
            values = numpy_helper.to_array(scale)
            if not (values > 0).all():  # NaN fails too
                yield f"{title}: its scale {scale.name!r} is not above 0 everywhere"
            elif not np.isfinite(values).all():
                yield f"{title}: its scale {scale.name!r} is not finite"
        if len(node.input) > 2 and node.input[2]:
            zero = constants.get(node.input[2])
            if zero is None or numpy_helper.to_array(zero).astype("float32").any():
                yield f"{title}: its zero point {node.input[2]!r} is not 0: quantise symmetrically"
        yield from _position(title, node, users.get(node.output[0], []))
        source = constants.get(node.input[0])
        if node.op_type == "DequantizeLinear" and source is not None:
            if source.data_type == TensorProto.INT32:
                yield f"{title}: dequantises the INT32 {source.name!r}: leave biases unquantised"
            if scale is not None and numpy_helper.to_array(scale).size > 1:
                yield from _weight_axis(title, node, users.get(node.output[0], []))


def _inputs(
    title: str, node: NodeProto, dequantised: dict[str, NodeProto], constants: dict[str, TensorProto]
) -> Iterator[str]:
    """A product's two inputs: quantised ones go with quantised weights, and their scales are of one type."""
    left, right = (dequantised.get(name) for name in node.input[:2])
    if left is not None and right is None:
        yield f"{title}: its input {node.input[0]!r} is quantised and {node.input[1]!r} is not: quantise both"
    if left is None and right is not None and right.input[0] not in constants:  # weights alone are a mode of its own
        yield f"{title}: its input {node.input[1]!r} is quantised and {node.input[0]!r} is not: quantise both"
    if left is not None and right is not None:
        types = {constants[n.input[1]].data_type for n in (left, right) if n.input[1] in constants}
        if len(types) > 1:
            yield f"{title}: the scales of its inputs differ in type: give both the type of what is multiplied"


def _position(title: str, node: NodeProto, users: Iterable[NodeProto]) -> Iterator[str]:
    """QuantizeLinear is read by DequantizeLinear alone, and that by products alone."""
    wanted = ("DequantizeLinear",) if node.op_type == "QuantizeLinear" else PRODUCTS
    for user in users:
        if user.op_type not in wanted:
            yield (
                f"{title}: is read by node {user.name or user.output[0]!r} ({user.op_type}), and may only be by "
                f"{', '.join(wanted)}: quantise directly before a product"
            )


def _weight_axis(title: str, node: NodeProto, users: Iterable[NodeProto]) -> Iterator[str]:
    axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
    for user in users:
        wanted = _WEIGHT_AXIS.get(user.op_type)
        if user.op_type == "Gemm":
            wanted = 0 if any(a.name == "transB" and a.i for a in user.attribute) else 1
        if wanted is not None and axis != wanted:
            yield f"{title}: scales along axis {axis}, weights of {user.op_type} need axis {wanted}"


def _graphs(graph: GraphProto) -> Iterator[GraphProto]:
    """``graph`` and those nested in its nodes."""
    yield graph
    for node in graph.node:
        for inner in _subgraphs(node):
            yield from _graphs(inner)


def _subgraphs(node: NodeProto) -> Iterator[GraphProto]:
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            yield attribute.g
        yield from attribute.graphs


def _names(graph: GraphProto) -> Iterator[str]:
    for value in [*graph.input, *graph.output, *graph.initializer]:
        yield value.name
    for node in graph.node:
        yield from node.output


def _nodes(model: ModelProto) -> Iterator[tuple[str, NodeProto]]:
    """Every node with a phrase for where it stands: empty in the graph, or its function's name."""
    holders: list[tuple[str, Any]] = [("", model.graph)]
    holders += [(f"function {f.name}, ", f) for f in model.functions]
    for where, holder in holders:
        for node in holder.node:
            yield where, node
            for inner in _subgraphs(node):
                for graph in _graphs(inner):
                    for nested in graph.node:
                        yield where, nested
