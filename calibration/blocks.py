"""The denoiser's blocks, which are quantised as a whole or not at all, and the recipe that says which of them are.

A block is a part of the network under its module's name: a convolution of a resnet (``down_blocks.0.resnets.0.conv1``),
the projections or the feed-forward of a transformer (``...attentions.0.attn1``, ``...attentions.0.ff``). Depthwise
convolutions (``...conv1.depthwise``) and what is inside a lambda operator (``...attn1.lambda``) are blocks of their
own, because INT8 serves them differently.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from onnx import ModelProto, NodeProto

from ..documents import Flag, Text, read_document
from ..errors import BundleError, UsageError
from ..export.onnx_graph import FUNCTION, PRODUCTS, attribute, infer_shapes, inline, multiplications, outline
from ..system.files import atomic_write

_BLOCK = re.compile(r"\w+_blocks\.\d+\.\w+\.\d+\.\w+|\w+")
_ROOT = "network."


@dataclass(frozen=True)
class Block:
    """``nodes`` are the names of its convolutions and matrix products once functions are inlined, ``operators`` their
    types, and ``macs`` the multiply-adds of one call at batch 1."""

    name: str
    nodes: tuple[str, ...]
    operators: frozenset[str]
    macs: int


def blocks(model: ModelProto) -> list[Block]:
    """The blocks of a denoiser in the order of the network, those inside lambda operators included.

    Raises:
        BundleError: a convolution or matrix product has no module path, or its shapes cannot be inferred.
    """
    flat = outline(model)
    inline(flat, lambda call: True, fold=False)
    shapes = infer_shapes(flat, rows=1)
    members: dict[str, list[NodeProto]] = {}
    macs: dict[str, int] = {}
    for node in flat.graph.node:
        if node.op_type in PRODUCTS:
            name = block_of(node)
            members.setdefault(name, []).append(node)
            if (count := multiplications(node, shapes)) is None:
                problem = f"the shapes of node {node.name!r} ({node.op_type}) are not known"
                raise BundleError(problem, "export the bundle again")
            macs[name] = macs.get(name, 0) + count
    return [
        Block(name, tuple(n.name for n in nodes), frozenset(n.op_type for n in nodes), macs[name])
        for name, nodes in members.items()
    ]


def inlined(model: ModelProto, only: frozenset[str] | None = None) -> ModelProto:
    """A copy of ``model`` with the bodies of its lambda operators in their place: of all, or of the blocks ``only``."""
    copy = ModelProto()
    copy.CopyFrom(model)
    inline(copy, lambda call: only is None or block_of(call) in only)
    return copy


def block_of(node: NodeProto) -> str:
    """The name of the block that a convolution, a matrix product or the call of a function belongs to."""
    metadata = {p.key: p.value for p in node.metadata_props}  # weights of linear layers have lost their module's path
    modules = [part.split(":")[0] for part in metadata.get("namespace", "").split("/")]
    paths = [m.removeprefix(_ROOT) for m in modules if m.startswith(_ROOT)]
    match = _BLOCK.match(paths[-1]) if paths else None
    if match is None or not node.name:
        problem = f"node {node.name or node.output[0]!r} ({node.op_type}) lacks its name or its module's path"
        raise BundleError(problem, "export the bundle again")
    if node.domain or FUNCTION in metadata:
        return f"{match[0]}.lambda"
    return f"{match[0]}.depthwise" if attribute(node, "group", 1) > 1 else match[0]


@dataclass(frozen=True)
class Recipe:
    """Which blocks are quantised, and before which of them outliers are migrated into the weights (``smoothing``).

    It is a JSON file that a person may edit and apply again. Blocks that it does not name are not quantised.
    """

    quantised: dict[Text, Flag]
    smoothed: tuple[Text, ...] = ()
    schema_version: Literal[1] = 1

    @property
    def chosen(self) -> frozenset[str]:
        """The blocks that are quantised."""
        return frozenset(name for name, chosen in self.quantised.items() if chosen)

    def check(self, known: Iterable[str]) -> None:
        """Raise ``UsageError`` if the recipe names a block that is not among the ``known`` ones."""
        if unknown := sorted({*self.quantised, *self.smoothed} - {*known}):
            problem = f"the recipe names blocks that the model does not have: {', '.join(unknown[:3])}"
            raise UsageError(problem, "remove them, or use the recipe with the model it was made for")

    def save(self, path: Path) -> None:
        """Write the recipe to the file ``path``, whole or not at all."""
        document = {name: getattr(self, name) for name in ("schema_version", "quantised", "smoothed")}
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Recipe:
        """The recipe in the file ``path``.

        Raises:
            MachineError: the file cannot be read.
            UsageError: it holds no recipe, or one of another version.
        """
        recipe: Recipe = read_document(path, cls, UsageError, "correct it, or let the export write one")
        return recipe
