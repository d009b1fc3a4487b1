"""The shallow part is the denoiser's own arithmetic, cut out of its file in any precision."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from toy import make_toy_bundle

from moebius_edge.bundle.bundle import Bundle
from moebius_edge.errors import QualityError
from moebius_edge.export.exporter import judge_shallow, shallow_difference
from moebius_edge.export.precision import to_float16
from moebius_edge.export.shallow import shallow_part, write_shallow
from moebius_edge.runtimes import create_runtime


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return Bundle.load(make_toy_bundle(tmp_path / "toy", deep=True))


def test_what_makes_the_deep_feature_is_left_out(bundle: Bundle) -> None:
    whole = onnx.load(bundle.component_path("denoiser"))
    before = whole.SerializeToString()
    part = shallow_part(whole)
    assert whole.SerializeToString() == before
    assert [i.name for i in part.graph.input] == ["sample", "timestep", "branch", "deep"]
    assert [o.name for o in part.graph.output] == ["noise"]
    pools = [[node.op_type for node in model.graph.node].count("GlobalAveragePool") for model in (whole, part)]
    assert pools[0] > 0 == pools[1]
    assert {t.name for t in part.graph.initializer} < {t.name for t in whole.graph.initializer}


def test_in_fp16_the_feature_is_rounded_where_the_whole_rounds_it(bundle: Bundle, tmp_path: Path) -> None:
    path = bundle.component_path("denoiser")
    to_float16(path)
    part = write_shallow(path, bundle.component_path("denoiser_shallow"))
    (entry,) = (node for node in part.graph.node if "deep" in node.input)
    assert entry.op_type == "Cast" and part.graph.input[3].type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    with create_runtime("onnxruntime", bundle, "cpu", 1) as runtime:
        assert shallow_difference(runtime) == 0


def test_the_gate_sees_another_part(bundle: Bundle) -> None:
    with create_runtime("onnxruntime", bundle, "cpu", 1) as runtime:
        assert shallow_difference(runtime) < 1e-6
    path = bundle.component_path("denoiser_shallow")
    model = onnx.load(path)
    (weight,) = (t for t in model.graph.initializer if t.name == "weight")
    weight.CopyFrom(onnx.numpy_helper.from_array(np.float32(1.01), "weight"))
    onnx.save(model, path)
    with create_runtime("onnxruntime", bundle, "cpu", 1) as runtime:
        difference = shallow_difference(runtime)
    assert difference == pytest.approx(0.01, rel=1e-3)
    message = r"the shallow part .* by 1\.0e-02 of the largest noise, 0\.0\d* is allowed"
    for precision in ("float32", "float16"):
        with pytest.raises(QualityError, match=message):
            judge_shallow(difference * 1.01, precision)
    judge_shallow(0.0, "float32")
    with pytest.raises(QualityError, match="differs from the whole by nan"):
        judge_shallow(float("nan"), "int8")
