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


def node(kind: str, inputs: Sequence[str], output: str, block: str = ATTENTION, **attributes: object) -> onnx.NodeProto:
    made = helper.make_node(kind, inputs, [output], f"{output}/{kind}", **attributes)
    made.metadata_props.add(key="namespace", value=f": Net/network.{block}: Part/{kind}")
    return made


NORM = node("LayerNormalization", ["x", "gain", "bias"], "normed", axis=-1)
LINEAR = [node("MatMul", ["normed", "wq"], "q"), node("MatMul", ["normed", "wk"], "k")]
MOVED = [
    node("Transpose", ["normed"], "turned", perm=[0, 2, 1]),
    node("Reshape", ["turned", "shape"], "picture"),
    node("Conv", ["picture", "kernel"], "y", FEED_FORWARD),
]


def graph(
    nodes: Sequence[onnx.NodeProto], outputs: Sequence[str], changes: dict[str, float] | None = None
) -> onnx.ModelProto:
    values = {name: array * np.float32((changes or {}).get(name, 1)) for name, array in arrays().items()}
    values |= {name: arrays()[name] for name in ("shape", "halves")}
    used = {name for n in nodes for name in n.input}
    weights = [numpy_helper.from_array(v, n) for n, v in values.items() if n in used]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", SIDE * SIDE, CHANNELS])
    made = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
    body = helper.make_graph(list(nodes), "small", [x], made, weights)
    return helper.make_model(body, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


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


WITHOUT_BIAS = node("LayerNormalization", ["x", "gain"], "normed", axis=-1)
CASES = {
    "two matrix products": ([NORM, *LINEAR], ["q", "k"], ATTENTION, "normed", 2),
    "no bias": ([WITHOUT_BIAS, *LINEAR], ["q", "k"], ATTENTION, "normed", 2),
    "a 1x1 convolution": ([NORM, *MOVED], ["y"], FEED_FORWARD, "picture", 1),
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
    model = graph([NORM, node("Transpose", ["normed"], "again", perm=[0, 1, 2]), LINEAR[0],
                   node("MatMul", ["again", "wk"], "k")], ["q", "k"])  # fmt: skip
    (activation,) = run(model, "normed")
    largest = np.abs(activation).max((0, 1))
    scales = smooth(model, frozenset([ATTENTION]), dict.fromkeys(("normed", "again"), largest))
    assert set(scales) == {"normed", "again"} and len(set(scales.values())) == 1


LEFT_ALONE = {
    "another reader": [NORM, *LINEAR, node("Relu", ["normed"], "r")],
    "another reader behind a move": [NORM, *MOVED, node("Relu", ["picture"], "r")],
    "nothing reads it": [NORM],
    "a weight that the input makes": [NORM, LINEAR[0], node("Transpose", ["x"], "t", perm=[0, 2, 1]),
                                      node("MatMul", ["normed", "t"], "k")],
    "the weight of another product": [NORM, *LINEAR, node("MatMul", ["x", "wk"], "other")],
    "a gain of another norm": [NORM, *LINEAR, node("LayerNormalization", ["x", "gain", "bias"], "n2", axis=-1),
                               node("Relu", ["n2"], "r")],
    "a grouped convolution": [NORM, *MOVED[:2], node("Conv", ["picture", "depthwise"], "y", group=CHANNELS)],
    "products of two blocks": [NORM, LINEAR[0], node("MatMul", ["normed", "wk"], "k", FEED_FORWARD)],
    "channels that a move takes apart": [NORM, node("Reshape", ["normed", "halves"], "parts"),
                                         node("MatMul", ["parts", "part"], "y")],
    "a batch of matrices": [NORM, node("MatMul", ["normed", "batch"], "y")],
}  # fmt: skip


@pytest.mark.parametrize("case", LEFT_ALONE)
def test_what_cannot_take_part_is_left_alone(case: str) -> None:
    nodes = LEFT_ALONE[case]
    model = graph(nodes, [nodes[-1].output[0]])
    before = model.SerializeToString()
    assert [n.node.output[0] for n in norms(model)] == []
    assert smooth(model, frozenset([ATTENTION, FEED_FORWARD]), {}) == {}
    assert model.SerializeToString() == before


def test_weights_that_are_not_finite_are_named() -> None:
    model = graph([NORM, *LINEAR], ["q", "k"], {"wk": np.nan})
    with pytest.raises(UsageError, match="a channel of activation normed or of its weight is not finite"):
        smooth(model, frozenset([ATTENTION]), {"normed": np.ones(CHANNELS, np.float32)})


def test_factors_are_the_papers_and_a_dead_channel_stays_as_it_is() -> None:
    rng = np.random.default_rng(0)
    x, w = rng.uniform(0.1, 50, 6), rng.uniform(0.01, 2, 6)
    expected = [x[j] ** 0.5 / w[j] ** 0.5 for j in range(6)]
    np.testing.assert_allclose(migration_factors("x", x, w), expected, rtol=1e-6)
    assert migration_factors("x", [0, 2, 8], [3, 0, 2]).tolist() == [1, 1, 2]
