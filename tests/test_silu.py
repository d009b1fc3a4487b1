"""SiLU on a dequantised tensor becomes one node with the same values; all else stays as it is."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from moebius_edge.calibration.silu import fuse_silu

X = np.random.default_rng(0).normal(0, 3, (2, 64)).astype(np.float32)


def model(quantised: bool = True, twice: bool = False, other: bool = False) -> onnx.ModelProto:
    """y = x sigmoid(x) of a rounded x; ``twice``: the sigmoid is an output too; ``other``: times something else."""
    pairs = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["d"]),
    ]
    data = "d" if quantised else "x"
    nodes = [
        *(pairs if quantised else []),
        helper.make_node("Sigmoid", [data], ["s"], "sigmoid"),
        helper.make_node("Mul", ["s", "x" if other else data], ["y"], "product"),
        *([helper.make_node("Neg", ["s"], ["z"])] if twice else []),
    ]
    outputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [2, 64]) for n in ("y", *(["z"] if twice else []))]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 64])
    weights = [
        numpy_helper.from_array(np.float32(0.1), "scale"),
        numpy_helper.from_array(np.uint8(128), "zero"),
    ]
    graph = helper.make_graph(nodes, "silu", [x], outputs, weights if quantised else [])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def run(made: onnx.ModelProto) -> np.ndarray:
    session = onnxruntime.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(["y"], {"x": X})[0])


def test_one_node_with_the_same_values() -> None:
    made = model()
    before = run(made)
    assert fuse_silu(made) == 1
    onnx.checker.check_model(made)
    assert Counter(n.op_type for n in made.graph.node) == {"QuantizeLinear": 1, "DequantizeLinear": 1, "QuickGelu": 1}
    np.testing.assert_allclose(run(made), before, atol=1e-5)
    assert np.abs(before).max() > 1


@pytest.mark.parametrize("kind", ["float32", "twice", "other"])
def test_what_is_no_silu_of_a_dequantised_tensor_stays(kind: str) -> None:
    made = model(kind != "float32", kind == "twice", kind == "other")
    before = made.SerializeToString()
    assert fuse_silu(made) == 0
    assert made.SerializeToString() == before
