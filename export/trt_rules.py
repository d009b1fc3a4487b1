"""What an ONNX file must keep to for the oldest TensorRT that is supported: 10.3, of JetPack 6.

``problems`` is a pure function over the model. TensorRT's parser finds most violations too, but each version its
own, on the device, and one of them (a name that a function's body shares with the graph) it does not find: it
computes something else. The sources of the rules are TensorRT's release notes and support matrices, by version.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper

from .onnx_graph import PRODUCTS, attribute, tensor_readers  # TensorRT fuses PRODUCTS with the pairs before them

# The highest opset that 10.3 reads. 21 would bring GroupNormalization, whose per-channel scale TensorRT mishandles
# before 10.9.
OPSET = 20
_DEFAULT_DOMAINS = ("", "ai.onnx")
_EXPLICIT = "quantisation is explicit: write QuantizeLinear and DequantizeLinear before"
# Operator -> why it is refused.
FORBIDDEN = {
    "Einsum": "mixed types are rejected, and broadcasting before 10.12: write it as MatMul",
    "GroupNormalization": "its scale is mishandled before 10.9: write it as InstanceNormalization",
    "DynamicQuantizeLinear": "quantisation is explicit: write QuantizeLinear with a constant scale",
    **{f"QLinear{kind}": f"{_EXPLICIT} {kind}" for kind in ("Conv", "MatMul")},
    **{f"{kind}Integer": f"{_EXPLICIT} {kind}" for kind in ("Conv", "MatMul")},
}
_QUANTISERS = ("QuantizeLinear", "DequantizeLinear")


def problems(model: ModelProto) -> list[str]:
    """Every violation, each a phrase that names the node (or function) and says what to do instead.

    Weights are looked at only where a rule concerns them: the scales and zero points of quantisation.
    """
    rules = (_opset_problems, _function_problems, _operator_problems, _kernel_problems, _quantisation_problems)
    return [problem for rule in rules for problem in rule(model)]


def _opset_problems(model: ModelProto) -> Iterator[str]:
    imports = [*model.opset_import, *(o for f in model.functions for o in f.opset_import)]
    highest = max((o.version for o in imports if o.domain in _DEFAULT_DOMAINS), default=OPSET)
    if highest > OPSET:
        yield f"opset {highest} is newer than {OPSET}, the highest that is parsed: export with opset {OPSET}"


def _function_problems(model: ModelProto) -> Iterator[str]:
    """Before 10.8 a body must share no name with the graph that calls it."""
    graph = model.graph
    outer = {value.name for value in [*graph.input, *graph.output, *graph.initializer]}
    outer |= {name for node in graph.node for name in node.output}
    for function in model.functions:
        names = {*function.input, *(n for node in function.node for n in [*node.input, *node.output])}
        if clash := sorted((names & outer) - {""}):
            yield (
                f"function {function.name}: its tensor {clash[0]!r} has the name of one in the graph and would "
                "take its value: give every name in a body a prefix of its own, or inline the function"
            )


def _operator_problems(model: ModelProto) -> Iterator[str]:
    functions = {(f.domain, f.name): len(f.input) for f in model.functions}
    for function in (None, *model.functions):
        for node in (model.graph if function is None else function).node:
            title = _title(node) if function is None else f"function {function.name}, {_title(node)}"
            takes = functions.get((node.domain, node.op_type), len(node.input))
            if takes != len(node.input) or (node.domain and "" in node.input):
                yield f"{title}: leaves out inputs of its function, which takes {takes}: pass all of them"
            if node.domain not in _DEFAULT_DOMAINS and (node.domain, node.op_type) not in functions:
                yield f"{title}: domain {node.domain!r} has no function of that name in the file"
            if node.op_type in FORBIDDEN:
                yield f"{title}: {FORBIDDEN[node.op_type]}"
            if function is not None and node.op_type in _QUANTISERS:
                yield f"{title}: quantisation in a function is not seen: inline the function"


def _kernel_problems(model: ModelProto) -> Iterator[str]:
    """Before 10.4 the size of a Conv's kernel that is no initializer is read from ``kernel_shape``, else is undefined.

    In a function the kernel may be a formal, which the parser sees as what the call passes.
    """
    for function in (None, *model.functions):
        scope = model.graph if function is None else function
        constants = {t.name for t in model.graph.initializer} if function is None else set(scope.input)
        constants |= {node.output[0] for node in scope.node if node.op_type == "Constant"}
        for node in scope.node:
            computed = node.op_type == "Conv" and node.input[1] not in constants
            if computed and not attribute(node, "kernel_shape", None):
                title = _title(node) if function is None else f"function {function.name}, {_title(node)}"
                yield f"{title}: its kernel {node.input[1]!r} is computed: give the attribute kernel_shape"


def _quantisation_problems(model: ModelProto) -> Iterator[str]:
    """Pairs stand directly before products and on both their inputs; scales are constants above 0, zero points 0."""
    constants = {t.name: t for t in model.graph.initializer}
    nodes = [node for node in model.graph.node if node.op_type == "Constant" and attribute(node, "value", None)]
    constants |= {node.output[0]: attribute(node, "value", None) for node in nodes}
    dequantised = {node.output[0]: node for node in model.graph.node if node.op_type == "DequantizeLinear"}
    readers = tensor_readers(model)
    for node in model.graph.node:
        if node.op_type in PRODUCTS:
            yield from _product_problems(node, dequantised, constants)
        if node.op_type in _QUANTISERS:
            yield from _pair_problems(node, constants)
            allowed = ("DequantizeLinear",) if node.op_type == "QuantizeLinear" else PRODUCTS
            for reader in readers.get(node.output[0], []):
                if reader.op_type not in allowed:
                    yield (
                        f"{_title(node)}: is read by {_title(reader)}, and may only be by {', '.join(allowed)}: "
                        "quantise directly before a product"
                    )


def _product_problems(
    node: NodeProto, dequantised: dict[str, NodeProto], constants: dict[str, TensorProto]
) -> Iterator[str]:
    left, right = (dequantised.get(name) for name in node.input[:2])
    weights_alone = right is not None and right.input[0] in constants  # a mode of its own
    if (left is None) != (right is None) and not weights_alone:
        there, absent = node.input[:2] if left is not None else node.input[1::-1]
        yield f"{_title(node)}: its input {there!r} is quantised and {absent!r} is not: quantise both"
    scales = [constants[n.input[1]].data_type for n in (left, right) if n is not None and n.input[1] in constants]
    if len(set(scales)) > 1:
        yield f"{_title(node)}: the scales of its inputs differ in type: give both the type of what is multiplied"


def _pair_problems(node: NodeProto, constants: dict[str, TensorProto]) -> Iterator[str]:
    scale, source = constants.get(node.input[1]), constants.get(node.input[0])
    if scale is None:
        yield f"{_title(node)}: its scale {node.input[1]!r} is not a constant: store it as an initializer"
    else:
        values = numpy_helper.to_array(scale)
        if not (np.isfinite(values) & (values > 0)).all():
            yield f"{_title(node)}: its scale {scale.name!r} is not finite and above 0 everywhere"
    if len(node.input) > 2 and node.input[2]:
        zero = constants.get(node.input[2])
        if zero is None or numpy_helper.to_array(zero).astype("float32").any():
            yield f"{_title(node)}: its zero point {node.input[2]!r} is not 0: quantise symmetrically"
    if node.op_type == "DequantizeLinear" and source is not None and source.data_type == TensorProto.INT32:
        yield f"{_title(node)}: dequantises the INT32 {source.name!r}: leave biases unquantised"


def _title(node: NodeProto) -> str:
    return f"node {(node.name or node.output[0])!r} ({node.op_type})"
