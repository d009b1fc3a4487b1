"""Multiply-adds (MACs) of a denoiser's calls by class of operator, and what this machine reaches at best.

Counted are the multiply-adds of convolutions and matrix products, those inside the lambda operators as a class of their
own; sums, norms, activations and softmax are not. The peak is the fastest of a few runs of square matrix products in a
row, in the runtime, on the device and in the precision under test. A multiply-add is half of what is sold as two FLOPs.

Files are read and written with the onnx package, which a device need not have: without it there is a reason instead.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..bundle.bundle import Bundle
from ..errors import MachineError
from ..pipeline.latency import StageTimer
from ..pipeline.loop import plan_calls
from ..sampling.guidance import choose_guidance
from ..sampling.scheduler import SCHEDULERS
from ..spec import DENOISER, SHALLOW, Component, Tensor
from ..system.machine import available_memory_bytes

CLASSES = ("convolution", "depthwise convolution", "matrix product", "lambda")
# The side of the matrices and the number of their products: enough that handing over one matrix does not show.
PRODUCTS_IN_A_ROW = {"cpu": (1024, 8), "cuda": (2048, 256)}
_REPEATS = 3
_PRECISIONS = ("float32", "float16", "int8")
_NO_ONNX = "the package onnx is missing, which reads the file: run `pip install onnx`"


@dataclass(frozen=True)
class Macs:
    """Multiply-adds of a call by class of operator, or the ``reason`` why they could not be counted."""

    by_class: dict[str, float] = field(default_factory=dict)
    reason: str | None = None

    @property
    def total(self) -> float | None:
        return None if self.reason else sum(self.by_class.values())


def count_macs(path: str | os.PathLike[str], rows: int) -> Macs:
    """The multiply-adds of one call of the ONNX file ``path`` with a batch of ``rows``: 2 for a guided step, else 1."""
    try:
        import onnx

        from ..export.onnx_graph import FUNCTION, PRODUCTS, infer_shapes, inline, multiplications, outline
    except ImportError:
        return Macs(reason=_NO_ONNX)
    model = outline(onnx.load(os.fspath(path)))
    inline(model, lambda call: True, fold=False)
    shapes = infer_shapes(model, rows)
    by_class = dict.fromkeys(CLASSES, 0.0)
    for node in model.graph.node:
        if node.op_type not in PRODUCTS:
            continue
        count = multiplications(node, shapes)
        if count is None:
            return Macs(reason=f"the shapes of node {node.name!r} are not known: export the bundle again")
        by_class[_class(node, any(p.key == FUNCTION for p in node.metadata_props))] += count
    return Macs(by_class)


def _class(node: Any, in_lambda: bool) -> str:
    from ..export.onnx_graph import attribute

    if in_lambda:
        return "lambda"
    if node.op_type in ("MatMul", "Gemm"):
        return "matrix product"
    return "depthwise convolution" if attribute(node, "group", 1) > 1 else "convolution"


def network_calls(settings: Mapping[str, Any]) -> Counter[tuple[str, int]]:
    """How many calls of a trajectory with a configuration's settings are of which component and have how many rows."""
    sampled = choose_guidance(settings["guidance"], settings["distilled_guidance"]).sampled
    timesteps = SCHEDULERS[settings["scheduler"]](settings["steps"], settings["strength"]).timesteps
    calls = plan_calls(timesteps, sampled, settings["guidance_interval"], settings["cache_interval"])
    return Counter((DENOISER if call.whole else SHALLOW, call.rows) for call in calls)


def arithmetic(
    bundle: Bundle, settings: Mapping[str, Any], runtime: Mapping[str, Any], timer: StageTimer
) -> dict[str, Any]:
    """``work`` as ``results.json`` has it, and the ``peak`` that its share is of.

    The multiply-adds of a step are the mean of all calls that ``settings`` make. Its time is the median of the calls in
    ``timer``, and their mean where they differ.
    """
    calls = network_calls(settings)
    counted = [(count_macs(bundle.component_path(name), rows), count) for (name, rows), count in calls.items()]
    reason = next((macs.reason for macs, _ in counted if macs.reason), None)
    classes = () if reason else CLASSES
    means = {c: sum(macs.by_class[c] * count for macs, count in counted) / calls.total() for c in classes}
    peak = measure_peak(runtime, bundle.precision)
    denoise, share = timer.summary()["denoise"], None
    if means and peak["multiplications_per_second"]:
        step_ms = denoise["median_ms"] if len(calls) == 1 else denoise["total_ms"] / denoise["count"]
        share = sum(means.values()) / (step_ms / 1e3) / peak["multiplications_per_second"]
    work = {
        "multiplications_per_step": None if reason else sum(means.values()),
        "by_class": {name: {"multiplications": mean} for name, mean in means.items()},
        "share_of_peak": share,
        "reason": reason or peak["reason"],
    }
    return {"work": work, "peak": peak}


def measure_peak(runtime: Mapping[str, Any], precision: str) -> dict[str, Any]:
    """Multiply-adds a second for ``runtime`` (as ``Runtime.info``) and a bundle's ``precision``, or why they are null.

    With TensorRT nothing is measured: its engines are built, in minutes, and what they reach is the builder's choice.
    """
    name, device = str(runtime["name"]), str(runtime["device"])
    problem, per_second = _obstacle(name, device, precision), None
    if not problem:
        try:
            per_second = _products_per_second(device, int(runtime.get("threads") or 1), precision)
        except ImportError:
            problem = _NO_ONNX
        except MachineError as error:
            problem = str(error)
    return {
        "multiplications_per_second": per_second,
        "runtime": f"{name} on {device}",
        "precision": precision,
        "reason": problem or None,
    }


def _obstacle(name: str, device: str, precision: str) -> str:
    """Why nothing is measured; empty where it is."""
    if name != "onnxruntime" or device not in PRODUCTS_IN_A_ROW:
        return f"no peak is measured with {name} on {device}, only with ONNX Runtime on cpu or cuda"
    if precision not in _PRECISIONS:
        return f"no peak is measured in {precision}, only in {', '.join(_PRECISIONS)}"
    if precision == "int8" and device != "cpu":
        return f"{name} on {device} has no integer matrix product of its own"
    free, side = available_memory_bytes(), PRODUCTS_IN_A_ROW[device][0]
    if free is not None and free < 24 * side * side:
        return f"{free / 1e9:.1f} GB of free memory are too little to measure a peak in: close other programs"
    return ""


def _products_per_second(device: str, threads: int, precision: str) -> float:
    from ..runtimes.providers import PROVIDERS, first_line, import_onnxruntime, quiet_options, session_providers

    ort, (side, count) = import_onnxruntime(), PRODUCTS_IN_A_ROW[device]
    # With the options that networks get: with TF32, say, a peak would be another precision's.
    providers = session_providers(ort, device, Component("peak", (Tensor("x", "float32", ("N", 1)),), ()), Path())
    matrix = np.random.default_rng(0).standard_normal((side, side))
    integers = (128 + 8 * matrix).astype(np.uint8)  # zero point 128, step 1/8
    feeds = {"x": integers if precision == "int8" else matrix.astype(precision)}
    model = matrix_products(precision, side, count)
    try:
        session = ort.InferenceSession(model, quiet_options(ort, threads), providers=providers, enable_fallback=0)
        if PROVIDERS[device].name not in session.get_providers():
            raise MachineError(f"onnxruntime could not start {PROVIDERS[device].name}: check `nvidia-smi`")
        seconds = []
        for _ in range(_REPEATS + 1):
            started = time.perf_counter()
            session.run(None, feeds)
            seconds.append(time.perf_counter() - started)
    except MachineError:
        raise
    except Exception as error:  # onnxruntime raises a class of its own for every cause
        raise MachineError(f"onnxruntime cannot compute the matrix products ({first_line(error)})") from error
    return count * side**3 / min(seconds[1:])  # the first run warms up


def matrix_products(precision: str, side: int, count: int) -> bytes:
    """The ONNX file of ``x`` (side, side) times one constant matrix, ``count`` times over -> ``y``, of the same scale.

    INT8 is QLinearMatMul on unsigned inputs with zero point 128: integers in, integers out.
    """
    from onnx import helper, numpy_helper

    matrix = np.random.default_rng(1).standard_normal((side, side)) / side**0.5
    step = 4 / 127 / side**0.5
    weights: dict[str, Any] = {"w": matrix.astype(precision if precision != "int8" else np.float32)}
    operator, operands, kind = "MatMul", ["w"], weights["w"].dtype
    if precision == "int8":
        weights = {"w": np.clip(np.rint(matrix / step), -127, 127).astype(np.int8)}
        weights |= {"ws": np.float32(step), "wz": np.int8(0), "xs": np.float32(1 / 8), "xz": np.uint8(128)}
        operator, operands, kind = "QLinearMatMul", ["xs", "xz", "w", "ws", "wz", "xs", "xz"], np.dtype(np.uint8)
    names = ["x", *(f"h{i}" for i in range(1, count)), "y"]
    nodes = [helper.make_node(operator, [a, *operands], [b]) for a, b in zip(names, names[1:], strict=False)]
    element = helper.np_dtype_to_tensor_dtype(kind)
    x, y = (helper.make_tensor_value_info(name, element, [side, side]) for name in ("x", "y"))
    tensors = [numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()]
    graph = helper.make_graph(nodes, "peak", [x], [y], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    return bytes(model.SerializeToString())
