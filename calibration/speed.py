"""How fast a quantised denoiser is beside the one it would replace, both on this machine's own runtime.

They take turns, so that a noisy machine slows both alike: the ratio is what counts.
"""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..bundle.bundle import Bundle, write_bundle
from ..export.precision import to_float16
from ..runtimes import Runtime
from ..runtimes.base import drawn_feeds
from ..runtimes.ort import OrtRuntime
from ..runtimes.providers import absence, import_onnxruntime, start_problem
from ..spec import DENOISER, SHALLOW
from ..system.files import scratch_directory

ROUNDS, WARM_UPS = 9, 2


def denoiser_runtime(bundle: Bundle, device: str = "cpu") -> OrtRuntime:
    """A bundle's denoiser alone, without its autoencoder."""
    return OrtRuntime({DENOISER: bundle.components[DENOISER]}, {DENOISER: bundle.component_path(DENOISER)}, device)


def fastest_device(target: str) -> str:
    """Where files of ``target`` run on this machine by ONNX Runtime: ``tensorrt``, ``cuda`` or ``cpu``."""
    ort = import_onnxruntime()
    for device in ("tensorrt", "cuda") if target == "tensorrt" else ():
        if not absence(ort, device) and not start_problem(ort, device):
            return device
    return "cpu"


def compare_speed(quantised: Runtime, other: Runtime, rows: int, tell: Callable[[int, int], None]) -> dict[str, Any]:
    """Median milliseconds of a call with ``rows`` rows of two active runtimes that have a denoiser, and their ratio.

    ``speedup`` is the other's time over the quantised one's: above 1, INT8 pays.
    """
    feeds = drawn_feeds(quantised.components[DENOISER], rows)
    taken: tuple[list[float], list[float]] = ([], [])
    for turn in range(WARM_UPS + ROUNDS):
        for runtime, times in zip((quantised, other), taken, strict=True):
            start = time.perf_counter()
            runtime.run("denoiser", feeds)
            if turn >= WARM_UPS:
                times.append((time.perf_counter() - start) * 1e3)
        tell(turn + 1, WARM_UPS + ROUNDS)
    fast, slow = (statistics.median(times) for times in taken)
    return {"int8_ms": round(fast, 2), "other_ms": round(slow, 2), "speedup": round(slow / fast, 3), "rows": rows}


def measure_speed(
    reference: Bundle, candidate: Bundle, target: str, progress: Callable[[str, int, int], None]
) -> dict[str, Any]:
    """INT8 beside what one would run instead, FP16 on a GPU and float32 on a CPU: ``compare_speed``, and on what."""
    device = fastest_device(target)
    with (
        _alternative(reference, candidate.path, device) as other,
        denoiser_runtime(candidate, device) as quantised,
        denoiser_runtime(other, device) as plain,
    ):
        figures = compare_speed(quantised, plain, reference.branches, lambda i, n: progress("speed beside INT8", i, n))
        info = quantised.info
    where = {"device": device, "runtime": f"onnxruntime {info['version']}", "threads": info["threads"]}
    return {"other": other.precision, **where, **figures}


def advice(speed: dict[str, Any], target: str) -> list[str]:
    """What a speed that was measured means for this machine; nothing where INT8 pays."""
    if speed["speedup"] > 1:
        return []
    other = {"float32": "fp32", "float16": "fp16"}[speed["other"]]
    said = f"INT8 does not pay on this machine's {speed['device']}: {speed['int8_ms']:g} ms a call, {speed['other']} "
    said += f"{speed['other_ms']:g} ms; use --precision {other} here"
    if speed["device"] == "cpu" and target == "tensorrt":
        said += ", or try --target cpu; this file is for TensorRT and GPUs, and must be measured there"
    return [said]


@contextmanager
def _alternative(reference: Bundle, beside: Path, device: str) -> Iterator[Bundle]:
    """The float32 bundle, or for a GPU one in FP16 that is gone afterwards."""
    if device == "cpu":
        yield reference
        return
    with scratch_directory(beside) as folder:
        for component in reference.components.values():
            shutil.copyfile(reference.component_path(component.name), folder / component.file)
        for component in (c for c in reference.components.values() if c.name in (DENOISER, SHALLOW)):
            to_float16(folder / component.file)
        write_bundle(
            folder,
            **{key: getattr(reference, key) for key in ("name", "description", "licence", "model", "resolution")},
            **{key: getattr(reference, key) for key in ("scaling_factor", "source", "tools", "defaults")},
            distilled_guidance=reference.distilled_guidance,
            deep_channels=reference.deep_channels,
            precision="float16",
            gate={},
        )
        yield Bundle.load(folder, verify=False)
