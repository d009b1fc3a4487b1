"""From a recipe to a quantised denoiser: smoothing, FP16, scales and pairs in their order, for one float32 file.

The float32 file, what was recorded of it, the method of the ranges and the target stay; recipes come and go.
"""

from __future__ import annotations

from pathlib import Path

import onnx
from onnx import ModelProto

from ..export.precision import convert
from .blocks import Block, blocks
from .quantise import TARGETS, activations, quantise
from .ranges import activation_scale
from .recipe import Recipe
from .smoothing import norms, smooth
from .statistics import Statistics

# Kinds of products that are no faster in INT8: docs/int8.md has the measurements on a CPU. A recipe may name them.
SLOW = ("depthwise", "lambda")
_WORTH = 0.002  # the least share of the multiplications that is worth a rounding


class Quantiser:
    """Makes candidates of the denoiser in ``file`` (float32) for ``target`` with ranges by ``method``.

    ``blocks`` are the denoiser's; ``candidates`` those of them that a search may quantise: what the target computes in
    INT8, has a share of the multiplications that matters, and is not of the kinds ``SLOW``.
    """

    def __init__(self, file: Path, statistics: Statistics, method: str, target: str) -> None:
        self.model = onnx.load(str(file))
        self.statistics, self.method, self.target = statistics, method, target
        self.blocks: list[Block] = blocks(self.model)
        self.multiplications = sum(block.multiplications for block in self.blocks)
        self.smoothable = frozenset(norm.block for norm in norms(self.model))
        kinds = self._kinds()
        self.candidates = [
            block
            for block in self.blocks
            if block.name.rpartition(".")[2] not in SLOW
            and self.share(block) >= _WORTH
            and kinds[block.name] & set(TARGETS[target])
        ]

    def share(self, block: Block) -> float:
        """Of all multiplications of a call."""
        return block.multiplications / self.multiplications

    def make(self, recipe: Recipe, half: bool = False) -> tuple[ModelProto, dict[str, list[str]]]:
        """The denoiser by ``recipe``, and its float32 islands by operator type: with ``half`` the rest is FP16.

        Raises:
            UsageError: as ``quantise`` and ``activation_scale``; the message names the block or the tensor.
            BundleError: as ``quantise`` and ``convert``.
        """
        recipe.check(block.name for block in self.blocks)
        made = ModelProto()
        made.CopyFrom(self.model)
        scales = self._scales(recipe)
        tensors = self.statistics.tensors.items()
        channels = {name: t.channels for name, t in tensors if t.channels is not None}
        scales |= smooth(made, recipe.chosen.intersection(recipe.smoothed), channels)
        islands: dict[str, list[str]] = {}
        if half:
            made = onnx.shape_inference.infer_shapes(made, check_type=True, data_prop=True)
            islands = convert(made)
            made = onnx.shape_inference.infer_shapes(made, check_type=True, data_prop=True)
        return quantise(made, recipe, scales, self.target), islands

    def _scales(self, recipe: Recipe) -> dict[str, float]:
        names = activations(self.model, recipe, self.target)
        recorded = self.statistics.tensors  # what lacks one is named by ``quantise``
        return {n: activation_scale(n, recorded[n].histogram, self.method) for n in names if n in recorded}

    def _kinds(self) -> dict[str, set[str]]:
        """The operator types of each block's products."""
        types = {node.name: node.op_type for node in self.model.graph.node}
        return {block.name: {types.get(name, "MatMul") for name in block.nodes} for block in self.blocks}
