"""What a call of a denoiser has to compute and to move, by class of operator, and how near a machine comes to it.

**Multiplications** are multiply-adds of convolutions and matrix products, those inside the lambda operators as a class
of their own; sums, norms, activations and softmax are not counted.

**Bytes** are a lower bound: every product, and every lambda operator as a whole, reads its inputs and weights and
writes its output once, in the types of the file (of a quantised tensor one byte a value). All other operators are
taken to be fused into the products around them, so that of them only their constants are counted.

**Share of peak**, by the roofline model (Williams, Waterman, Patterson, CACM 52(4), 2009): no machine can do more
multiplications a second than the smaller of its peak and (multiplications a byte) x (bytes a second). With a lower
bound for the bytes that limit is not too low, so that the share flatters nobody.

The file is read with the onnx package, which a device need not have: without it there are no figures but a reason.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import BundleError
from .peaks import Peaks

CLASSES = ("convolution", "depthwise convolution", "matrix product", "lambda", "other")
_QUANTISERS = ("QuantizeLinear", "DequantizeLinear")


@dataclass
class Amount:
    """Multiply-adds and bytes; a mean need not be whole."""

    multiplications: float = 0
    bytes: float = 0


@dataclass(frozen=True)
class Work:
    """Of one call, or the mean of several; empty with a ``reason`` where it could not be counted."""

    by_class: dict[str, Amount] = field(default_factory=dict)
    reason: str | None = None

    @property
    def multiplications(self) -> float | None:
        return None if self.reason else sum(a.multiplications for a in self.by_class.values())

    @property
    def bytes(self) -> float | None:
        return None if self.reason else sum(a.bytes for a in self.by_class.values())

    def to_dict(self, seconds: float | None = None, peaks: Peaks | None = None) -> dict[str, Any]:
        """As ``results.json`` has it; ``seconds`` are those of one call on the machine with ``peaks``."""
        share = None if seconds is None or peaks is None else share_of_peak(self, seconds, peaks)
        return {
            "multiplications_per_step": self.multiplications,
            "bytes_per_step": self.bytes,
            "by_class": {
                name: {"multiplications": amount.multiplications, "bytes": amount.bytes}
                for name, amount in self.by_class.items()
            },
            "share_of_peak": share,
            "reason": self.reason or (peaks.reason if peaks is not None and share is None else None),
        }


def share_of_peak(work: Work, seconds: float, peaks: Peaks) -> float | None:
    """The multiplications that a call of ``seconds`` did a second, over those attainable here; None where unknown."""
    if not work.multiplications or not work.bytes or peaks.multiplications_per_second is None:
        return None
    attainable = peaks.multiplications_per_second
    if peaks.bytes_per_second is not None:
        attainable = min(attainable, work.multiplications / work.bytes * peaks.bytes_per_second)
    return work.multiplications / seconds / attainable


def mean_work(calls: Sequence[tuple[Work, int]]) -> Work:
    """The mean of one work or more, each with how many calls have it; a single one is returned as it is."""
    if len(calls) == 1 or any(work.reason for work, _ in calls):
        return next((work for work, _ in calls if work.reason), calls[0][0])
    total = sum(count for _, count in calls)

    def mean(name: str, what: str) -> float:
        return sum(getattr(work.by_class[name], what) * count for work, count in calls) / total

    return Work({name: Amount(mean(name, "multiplications"), mean(name, "bytes")) for name in calls[0][0].by_class})


def count_work(path: str | os.PathLike[str], rows: int) -> Work:
    """The work of one call of the ONNX file ``path`` with a batch of ``rows``: 2 for a guided step, else 1."""
    try:
        import onnx

        from ..export.onnx_graph import outline
    except ImportError as error:
        return Work(reason=f"the package {error.name} is missing, which reads the file: run `pip install onnx`")
    try:
        return Work(_count(outline(onnx.load(os.fspath(path))), rows))
    except BundleError as error:
        return Work(reason=str(error))


def _count(model: Any, rows: int) -> dict[str, Amount]:
    from ..export.onnx_graph import (
        FUNCTION,
        PRODUCTS,
        constant_tensors,
        infer_tensors,
        inline,
        multiplications,
        outline,
    )

    calls = [node for node in model.graph.node if node.domain]  # the lambda operators; their bodies are inlined next
    flat = outline(model)
    inline(flat, lambda call: True, fold=False)
    tensors = infer_tensors(flat, rows)
    sizes = _Sizes(flat.graph, tensors)
    shapes, constant = {name: shape for name, (shape, _) in tensors.items()}, constant_tensors(flat.graph)
    weights = {t.name for t in flat.graph.initializer}
    own = {node.name for node in model.graph.node}  # a quantised file has bodies of lambda operators among its nodes
    found = {name: Amount() for name in CLASSES}
    for node in flat.graph.node:
        in_lambda = any(p.key == FUNCTION for p in node.metadata_props)
        if node.op_type in PRODUCTS:
            amount = found[_class(node, in_lambda)]
            count = multiplications(node, shapes)
            if count is None:
                raise BundleError(f"the shapes of node {node.name!r} are not known: export the bundle again")
            amount.multiplications += count
            if node.name in own:
                amount.bytes += sizes.moved(node)
        elif not in_lambda and node.op_type not in _QUANTISERS and node.output[0] not in constant:
            found["other"].bytes += sum(
                min(sizes.of(name), sizes.of(node.output[0])) for name in node.input if name in weights
            )
    for call in calls:
        found["lambda"].bytes += sizes.moved(call)
    return found


def _class(node: Any, in_lambda: bool) -> str:
    from ..export.onnx_graph import attribute

    if in_lambda:
        return "lambda"
    if node.op_type in ("MatMul", "Gemm"):
        return "matrix product"
    return "depthwise convolution" if attribute(node, "group", 1) > 1 else "convolution"


class _Sizes:
    """Bytes of tensors as they are kept: a dequantised one is read as the integers that it is made from."""

    def __init__(self, graph: Any, tensors: dict[str, tuple[tuple[int, ...], int]]) -> None:
        from onnx.helper import tensor_dtype_to_np_dtype

        self._bytes = {
            name: math.prod(shape) * tensor_dtype_to_np_dtype(kind).itemsize for name, (shape, kind) in tensors.items()
        }
        self._kept_as = {}
        for node in graph.node:
            if node.op_type == "DequantizeLinear":
                self._kept_as[node.output[0]] = node.input[0]
            if node.op_type == "QuantizeLinear":
                self._kept_as.setdefault(node.input[0], node.output[0])

    def of(self, name: str) -> int:
        return self._bytes.get(self._kept_as.get(name, name), 0)

    def moved(self, node: Any) -> int:
        return sum(self.of(name) for name in (*node.input, *node.output) if name)
