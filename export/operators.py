"""The two lambda operators as torch custom operators that stay single nodes in the ONNX file.

``moebius::local_lambda`` and ``moebius::interactive_lambda`` export as nodes ``LocalLambda`` and
``InteractiveLambda`` of domain ``moebius``; ``function_bodies`` are ONNX local functions of the same names, so that
any runtime runs the file as it is, and one with a fused kernel can take the node by name.

Both are summed in the order that needs fewest multiplications; the plain forms are ``model/lambdas.py``. Letters as
there, and: T tiles of ``TILE`` neighbouring positions of one row, D positions that some position of a tile sees through
the window (a rectangle).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from onnx import helper, numpy_helper
from onnxscript import FLOAT, FLOAT16, values
from torch import Tensor

from ..model import StudentConfig

DOMAIN = "moebius"
TILE = 8  # 8 positions see 15 x 22 others, 1.47 times what one sees; of 16 it is twice, and 4 repeat V more often

_T = TypeVar("_T", FLOAT, FLOAT16)


def tile_width(*widths: int) -> int:
    """The widest tile, at most ``TILE`` and a power of two, that divides the rows of all these grids."""
    return int(np.gcd.reduce([TILE, *widths]))


def best_tile(config: StudentConfig) -> int:
    """The tile for a network of this configuration; 0 where convolving first takes fewer multiplications.

    A position convolved takes K V r² multiplications, summed over k first H (K + V) D / tile, with K = V = C / H.
    All levels of a network get the same, since the file has one body for them.
    """
    sizes = [config.latent_size >> level for level in range(len(config.block_out_channels))]
    tile, r = tile_width(*sizes), config.window
    convolved = summed = 0
    for size, channels in zip(sizes, config.block_out_channels, strict=True):
        keys = channels // config.num_heads
        convolved += size * size * keys * keys * r * r
        summed += size * size * config.num_heads * 2 * keys * r * (r - 1 + tile)
    return tile if summed < convolved else 0


def window_positions(height: int, width: int, window: int, tile: int) -> np.ndarray:
    """Which positions each tile sees, row-major: int64 (T, D); ``height * width`` stands for what is outside."""
    half, reach = window // 2, window - 1 + tile
    tiles_y, tiles_x = np.divmod(np.arange(height * width // tile), width // tile)
    y = tiles_y[:, None] - half + np.arange(window)  # (T, r)
    x = tiles_x[:, None] * tile - half + np.arange(reach)  # (T, reach)
    inside = ((y >= 0) & (y < height))[:, :, None] & ((x >= 0) & (x < width))[:, None, :]
    positions = np.where(inside, y[:, :, None] * width + x[:, None, :], height * width)
    return _aligned(positions.reshape(len(positions), -1), height * width)


def kernel_positions(window: int, tile: int) -> np.ndarray:
    """For each position of a tile and each it may see, the kernel's tap: int64 (tile, D); window² where none is."""
    reach = window - 1 + tile
    dx = np.arange(reach) - np.arange(tile)[:, None]  # (tile, reach)
    taps = np.arange(window)[None, :, None] * window + dx[:, None, :]  # (tile, r, reach)
    taps = np.where(((dx >= 0) & (dx < window))[:, None, :], taps, window * window)
    return _aligned(taps.reshape(tile, -1), window * window)


def _aligned(table: np.ndarray, nothing: int) -> np.ndarray:
    """(rows, D) with D made a multiple of 16 by entries that stand for nothing: rows of 330 take twice as long."""
    return np.pad(table, ((0, 0), (0, -table.shape[1] % 16)), constant_values=nothing).astype(np.int64)


def layout(size: int, window: int, tile: int) -> Tensor:
    """What ``local_lambda`` needs to know of a grid of ``size`` x ``size``: int64, its windows (T, D) or its shape."""
    if tile:
        return torch.from_numpy(window_positions(size, size, window, tile))
    return torch.tensor([-1, 1, size, size])


@torch.library.custom_op("moebius::local_lambda", mutates_args=())
def local_lambda(
    q: Tensor, k: Tensor, v: Tensor, weight: Tensor, bias: Tensor, layout: Tensor, heads: int, tile: int
) -> Tensor:
    """Y[h,v,p] = sum_k Q[h,k,p] (sum_m K[k,m] V[v,m] + b[k] + sum_d W[k,d] V[v,p+d]).

    q (N, T, tile * H, K), row x * H + h for position x of the tile and head h; k (N, K, P), normalised over P;
    v (N, P, V); weight (K, r * r); bias (K, 1); ``layout`` of the grid. ``tile`` 0 convolves first: then q is
    (N, P, H, K), as with tiles of one. Returns a tensor like q, of (..., V).
    """
    keys, taps = weight.shape
    window = round(taps**0.5)
    content = (k @ v + bias).unsqueeze(1)  # (N, 1, K, V): the bias is one more key that sees every value
    if tile == 0:
        maps = v.transpose(1, 2).reshape(tuple(layout.tolist()))  # (N * V, 1, h, w)
        convolved = F.conv2d(maps, weight.reshape(keys, 1, window, window), padding=window // 2)
        lambdas = convolved.reshape(len(v), v.shape[2], keys, -1).permute(0, 3, 2, 1)  # (N, P, K, V)
        return q @ (lambdas + content)
    table = torch.from_numpy(kernel_positions(window, tile)).to(q.device)
    kernels = F.pad(weight, (0, 1))[:, table].transpose(0, 1)  # (tile, K, D): the kernel where position x sees it
    local = (q.unflatten(2, (tile, heads)) @ kernels).flatten(2, 3)  # (N, T, tile * H, D): summed over k first
    seen = F.pad(v, (0, 0, 0, 1))[:, layout]  # (N, T, D, V)
    return local @ seen + q @ content


@torch.library.custom_op("moebius::interactive_lambda", mutates_args=())
def interactive_lambda(q: Tensor, keys: Tensor, values: Tensor, table: Tensor) -> Tensor:
    """Y[h,v,p] = sum_k Q[h,k,p] sum_m (K[k,m] + E[p,k,m]) V[m,v].

    q (N, P, H, K); keys (N, 1, K, M), normalised over the prompts; values (N, M, V); table (P, K, M).
    Returns (N, P * H, V).
    """
    mixed = q @ (table + keys)  # (N, P, H, M): summed over k first, so that no (P, K, V) is ever held
    return mixed.flatten(1, 2) @ values


# The shapes that tracing sees, without computing anything.
local_lambda.register_fake(lambda q, k, v, *rest: q.new_empty(*q.shape[:3], v.shape[-1]))
interactive_lambda.register_fake(
    lambda q, keys, values, table: q.new_empty(q.shape[0], q.shape[1] * q.shape[2], values.shape[-1])
)


def _operator(
    name: str, inputs: tuple[str, ...], integers: tuple[str, ...] = (), attributes: tuple[str, ...] = ()
) -> Any:
    """An onnxscript operator with a schema: an ``Op`` stays a node, a script function would be inlined."""
    schema = onnx.defs.OpSchema
    return values.Op(
        values.Opset(DOMAIN, 1),
        name,
        schema(
            name,
            DOMAIN,
            1,
            doc="",
            inputs=[schema.FormalParameter(n, "tensor(int64)" if n in integers else "T") for n in inputs],
            outputs=[schema.FormalParameter("y", "T")],
            type_constraints=[("T", ["tensor(float)", "tensor(float16)"], "")],
            attributes=[schema.Attribute(a, schema.AttrType.INT, required=True) for a in attributes],
        ),
    )


_LOCAL = _operator("LocalLambda", ("q", "k", "v", "weight", "bias", "layout"), ("layout",), ("heads", "tile"))
_INTERACTIVE = _operator("InteractiveLambda", ("q", "keys", "values", "table"))


def _translate_local(q: _T, k: _T, v: _T, weight: _T, bias: _T, layout: Any, heads: int, tile: int) -> _T:
    return _LOCAL(q, k, v, weight, bias, layout, heads=heads, tile=tile)


def _translate_interactive(q: _T, keys: _T, values: _T, table: _T) -> _T:
    return _INTERACTIVE(q, keys, values, table)


TRANSLATIONS: Mapping[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.moebius.local_lambda.default: _translate_local,
    torch.ops.moebius.interactive_lambda.default: _translate_interactive,
}


def _constant(name: str, array: Any) -> onnx.NodeProto:
    return helper.make_node("Constant", [], [name], value=numpy_helper.from_array(np.asarray(array, np.int64)))


def local_function(opset: int, window: int, tile: int, heads: int) -> onnx.FunctionProto:
    """The body of ``LocalLambda`` for networks of this window, tile and number of heads, of any grid."""
    node = helper.make_node
    # Every name in a body has a prefix: TensorRT before 10.8 takes an outer tensor of the same name for it.
    content = [
        node("MatMul", ["ll_k", "ll_v"], ["ll_kv"]),
        node("Add", ["ll_kv", "ll_bias"], ["ll_biased"]),
        _constant("ll_axis", [1]),
        node("Unsqueeze", ["ll_biased", "ll_axis"], ["ll_content"]),
    ]
    body = _tiled(window, tile, heads) if tile else _convolved(window)
    inputs = ["ll_q", "ll_k", "ll_v", "ll_weight", "ll_bias", "ll_layout"]
    imports, attributes = [helper.make_opsetid("", opset)], ["heads", "tile"]
    return helper.make_function(DOMAIN, "LocalLambda", inputs, ["ll_y"], content + body, imports, attributes)


def _tiled(window: int, tile: int, heads: int) -> list[onnx.NodeProto]:
    node = helper.make_node
    return [
        _constant("ll_end", [0, 0, 0, 1]),
        node("Pad", ["ll_weight", "ll_end"], ["ll_taps"]),
        _constant("ll_kernel_positions", kernel_positions(window, tile)),
        node("Gather", ["ll_taps", "ll_kernel_positions"], ["ll_gathered"], axis=1),
        node("Transpose", ["ll_gathered"], ["ll_kernels"], perm=[1, 0, 2]),
        _constant("ll_split", [0, 0, tile, heads, -1]),
        node("Reshape", ["ll_q", "ll_split"], ["ll_q5"]),
        node("MatMul", ["ll_q5", "ll_kernels"], ["ll_local5"]),
        _constant("ll_join", [0, 0, tile * heads, -1]),
        node("Reshape", ["ll_local5", "ll_join"], ["ll_local"]),
        _constant("ll_outside", [0, 0, 0, 0, 1, 0]),
        node("Pad", ["ll_v", "ll_outside"], ["ll_padded"]),
        node("Gather", ["ll_padded", "ll_layout"], ["ll_seen"], axis=1),
        node("MatMul", ["ll_local", "ll_seen"], ["ll_position"]),
        node("MatMul", ["ll_q", "ll_content"], ["ll_read"]),
        node("Add", ["ll_position", "ll_read"], ["ll_y"]),
    ]


def _convolved(window: int) -> list[onnx.NodeProto]:
    node = helper.make_node
    return [
        node("Transpose", ["ll_v"], ["ll_vt"], perm=[0, 2, 1]),
        node("Reshape", ["ll_vt", "ll_layout"], ["ll_maps"]),
        _constant("ll_square", [0, 1, window, window]),
        node("Reshape", ["ll_weight", "ll_square"], ["ll_kernels"]),
        # TensorRT 10.3 reads the size of a computed kernel from this attribute alone.
        node("Conv", ["ll_maps", "ll_kernels"], ["ll_convolved"], kernel_shape=[window] * 2, pads=[window // 2] * 4),
        node("Shape", ["ll_vt"], ["ll_rows"], end=2),
        node("Shape", ["ll_vt"], ["ll_positions"], start=2),
        _constant("ll_rest", [-1]),
        node("Concat", ["ll_rows", "ll_rest", "ll_positions"], ["ll_shape"], axis=0),
        node("Reshape", ["ll_convolved", "ll_shape"], ["ll_apart"]),
        node("Transpose", ["ll_apart"], ["ll_position"], perm=[0, 3, 2, 1]),
        node("Add", ["ll_position", "ll_content"], ["ll_lambdas"]),
        node("MatMul", ["ll_q", "ll_lambdas"], ["ll_y"]),
    ]


def interactive_function(opset: int, prompts: int) -> onnx.FunctionProto:
    """The body of ``InteractiveLambda`` for this many prompts, of any grid and number of heads."""
    node = helper.make_node
    body = [
        node("Add", ["il_table", "il_keys"], ["il_tables"]),
        node("MatMul", ["il_q", "il_tables"], ["il_mixed4"]),
        _constant("il_join", [0, -1, prompts]),
        node("Reshape", ["il_mixed4", "il_join"], ["il_mixed"]),
        node("MatMul", ["il_mixed", "il_values"], ["il_y"]),
    ]
    inputs = ["il_q", "il_keys", "il_values", "il_table"]
    return helper.make_function(DOMAIN, "InteractiveLambda", inputs, ["il_y"], body, [helper.make_opsetid("", opset)])


def function_bodies(config: StudentConfig, opset: int) -> list[onnx.FunctionProto]:
    """The local functions that the file of a network of this configuration needs."""
    return [
        local_function(opset, config.window, best_tile(config), config.num_heads),
        interactive_function(opset, config.num_prompts),
    ]
