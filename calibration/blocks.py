"""The denoiser's blocks: what is quantised together or not at all, and each block's share of the multiplications.

A block is a part of the network under its own name: a convolution of a resnet (``down_blocks.0.resnets.0.conv1``), the
projections or the feed-forward of a transformer (``...attentions.0.attn1``, ``...attentions.0.ff``). Two kinds of
products stand apart from the rest of theirs, because INT8 serves them differently: depthwise convolutions
(``...conv1.depthwise``), which have no INT8 kernel worth having on most devices, and those inside a lambda operator
(``...attn1.lambda``), which must be taken out of its function first. Names come from the module paths that the exporter
noted at every node, since the weights of linear layers lose theirs.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from onnx import ModelProto, NodeProto

from ..errors import BundleError
from ..export.onnx_graph import FUNCTION, PRODUCTS, attribute, infer_shapes, inline, multiplications, outline

_BLOCK = re.compile(r"\w+_blocks\.\d+\.\w+\.\d+\.\w+|\w+")
_ROOT = "network."


@dataclass(frozen=True)
class Block:
    """``nodes`` are the names of its products once functions are inlined; ``multiplications`` are those of one call
    at batch 1."""

    name: str
    nodes: tuple[str, ...]
    multiplications: int


def blocks(model: ModelProto) -> list[Block]:
    """The blocks of a denoiser in the order of the network, those inside lambda operators too; changes nothing.

    Raises:
        BundleError: a product has no module path, or its shapes cannot be inferred.
    """
    copy = outline(model)
    inline(copy, lambda call: True, fold=False)
    graph, shapes = copy.graph, infer_shapes(copy, rows=1)
    nodes: dict[str, list[str]] = {}
    counts: dict[str, int] = {}
    for node in graph.node:
        if node.op_type in PRODUCTS:
            name = block_of(node)
            nodes.setdefault(name, []).append(node.name)
            counts[name] = counts.get(name, 0) + _multiplications(node, shapes)
    return [Block(name, tuple(nodes[name]), counts[name]) for name in nodes]


def inlined(model: ModelProto, only: frozenset[str] | None = None) -> ModelProto:
    """A copy of ``model`` whose lambda operators are their bodies: all, or those of the blocks ``only``."""
    copy = ModelProto()
    copy.CopyFrom(model)
    inline(copy, lambda call: only is None or block_of(call) in only)
    return copy


def block_of(node: NodeProto) -> str:
    """The name of the block that a product, or a call of a function, belongs to."""
    noted = {p.key: p.value for p in node.metadata_props}
    modules = [part.split(":")[0] for part in noted.get("namespace", "").split("/")]
    paths = [m.removeprefix(_ROOT) for m in modules if m.startswith(_ROOT)]
    found = _BLOCK.match(paths[-1]) if paths else None
    if found is None or not node.name:
        lack = "module path" if node.name else "name"
        raise BundleError(
            f"node {node.name or node.output[0]!r} ({node.op_type}) has no {lack}: export the bundle again"
        )
    if node.domain or FUNCTION in noted:
        return f"{found[0]}.lambda"
    return f"{found[0]}.depthwise" if attribute(node, "group", 1) > 1 else found[0]


def _multiplications(node: NodeProto, shapes: dict[str, tuple[int, ...]]) -> int:
    count = multiplications(node, shapes)
    if count is None:
        raise BundleError(f"the shapes of node {node.name!r} ({node.op_type}) are not known: export the bundle again")
    return count
