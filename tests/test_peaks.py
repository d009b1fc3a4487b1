"""The peaks on this machine's CPU with small sizes, and why there are none elsewhere."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
from fake_gpu import CUDA, FakeGpu

from moebius_edge.report import peaks as peaks_module
from moebius_edge.report.peaks import measure_peaks

CPU: dict[str, Any] = {"name": "onnxruntime", "device": "cpu", "threads": 1}


def small(precision: str = "float32", **runtime: Any) -> Any:
    return measure_peaks(CPU | runtime, precision, side=256, copied=1 << 20)


@pytest.mark.parametrize("precision", ["float32", "float16", "int8"])
def test_on_a_cpu(precision: str) -> None:
    found = small(precision)
    assert found.reason is None and (found.runtime, found.precision) == ("onnxruntime on cpu", precision)
    assert 1e8 < found.multiplications_per_second < 1e14
    assert 1e7 < found.bytes_per_second < 1e14
    assert found.to_dict()["multiplications_per_second"] == found.multiplications_per_second


def test_they_are_what_was_done_over_the_time_it_took(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that ticks a tenth of a second at every look: four products of 256³, and 2 MiB moved."""
    now = iter(np.arange(0, 1000, 0.1))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(now)))
    found = small(threads=2)
    assert found.multiplications_per_second == pytest.approx(4 * 256**3 / 0.1)
    assert found.bytes_per_second == pytest.approx(2 * 2**20 / 0.1)


def test_a_gpu_gets_what_a_network_gets(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGpu(monkeypatch)
    found = small(device="cuda")
    assert found.reason is None and found.multiplications_per_second > 0 and found.bytes_per_second > 0
    gpu.broken = {CUDA}
    assert "could not start CUDAExecutionProvider" in small(device="cuda").reason


@pytest.mark.parametrize(
    ("runtime", "precision", "text"),
    [
        (
            {"name": "tensorrt", "device": "cuda"},
            "float16",
            "no peak is measured with tensorrt on cuda, only with",
        ),
        ({"device": "tensorrt"}, "float32", "no peak is measured with onnxruntime on tensorrt"),
        ({"name": "torch"}, "float32", "no peak is measured with torch on cpu"),
        ({}, "bfloat16", "no peak is measured in bfloat16, only in float32, float16, int8"),
        ({"device": "cuda"}, "int8", "onnxruntime on cuda has no integer matrix product of its own"),
    ],
)
def test_where_there_is_none(runtime: dict[str, Any], precision: str, text: str) -> None:
    found = small(precision, **runtime)
    assert found.reason.startswith(text)
    assert (found.multiplications_per_second, found.bytes_per_second) == (None, None)


def test_too_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peaks_module, "available_memory_bytes", lambda: 10**6)
    assert small().reason == "0.0 GB of free memory are too little to measure peaks in: close other programs"
