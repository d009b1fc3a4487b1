"""The lambda operators against the plain forms of the model, eager and as ONNX functions, on random shapes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from onnx.numpy_helper import from_array
from trt_network import network_facts

from moebius_edge.export.onnx_file import OPSET
from moebius_edge.export.operators import (
    DOMAIN,
    best_tile,
    interactive_function,
    interactive_lambda,
    kernel_positions,
    local_function,
    local_lambda,
    tile_width,
    window_positions,
)
from moebius_edge.model import StudentConfig, lambdas

torch.set_num_threads(1)

# batch, heads, key width, value width, height, width, window
SHAPES = [
    (1, 2, 3, 3, 8, 8, 5),
    (2, 8, 4, 4, 16, 16, 15),
    (3, 1, 5, 5, 4, 8, 15),  # a window larger than the grid
    (2, 4, 2, 6, 6, 12, 3),  # tiles of four, values wider than keys
    (1, 3, 7, 2, 5, 7, 7),  # odd sides: tiles of one
]


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def check(found: np.ndarray | torch.Tensor, expected: torch.Tensor) -> None:
    worst = float((torch.as_tensor(found) - expected).abs().max())
    assert worst <= 1e-5 * float(expected.abs().max()), worst


@pytest.mark.parametrize("convolved", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_local_lambda_and_its_body_are_the_plain_one(shape: tuple[int, ...], convolved: bool) -> None:
    n, h, k, v, height, width, window = shape
    positions = height * width
    q, keys = draw(n, h, k, positions, seed=1), draw(n, k, positions, seed=2).softmax(-1)
    maps, weight, bias = draw(n, v, height, width, seed=3), draw(k, 1, window, window, seed=4), draw(k, seed=5)
    tile = 0 if convolved else tile_width(width)
    tokens = q.permute(0, 3, 1, 2).reshape(n, positions // max(1, tile), max(1, tile) * h, k)
    where = torch.tensor([-1, 1, height, width])
    if tile:
        where = torch.from_numpy(window_positions(height, width, window, tile))
    values = maps.flatten(2).transpose(1, 2).contiguous()
    inputs = [tokens, keys, values, weight.flatten(1), bias[:, None], where]
    expected = lambdas.local_lambda(q, keys, maps, weight, bias)  # (N, H, V, P)
    ran = run_function(local_function(OPSET, window, tile, h), inputs, {"heads": h, "tile": tile})
    for y in (local_lambda(*inputs, h, tile), ran):
        check(y.reshape(n, positions, h, v), expected.permute(0, 3, 1, 2))
    torch.library.opcheck(local_lambda, (*inputs, h, tile), test_utils="test_faketensor")


@pytest.mark.parametrize("shape", SHAPES)
def test_interactive_lambda_is_the_plain_one(shape: tuple[int, ...]) -> None:
    n, h, keys, values, height, width, _ = shape
    prompts, positions = 10, height * width
    q, k = draw(n, h, keys, positions, seed=1), draw(n, keys, prompts, seed=2).softmax(-1)
    v, e = draw(n, values, prompts, seed=3), draw(positions, prompts, keys, seed=4)
    tokens = q.permute(0, 3, 1, 2).contiguous()
    inputs = [tokens, k[:, None], v.transpose(1, 2).contiguous(), e.transpose(1, 2).contiguous()]
    expected = lambdas.interactive_lambda(q, k, v, e)
    for y in (interactive_lambda(*inputs), run_function(interactive_function(OPSET, prompts), inputs, {})):
        check(y.reshape(n, positions, h, values), expected.permute(0, 3, 1, 2))
    torch.library.opcheck(interactive_lambda, tuple(inputs), test_utils="test_faketensor")


def one_node(
    body: onnx.FunctionProto, inputs: Sequence[torch.Tensor], attributes: dict[str, int]
) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """A model of one node of domain ``moebius`` with this body, whose inner names all have a prefix, and its feeds."""
    prefix = body.input[0].split("_")[0] + "_"
    assert all(name.startswith(prefix) for n in body.node for name in [*n.input, *n.output])
    names = [name.removeprefix(prefix) for name in body.input]  # an outer tensor must not share a formal's name
    types = [TensorProto.INT64 if t.dtype == torch.int64 else TensorProto.FLOAT for t in inputs]
    graph = helper.make_graph(
        [helper.make_node(body.name, names, ["y"], domain=DOMAIN, **attributes)],
        "one node",
        [helper.make_tensor_value_info(*v, list(t.shape)) for *v, t in zip(names, types, inputs, strict=True)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * (inputs[0].ndim if attributes else 3))],
    )
    imports = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)]
    model = helper.make_model(graph, functions=[body], opset_imports=imports, ir_version=9)
    onnx.checker.check_model(model)
    return model, dict(zip(names, (t.numpy() for t in inputs), strict=True))


def run_function(body: onnx.FunctionProto, inputs: Sequence[torch.Tensor], attributes: dict[str, int]) -> np.ndarray:
    model, feeds = one_node(body, inputs, attributes)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (y,) = session.run(None, feeds)
    return np.asarray(y)


def test_tensorrt_knows_the_kernel_of_the_body_that_convolves_first(tmp_path: Path) -> None:
    """By the attribute, without which 10.3 reads a size that was never set."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    q, keys, values, weight = (
        draw(1, 64, 2, 4, seed=1),
        draw(1, 4, 64, seed=2),
        draw(1, 64, 4, seed=3),
        draw(4, 25, seed=4),
    )
    inputs = [q, keys, values, weight, draw(4, 1, seed=5), torch.tensor([-1, 1, 8, 8])]
    model, _ = one_node(local_function(OPSET, 5, 0, 2), inputs, {"heads": 2, "tile": 0})
    del model.graph.input[3]  # as in a network's file, constants
    del model.graph.input[-1]
    model.graph.initializer.extend([from_array(weight.numpy(), "weight"), from_array(inputs[-1].numpy(), "layout")])
    onnx.save(model, tmp_path / "one.onnx")
    assert network_facts(tmp_path / "one.onnx")["layers"]["CONVOLUTION"] == 1
    (node,) = (n for n in model.functions[0].node if n.op_type == "Conv")
    assert helper.get_node_attr_value(node, "kernel_shape") == [5, 5]


def test_windows_and_taps_of_a_small_grid_by_hand() -> None:
    """A 2x4 grid, window 3, tiles of two: each sees three rows of four, and 8 stands for what is outside."""
    windows = window_positions(2, 4, 3, 2)
    assert windows.shape == (4, 16)  # 12, and 4 that stand for nothing
    assert windows[0].tolist() == [8, 8, 8, 8, 8, 0, 1, 2, 8, 4, 5, 6, 8, 8, 8, 8]
    assert windows[3].tolist() == [1, 2, 3, 8, 5, 6, 7, 8, 8, 8, 8, 8, 8, 8, 8, 8]
    taps = kernel_positions(3, 2)
    assert taps[0].tolist() == [0, 1, 2, 9, 3, 4, 5, 9, 6, 7, 8, 9, 9, 9, 9, 9]
    assert taps[1].tolist() == [9, 0, 1, 2, 9, 3, 4, 5, 9, 6, 7, 8, 9, 9, 9, 9]


def test_a_tile_divides_every_row() -> None:
    assert [tile_width(64, 32, 16), tile_width(8), tile_width(4), tile_width(12), tile_width(7)] == [8, 8, 4, 4, 1]


def test_the_order_of_sums_is_the_cheaper_one() -> None:
    assert best_tile(StudentConfig()) == 8  # 40 keys a head and more: 1.7 to 7 times fewer multiplications
    narrow = StudentConfig(block_out_channels=(64, 96, 128), latent_size=32)
    assert best_tile(narrow) == 0  # 8 to 16 keys: summing over them first saves nothing
