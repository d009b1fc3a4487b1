"""Float32 ONNX file -> typed FP16, with float32 islands where the range or the sum needs them.

The file's inputs and outputs keep their types, so nothing outside it knows its precision, and a runtime that obeys
types needs no flag. Our own pass, for ready ones (onnxruntime's, onnxconverter-common's) round every input of the file
to FP16 on its way to an island, the timestep too. Needs onnx only, no PyTorch.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from ..errors import BundleError

LARGEST = 65504.0  # of FP16
# Sums over up to 4096 positions, and squares of activations: FP16's weak points are the accumulator and the range.
# TensorRT accumulates these in float32 by itself; other runtimes do what the file says.
ISLANDS = ("Softmax", "InstanceNormalization", "LayerNormalization")
# Modules whose every node stays float32, by the module path that the exporter noted: angles of up to 999 radians.
ISLAND_MODULES = ("time_embedding",)
# The decoders of the published autoencoder's family overflow in FP16, and run once a picture.
FLOAT32_COMPONENTS = ("vae_decoder",)

_EITHER = ("Shape", "Size", "Cast")  # what these return does not depend on the type of what they read
_FLOAT_INPUTS = {"Resize": (1, 2)}  # region and scales, float32 whatever is resized


def to_float16(
    path: Path, islands: tuple[str, ...] = ISLANDS, modules: tuple[str, ...] = ISLAND_MODULES
) -> dict[str, list[str]]:
    """Rewrites the file ``path`` in FP16, but for nodes of the types ``islands`` and those of ``modules``.

    Returns the names of the nodes that stayed float32, by operator type.

    Raises:
        BundleError: a weight is beyond FP16's range; the message names it.
    """
    model = onnx.shape_inference.infer_shapes(onnx.load(str(path)), check_type=True, data_prop=True)
    kept = convert(model, islands, modules)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, str(path))
    return kept


def convert(
    model: onnx.ModelProto, islands: tuple[str, ...] = ISLANDS, modules: tuple[str, ...] = ISLAND_MODULES
) -> dict[str, list[str]]:
    """``to_float16`` on a float32 model whose every tensor's type is known, in place."""
    graph = model.graph
    floats = _float_tensors(graph)
    native = {value.name: TensorProto.FLOAT for value in graph.input}  # the type a tensor is made in
    weights = {t.name: t for t in graph.initializer if t.data_type == TensorProto.FLOAT}
    nodes: list[onnx.NodeProto] = []
    cast: dict[tuple[str, int], str] = {}  # what there is in a second type
    halves: dict[str, onnx.TensorProto] = {}
    kept: dict[str, list[str]] = {}

    def as_type(name: str, wanted: int) -> str:
        """The name of ``name`` in the type ``wanted``; makes a cast or a rounded weight where there is none yet."""
        if name in weights:
            if wanted == TensorProto.FLOAT:
                return name
            halves.setdefault(name, _rounded(weights[name]))
            return halves[name].name
        if native.get(name, wanted) == wanted:
            return name
        if (name, wanted) not in cast:
            cast[name, wanted] = f"{name}_as_{'float16' if wanted == TensorProto.FLOAT16 else 'float32'}"
            nodes.append(helper.make_node("Cast", [name], [cast[name, wanted]], f"cast_{name}_{wanted}", to=wanted))
        return cast[name, wanted]

    for index, node in enumerate(graph.node):
        node.name = node.name or f"{node.op_type}_{index}"
        if node.op_type not in _EITHER:
            island = node.op_type in islands or _in_module(node, modules)
            wanted = TensorProto.FLOAT if island else TensorProto.FLOAT16
            for i, name in enumerate(node.input):
                if name in floats and i not in _FLOAT_INPUTS.get(node.op_type, ()):
                    node.input[i] = as_type(name, wanted)
            touched = [name for name in (*node.input, *node.output) if name in floats or name in native]
            if island and touched:
                kept.setdefault(node.op_type, []).append(node.name)
            native.update({name: wanted for name in node.output if name in floats})
            if not island:
                _round_constant(node)
        elif node.op_type == "Cast" and node.output[0] in floats:
            to = next(a for a in node.attribute if a.name == "to")
            native[node.output[0]] = to.i
        nodes.append(node)

    for output in graph.output:
        if output.name in floats and native[output.name] == TensorProto.FLOAT16:
            _rename(nodes, output.name, f"{output.name}_float16")
            nodes.append(helper.make_node("Cast", [f"{output.name}_float16"], [output.name], to=TensorProto.FLOAT))
    del graph.node[:], graph.value_info[:]
    graph.node.extend(nodes)
    used = {name for node in nodes for name in node.input}
    remaining = [t for t in (*graph.initializer, *halves.values()) if t.name in used]
    del graph.initializer[:]
    graph.initializer.extend(remaining)
    return kept


def weight_bytes(model: onnx.ModelProto) -> dict[str, int]:
    """Bytes of the initialisers by element type, such as ``{"FLOAT16": 1234}``."""
    found: dict[str, int] = {}
    for tensor in model.graph.initializer:
        kind = TensorProto.DataType.Name(tensor.data_type)
        found[kind] = found.get(kind, 0) + numpy_helper.to_array(tensor).nbytes
    return found


def _float_tensors(graph: onnx.GraphProto) -> set[str]:
    typed = (*graph.input, *graph.output, *graph.value_info)
    names = {v.name for v in typed if v.type.tensor_type.elem_type == TensorProto.FLOAT}
    known = {v.name for v in typed}
    unknown = [name for node in graph.node for name in node.output if name and name not in known]
    if unknown:
        raise RuntimeError(f"the type of {unknown[0]} is not known: infer the shapes first")
    return names | {t.name for t in graph.initializer if t.data_type == TensorProto.FLOAT}


def _rounded(tensor: onnx.TensorProto) -> onnx.TensorProto:
    values = numpy_helper.to_array(tensor)
    largest = float(np.abs(values).max(initial=0.0))
    if not largest <= LARGEST:
        raise BundleError(f"weight {tensor.name} reaches {largest:.3g}, FP16 ends at {LARGEST:g}: use --precision fp32")
    return numpy_helper.from_array(values.astype(np.float16), f"{tensor.name}_float16")


def _round_constant(node: onnx.NodeProto) -> None:
    """A Constant of float32 in FP16."""
    for attribute in node.attribute:
        if node.op_type == "Constant" and attribute.name == "value" and attribute.t.data_type == TensorProto.FLOAT:
            attribute.t.CopyFrom(_rounded(attribute.t))


def _in_module(node: onnx.NodeProto, modules: tuple[str, ...]) -> bool:
    where = "".join(p.value for p in node.metadata_props if p.key == "namespace")
    return any(re.search(rf"\b{module}\b", where) for module in modules)


def _rename(nodes: list[onnx.NodeProto], old: str, new: str) -> None:
    for node in nodes:
        for names in (node.input, node.output):
            for i, name in enumerate(names):
                if name == old:
                    names[i] = new
