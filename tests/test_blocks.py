"""Blocks with their multiplications counted by hand; lambda operators inlined: the same numbers, constants folded."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from moebius_edge.bundle.bundle import ASSETS
from moebius_edge.calibration.blocks import blocks, inlined
from moebius_edge.calibration.quantise import activations, quantise
from moebius_edge.calibration.recipe import Recipe
from moebius_edge.errors import BundleError
from moebius_edge.export.onnx_file import OPSET
from moebius_edge.export.operators import local_function, window_positions

LAMBDA = "down_blocks.0.attentions.0.attn1.lambda"


@pytest.fixture(scope="module")
def tiny() -> SimpleNamespace:
    model = onnx.load(ASSETS / "tiny" / "denoiser.onnx")
    return SimpleNamespace(model=model, blocks=blocks(model))


def test_blocks_cover_every_product_of_the_network(tiny: SimpleNamespace) -> None:
    found = {b.name: b for b in tiny.blocks}
    products = [n.name for n in inlined(tiny.model).graph.node if n.op_type in ("Conv", "MatMul", "Gemm")]
    assert sorted(products) == sorted(n for b in tiny.blocks for n in b.nodes)
    # 32 x 32 positions of 64 channels; 1x1 up to 2 x 160, back from 160
    assert found["down_blocks.0.attentions.0.ff"].multiplications == 32 * 32 * 64 * 160 * 3
    assert found["down_blocks.0.resnets.0.conv1.depthwise"].multiplications == 32 * 32 * 64 * 9
    assert found["time_embedding"].multiplications == 64 * 256 + 256 * 256
    local = found[LAMBDA]  # 8 keys of 8 values: content, 15 x 15 convolved, read by 8 heads
    assert local.multiplications == 32 * 32 * 64 * (1 + 15 * 15 + 8) and len(local.nodes) == 3


def test_inlined_and_folded_it_computes_what_it_did(tiny: SimpleNamespace) -> None:
    generator = np.random.default_rng(3)
    feeds = {
        "sample": generator.standard_normal((2, 9, 32, 32)).astype(np.float32),
        "timestep": np.array([500.0, 500.0], np.float32),
        "branch": np.array([0, 1]),
    }
    noises = []
    for model in (tiny.model, inlined(tiny.model)):
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        noises.append(session.run(None, feeds)[0])
    assert np.abs(noises[0] - noises[1]).max() < 1e-4
    assert len(inlined(tiny.model).functions) == 0


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
    recipe = Recipe({LAMBDA: True})
    names = activations(model, recipe)
    assert names == ["k", "v", "call/ll_q5", "call/ll_local", "call/ll_seen", "q", "call/ll_content"]
    reach = {"call/ll_local": 12.0, "call/ll_content": 16.0}
    q = quantise(model, recipe, {name: reach.get(name, 4.0) / 127 for name in names})
    assert len(q.functions) == 0
    weights = {t.name: t for t in q.graph.initializer}
    assert list(weights["call/ll_kernels_int8"].dims) == [4, 3, 32]  # tile, keys, 3 x 6 positions seen and 14 of none
    assert list(weights["call/ll_kernels_int8_scale"].dims) == [] and "weight" not in weights
    results = []
    for graph in (model, inlined(model), q):
        session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
        results.append(session.run(None, feeds)[0])
    assert np.abs(results[0] - results[1]).max() < 1e-5
    assert 1e-4 < np.abs(results[0] - results[2]).max() < 0.05 * np.abs(results[0]).max()


def test_unknown_shapes_are_refused() -> None:
    model = tiled_model()
    model.graph.input[1].type.tensor_type.ClearField("shape")
    with pytest.raises(BundleError, match=r"the shapes of node 'call/MatMul_0' \(MatMul\) are not known"):
        blocks(model)
