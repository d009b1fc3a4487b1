"""SmoothQuant's factors by the paper, and in small graphs: the float result stays, the outliers go."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from moebius_edge.calibration.smoothing import migration_factors, norms, smooth
from moebius_edge.errors import UsageError

CHANNELS, SIDE = 6, 4
ATTENTION, FEED_FORWARD = "down_blocks.0.attentions.0.attn1", "down_blocks.0.attentions.0.ff"
X = np.random.default_rng(1).standard_normal((2, SIDE * SIDE, CHANNELS)).astype(np.float32)


def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {
        "gain": (CHANNELS,),
        "bias": (CHANNELS,),
        "wq": (CHANNELS, 5),
        "wk": (CHANNELS, 3),
        "kernel": (8, CHANNELS, 1, 1),
        "depthwise": (CHANNELS, 1, 1, 1),
        "part": (CHANNELS // 2, 3),
        "batch": (CHANNELS, CHANNELS, 3),
    }
    made = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    made["gain"][2] = 60.0  # the outlier
    made["shape"] = np.array([0, CHANNELS, SIDE, SIDE], np.int64)
    made["halves"] = np.array([0, -1, CHANNELS // 2], np.int64)
    return made


LINEAR = "q = MatMul(normed, wq) k = MatMul(normed, wk)"
NORM = "normed = LayerNormalization <axis = -1>(x, gain, bias)"
MOVED = "turned = Transpose <perm = [0, 2, 1]>(normed) picture = Reshape(turned, shape)"
CONV = "[ff] y = Conv(picture, kernel)"


def graph(nodes: str, outputs: Sequence[str], changes: dict[str, float] | None = None) -> onnx.ModelProto:
    """A model of these nodes, which belong to the feed-forward block if their name begins with ff."""
    text = f'<ir_version: 9, opset_import: ["": 20]> small (float[N, {SIDE * SIDE}, {CHANNELS}] x) => () {{ {nodes} }}'
    model = onnx.parser.parse_model(text)
    for node in model.graph.node:
        block = FEED_FORWARD if node.name.startswith("ff") else ATTENTION
        node.name = node.name or node.output[0]
        node.metadata_props.add(key="namespace", value=f": Net/network.{block}: Part/{node.op_type}")
    used = {name for n in model.graph.node for name in n.input}
    values = {n: v * np.asarray((changes or {}).get(n, 1), v.dtype) for n, v in arrays().items() if n in used}
    model.graph.initializer.extend(numpy_helper.from_array(v, n) for n, v in values.items())
    model.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs)
    return model


def run(model: onnx.ModelProto, *names: str) -> list[np.ndarray]:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    present = {output.name for output in copy.graph.output}
    copy.graph.output.extend(
        helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in names if n not in present
    )
    session = onnxruntime.InferenceSession(copy.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(list(names), {"x": X})


def weights_of(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}


CASES = {
    "two matrix products": (NORM + LINEAR, ["q", "k"], ATTENTION, "normed", 2),
    "no bias": (NORM.replace(", bias", "") + LINEAR, ["q", "k"], ATTENTION, "normed", 2),
    "a 1x1 convolution": (NORM + MOVED + CONV, ["y"], FEED_FORWARD, "picture", 1),
}


@pytest.mark.parametrize("case", CASES)
def test_the_result_stays_and_the_scale_covers_what_was_migrated(case: str) -> None:
    nodes, outputs, block, tensor, axis = CASES[case]
    model = graph(nodes, outputs)
    (found,) = norms(model)
    assert (found.block, {n.input[0] for n in found.readers}, len(found.readers)) == (block, {tensor}, len(outputs))
    before, (activation,) = run(model, *outputs), run(model, tensor)
    largest = np.abs(activation).max(tuple(a for a in range(activation.ndim) if a != axis))

    scales = smooth(model, frozenset([block]), {tensor: largest})
    for a, b in zip(before, run(model, *outputs), strict=True):
        assert np.abs(a - b).max() < 1e-5 * np.abs(a).max()
    reach = {
        "normed": np.maximum(np.abs(arrays()["wq"]).max(1), np.abs(arrays()["wk"]).max(1)),
        "picture": np.abs(arrays()["kernel"]).max((0, 2, 3)),
    }[tensor]
    factors = migration_factors(tensor, largest, reach)
    changed, original = weights_of(model), arrays()
    along = {"wq": factors[:, None], "wk": factors[:, None], "kernel": factors[None, :, None, None]}
    along |= dict.fromkeys(("gain", "bias"), 1 / factors)
    for name in changed.keys() & along.keys():
        np.testing.assert_allclose(changed[name], original[name] * along[name], rtol=1e-6)

    (migrated,) = run(model, tensor)
    assert scales == {tensor: pytest.approx((largest / factors).max() / 127)}
    assert np.abs(migrated).max() == pytest.approx(127 * scales[tensor], rel=1e-5), "nothing is clipped, nothing spared"
    assert np.abs(migrated).max() < 0.5 * np.abs(activation).max(), "the outlier has gone"


def test_two_tensors_of_one_norm_get_one_scale() -> None:
    moved = "again = Transpose <perm = [0, 1, 2]>(normed) q = MatMul(normed, wq) k = MatMul(again, wk)"
    model = graph(NORM + moved, ["q", "k"])
    (activation,) = run(model, "normed")
    largest = np.abs(activation).max((0, 1))
    scales = smooth(model, frozenset([ATTENTION]), dict.fromkeys(("normed", "again"), largest))
    assert set(scales) == {"normed", "again"} and len(set(scales.values())) == 1


FIRST = NORM + "q = MatMul(normed, wq)"
LEFT_ALONE = {
    "another reader": NORM + LINEAR + "r = Relu(normed)",
    "another reader behind a move": NORM + MOVED + CONV + "r = Relu(picture)",
    "nothing reads it": NORM,
    "a weight that the input makes": FIRST + "t = Transpose <perm = [0, 2, 1]>(x) k = MatMul(normed, t)",
    "the weight of another product": NORM + LINEAR + "other = MatMul(x, wk)",
    "a gain of another norm": NORM + LINEAR + "n2 = LayerNormalization(x, gain, bias) r = Relu(n2)",
    "a grouped convolution": NORM + MOVED + f"y = Conv <group = {CHANNELS}>(picture, depthwise)",
    "products of two blocks": FIRST + "[ff] k = MatMul(normed, wk)",
    "channels that a move takes apart": NORM + "parts = Reshape(normed, halves) y = MatMul(parts, part)",
    "a batch of matrices": NORM + "y = MatMul(normed, batch)",
}


@pytest.mark.parametrize("case", LEFT_ALONE)
def test_what_cannot_take_part_is_left_alone(case: str) -> None:
    model = graph(LEFT_ALONE[case], [])
    before = model.SerializeToString()
    assert [n.node.output[0] for n in norms(model)] == []
    assert smooth(model, frozenset([ATTENTION, FEED_FORWARD]), {}) == {}
    assert model.SerializeToString() == before


def test_weights_that_are_not_finite_are_named() -> None:
    model = graph(NORM + LINEAR, ["q", "k"], {"wk": np.nan})
    with pytest.raises(UsageError, match="a channel of activation normed or of its weight is not finite"):
        smooth(model, frozenset([ATTENTION]), {"normed": np.ones(CHANNELS, np.float32)})


def test_factors_are_the_papers_and_a_dead_channel_stays_as_it_is() -> None:
    rng = np.random.default_rng(0)
    x, w = rng.uniform(0.1, 50, 6), rng.uniform(0.01, 2, 6)
    expected = [x[j] ** 0.5 / w[j] ** 0.5 for j in range(6)]
    np.testing.assert_allclose(migration_factors("x", x, w), expected, rtol=1e-6)
    assert migration_factors("x", [0, 2, 8], [3, 0, 2]).tolist() == [1, 1, 2]
