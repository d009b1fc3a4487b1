"""The work of one call, counted by hand on small graphs; the bundled model's against its blocks; the roofline."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from test_blocks import tiled_model

from moebius_edge.bundle.bundle import ASSETS
from moebius_edge.calibration.blocks import blocks
from moebius_edge.calibration.quantise import activations, quantise
from moebius_edge.calibration.recipe import Recipe
from moebius_edge.report.peaks import Peaks
from moebius_edge.report.work import CLASSES, Amount, Work, count_work, share_of_peak

TINY = ASSETS / "tiny" / "denoiser.onnx"


def save(path: Path, nodes: list[onnx.NodeProto], weights: dict[str, np.ndarray], out: tuple[object, ...]) -> Path:
    """A graph from ``x`` (N, 4, 8, 8) to ``y``, float32, opset 20."""
    values = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ("N", 4, 8, 8)),
              helper.make_tensor_value_info("y", TensorProto.FLOAT, out)]  # fmt: skip
    initializers = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("elsewhere", 1)]
    graph = helper.make_graph(nodes, "small", values[:1], values[1:], initializers)
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), path)
    return path


def test_classes_counted_by_hand(tmp_path: Path) -> None:
    node = helper.make_node
    nodes = [
        node("Conv", ["x", "dense", "bias"], ["a"], pads=[1] * 4),
        node("Relu", ["a"], ["b"]),
        node("Conv", ["b", "depthwise"], ["c"], pads=[1] * 4, group=6),
        node("Mul", ["c", "scale"], ["d"]),
        node("Flatten", ["d"], ["e"]),
        node("MatMul", ["e", "matrix"], ["y"]),
    ]
    weights = {
        "dense": np.ones((6, 4, 3, 3)), "bias": np.ones(6), "depthwise": np.ones((6, 1, 3, 3)),
        "scale": np.ones((6, 1, 1)), "matrix": np.ones((384, 10)),
    }  # fmt: skip
    path = save(tmp_path / "m.onnx", nodes, {k: v.astype(np.float32) for k, v in weights.items()}, ("N", 10))
    work = count_work(path, 2)
    assert work.by_class == {
        "convolution": Amount(2 * 6 * 64 * 36, 4 * (2 * 256 + 216 + 6 + 2 * 384)),
        "depthwise convolution": Amount(2 * 6 * 64 * 9, 4 * (2 * 384 + 54 + 2 * 384)),
        "matrix product": Amount(2 * 384 * 10, 4 * (2 * 384 + 3840 + 2 * 10)),
        "lambda": Amount(),
        "other": Amount(0, 4 * 6),  # the ReLU is fused, the scale is read
    }
    assert work.multiplications == 2 * (6 * 64 * 45 + 3840)
    half = count_work(path, 1)
    assert half.multiplications == work.multiplications / 2 and half.bytes > work.bytes / 2, "weights stay"


def test_the_bundled_model_is_the_sum_of_its_blocks() -> None:
    work = count_work(TINY, 1)
    by_block = {b.name: b.multiplications for b in blocks(onnx.load(TINY))}
    assert work.multiplications == sum(by_block.values())
    lambdas = sum(count for name, count in by_block.items() if name.endswith(".lambda"))
    depthwise = sum(count for name, count in by_block.items() if name.endswith(".depthwise"))
    assert work.by_class["lambda"].multiplications == lambdas > 0
    assert work.by_class["depthwise convolution"].multiplications == depthwise > 0
    assert tuple(work.by_class) == CLASSES and work.by_class["other"].multiplications == 0


def test_a_lambda_operator_moves_what_its_call_does(tmp_path: Path) -> None:
    """q, k, v, weights and the output; none of the tensors inside its body, whose products count all the same."""
    model = tiled_model(tile=4, heads=2, keys=3, window=3, size=4)  # two rows of 4 tiles of 4 positions, 5 values
    onnx.save(model, tmp_path / "m.onnx")
    seen = next(t.dims[1] for t in model.graph.initializer if t.name == "layout")
    work = count_work(tmp_path / "m.onnx", 2)
    count = 2 * (3 * 16 * 5 + 4 * 8 * seen * 3 + 4 * 8 * seen * 5 + 4 * 8 * 3 * 5)
    floats = 2 * (4 * 8 * 3 + 3 * 16 + 16 * 5 + 4 * 8 * 5) + 3 * 9 + 3
    assert work.by_class["lambda"] == Amount(count, 4 * floats + 8 * 4 * seen)
    assert (work.multiplications, work.bytes) == (count, 4 * floats + 8 * 4 * seen), "and nothing else"


def test_quantised_values_take_a_byte(tmp_path: Path) -> None:
    model = onnx.load(TINY)
    name = "down_blocks.0.attentions.0.proj_in"
    recipe = Recipe({name: True})
    quantised = quantise(model, recipe, dict.fromkeys(activations(model, recipe), 0.1))
    onnx.save(quantised, tmp_path / "int8.onnx")
    before, after = count_work(TINY, 2), count_work(tmp_path / "int8.onnx", 2)
    assert after.multiplications == before.multiplications
    weights, read = 64 * 64, 2 * 32 * 32 * 64
    assert before.bytes - after.bytes == 3 * (weights + read), "the output and the bias stay float32"


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    work = count_work(TINY, 2)
    assert work.reason == "the package onnx is missing, which reads the file: run `pip install onnx`"
    assert work.to_dict(1.0, PEAKS) == {
        "multiplications_per_step": None, "bytes_per_step": None, "by_class": {}, "share_of_peak": None,
        "reason": work.reason,
    }  # fmt: skip


def test_unknown_shapes_are_a_reason(tmp_path: Path) -> None:
    nodes = [helper.make_node("Mystery", ["x"], ["a"], domain="elsewhere"),
             helper.make_node("MatMul", ["a", "m"], ["y"], "product")]  # fmt: skip
    path = save(tmp_path / "m.onnx", nodes, {"m": np.ones((8, 8), np.float32)}, ("N", 4, 8, 8))
    assert count_work(path, 1).reason == "the shapes of node 'product' are not known: export the bundle again"


PEAKS = Peaks(1e9, 1e8, "onnxruntime on cpu", "float32")


def test_the_roofline() -> None:
    dense = Work({"convolution": Amount(10**9, 10**6)})  # 1000 a byte: the multiplier is the limit
    assert share_of_peak(dense, 2.0, PEAKS) == pytest.approx(0.5)
    moving = Work({"convolution": Amount(10**9, 10**9)})  # 1 a byte: 1e8 a second at most
    assert share_of_peak(moving, 20.0, PEAKS) == pytest.approx(0.5)
    unknown = Peaks(1e9, None, "onnxruntime on cpu", "float32")
    assert share_of_peak(moving, 2.0, unknown) == pytest.approx(0.5)
    none = Peaks(None, None, "tensorrt on cuda", "float16", "no peak is measured with tensorrt on cuda")
    assert share_of_peak(dense, 2.0, none) is None
    assert dense.to_dict(2.0, PEAKS)["share_of_peak"] == pytest.approx(0.5) and dense.to_dict()["reason"] is None
    assert dense.to_dict(2.0, none)["reason"] == none.reason
