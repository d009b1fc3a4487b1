"""A denoiser that reuses deep features from call to call (DeepCache, Ma et al., arXiv 2312.00858), for ``few_steps``.

The exported denoiser is cut where a late resnet of an up block joins what comes from below with its skip connection.
The whole of it also returns that deep feature; the shallow part is given one, and computes the layers round it alone.
No bundle carries the two.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
from onnx.utils import Extractor

from moebius_edge.bundle import Bundle
from moebius_edge.runtimes.base import Arrays, batched
from moebius_edge.runtimes.ort import OrtRuntime
from moebius_edge.runtimes.providers import quiet_options


class Reuse(NamedTuple):
    """The deep feature that enters resnet ``resnet`` of up block ``block`` is made in every ``period``-th call."""

    block: int
    resnet: int
    period: int


class ReusingRuntime(OrtRuntime):
    """ONNX Runtime on one thread whose denoiser, while ``reuse`` is set, keeps a deep feature from call to call."""

    def __init__(self, bundle: Bundle, folder: Path) -> None:
        super().__init__(bundle, threads=1)
        self._folder = folder
        self._cut: dict[tuple[int, int], tuple[Any, Any, str]] = {}
        self.begin(None)

    def begin(self, reuse: Reuse | None) -> None:
        """Before every picture."""
        if reuse is not None:
            self._sessions_of(reuse)
        self._reuse, self._calls, self._feature = reuse, 0, np.zeros((0,), np.float32)
        self.rows = 0

    def _run(self, component: str, feeds: Arrays) -> Arrays:
        if component != "denoiser":
            return super()._run(component, feeds)
        self.rows += len(feeds["sample"])
        if self._reuse is None:
            return super()._run(component, feeds)
        full, shallow, deep = self._sessions_of(self._reuse)
        whole = self._calls % self._reuse.period == 0 or len(self._feature) != len(feeds["sample"])
        self._calls += 1
        if whole:
            noise, self._feature = full.run(["noise", deep], feeds)
        else:
            (noise,) = shallow.run(["noise"], fed(shallow, {**feeds, deep: self._feature}))
        return {"noise": noise}

    def _sessions_of(self, reuse: Reuse) -> tuple[Any, Any, str]:
        key = (reuse.block, reuse.resnet)
        if key not in self._cut:
            model = onnx.load(self._bundle.component_path("denoiser"))
            deep = deep_feature(model, *key)
            paths = [self._folder / f"{kind}-{key[0]}-{key[1]}.onnx" for kind in ("full", "shallow")]
            for path, made in zip(paths, cut(model, deep), strict=True):
                onnx.save(made, os.fspath(path))
            full, shallow = (self._ort.InferenceSession(os.fspath(p), quiet_options(self._ort, 1)) for p in paths)
            self._cut[key] = (full, shallow, deep)
            inputs = self.components["denoiser"].inputs
            feeds = {t.name: np.random.default_rng(0).random(batched(t, 2)).astype(t.dtype) for t in inputs}
            noise, feature = full.run(["noise", deep], feeds)
            assert np.allclose(shallow.run(["noise"], fed(shallow, {**feeds, deep: feature}))[0], noise, atol=1e-4)
        return self._cut[key]


def fed(session: Any, feeds: Arrays) -> Arrays:
    """Those of ``feeds`` that the graph reads; the shallow part may not need all."""
    return {node.name: feeds[node.name] for node in session.get_inputs()}


def deep_feature(model: onnx.ModelProto, block: int, resnet: int) -> str:
    """The tensor that a resnet of an up block is given beside its skip connection."""
    weight = f"up_blocks.{block}.resnets.{resnet}.conv_shortcut.weight"
    makers = {output: node for node in model.graph.node for output in node.output}
    (shortcut,) = (node for node in model.graph.node if any(name.endswith(weight) for name in node.input))
    joined = makers[shortcut.input[0]]
    assert joined.op_type == "Concat", f"{weight} should read a concatenation, and reads {joined.op_type}"
    return str(joined.input[0])


def cut(model: onnx.ModelProto, deep: str) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """The whole denoiser with ``deep`` as another output, and the part of it that is left where ``deep`` is given."""
    inferred = onnx.shape_inference.infer_shapes(model)
    (value,) = (v for v in inferred.graph.value_info if v.name == deep)
    full = onnx.ModelProto()
    full.CopyFrom(model)
    full.graph.output.append(value)
    inputs = [i.name for i in model.graph.input]
    return full, Extractor(inferred).extract_model([*inputs, deep], ["noise"])
