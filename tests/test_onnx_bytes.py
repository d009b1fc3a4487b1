"""The models written as bytes: valid by the onnx package, and computing what NumPy does."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest

from moebius_edge.report.onnx_bytes import TYPES, matrix_products, negations


def run(model: bytes, x: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": x})[0])


@pytest.mark.parametrize("precision", TYPES)
def test_matrix_products(precision: str) -> None:
    side, count = 160, 3
    made = matrix_products(precision, side, count)
    model = onnx.load_from_string(made)
    onnx.checker.check_model(model, full_check=True)
    kinds = [node.op_type for node in model.graph.node]
    assert kinds == ["QLinearMatMul" if precision == "int8" else "MatMul"] * count
    weights = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    x = np.random.default_rng(0).standard_normal((side, side))
    if precision == "int8":
        given = np.clip(np.rint(8 * x) + 128, 0, 255).astype(np.uint8)
        expected, matrix = (given - 128.0) / 8, weights["w"] * np.float64(weights["ws"])
        result, tolerance = (run(made, given) - 128.0) / 8, 0.3
    else:
        expected, matrix = x, weights["w"].astype(np.float64)
        given = x.astype(precision)
        result, tolerance = run(made, given).astype(np.float64), {"float32": 1e-5, "float16": 0.02}[precision]
    for _ in range(count):
        expected = expected @ matrix
    assert np.abs(result - expected).max() < tolerance
    assert 0.5 < result.std() < 2, "the scale is kept, so that nothing overflows however many follow"


def test_negations() -> None:
    made = negations(5, 3)
    onnx.checker.check_model(onnx.load_from_string(made), full_check=True)
    assert run(made, np.arange(5, dtype=np.float32)).tolist() == [0, -1, -2, -3, -4]
