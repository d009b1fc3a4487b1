"""``LocalLambda`` as one GPU kernel in Triton, and the script that compiles it ahead of time.

    python -m moebius_edge.export.lambda_kernel     # writes assets/kernels/local_lambda.zip, which the package carries

Needs Triton (the extra ``dev``) and no GPU. What a device loads is the PTX in that file, see
``runtimes/lambda_plugin.py``; neither Triton nor PyTorch is needed there.

The sum over a window is two matrix products with a skew between them. For 16 neighbouring positions of a row of the
grid, all heads of them, and one row of the window: G = Q W, (16 H x K) by (K x 16 taps), then S[x, u] = G[x, u - x],
which moves each position's taps to the columns that they fall on, then Y += S V with the 32 columns of V that the 16
positions see. G and S never leave the chip. Columns are 16 taps for a window of at most 15, and positions outside of
the grid are read as zero. Letters as in ``operators.py``.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import zipfile
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import onnx
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from onnx import helper
from torch import Tensor

from ..model import StudentConfig
from ..runtimes.lambda_plugin import DOMAIN, FUNCTION, KERNEL, KERNELS_FILE, PLUGIN
from ..system.files import atomic_write
from .onnx_file import OPSET

# Compute capability -> version of PTX: the oldest that knows the target, so that as old a driver as possible takes it.
# TensorRT 10.3 of JetPack 6 comes with CUDA 12.6, which reads PTX up to 8.5.
TARGETS = {80: 80, 86: 80, 87: 80, 89: 80, 90: 80, 100: 86, 110: 90, 120: 87}
SHARED_LIMIT = 48 * 1024  # bytes that a kernel may use without being allowed more by name
WARPS = 4
TAPS = 16
_BLOCK = 16  # positions
_NETWORK = ("block_out_channels", "latent_size", "num_heads", "window")  # what the kernels are made for
_POINTERS = ("q", "content", "v", "taps", "y")


@triton.jit  # type: ignore[untyped-decorator]
def local_window(  # type: ignore[no-untyped-def]
    q, content, v, taps, y,
    SIZE: tl.constexpr, HEADS: tl.constexpr, KEYS: tl.constexpr, WINDOW: tl.constexpr,
    BLOCK_HEADS: tl.constexpr, FIRST: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """y = q content + the sum over the window, for 16 positions of a row and BLOCK_HEADS heads of picture axis 1.

    q, y (N, P, H, K); content (N, K, V), the bias in it; v (N, P, V); taps (WINDOW, 16, K), zero from WINDOW on.
    K = V is FIRST + REST, powers of two of which the second is masked, for the sides of a tile are powers of two.
    """
    GROUPS: tl.constexpr = HEADS // BLOCK_HEADS
    TILES: tl.constexpr = SIZE // 16
    HALF: tl.constexpr = WINDOW // 2
    ROWS: tl.constexpr = 16 * BLOCK_HEADS
    n, block = tl.program_id(1), tl.program_id(0)
    row, x0 = block // (GROUPS * TILES), block // GROUPS % TILES * 16
    line = tl.arange(0, ROWS)
    x = line // BLOCK_HEADS
    head = block % GROUPS * BLOCK_HEADS + line % BLOCK_HEADS
    lines = (((n * SIZE + row) * SIZE + x0 + x) * HEADS + head)[:, None] * KEYS
    a, b = tl.arange(0, FIRST), FIRST + tl.arange(0, REST)
    in_b = b < KEYS

    ya = tl.full((ROWS, FIRST), 0.0, tl.float32)
    yb = tl.full((ROWS, REST), 0.0, tl.float32)
    for start in range(0, KEYS, 16):
        key = start + tl.arange(0, 16)
        in_key = key < KEYS
        part = tl.load(q + lines + key[None, :], mask=in_key[None, :], other=0.0)
        table = content + (n * KEYS + key)[:, None] * KEYS
        ya = tl.dot(part, tl.load(table + a[None, :], mask=in_key[:, None], other=0.0), ya, input_precision="ieee")
        beside = tl.load(table + b[None, :], mask=in_key[:, None] & in_b[None, :], other=0.0)
        yb = tl.dot(part, beside, yb, input_precision="ieee")

    qa = tl.load(q + lines + a[None, :])
    qb = tl.load(q + lines + b[None, :], mask=in_b[None, :], other=0.0)
    tap, u = tl.arange(0, 16), tl.arange(0, 32)
    shift = u[None, :] - x[:, None]
    seen = (shift >= 0) & (shift < 16)
    shift = tl.where(seen, shift, 0)
    column = x0 - HALF + u
    in_row = ((column >= 0) & (column < SIZE))[:, None]
    for dy in range(tl.maximum(0, HALF - row), tl.minimum(WINDOW, SIZE + HALF - row)):
        weights = taps + (dy * 16 + tap)[None, :] * KEYS
        g = tl.dot(qa, tl.load(weights + a[:, None]), input_precision="ieee")
        beside = tl.load(weights + b[:, None], mask=in_b[:, None], other=0.0)
        g = tl.dot(qb, beside, g, input_precision="ieee").to(v.dtype.element_ty)
        s = tl.where(seen, tl.gather(g, shift, 1), 0.0)
        source = v + ((n * SIZE + row + dy - HALF) * SIZE + column)[:, None] * KEYS
        ya = tl.dot(s, tl.load(source + a[None, :], mask=in_row, other=0.0), ya, input_precision="ieee")
        beside = tl.load(source + b[None, :], mask=in_row & in_b[None, :], other=0.0)
        yb = tl.dot(s, beside, yb, input_precision="ieee")

    tl.store(y + lines + a[None, :], ya.to(y.dtype.element_ty))
    tl.store(y + lines + b[None, :], yb.to(y.dtype.element_ty), mask=in_b[None, :])


def constants(size: int, keys: int, heads: int, window: int) -> dict[str, int]:
    """The kernel's compile-time constants for a grid of ``size`` x ``size`` and ``keys`` = V a head.

    Raises ``ValueError`` for a network that the kernel is not made for.
    """
    if size % _BLOCK or keys < 16 or heads & (heads - 1) or window >= TAPS or window % 2 == 0:
        raise ValueError(f"no kernel for a grid of {size}, {keys} keys, {heads} heads and a window of {window}")
    first = 1 << keys.bit_length() - 1
    rest = max(16, 1 << max(0, keys - first - 1).bit_length())
    block_heads = min(heads, 4 if keys >= 128 else 8)  # more would not fit the registers
    return {
        "SIZE": size, "HEADS": heads, "KEYS": keys, "WINDOW": window,
        "BLOCK_HEADS": block_heads, "FIRST": first, "REST": rest,
    }  # fmt: skip


def grid(chosen: dict[str, int], rows: int) -> tuple[int, int]:
    """How many programs for ``rows`` pictures."""
    return chosen["SIZE"] ** 2 // _BLOCK * chosen["HEADS"] // chosen["BLOCK_HEADS"], rows


def arrange_taps(weight: Tensor) -> Tensor:
    """The kernel's ``taps`` (r, 16, K) of the operator's weight (K, r * r)."""
    window = round(weight.shape[1] ** 0.5)
    square = weight.unflatten(1, (window, window))
    return F.pad(square, (0, TAPS - window)).permute(1, 2, 0).contiguous()


def fused_local_lambda(
    q: Tensor, content: Tensor, v: Tensor, taps: Tensor, window: int, kernel: Any = local_window, **launch: Any
) -> Tensor:
    """``operators.local_lambda`` by the kernel, of the same q, v and result, on an NVIDIA GPU.

    content (N, K, V) is k @ v + bias, taps ``arrange_taps`` of the weight. ``kernel`` is Triton's own form of
    ``local_window``, or its interpreter; ``launch`` are Triton's options, such as ``num_warps``.
    """
    rows, positions, keys = v.shape
    heads = q.shape[1] * q.shape[2] // positions
    chosen = constants(round(positions**0.5), keys, heads, window)
    y = torch.empty_like(q)
    kernel[grid(chosen, rows)](q, content, v, taps, y, **chosen, **launch)
    return y


def published_levels() -> dict[int, int]:
    """The side of each level's grid in the published network, and its keys a head."""
    config = StudentConfig()
    return {
        config.latent_size >> level: channels // config.num_heads
        for level, channels in enumerate(config.block_out_channels)
    }


def compile_kernel(capability: int, size: int, keys: int, heads: int, window: int) -> tuple[str, dict[str, int]]:
    """PTX for one target and one level, and how to launch it: grid, threads and bytes of shared memory.

    The order of parameters is that of ``local_window``; FP16 throughout, sums in float32.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    triton.knobs.compilation.disable_line_info = True  # paths of this machine, and half of the text
    chosen = constants(size, keys, heads, window)
    signature = {**dict.fromkeys(_POINTERS, "*fp16"), **dict.fromkeys(chosen, "constexpr")}
    aligned = {(index,): [["tt.divisibility", 16]] for index in range(len(_POINTERS))}
    for stages in (2, 1):
        source = ASTSource(fn=local_window, signature=signature, constexprs=chosen, attrs=aligned)
        options = {"num_warps": WARPS, "num_stages": stages, "enable_fp_fusion": True}
        options["ptx_version"] = TARGETS[capability]
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        if compiled.metadata.shared <= SHARED_LIMIT:
            break
    else:
        raise ValueError(f"the kernel for sm_{capability} needs {compiled.metadata.shared} bytes of shared memory")
    launch = {"grid": grid(chosen, 1)[0], "threads": WARPS * 32, "shared": compiled.metadata.shared}
    return _without_scratch(compiled.asm["ptx"]), launch


def _without_scratch(ptx: str) -> str:
    """PTX without the two last parameters that Triton adds for scratch memory: whoever launches it passes five."""
    names = re.findall(rf"^\t\.param .* ({KERNEL}_param_\d+),?$", ptx, re.MULTILINE)
    extra = names[len(_POINTERS) :]
    if len(extra) != 2 or any(f"[{name}]" in ptx for name in extra):
        raise ValueError("the kernel uses scratch memory, which nothing allocates")
    for name in extra:
        ptx = re.sub(rf",\n\t\.param [^,\n]* {name}\b", "", ptx)
    return ptx


def plugin_function() -> onnx.FunctionProto:
    """A body for ``LocalLambda`` that leaves the window to the plug-in, for any network.

    TensorRT's parser takes a node that no function and no importer of its own has for a plug-in, in the namespace that
    the node names: so the plug-in is found by 10.3 as by 11, whichever of a function and a plug-in of one name each
    prefers. Only products with constants and small ones are left outside.
    """
    node = helper.make_node

    def constant(name: str, values: list[int]) -> onnx.NodeProto:
        return node("Constant", [], [name], value_ints=values)

    window = StudentConfig().window
    body = [
        node("MatMul", ["ll_k", "ll_v"], ["ll_kv"]),
        node("Add", ["ll_kv", "ll_bias"], ["ll_content"]),
        constant("ll_square", [0, window, window]),
        node("Reshape", ["ll_weight", "ll_square"], ["ll_window"]),
        constant("ll_end", [0, 0, 0, 0, 0, TAPS - window]),
        node("Pad", ["ll_window", "ll_end"], ["ll_padded"]),
        node("Transpose", ["ll_padded"], ["ll_taps"], perm=[1, 2, 0]),
        node(
            PLUGIN, ["ll_q", "ll_content", "ll_v", "ll_taps"], ["ll_y"], domain=DOMAIN,
            plugin_namespace=DOMAIN, plugin_version="1",
        ),
    ]  # fmt: skip
    inputs = ["ll_q", "ll_k", "ll_v", "ll_weight", "ll_bias", "ll_layout"]
    imports = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)]
    return helper.make_function(DOMAIN, FUNCTION, inputs, ["ll_y"], body, imports, ["heads", "tile"])


def source_hash() -> str:
    """Of the kernel and its targets: what the package carries was compiled from them."""
    return hashlib.sha256(f"{local_window.src}{TARGETS}{published_levels()}".encode()).hexdigest()


def kernel_files() -> Iterator[tuple[str, bytes]]:
    """Name and contents of each member of ``KERNELS_FILE``, the list of kernels last."""
    config = StudentConfig()
    kernels: dict[str, dict[str, Any]] = {}
    for capability in TARGETS:
        for size, keys in published_levels().items():
            ptx, launch = compile_kernel(capability, size, keys, config.num_heads, config.window)
            name = f"sm_{capability}-{size}.ptx"
            kernels[name] = {"capability": capability, "size": size, **launch}
            yield name, ptx.encode()
    yield "function.bin", plugin_function().SerializeToString(deterministic=True)
    network = {name: asdict(config)[name] for name in _NETWORK}
    listed = {"source_sha256": source_hash(), "triton": triton.__version__, "network": network, "kernels": kernels}
    yield "kernels.json", json.dumps(listed, indent=1).encode()


def main() -> None:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as packed:
        for name, content in kernel_files():
            packed.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED)
            print(f"{name} {len(content)} bytes")
    os.makedirs(KERNELS_FILE.parent, exist_ok=True)
    with atomic_write(KERNELS_FILE) as temporary:
        temporary.write_bytes(archive.getvalue())
    print(f"{KERNELS_FILE} {len(archive.getvalue())} bytes")


if __name__ == "__main__":
    main()
