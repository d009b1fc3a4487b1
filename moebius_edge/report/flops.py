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
from typing import Any

import numpy as np

from ..bundle.bundle import Bundle
from ..errors import MachineError
from ..pipeline.latency import StageTimer
from ..runtimes.providers import PROVIDERS, first_line, import_onnxruntime, quiet_options, session_providers
from ..sampling.calls import Sampling
from ..sampling.guidance import choose_guidance
from ..sampling.scheduler import SCHEDULERS
from ..spec import DENOISER, SHALLOW

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

        from ..export import onnx_graph
    except ImportError:
        return Macs(reason=_NO_ONNX)
    model = onnx_graph.outline(onnx.load(os.fspath(path)))
    onnx_graph.inline(model, lambda call: True, fold=False)
    shapes, by_class = onnx_graph.infer_shapes(model, rows), dict.fromkeys(CLASSES, 0.0)
    for node in model.graph.node:
        if node.op_type not in onnx_graph.PRODUCTS:
            continue
        count = onnx_graph.multiplications(node, shapes)
        if count is None:
            return Macs(reason=f"the shapes of node {node.name!r} are not known: export the bundle again")
        kind = "depthwise convolution" if onnx_graph.attribute(node, "group", 1) > 1 else "convolution"
        if any(p.key == onnx_graph.FUNCTION for p in node.metadata_props):
            kind = "lambda"
        elif node.op_type in ("MatMul", "Gemm"):
            kind = "matrix product"
        by_class[kind] += count
    return Macs(by_class)


def network_calls(settings: Mapping[str, Any]) -> Counter[tuple[str, int]]:
    """How many calls of a trajectory with a configuration's settings are of which component and have how many rows."""
    sampled = choose_guidance(settings["guidance"], settings["distilled_guidance"]).sampled
    scheduler = SCHEDULERS[settings["scheduler"]](settings["steps"], settings["strength"])
    sampling = Sampling(scheduler, sampled, settings["guidance_interval"], settings["cache_interval"])
    return Counter((DENOISER if call.full else SHALLOW, call.rows) for call in sampling.calls())


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
    per_second, reason = None, None
    if name != "onnxruntime" or device not in PRODUCTS_IN_A_ROW:
        reason = f"no peak is measured with {name} on {device}, only with ONNX Runtime on cpu or cuda"
    elif precision not in _PRECISIONS:
        reason = f"no peak is measured in {precision}, only in {', '.join(_PRECISIONS)}"
    elif precision == "int8" and device != "cpu":
        reason = f"{name} on {device} has no integer matrix product of its own"
    else:
        try:
            per_second = _products_per_second(device, int(runtime.get("threads") or 1), precision)
        except ImportError:
            reason = _NO_ONNX
        except MachineError as error:
            reason = str(error)
    peak = {"multiplications_per_second": per_second, "reason": reason}
    return {**peak, "runtime": f"{name} on {device}", "precision": precision}


def _products_per_second(device: str, threads: int, precision: str) -> float:
    ort, (side, count) = import_onnxruntime(), PRODUCTS_IN_A_ROW[device]
    # With the options that networks get: with TF32, say, a peak would be another precision's.
    providers = session_providers(ort, device)
    x, model = matrix_products(precision, side, count)
    seconds = []
    try:
        session = ort.InferenceSession(model, quiet_options(ort, threads), providers=providers, enable_fallback=0)
        for _ in range(_REPEATS + 1):
            started = time.perf_counter()
            session.run(None, {"x": x})
            seconds.append(time.perf_counter() - started)
    except Exception as error:  # onnxruntime raises a class of its own for every cause
        raise MachineError(f"onnxruntime cannot compute the matrix products ({first_line(error)})") from error
    if PROVIDERS[device][0] not in session.get_providers():
        raise MachineError(f"onnxruntime could not start {PROVIDERS[device][0]}: check `nvidia-smi`")
    return count * side**3 / min(seconds[1:])  # the first run warms up


def matrix_products(precision: str, side: int, count: int) -> tuple[np.ndarray, bytes]:
    """Values for ``x`` (side, side), and the ONNX file of ``x`` times a constant matrix, ``count`` times over -> ``y``.

    The scale of the values stays. INT8 is QLinearMatMul on unsigned inputs with zero point 128 and step 1/8.
    """
    from onnx import helper, numpy_helper

    rng = np.random.default_rng(0)
    x, matrix = rng.standard_normal((side, side)), rng.standard_normal((side, side)) / side**0.5
    if precision == "int8":
        operator, operands = "QLinearMatMul", ["xs", "xz", "w", "ws", "wz", "xs", "xz"]
        step = 4 / 127 / side**0.5
        weights = {"w": np.clip(np.rint(matrix / step), -127, 127).astype(np.int8), "ws": np.float32(step)}
        weights |= {"wz": np.int8(0), "xs": np.float32(1 / 8), "xz": np.uint8(128)}
        x = np.clip(np.rint(8 * x) + 128, 0, 255).astype(np.uint8)
    else:
        operator, operands, weights, x = "MatMul", ["w"], {"w": matrix.astype(precision)}, x.astype(precision)
    names = ["x", *(f"h{i}" for i in range(1, count)), "y"]
    nodes = [helper.make_node(operator, [a, *operands], [b]) for a, b in zip(names, names[1:], strict=False)]
    element = helper.np_dtype_to_tensor_dtype(x.dtype)
    ends = [helper.make_tensor_value_info(name, element, [side, side]) for name in ("x", "y")]
    tensors = [numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()]
    graph = helper.make_graph(nodes, "peak", ends[:1], ends[1:], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    return x, bytes(model.SerializeToString())
