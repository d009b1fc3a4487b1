"""Multiply-adds counted by hand on small graphs, of the bundled model and of trajectories; the machine's peak."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from fake_gpu import CUDA, FakeGpu
from onnx import TensorProto, helper, numpy_helper
from test_blocks import tiled_model
from toy import make_toy_bundle

from moebius_edge.bundle.bundle import ASSETS, Bundle
from moebius_edge.calibration.blocks import blocks
from moebius_edge.pipeline.latency import StageTimer
from moebius_edge.report import flops
from moebius_edge.report.flops import Macs, count_macs, measure_peak

TINY = ASSETS / "tiny" / "denoiser.onnx"
CPU: dict[str, Any] = {"name": "onnxruntime", "device": "cpu", "threads": 1}


def save(path: Path, nodes: list[onnx.NodeProto], weights: dict[str, np.ndarray], out: tuple[object, ...]) -> Path:
    """A graph from ``x`` (N, 4, 8, 8) to ``y``, float32, opset 20."""
    values = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ("N", 4, 8, 8)),
              helper.make_tensor_value_info("y", TensorProto.FLOAT, out)]  # fmt: skip
    initializers = [numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights.items()]
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("elsewhere", 1)]
    graph = helper.make_graph(nodes, "small", values[:1], values[1:], initializers)
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), path)
    return path


def test_classes_counted_by_hand(tmp_path: Path) -> None:
    node = helper.make_node
    nodes = [
        node("Conv", ["x", "dense"], ["a"], pads=[1] * 4),
        node("Relu", ["a"], ["b"]),
        node("Conv", ["b", "depthwise"], ["c"], pads=[1] * 4, group=6),
        node("Flatten", ["c"], ["d"]),
        node("MatMul", ["d", "matrix"], ["y"]),
    ]
    weights = {"dense": np.ones((6, 4, 3, 3)), "depthwise": np.ones((6, 1, 3, 3)), "matrix": np.ones((384, 10))}
    path = save(tmp_path / "m.onnx", nodes, weights, ("N", 10))
    macs = count_macs(path, 2)
    counts = (2 * 6 * 64 * 36, 2 * 6 * 64 * 9, 2 * 384 * 10, 0)
    assert macs.by_class == dict(zip(flops.CLASSES, counts, strict=True))
    assert macs.total == 2 * (6 * 64 * 45 + 3840) == 2 * (count_macs(path, 1).total or 0)


def test_the_bundled_model_is_the_sum_of_its_blocks() -> None:
    macs = count_macs(TINY, 1)
    by_block = {b.name: b.macs for b in blocks(onnx.load(TINY))}
    assert macs.total == sum(by_block.values())
    assert macs.by_class["lambda"] == sum(n for name, n in by_block.items() if name.endswith(".lambda")) > 0
    depthwise = sum(n for name, n in by_block.items() if name.endswith(".depthwise"))
    assert macs.by_class["depthwise convolution"] == depthwise > 0


def test_products_in_a_lambda_operator_count(tmp_path: Path) -> None:
    model = tiled_model(tile=4, heads=2, keys=3, window=3, size=4)  # two rows of 4 tiles of 4 positions, 5 values
    onnx.save(model, tmp_path / "m.onnx")
    seen = next(t.dims[1] for t in model.graph.initializer if t.name == "layout")
    macs = count_macs(tmp_path / "m.onnx", 2)
    count = 2 * (3 * 16 * 5 + 4 * 8 * seen * 3 + 4 * 8 * seen * 5 + 4 * 8 * 3 * 5)
    assert macs.by_class["lambda"] == macs.total == count


def test_what_cannot_be_counted_has_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [helper.make_node("Mystery", ["x"], ["a"], domain="elsewhere"),
             helper.make_node("MatMul", ["a", "m"], ["y"], "product")]  # fmt: skip
    path = save(tmp_path / "m.onnx", nodes, {"m": np.ones((8, 8))}, ("N", 4, 8, 8))
    macs = count_macs(path, 1)
    assert macs.reason == "the shapes of node 'product' are not known: export the bundle again" and macs.total is None
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert count_macs(TINY, 2).reason == "the package onnx is missing, which reads the file: run `pip install onnx`"
    assert measure_peak(CPU, "float32")["reason"] == count_macs(TINY, 2).reason


def settings(**changes: Any) -> dict[str, Any]:
    """Settings of a configuration: 20 steps of which 19 are executed."""
    absent = dict.fromkeys(("distilled_guidance", "guidance_interval"))
    return {
        "steps": 20,
        "strength": 0.99,
        "scheduler": "ddim",
        "guidance": 2.0,
        "cache_interval": 1,
        **absent,
        **changes,
    }


def test_calls_of_a_trajectory() -> None:
    """19 of DDIM's, at t = 900, 850 .. 0: one in five full is 0, 5, 10, 15; from 250 to below 550 six are guided."""
    full, cached = "denoiser", "denoiser_shallow"
    calls = flops.network_calls
    assert calls(settings()) == {(full, 2): 19}
    assert calls(settings(guidance=1.0)) == calls(settings(distilled_guidance=2.0)) == {(full, 1): 19}
    assert calls(settings(cache_interval=5)) == {(full, 2): 4, (cached, 2): 15}
    assert calls(settings(guidance_interval=[250, 550])) == {(full, 2): 6, (full, 1): 13}
    mixed = calls(settings(guidance_interval=[250, 550], cache_interval=5))
    # 8 calls of one row, 6 of two, 5 of one: each series begins with a full one, and so does its sixth
    assert mixed == {(full, 1): 3, (cached, 1): 10, (full, 2): 2, (cached, 2): 4}
    assert calls(settings(strength=0.5, guidance=1.0)) == {(full, 1): 10}


def test_a_step_is_the_mean_of_the_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One call of 400 ms and four of 50: where calls are alike the median is a call's time, else the mean is."""
    counts, asked = {"denoiser.onnx": 1000, "denoiser_shallow.onnx": 100}, []

    def count(path: Path, rows: int) -> Macs:
        asked.append((path.name, rows))
        return Macs(dict.fromkeys(flops.CLASSES, 0.0) | {"convolution": counts[path.name] * rows})

    peak = {"multiplications_per_second": 1e5, "reason": None}
    monkeypatch.setattr(flops, "count_macs", count)
    monkeypatch.setattr(flops, "measure_peak", lambda *given: peak)
    bundle, timer = Bundle.load(make_toy_bundle(tmp_path / "deep", deep=True)), StageTimer()
    for ms in (400.0, 50.0, 50.0, 50.0, 50.0):
        timer.add("denoise", ms)
    alike = flops.arithmetic(bundle, settings(), CPU, timer)["work"]
    assert alike["multiplications_per_step"] == 2000 and alike["share_of_peak"] == pytest.approx(2000 / 0.05 / 1e5)
    mixed = flops.arithmetic(bundle, settings(cache_interval=5), CPU, timer)
    mean = (4 * 2000 + 15 * 200) / 19
    assert mixed["peak"] == peak and mixed["work"]["by_class"]["convolution"]["multiplications"] == pytest.approx(mean)
    assert mixed["work"]["share_of_peak"] == pytest.approx(mean / 0.12 / 1e5)
    assert asked[1:] == [("denoiser.onnx", 2), ("denoiser_shallow.onnx", 2)], "each kind once"
    peak |= {"multiplications_per_second": None, "reason": "it crashed"}
    unknown = flops.arithmetic(bundle, settings(), CPU, timer)["work"]
    assert (unknown["share_of_peak"], unknown["reason"]) == (None, "it crashed")
    monkeypatch.setattr(flops, "count_macs", lambda path, rows: Macs(reason="no onnx"))
    assert flops.arithmetic(bundle, settings(), CPU, timer)["work"] == {
        "multiplications_per_step": None, "by_class": {}, "share_of_peak": None, "reason": "no onnx",
    }  # fmt: skip


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flops, "PRODUCTS_IN_A_ROW", {"cpu": (256, 4), "cuda": (256, 4)})


@pytest.mark.parametrize("precision", ["float32", "float16", "int8"])
def test_a_peak_is_what_was_done_over_the_time_it_took(
    precision: str, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a clock that ticks a tenth of a second at every look, four products of 256³."""
    peak = measure_peak(CPU, precision)
    assert (peak["reason"], peak["runtime"], peak["precision"]) == (None, "onnxruntime on cpu", precision)
    assert 1e8 < peak["multiplications_per_second"] < 1e14
    now = iter(np.arange(0, 1000, 0.1))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(now)))
    assert measure_peak(CPU, precision)["multiplications_per_second"] == pytest.approx(4 * 256**3 / 0.1)


@pytest.mark.parametrize("precision", ["float32", "float16", "int8"])
def test_the_products_compute_what_numpy_does(precision: str) -> None:
    side, count = 160, 3
    x, data = flops.matrix_products(precision, side, count)
    model = onnx.load_from_string(data)
    onnx.checker.check_model(model, full_check=True)
    assert [n.op_type for n in model.graph.node] == ["QLinearMatMul" if precision == "int8" else "MatMul"] * count
    weights = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    result = onnxruntime.InferenceSession(data).run(None, {"x": x})[0].astype(np.float64)
    expected, matrix, tolerance = x.astype(np.float64), weights["w"].astype(np.float64), 1e-5
    if precision == "int8":
        expected, result, tolerance = (expected - 128.0) / 8, (result - 128.0) / 8, 0.3
        matrix = matrix * np.float64(weights["ws"])
    elif precision == "float16":
        tolerance = 0.02
    for _ in range(count):
        expected = expected @ matrix
    assert np.abs(result - expected).max() < tolerance
    assert 0.5 < result.std() < 2, "the scale is kept, so that nothing overflows however many follow"


def test_a_gpu_gets_what_a_network_gets(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGpu(monkeypatch)
    peak = measure_peak(CPU | {"device": "cuda"}, "float32")
    assert peak["reason"] is None and peak["multiplications_per_second"] > 0
    gpu.broken = {CUDA}
    assert "could not start CUDAExecutionProvider" in measure_peak(CPU | {"device": "cuda"}, "float32")["reason"]


@pytest.mark.parametrize(
    ("runtime", "precision", "text"),
    [
        ({"name": "tensorrt", "device": "cuda"}, "float16", "no peak is measured with tensorrt on cuda, only with"),
        ({"device": "tensorrt"}, "float32", "no peak is measured with onnxruntime on tensorrt"),
        ({}, "bfloat16", "no peak is measured in bfloat16, only in float32, float16, int8"),
        ({"device": "cuda"}, "int8", "onnxruntime on cuda has no integer matrix product of its own"),
    ],
)
def test_where_there_is_no_peak(runtime: dict[str, Any], precision: str, text: str) -> None:
    peak = measure_peak(CPU | runtime, precision)
    assert peak["reason"].startswith(text) and peak["multiplications_per_second"] is None
