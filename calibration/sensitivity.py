"""How far a quantised block moves the noise that the denoiser predicts, in one call at a few points of trajectories.

The denoiser is cut into parts that run one after the other. All that comes before a block's part is the same whether
the block is quantised or not, so a trial starts from what the float32 network had at that cut, with that one part
quantised: half a call on average, and only a part is written and opened anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnxruntime
from onnx import ModelProto

from ..export.onnx_graph import PRODUCTS, cut
from ..runtimes.base import Arrays
from ..runtimes.providers import quiet_options
from ..system.machine import available_cores
from .blocks import Recipe, block_of
from .quantise import Quantiser

PARTS = 8  # of the denoiser: more spare little, and each keeps the tensors at its cut


class PartedDenoiser:
    """The denoiser's noise on ``feeds`` in float32, and with single blocks quantised."""

    def __init__(self, quantiser: Quantiser, feeds: Arrays) -> None:
        self._quantiser = quantiser
        self._parts = cut(quantiser.model, PARTS, len(feeds["sample"]))
        self._blocks = [{block_of(n) for n in p.graph.node if n.domain or n.op_type in PRODUCTS} for p in self._parts]
        self._sessions = [_open(part) for part in self._parts]
        self._tensors = dict(feeds)  # in float32, at every cut
        for session in self._sessions:
            self._tensors |= _run(session, self._tensors)

    @property
    def noise(self) -> np.ndarray:
        """In float32, (R, 4, h, w) for R rows of the feeds."""
        return self._tensors["noise"]

    def share(self, block: str) -> float:
        """The share of the parts that a trial of ``block`` executes."""
        return 1 - self._first(block) / PARTS

    def noise_with(self, block: str, smoothed: bool) -> np.ndarray:
        """As ``noise``, with ``block`` alone in INT8, after outliers were migrated if ``smoothed``."""
        recipe, tensors = Recipe({block: True}, (block,) if smoothed else ()), dict(self._tensors)
        for i in range(self._first(block), PARTS):
            session = self._sessions[i]
            if block in self._blocks[i]:
                session = _open(self._quantiser.quantise(recipe, part=self._parts[i])[0])
            tensors |= _run(session, tensors)
        return tensors["noise"]

    def _first(self, block: str) -> int:
        return next(i for i, names in enumerate(self._blocks) if block in names)


def _open(model: ModelProto) -> Any:
    options = quiet_options(onnxruntime, available_cores())
    options.enable_cpu_mem_arena = False  # every part would keep room for its largest tensors
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _run(session: Any, tensors: Mapping[str, np.ndarray]) -> Arrays:
    names = [output.name for output in session.get_outputs()]
    feeds = {value.name: tensors[value.name] for value in session.get_inputs()}
    return dict(zip(names, session.run(names, feeds), strict=True))
