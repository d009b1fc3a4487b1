"""How fast a quantised denoiser is beside the one that would run instead, both on this machine's ONNX Runtime."""

from __future__ import annotations

import shutil
import statistics
import time
from typing import Any

from ..bundle.bundle import Bundle
from ..export.precision import to_float16
from ..progress import Progress
from ..runtimes.base import Runtime, drawn_feeds
from ..runtimes.ort import OrtRuntime
from ..runtimes.providers import absence, import_onnxruntime, start_problem
from ..spec import DENOISER
from ..system.files import scratch_directory
from .components import partial_bundle

ROUNDS, WARM_UPS = 9, 2
_OPTION = {"float32": "fp32", "float16": "fp16"}  # of ``--precision``


def fastest_device(target: str) -> str:
    """Where files for ``target`` run on this machine by ONNX Runtime: ``tensorrt``, ``cuda`` or ``cpu``."""
    ort = import_onnxruntime()
    for device in ("tensorrt", "cuda") if target == "tensorrt" else ():
        if not absence(ort, device) and not start_problem(ort, device):
            return device
    return "cpu"


def measure_speed(reference: Bundle, candidate: Bundle, target: str, progress: Progress) -> dict[str, Any]:
    """INT8 beside what one would run instead: FP16 on a GPU, float32 on a CPU.

    ``int8_ms`` and ``other_ms`` are median milliseconds of a call with ``rows`` rows; ``speedup`` is the other's time
    over INT8's, so that INT8 pays above 1.
    """
    device = fastest_device(target)
    precision = "float32" if device == "cpu" else "float16"
    other = partial_bundle(reference, DENOISER)
    with scratch_directory(candidate.path) as folder:
        if precision == "float16":
            other = partial_bundle(reference, DENOISER, folder=folder)
            shutil.copyfile(reference.component_path(DENOISER), other.component_path(DENOISER))
            to_float16(other.component_path(DENOISER))
        with (
            OrtRuntime(partial_bundle(candidate, DENOISER), device) as quantised,
            OrtRuntime(other, device) as plain,
        ):
            times = compare_speed(quantised, plain, reference.branches, progress)
            info = quantised.info
    runtime = f"onnxruntime {info['version']}"
    return {"other": precision, "device": device, "runtime": runtime, "threads": info["threads"], **times}


def compare_speed(quantised: Runtime, other: Runtime, rows: int, progress: Progress) -> dict[str, Any]:
    """The times of two active runtimes, which take turns, so that a noisy machine slows both alike."""
    feeds = drawn_feeds(quantised.components[DENOISER], rows)
    measured: tuple[list[float], list[float]] = ([], [])
    for turn in range(WARM_UPS + ROUNDS):
        for runtime, times in zip((quantised, other), measured, strict=True):
            start = time.perf_counter()
            runtime.run(DENOISER, feeds)
            if turn >= WARM_UPS:
                times.append((time.perf_counter() - start) * 1e3)
        progress("speed beside INT8", turn + 1, WARM_UPS + ROUNDS)
    fast, slow = (statistics.median(times) for times in measured)
    return {"int8_ms": round(fast, 2), "other_ms": round(slow, 2), "speedup": round(slow / fast, 3), "rows": rows}


def advice(speed: dict[str, Any], target: str) -> list[str]:
    """What a measured speed means for this machine; nothing if INT8 pays."""
    if speed["speedup"] > 1:
        return []
    text = (
        f"INT8 does not pay on this machine's {speed['device']}: {speed['int8_ms']:g} ms a call, {speed['other']} "
        f"{speed['other_ms']:g} ms; use --precision {_OPTION[speed['other']]} here"
    )
    if speed["device"] == "cpu" and target == "tensorrt":
        text += ", or try --target cpu; this file is for TensorRT and GPUs, and must be measured there"
    return [text]
