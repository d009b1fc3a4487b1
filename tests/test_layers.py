"""Where two ONNX files part: the tensor that differs is named, and those that cannot be compared are left out."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from toy import make_toy_bundle

from moebius_edge.bundle.bundle import ASSETS
from moebius_edge.errors import BundleError, MachineError, UsageError
from moebius_edge.export import layers
from moebius_edge.export.layers import compare_layers
from moebius_edge.export.precision import read_model, to_float16


def chain(path: Path, third: float = 1.0, inner: str = "b = Relu(a)") -> Path:
    """x -> MatMul a -> Relu b -> Mul c -> Add y, the product of ``c`` times ``third``."""
    model = onnx.parser.parse_model(f"""<ir_version: 10, opset_import: ["": 20]>
        g (float[N, 4] x) => (float[N, 4] y)
        <float s = {{{third}}}, float t = {{1}}, float scale = {{0.3}}, int8 zero = {{0}}>
        {{ a = MatMul(x, w) {inner} c = Mul(b, s) y = Add(c, t) }}""")
    model.graph.initializer.append(numpy_helper.from_array(np.eye(4, dtype=np.float32), "w"))
    onnx.save(model, path)
    return path


# A pair of its own on the second node's input.
QUANTISED = "q = QuantizeLinear(a, scale, zero) d = DequantizeLinear(q, scale, zero) b = Relu(d)"
FEEDS = {"x": np.array([[1, -1, 2, 4]], np.float32)}


def test_the_wrong_layer_is_where_they_part(tmp_path: Path) -> None:
    right, wrong = chain(tmp_path / "right.onnx"), chain(tmp_path / "wrong.onnx", third=1.5)
    steps: list[tuple[str, int, int]] = []
    differences = compare_layers(right, wrong, FEEDS, on_progress=lambda *step: steps.append(step))
    assert {d.tensor: (d.operator, d.order) for d in differences} == {
        "a": ("MatMul", 0), "b": ("Relu", 1), "c": ("Mul", 2), "y": ("Add", 3),
    }  # fmt: skip
    worst = differences[0]
    assert worst.tensor == "c" and worst.shape == (1, 4) and worst.relative_error == pytest.approx(0.5)
    assert worst.max_abs_error == 2.0 and worst.psnr_db == pytest.approx(20 * math.log10(4 / math.sqrt(5.25 / 4)))
    assert min(d.order for d in differences if d.relative_error) == 2, "what is before it is equal"
    assert [d.psnr_db for d in differences[-2:]] == [math.inf, math.inf]
    assert steps == [("compare layers", 0, 1), ("compare layers", 1, 1)]
    infinite = chain(tmp_path / "infinite.onnx", third=math.inf)
    assert compare_layers(right, infinite, FEEDS)[0].relative_error == math.inf


def test_quantisations_own_tensors_are_left_out(tmp_path: Path) -> None:
    plain, quantised = chain(tmp_path / "plain.onnx"), chain(tmp_path / "int8.onnx", inner=QUANTISED)
    for pair in ((plain, quantised), (quantised, plain)):
        differences = {d.tensor: d.relative_error for d in compare_layers(*pair, FEEDS)}
        assert set(differences) == {"a", "b", "c", "y"} and differences["a"] == 0 < differences["b"] < 0.1


def test_fp16_is_near_float32_in_every_layer_but_not_equal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In many groups as in one; the feeds are drawn."""
    float32 = ASSETS / "tiny" / "vae_encoder.onnx"
    half = Path(shutil.copy(float32, tmp_path / "half.onnx"))
    to_float16(half)
    monkeypatch.setattr(layers, "LIMIT_BYTES", 32 << 20)
    monkeypatch.setattr(layers, "_ROWS", 1)
    groups: list[int] = []
    differences = compare_layers(float32, half, on_progress=lambda what, done, total: groups.append(total))
    nodes = read_model(float32).graph.node
    assert len(differences) > 0.8 * len(nodes) and groups[0] > 1
    assert all(d.operator != "Cast" for d in differences)
    assert 1e-5 < differences[0].relative_error < 0.05 and 40 < differences[0].psnr_db < 100
    assert {d.tensor for d in differences} >= {"latent"}


def test_what_cannot_be_compared_is_told(tmp_path: Path) -> None:
    toy = make_toy_bundle(tmp_path / "toy")
    (tmp_path / "none.onnx").write_bytes(b"no model")
    model = chain(tmp_path / "chain.onnx")
    with pytest.raises(BundleError, match="none.onnx is no ONNX model"):
        compare_layers(model, tmp_path / "none.onnx")
    with pytest.raises(MachineError, match="cannot read .*absent.onnx"):
        compare_layers(model, tmp_path / "absent.onnx")
    with pytest.raises(UsageError, match="compute no tensor of the same name: compare two conversions of one network"):
        compare_layers(model, toy / "vae_encoder.onnx")
    with pytest.raises(BundleError, match="the layers cannot be compared .*provider was: rocket"):
        compare_layers(model, model, provider_b="rocket")
