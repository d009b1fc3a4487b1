"""A denoiser in INT8: explicit QuantizeLinear and DequantizeLinear at the products of the blocks that a recipe names.

Our own insertion, not onnxruntime's ``quantize_static``. That one calibrates and inserts in one go, with its own
ranges; it does not look into functions, forgets the nodes' module paths, and knows one placement. Once ranges and
recipe are given what is left is short, and the same for float32 and FP16 files. Where the pairs stand:

- ``tensorrt`` (and ONNX Runtime's GPU providers): on both inputs of a product. The output stays in its type, for what
  follows is a norm, SiLU or a sum, which are not computed in INT8. Biases stay too: TensorRT refuses INT32 ones.
- ``cpu`` (ONNX Runtime): a convolution in integers exists with a quantised output only, so each that is quantised also
  gets a pair on its output, or behind the ReLU that alone reads it. Matrix products give float32 from integers.
  Gemm and transposed convolutions stay float32 whatever the recipe says, for they have no kernel in integers here
  (of a denoiser these are the layers that see the timestep alone: 0.02% of the multiplications).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import onnx
from onnx import ModelProto, NodeProto

from ..errors import UsageError
from ..export.onnx_graph import PRODUCTS, drop_unused
from .blocks import block_of, blocks, inlined
from .pairs import PairWriter, producers, source
from .recipe import Recipe
from .silu import fuse_silu

# target -> the products that it computes in INT8
TARGETS: dict[str, tuple[str, ...]] = {"tensorrt": PRODUCTS, "cpu": ("Conv", "MatMul")}


def activations(model: ModelProto, recipe: Recipe, target: str = "tensorrt") -> list[str]:
    """The tensors whose scales ``quantise`` needs, in the order of the network.

    They are tensors of ``blocks.inlined(model)``, which recording has to run. For an FP16 file the names are those in
    the float32 file that it was made from.

    Raises:
        UsageError: the recipe names a block that the model does not have, or the target is unknown.
    """
    copy, chosen = _prepared(model, recipe, target)
    constants, made_by = {t.name for t in copy.graph.initializer}, producers(copy)
    outputs = rounded_outputs(copy, chosen, target)
    names: dict[str, None] = {}
    for node in copy.graph.node:
        if node.name in chosen:
            names.update({source(n, made_by): None for n in node.input[:2] if n not in constants})
        names.update({source(n, made_by): None for n in node.output if n in outputs})
    return list(names)


def quantise(model: ModelProto, recipe: Recipe, scales: Mapping[str, float], target: str = "tensorrt") -> ModelProto:
    """A copy of ``model`` (float32, or FP16 with islands) with the recipe's blocks in INT8 for ``target``.

    ``scales`` holds, for every tensor that ``activations`` lists, the step of its INT8: the largest magnitude that is
    not clipped over 127.

    Raises:
        UsageError: the recipe names a block that the model does not have; the target is unknown; a scale is missing,
            not finite, or not above 0 in the type of its tensor.
        BundleError: a weight that is to be quantised is not finite.
    """
    copy, chosen = _prepared(model, recipe, target)
    writer = PairWriter(copy, scales, unsigned=target == "cpu")
    outputs = rounded_outputs(copy, chosen, target)
    for node in copy.graph.node:
        if node.name in chosen:
            node.input[:2] = _quantised_inputs(node, writer)
        writer.nodes.append(node)
        if outputs.intersection(node.output):
            writer.output(node)
    del copy.graph.node[:]
    copy.graph.node.extend(writer.nodes)
    copy.graph.initializer.extend(writer.made.values())
    drop_unused(copy)
    if target == "cpu":
        fuse_silu(copy)
    onnx.checker.check_model(copy, full_check=True)
    return copy


def check_target(target: str) -> None:
    """Raise ``UsageError`` for a target that is not in ``TARGETS``."""
    if target not in TARGETS:
        raise UsageError(f"there is no target {target!r} for INT8: choose one of {', '.join(TARGETS)}")


def quantised_nodes(model: ModelProto) -> list[str]:
    """The names of the products whose two inputs are dequantised."""
    made_by = {name: node.op_type for node in model.graph.node for name in node.output}
    return [
        node.name
        for node in model.graph.node
        if node.op_type in PRODUCTS and all(made_by.get(name) == "DequantizeLinear" for name in node.input[:2])
    ]


def _prepared(model: ModelProto, recipe: Recipe, target: str) -> tuple[ModelProto, set[str]]:
    """The model with the recipe's lambda operators inlined, and the names of its nodes that are to be quantised."""
    check_target(target)
    recipe.check(block.name for block in blocks(model))
    copy = inlined(model, recipe.chosen)
    chosen = {n.name for n in copy.graph.node if n.op_type in TARGETS[target] and block_of(n) in recipe.chosen}
    return copy, chosen


def _quantised_inputs(node: NodeProto, writer: PairWriter) -> list[str]:
    left, right = node.input[:2]
    return [
        writer.weight(node, i, other) if name in writer.constants else writer.activation(name)
        for i, (name, other) in enumerate(((left, right), (right, left)))
    ]


def rounded_outputs(model: ModelProto, chosen: Collection[str], target: str) -> set[str]:
    """The tensors that are rounded where they are made when the nodes named ``chosen`` are quantised."""
    if target != "cpu":
        return set()
    readers: dict[str, list[NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    found = set()
    for node in model.graph.node:
        if node.name in chosen and node.op_type == "Conv":
            name = node.output[0]
            behind = readers.get(name, [])
            found.add(behind[0].output[0] if [n.op_type for n in behind] == ["Relu"] else name)
    return found
