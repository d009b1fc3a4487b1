"""Blocks with their multiply-adds counted by hand, lambda operators inlined and in INT8, recipes as files."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from moebius_edge.bundle.bundle import ASSETS
from moebius_edge.calibration.blocks import Recipe, blocks, inlined
from moebius_edge.calibration.quantise import quantise
from moebius_edge.errors import BundleError, MachineError, UsageError
from moebius_edge.export.onnx_file import OPSET
from moebius_edge.export.operators import local_function, window_positions
from moebius_edge.export.precision import read_model

LAMBDA = "down_blocks.0.attentions.0.attn1.lambda"


@pytest.fixture(scope="module")
def tiny() -> SimpleNamespace:
    model = read_model(ASSETS / "tiny" / "denoiser.onnx")
    return SimpleNamespace(model=model, blocks=blocks(model))


def test_blocks_cover_every_product_of_the_network(tiny: SimpleNamespace) -> None:
    found = {b.name: b for b in tiny.blocks}
    products = [n.name for n in inlined(tiny.model).graph.node if n.op_type in ("Conv", "MatMul", "Gemm")]
    assert sorted(products) == sorted(n for b in tiny.blocks for n in b.nodes)
    # 32 x 32 positions of 64 channels; 1x1 up to 2 x 160, back from 160
    assert found["down_blocks.0.attentions.0.ff"].macs == 32 * 32 * 64 * 160 * 3
    assert found["down_blocks.0.resnets.0.conv1.depthwise"].macs == 32 * 32 * 64 * 9
    assert found["time_embedding"].macs == 64 * 256 + 256 * 256
    local = found[LAMBDA]  # 8 keys of 8 values: content, 15 x 15 convolved, read by 8 heads
    assert local.macs == 32 * 32 * 64 * (1 + 15 * 15 + 8) and len(local.nodes) == 3


def run(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> np.ndarray:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, feeds)[0])


def test_inlined_and_folded_it_computes_what_it_did(tiny: SimpleNamespace) -> None:
    sample = np.random.default_rng(3).standard_normal((2, 33, 32, 32)).astype(np.float32)
    feeds = {"sample": sample, "timestep": np.full(2, 500, np.float32), "branch": np.array([0, 1])}
    flat = inlined(tiny.model)
    assert np.abs(run(tiny.model, feeds) - run(flat, feeds)).max() < 1e-4 and len(flat.functions) == 0


def tiled_model(tile: int = 4, heads: int = 2, keys: int = 3, window: int = 3, size: int = 4) -> onnx.ModelProto:
    """One ``LocalLambda`` that sums over keys first, as the published network's do."""
    generator = np.random.default_rng(4)
    tiles = size * size // tile
    constants = {
        "weight": generator.standard_normal((keys, window * window)).astype(np.float32),
        "bias": generator.standard_normal((keys, 1)).astype(np.float32),
        "layout": window_positions(size, size, window, tile),
    }
    shapes = {
        "q": ("N", tiles, tile * heads, keys), "k": ("N", keys, size * size), "v": ("N", size * size, 5),
        "y": ("N", tiles, tile * heads, 5),
    }  # fmt: skip
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in shapes.items()]
    node = helper.make_node(
        "LocalLambda", [*shapes][:3] + [*constants], ["y"], "call", domain="moebius", heads=heads, tile=tile
    )
    node.metadata_props.add(key="namespace", value=": D/network.down_blocks.0.attentions.0.attn1: L/local_lambda: op")
    weights = [numpy_helper.from_array(v, k) for k, v in constants.items()]
    graph = helper.make_graph([node], "tiled", values[:3], values[3:], weights)
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("moebius", 1)]
    body = local_function(OPSET, window, tile, heads)
    return helper.make_model(graph, opset_imports=opsets, functions=[body], ir_version=9)


def test_kernels_that_a_tile_sees_become_weights_in_int8() -> None:
    model = tiled_model()
    generator = np.random.default_rng(5)
    wanted = {v.name: [2, *(d.dim_value for d in v.type.tensor_type.shape.dim[1:])] for v in model.graph.input}
    feeds = {name: generator.standard_normal(shape).astype(np.float32) for name, shape in wanted.items()}
    scales = defaultdict(lambda: 4.0 / 127, {"call/ll_local": 12.0 / 127, "call/ll_content": 16.0 / 127})
    q = quantise(model, Recipe({LAMBDA: True}), scales)
    assert scales.keys() == {"k", "v", "call/ll_q5", "call/ll_local", "call/ll_seen", "q", "call/ll_content"}
    assert len(q.functions) == 0
    weights = {t.name: t for t in q.graph.initializer}
    assert list(weights["call/ll_kernels_int8"].dims) == [4, 3, 32]  # tile, keys, 3 x 6 positions seen and 14 of none
    assert list(weights["call/ll_kernels_int8_scale"].dims) == [] and "weight" not in weights
    results = [run(graph, feeds) for graph in (model, inlined(model), q)]
    assert np.abs(results[0] - results[1]).max() < 1e-5
    assert 1e-4 < np.abs(results[0] - results[2]).max() < 0.05 * np.abs(results[0]).max()


def test_what_a_block_needs_to_know_is_asked_for() -> None:
    model = tiled_model()
    model.graph.node[0].name = ""
    with pytest.raises(BundleError, match=r"node 'y' \(LocalLambda\) lacks its name or its module's path: export"):
        inlined(model, frozenset())
    model = tiled_model()
    del model.graph.node[0].metadata_props[:]
    with pytest.raises(BundleError, match=r"node 'call' \(LocalLambda\) lacks its name or its module's path: export"):
        inlined(model, frozenset())
    model = tiled_model()
    model.graph.input[1].type.tensor_type.ClearField("shape")
    with pytest.raises(BundleError, match=r"the shapes of node 'call/MatMul_0' \(MatMul\) are not known"):
        blocks(model)


# --- recipes ---------------------------------------------------------------------------------------------


def test_a_recipe_is_read_as_it_was_written_for_its_model(tmp_path: Path) -> None:
    recipe = Recipe({"conv_9": False, "a": True, "b": True, "c": True, "d": True}, ("e",))
    recipe.save(tmp_path / "recipe.json")
    assert Recipe.load(tmp_path / "recipe.json") == recipe and recipe.chosen == {*"abcd"}
    with pytest.raises(UsageError, match="names blocks that the model does not have: a, b, c: remove"):
        recipe.check(["d"])
    with pytest.raises(UsageError, match="names blocks that the model does not have: e: remove"):
        recipe.check(recipe.quantised)
    with pytest.raises(MachineError, match=r"cannot read .*none\.json: No such file or directory"):
        Recipe.load(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not valid JSON"),
        ('{"schema_version": 2, "quantised": {}}', "schema_version is 2, expected 1"),
        ('{"schema_version": 1}', "quantised is missing"),
        ('{"schema_version": 1, "quantised": {"a": true, "b": 1}}', "quantised.b is 1, expected a valid boolean"),
        ('{"schema_version": 1, "quantised": {}, "smoothed": "a"}', "smoothed is 'a', expected a valid tuple"),
    ],
)
def test_what_is_no_recipe(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "recipe.json").write_text(content)
    with pytest.raises(UsageError, match=message):
        Recipe.load(tmp_path / "recipe.json")
