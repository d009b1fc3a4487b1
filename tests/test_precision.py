"""FP16 files: what is typed how, and that weights and islands are right; ``test_export`` has a whole bundle."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from exporting import element_types, weight_bytes
from onnx import TensorProto, numpy_helper

from moebius_edge.errors import BundleError
from moebius_edge.export.precision import convert, read_model, store_in_half, to_float16

FLOAT, HALF = TensorProto.FLOAT, TensorProto.FLOAT16


def small_model(largest: float = 2.0) -> onnx.ModelProto:
    """y = softmax(x W) W with a shape read from x, all float32; W's largest element is ``largest``."""
    model = onnx.parser.parse_model("""<ir_version: 9, opset_import: ["": 20]>
        small (float[N, 4] x) => (float[N, 4] y)
        { a = MatMul(x, w) b = Softmax <axis = -1>(a) s = Shape(x) c = Reshape(b, s) y = MatMul(c, w) }""")
    weight = np.full((4, 4), 0.5, np.float32)
    weight[0, 0] = largest
    model.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    return onnx.shape_inference.infer_shapes(model, check_type=True)


def test_products_become_fp16_and_islands_and_ends_stay() -> None:
    model = small_model()
    assert convert(model, islands=()) == {} and element_types(model)["b"] == HALF
    model = small_model()
    assert convert(model) == {"Softmax": ["Softmax_1"]}
    types = element_types(model)
    assert types["x"] == types["y"] == types["b"] == FLOAT
    assert types["a"] == types["c"] == types["y_float16"] == HALF
    assert types["s"] == TensorProto.INT64
    casts = [(n.input[0], n.output[0]) for n in model.graph.node if n.op_type == "Cast"]
    assert casts == [("x", "x_as_float16"), ("a", "a_as_float32"), ("b", "b_as_float16"), ("y_float16", "y")]
    assert weight_bytes(model) == {"FLOAT16": 32}  # one weight, read twice, and no float32 copy left
    onnx.checker.check_model(model, full_check=True)


def test_a_converted_file_computes_what_it_did(tmp_path: Path) -> None:
    onnx.save(small_model(), tmp_path / "m.onnx")
    assert to_float16(tmp_path / "m.onnx") == {"Softmax": ["Softmax_1"]}
    x = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
    results = []
    for model in (small_model(), onnx.load(tmp_path / "m.onnx")):
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        results.append(session.run(None, {"x": x})[0])
    assert results[1].dtype == np.float32
    assert 0 < np.abs(results[0] - results[1]).max() < 4e-3  # FP16 has eleven bits


def test_weights_stored_in_half_compute_in_float32(tmp_path: Path) -> None:
    """What ONNX Runtime makes of the file is, bit for bit, what it makes of the rounded weights."""
    model = onnx.parser.parse_model("""<ir_version: 9, opset_import: ["": 20]>
        product (float[N, 40] x) => (float[N, 40] y) { a = MatMul(x, w) y = Add(a, b) }""")
    rng = np.random.default_rng(0)
    w, b, x = (rng.standard_normal(shape).astype(np.float32) for shape in ((40, 40), (40,), (3, 40)))
    model.graph.initializer.extend([numpy_helper.from_array(w, "w"), numpy_helper.from_array(b, "b")])
    onnx.save(model, tmp_path / "m.onnx")
    store_in_half(tmp_path / "m.onnx")
    stored, read = onnx.load(tmp_path / "m.onnx"), read_model(tmp_path / "m.onnx")
    onnx.checker.check_model(stored, full_check=True)
    assert weight_bytes(stored) == {"FLOAT16": 3200, "FLOAT": 160}  # a short one is not worth a cast
    assert [node.op_type for node in read.graph.node] == ["MatMul", "Add"] and weight_bytes(read) == {"FLOAT": 6560}
    values = {t.name: numpy_helper.to_array(t) for t in read.graph.initializer}
    assert np.array_equal(values["w"], w.astype(np.float16).astype(np.float32)) and np.array_equal(values["b"], b)
    results = [
        onnxruntime.InferenceSession(m.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]
        for m in (stored, read)
    ]
    assert results[0].dtype == np.float32 and np.array_equal(*results)


@pytest.mark.parametrize("value", [1e5, np.inf, np.nan])
def test_a_weight_beyond_fp16_is_named(value: float) -> None:
    with pytest.raises(BundleError, match=r"weight w reaches .*, FP16 ends at 65504: use --precision fp32"):
        convert(small_model(value))


def test_scales_of_a_resize_stay_float32() -> None:
    model = onnx.parser.parse_model("""<ir_version: 9, opset_import: ["": 20]>
        resize (float[N, 1, 2, 2] x) => (float[N, 1, 4, 4] y) <float[4] scales = {1, 1, 2, 2}>
        { y = Resize <mode = "nearest">(x, "", scales) }""")
    convert(model)
    onnx.checker.check_model(model, full_check=True)
    assert list(model.graph.node[1].input) == ["x_as_float16", "", "scales"]
    assert [t.data_type for t in model.graph.initializer] == [FLOAT]
