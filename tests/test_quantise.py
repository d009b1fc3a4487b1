"""INT8 files: the numbers against numpy, where the pairs stand, what TensorRT makes of them."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from trt_network import network_facts

from moebius_edge.bundle.bundle import ASSETS
from moebius_edge.calibration.blocks import Recipe, blocks
from moebius_edge.calibration.quantise import (
    Quantiser,
    quantise,
    quantise_weight,
    quantised_nodes,
)
from moebius_edge.calibration.statistics import Statistics, TensorStatistics
from moebius_edge.errors import BundleError, UsageError
from moebius_edge.export.int8_ranges import METHODS
from moebius_edge.export.precision import convert
from moebius_edge.export.trt_rules import problems

CONV, RELU, LINEAR = "down_blocks.0.resnets.0.conv1", "down_blocks.0.resnets.0.conv2", "time_embedding"
ALL = Recipe({CONV: True, RELU: True, LINEAR: True})


def small_model(weight: float = 0.0) -> onnx.ModelProto:
    """y = mean(conv2(relu(conv1(x)))) W: two convolutions with biases, a product; one weight is ``weight``."""
    model = onnx.parser.parse_model("""<ir_version: 9, opset_import: ["": 20]>
        small (float[N, 4, 8, 8] x) => (float[N, 3] y) {
        [first] a = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]>(x, w1, b1) [relu] b = Relu(a)
        [second] c = Conv <kernel_shape = [1, 1]>(b, w2, b2)
        [mean] d = GlobalAveragePool(c) [flat] e = Flatten(d) [third] y = MatMul(e, w3) }""")
    for node, path in zip(model.graph.node, (CONV, CONV, RELU, RELU, LINEAR, LINEAR), strict=True):
        node.metadata_props.add(key="namespace", value=f": Net/network: UNet/network.{path}: Part/{node.name}")
    generator = np.random.default_rng(0)
    shapes = {"w1": (6, 4, 3, 3), "b1": (6,), "w2": (5, 6, 1, 1), "b2": (5,), "w3": (5, 3)}
    arrays = {name: generator.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    arrays["w1"][2] = 0.0  # a channel that does nothing
    arrays["w3"][0, 0] = weight
    model.graph.initializer.extend(numpy_helper.from_array(v, k) for k, v in arrays.items())
    return onnx.shape_inference.infer_shapes(model, check_type=True)


X = np.random.default_rng(1).standard_normal((2, 4, 8, 8)).astype(np.float32)


def run(model: onnx.ModelProto, names: list[str] | None = None, optimise: bool = True) -> list[np.ndarray]:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    added = set(names or []) - {o.name for o in copy.graph.output}
    copy.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in added)
    options = onnxruntime.SessionOptions()
    if not optimise:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(copy.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(names, {"x": X})


def scales_of(model: onnx.ModelProto) -> dict[str, float]:
    """Min-max scales of all that is computed."""
    names = list(dict.fromkeys(n for node in model.graph.node for n in node.output))
    values = {"x": X, **dict(zip(names, run(model, names), strict=True))}
    return {name: float(np.abs(v).max()) / 127 for name, v in values.items()}


SCALES = scales_of(small_model())
ANY_SCALE: dict[str, float] = defaultdict(lambda: 0.05)  # one for every tensor


def fake(values: np.ndarray, scale: np.ndarray | float, low: int = -128, high: int = 127) -> np.ndarray:
    return np.clip(np.rint(values / scale), low, high) * scale


def fake_weight(values: np.ndarray, axis: int) -> np.ndarray:
    others = tuple(i for i in range(values.ndim) if i != axis)
    largest = np.abs(values).max(others, keepdims=True)
    return fake(values, np.where(largest == 0, 1, largest / 127), -127, 127)


def convolve(x: np.ndarray, w: np.ndarray, b: np.ndarray) -> np.ndarray:
    half = w.shape[2] // 2
    padded = np.pad(x, ((0, 0), (0, 0), (half, half), (half, half)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, w.shape[2:], (2, 3))
    return np.einsum("nchwij,ocij->nohw", windows, w) + b[:, None, None]


def expected(model: onnx.ModelProto) -> np.ndarray:
    """The small model with inputs and weights rounded, in float64."""
    w = {t.name: numpy_helper.to_array(t).astype(np.float64) for t in model.graph.initializer}
    a = convolve(fake(X.astype(np.float64), SCALES["x"]), fake_weight(w["w1"], 0), w["b1"])
    b = fake(np.maximum(a, 0), SCALES["b"])
    c = convolve(b, fake_weight(w["w2"], 0), w["b2"])
    return fake(c.mean((2, 3)), SCALES["e"]) @ fake_weight(w["w3"], 1)


def test_the_numbers_are_those_of_rounding_in_numpy() -> None:
    model = small_model()
    (got,) = run(quantise(model, ALL, SCALES), optimise=False)
    wanted, unrounded = expected(model), run(model)[0]
    # A value half way between two integers may go either way in float32: that is one step of the last product.
    assert np.abs(got - wanted).max() < 1e-4 < np.abs(unrounded - wanted).max()


def test_every_input_of_a_product_gets_one_pair_and_the_rules_hold() -> None:
    model = small_model()
    q = quantise(model, ALL, {name: SCALES[name] for name in ("x", "b", "e")})
    kinds = Counter(n.op_type for n in q.graph.node)
    assert (kinds["QuantizeLinear"], kinds["DequantizeLinear"]) == (3, 6)
    assert quantised_nodes(q) == ["first", "second", "third"]
    assert problems(q) == []
    weights = {t.name: t for t in q.graph.initializer}
    assert {weights[n].data_type for n in ("b1", "b2", "b_scale")} == {TensorProto.FLOAT}
    assert "w1" not in weights and weights["w1_int8"].data_type == TensorProto.INT8
    assert list(weights["w1_int8_scale"].dims) == [6] and list(weights["w3_int8_scale"].dims) == [3]
    assert quantised_nodes(model) == []  # the argument is not changed


def test_two_readers_share_a_pair() -> None:
    model = small_model()
    twice = onnx.NodeProto()
    twice.CopyFrom(model.graph.node[0])
    twice.name, twice.output[0] = "other", "a2"
    model.graph.node.insert(1, twice)
    inputs = {n.name: n.input[0] for n in quantise(model, Recipe({CONV: True}), SCALES).graph.node}
    assert inputs["first"] == inputs["other"] == "x_dequantised"


# --- FP16 ------------------------------------------------------------------------------------------------


def half_model() -> onnx.ModelProto:
    model = small_model()
    convert(model)
    return onnx.shape_inference.infer_shapes(model, check_type=True)


def test_an_fp16_file_gets_fp16_scales_by_the_names_of_the_float32_one() -> None:
    q = quantise(half_model(), ALL, {name: SCALES[name] for name in ("x", "b", "e")})
    types = {t.name: t.data_type for t in q.graph.initializer if t.name.endswith("_scale")}
    half = {n for n, kind in types.items() if kind == TensorProto.FLOAT16}
    assert half == {"x_as_float16_scale", "w1_float16_int8_scale", "b_scale", "w2_float16_int8_scale"}
    assert types.keys() - half == {"e_scale", "w3_int8_scale"}  # the time embedding is a float32 island
    assert len(quantised_nodes(q)) == 3 and problems(q) == []
    assert np.abs(run(q)[0] - expected(small_model())).max() < 0.05


@pytest.mark.parametrize("scale", [0.0, np.nan, np.inf, -1.0, 1e-9, 1e6])
def test_a_scale_that_its_type_cannot_hold_is_named(scale: float) -> None:
    message = f"scale of tensor b is {scale:g} and must be finite and above 0 in float16"
    with pytest.raises(UsageError, match=re.escape(message)):
        quantise(half_model(), ALL, {**SCALES, "b": scale})


def test_missing_ranges_and_bad_weights_are_named() -> None:
    with pytest.raises(UsageError, match="no range for tensor e: record the calibration again"):
        quantise(small_model(), ALL, {k: v for k, v in SCALES.items() if k != "e"})
    with pytest.raises(BundleError, match="weight w3 has values that are not finite"):
        quantise(small_model(weight=np.inf), ALL, SCALES)


def test_weights_are_within_half_a_step_and_reach_127() -> None:
    values = np.random.default_rng(2).standard_normal((4, 3, 2)).astype(np.float32)
    for axis in (0, 1, None):
        whole, scale = quantise_weight(values, axis, "w")
        along = scale if axis is None else np.expand_dims(scale, [i for i in range(3) if i != axis])
        assert np.abs(whole * along - values).max() <= along.max() / 2 + 1e-6
        assert np.abs(whole).max() == 127 and scale.size == (1 if axis is None else values.shape[axis])


# --- the bundled model -----------------------------------------------------------------------------------

LAMBDA = "down_blocks.0.attentions.0.attn1.lambda"
ATTENTION, FEED_FORWARD = (f"down_blocks.0.attentions.0.{part}" for part in ("attn1", "ff"))
CHOSEN = (FEED_FORWARD, ATTENTION, "up_blocks.1.upsamplers.0.phases")
DENOISER = ASSETS / "tiny" / "denoiser.onnx"


@pytest.fixture(scope="module")
def tiny() -> SimpleNamespace:
    model = onnx.load(DENOISER)
    recipe = Recipe({name: True for name in (*CHOSEN, LAMBDA, "time_embedding")})
    return SimpleNamespace(model=model, recipe=recipe, blocks=blocks(model))


def test_a_lambda_operator_stays_a_node_where_the_recipe_leaves_it(tiny: SimpleNamespace) -> None:
    q = quantise(tiny.model, tiny.recipe, ANY_SCALE)
    kinds = Counter(n.op_type for n in q.graph.node)
    assert kinds["LocalLambda"] == 8 and kinds["InteractiveLambda"] == 9 and len(q.functions) == 2
    without = quantise(tiny.model, Recipe({CHOSEN[0]: True}), ANY_SCALE)
    assert len(without.functions) == 2 and Counter(n.op_type for n in without.graph.node)["LocalLambda"] == 9


def test_tensorrt_parses_exactly_the_recipes_layers(tiny: SimpleNamespace, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    for recipe, number in ((tiny.recipe, 15), (Recipe({b.name: True for b in tiny.blocks}), 213)):
        q = quantise(tiny.model, recipe, ANY_SCALE)
        assert problems(q) == []
        onnx.save(q, tmp_path / "denoiser.onnx")
        facts = network_facts(tmp_path / "denoiser.onnx")
        expected = sorted(n for b in tiny.blocks if b.name in recipe.chosen for n in b.nodes)
        assert sorted(facts["quantised"]) == expected == sorted(quantised_nodes(q)) and len(expected) == number
        assert facts["tensors"]["INT8"] > 0
    assert network_facts(DENOISER)["quantised"] == []


# --- from statistics to candidates -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def statistics() -> Statistics:
    """64 channels of numbers with outliers for every tensor that a node computes."""
    tensors: dict[str, TensorStatistics] = {}
    for node in onnx.load(DENOISER).graph.node:
        tensors[node.output[0]] = tensor = TensorStatistics(-1)
        tensor.update(np.random.default_rng(len(tensors)).standard_t(4, (200, 64)).astype(np.float32))
    return Statistics({"pictures": "drawn"}, tensors)


@pytest.fixture(scope="module")
def quantiser(statistics: Statistics) -> Quantiser:
    return Quantiser(DENOISER, statistics, "minmax")


def constants(model: onnx.ModelProto) -> dict[str, TensorProto]:
    return {t.name: t for t in model.graph.initializer}


def activation_scales(model: onnx.ModelProto) -> dict[str, float]:
    found = {n.removesuffix("_scale"): t for n, t in constants(model).items() if n.endswith("_scale") and not t.dims}
    return {name: float(numpy_helper.to_array(tensor)) for name, tensor in found.items()}


def test_candidates_are_what_pays(quantiser: Quantiser) -> None:
    assert sum(map(quantiser.share, quantiser.blocks)) == pytest.approx(1)
    names = {b.name for b in quantiser.candidates}
    assert {ATTENTION, FEED_FORWARD, "up_blocks.0.resnets.0.conv1"} <= names
    assert not [n for n in names if n.endswith((".depthwise", ".lambda")) or "time_emb" in n]
    share = sum(map(quantiser.share, quantiser.candidates))
    assert 0.6 < share < 0.9, "lambda operators and depthwise convolutions have the rest"


@pytest.mark.parametrize("method", ["minmax", "percentile"])
def test_a_recipe_becomes_pairs_at_its_blocks(statistics: Statistics, method: str) -> None:
    quantiser = Quantiser(DENOISER, statistics, method)
    before = quantiser.model.SerializeToString()
    model, islands = quantiser.quantise(Recipe({ATTENTION: True, FEED_FORWARD: False}))
    (block,) = (b for b in quantiser.blocks if b.name == ATTENTION)
    assert sorted(quantised_nodes(model)) == sorted(block.nodes) and islands == {}
    assert (scales := activation_scales(model))
    for name, scale in scales.items():
        assert scale == pytest.approx(METHODS[method](statistics.tensors[name].histogram) / 127)
    assert quantiser.model.SerializeToString() == before


def test_smoothing_changes_what_its_block_reads_and_no_other(quantiser: Quantiser) -> None:
    assert {ATTENTION, FEED_FORWARD} <= quantiser.smoothable
    both = {ATTENTION: True, FEED_FORWARD: True}
    models = [quantiser.quantise(Recipe(both, s))[0] for s in ((), (ATTENTION,))]
    plain, smoothed = map(constants, models)
    changed = {n for n in plain if plain[n].SerializeToString() != smoothed[n].SerializeToString()}
    assert plain.keys() == smoothed.keys() and not [n for n in changed if ".ff" in n]
    before, after = map(activation_scales, models)
    scales = {n for n in before if after[n] != before[n]}
    assert scales and scales <= activation_scales(quantiser.quantise(Recipe({ATTENTION: True}))[0]).keys()
    # Besides, gain and bias of the norm, weights and their scales of the products behind it.
    assert 4 <= len(changed) - len(scales) <= 10
    alone, unchanged = (quantiser.quantise(Recipe({FEED_FORWARD: True}, s))[0] for s in ((), (ATTENTION,)))
    assert alone == unchanged, "a block that is not quantised is not smoothed"


@pytest.mark.parametrize(("largest", "shown"), [(0.0, "is 0, which"), (np.inf, "is inf, which"), (None, "no range")])
def test_ranges_that_are_missing_zero_or_not_finite_name_their_tensor(
    quantiser: Quantiser, statistics: Statistics, largest: float | None, shown: str
) -> None:
    recipe = Recipe({ATTENTION: True})
    name = next(iter(activation_scales(quantiser.quantise(recipe)[0])))
    tensors = dict(statistics.tensors)
    del tensors[name]
    if largest is not None:
        tensors[name] = TensorStatistics(None)
        tensors[name].histogram.maximum = largest
    with pytest.raises(UsageError, match=shown) as error:
        Quantiser(DENOISER, Statistics({}, tensors), "minmax").quantise(recipe)
    assert f" {name}" in str(error.value)
