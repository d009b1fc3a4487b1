"""Float32 ONNX file -> typed FP16, with float32 islands where the range or the sum needs them.

The file's inputs and outputs keep their types, so nothing outside it knows its precision, and a runtime that obeys
types needs no flag. Our own pass, for ready ones (onnxruntime's, onnxconverter-common's) round every input of the file
to FP16 on its way to an island, the timestep too. Needs onnx only, no PyTorch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from ..errors import BundleError
from .onnx_graph import attribute

LARGEST = 65504.0  # of FP16
# Sums over up to 4096 positions, and squares of activations: FP16's weak points are the accumulator and the range.
# TensorRT accumulates these in float32 by itself; other runtimes do what the file says.
ISLANDS = ("Softmax", "InstanceNormalization", "LayerNormalization")
# Modules whose every node stays float32, by the module path that the exporter noted: angles of up to 999 radians.
ISLAND_MODULES = ("time_embedding",)

_SMALLEST_STORED = 256  # elements of a weight that is worth a cast: see ``store_in_half``
_EITHER = ("Shape", "Size", "Cast")  # what these return does not depend on the type of what they read
_FLOAT_INPUTS = {"Resize": (1, 2)}  # region and scales, float32 whatever is resized
_TYPE_NAMES: dict[int, str] = {TensorProto.FLOAT: "float32", TensorProto.FLOAT16: "float16"}


def to_float16(
    path: Path, islands: tuple[str, ...] = ISLANDS, modules: tuple[str, ...] = ISLAND_MODULES
) -> dict[str, list[str]]:
    """Rewrites the file ``path`` in FP16, but for nodes of the types ``islands`` and those of ``modules``.

    Returns the names of the nodes that stayed float32, by operator type.

    Raises:
        BundleError: a weight is beyond FP16's range; the message names it.
    """
    model = onnx.shape_inference.infer_shapes(read_model(path), check_type=True, data_prop=True)
    float32_nodes = convert(model, islands, modules)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, str(path))
    return float32_nodes


def convert(
    model: onnx.ModelProto,
    islands: tuple[str, ...] = ISLANDS,
    modules: tuple[str, ...] = ISLAND_MODULES,
    float32_tensors: Collection[str] = (),
) -> dict[str, list[str]]:
    """``to_float16`` on a float32 model whose every tensor's type is known, in place.

    The nodes that compute ``float32_tensors`` stay float32 too.
    """
    graph = model.graph
    floats = float_tensors(graph)
    native = {value.name: TensorProto.FLOAT for value in graph.input}  # the type that a tensor is computed in
    weights = {t.name: t for t in graph.initializer if t.data_type == TensorProto.FLOAT}
    nodes: list[onnx.NodeProto] = []
    casts: dict[tuple[str, int], str] = {}  # (tensor, type) -> the tensor in that second type
    halves: dict[str, onnx.TensorProto] = {}
    float32_nodes: dict[str, list[str]] = {}

    def as_type(name: str, kind: int) -> str:
        """The name of the tensor in the type ``kind``, by a cast or a rounded weight where there is none yet."""
        if name in weights:
            if kind == TensorProto.FLOAT:
                return name
            halves.setdefault(name, _rounded(weights[name]))
            return halves[name].name
        if native.get(name, kind) == kind:
            return name
        if (name, kind) not in casts:
            casts[name, kind] = f"{name}_as_{_TYPE_NAMES[kind]}"
            nodes.append(helper.make_node("Cast", [name], [casts[name, kind]], f"cast_{name}_{kind}", to=kind))
        return casts[name, kind]

    for index, node in enumerate(graph.node):
        node.name = node.name or f"{node.op_type}_{index}"
        if node.op_type == "Cast" and node.output[0] in floats:
            native[node.output[0]] = attribute(node, "to", None)
        if node.op_type not in _EITHER:
            path = "".join(p.value for p in node.metadata_props if p.key == "namespace")
            island = node.op_type in islands or any(re.search(rf"\b{module}\b", path) for module in modules)
            island = island or node.output[0] in float32_tensors
            kind = TensorProto.FLOAT if island else TensorProto.FLOAT16
            for i, name in enumerate(node.input):
                if name in floats and i not in _FLOAT_INPUTS.get(node.op_type, ()):
                    node.input[i] = as_type(name, kind)
            if island and any(name in floats or name in native for name in (*node.input, *node.output)):
                float32_nodes.setdefault(node.op_type, []).append(node.name)
            native.update({name: kind for name in node.output if name in floats})
            value = attribute(node, "value", None) if node.op_type == "Constant" and not island else None
            if value is not None and value.data_type == TensorProto.FLOAT:
                node.attribute[0].t.CopyFrom(_rounded(value))
        nodes.append(node)

    for output in graph.output:
        if output.name in floats and native[output.name] == TensorProto.FLOAT16:
            for names in (names for node in nodes for names in (node.input, node.output)):
                names[:] = [f"{name}_float16" if name == output.name else name for name in names]
            nodes.append(helper.make_node("Cast", [f"{output.name}_float16"], [output.name], to=TensorProto.FLOAT))
    used = {name for node in nodes for name in node.input}
    remaining = [t for t in (*graph.initializer, *halves.values()) if t.name in used]
    del graph.node[:], graph.value_info[:], graph.initializer[:]
    graph.node.extend(nodes)
    graph.initializer.extend(remaining)
    return float32_nodes


def float_tensors(graph: onnx.GraphProto) -> set[str]:
    """The names of the float32 tensors of a graph whose every tensor's type is known."""
    types = {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.output, *graph.value_info)}
    unknown = [name for node in graph.node for name in node.output if name and name not in types]
    if unknown:
        raise RuntimeError(f"the type of {unknown[0]} is not known: infer the shapes first")
    types |= {t.name: t.data_type for t in graph.initializer}
    return {name for name, kind in types.items() if kind == TensorProto.FLOAT}


def _rounded(tensor: onnx.TensorProto) -> onnx.TensorProto:
    values = numpy_helper.to_array(tensor)
    largest = float(np.abs(values).max(initial=0.0))
    if not largest <= LARGEST:
        problem = f"weight {tensor.name} reaches {largest:.3g}, FP16 ends at {LARGEST:g}"
        raise BundleError(problem, "use --precision fp32")
    return numpy_helper.from_array(values.astype(np.float16), f"{tensor.name}_float16")


def store_in_half(path: Path) -> None:
    """Store the float32 weights of the file ``path`` in FP16, each with a cast back, which ``read_model`` undoes.

    Runtimes fold the casts when they load the file: it halves, and what is computed stays float32.

    Raises:
        BundleError: a weight is beyond FP16's range; the message names it.
    """
    model = onnx.load(str(path))
    nodes: list[onnx.NodeProto] = []
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT and math.prod(tensor.dims) >= _SMALLEST_STORED:
            name = tensor.name
            tensor.CopyFrom(_rounded(tensor))
            nodes.append(helper.make_node("Cast", [tensor.name], [name], f"cast_{name}", to=TensorProto.FLOAT))
    nodes += model.graph.node
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.save(model, str(path))


def read_model(path: Path) -> onnx.ModelProto:
    """Read an ONNX file with its weights in the type that they are computed in; see ``store_in_half``."""
    model = onnx.load(str(path))
    graph = model.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    computed = []
    for node in graph.node:
        stored = weights.get(node.input[0]) if node.op_type == "Cast" else None
        if stored is None or attribute(node, "to", None) != TensorProto.FLOAT:
            computed.append(node)
        else:
            values = numpy_helper.to_array(stored).astype(np.float32)
            stored.CopyFrom(numpy_helper.from_array(values, node.output[0]))
    del graph.node[:]
    graph.node.extend(computed)
    return model
