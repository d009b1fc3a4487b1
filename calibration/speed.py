"""How fast a quantised denoiser is beside the one it would replace, both on this machine's own runtime.

They take turns, so that a noisy machine slows both alike: the ratio is what counts.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from ..bundle import Bundle
from ..runtimes import Runtime
from ..runtimes.base import batched
from ..runtimes.ort import OrtRuntime
from ..runtimes.providers import absence, import_onnxruntime, start_problem

ROUNDS, WARM_UPS = 9, 2


class DenoiserRuntime(OrtRuntime):
    """A bundle's denoiser alone, without its autoencoder."""

    def __init__(self, bundle: Bundle, device: str = "cpu") -> None:
        super().__init__(bundle, device)
        self.components = {"denoiser": self.components["denoiser"]}
        self._paths = {"denoiser": self._paths["denoiser"]}


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
    generator = np.random.default_rng(0)
    feeds: dict[str, np.ndarray] = {}
    for tensor in quantised.components["denoiser"].inputs:
        shape = batched(tensor, rows)
        values = {"timestep": np.full(shape, 500), "branch": np.arange(rows) % 2}.get(tensor.name)
        feeds[tensor.name] = (generator.standard_normal(shape) if values is None else values).astype(tensor.dtype)
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
