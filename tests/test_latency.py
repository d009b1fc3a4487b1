"""The stage timer's arithmetic, the report's form, and what is learnt about the machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from toy import make_toy_bundle

import moebius_edge
from moebius_edge.bundle.bundle import Bundle
from moebius_edge.pipeline.latency import STAGES, StageTimer, latency_report
from moebius_edge.system import machine
from moebius_edge.system.nvml import Gpu


def test_summary_of_known_values() -> None:
    timer = StageTimer()
    for ms in (50.0, 10.0, 20.0, 30.0, 40.0):
        timer.add("denoise", ms)
    assert timer.summary() == {
        "denoise": {
            "count": 5,
            "first_ms": 50.0,
            "median_ms": 30.0,
            "p95_ms": pytest.approx(48.0),  # linear: 0.95 of the way through 4 gaps is 40 + 0.8 * 10
            "p99_ms": pytest.approx(49.6),
            "iqr_ms": 20.0,
            "total_ms": 150.0,
        }
    }


def test_stages_are_in_the_order_of_the_work_only_if_measured_and_none_that_failed() -> None:
    timer = StageTimer()
    assert timer.summary() == {}
    with timer.measure("total"):
        time.sleep(0.02)
    for stage in ("stitch", "load"):
        timer.add(stage, 1.0)
    with pytest.raises(KeyboardInterrupt), timer.measure("denoise"):
        raise KeyboardInterrupt
    assert list(timer.summary()) == ["load", "stitch", "total"]
    assert 20 <= timer.summary()["total"]["first_ms"] < 2000
    assert set(STAGES) >= {"preprocess", "vae_encode", "denoise", "vae_decode", "stitch", "total"}


def test_report_is_json_and_complete(tmp_path: Path) -> None:
    bundle = Bundle.load(make_toy_bundle(tmp_path / "toy"))
    timer = StageTimer()
    timer.add("denoise", 12.5)
    report = latency_report(timer, {"name": "onnxruntime", "threads": 2}, bundle, {"steps": 20})
    again = json.loads(json.dumps(report, allow_nan=False))
    assert again == report
    assert report["schema_version"] == 1 and report["version"] == moebius_edge.__version__
    assert report["stages"]["denoise"]["first_ms"] == 12.5
    assert report["runtime"] == {"name": "onnxruntime", "threads": 2} and report["settings"] == {"steps": 20}
    assert report["bundle"]["denoiser_sha256"] == bundle.files["denoiser.onnx"]["sha256"]
    assert report["machine"]["cpu"]["cores_available"] >= 1
    assert report["peak_memory_bytes"] > 10 << 20


def printed(code: str) -> str:
    """What a fresh interpreter prints for ``code``, which finds ``machine`` imported."""
    program = f"import os, sys\nfrom moebius_edge.system import machine\n{code}"
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.strip()


def test_peak_memory_sees_an_allocation_and_its_release_and_is_not_the_parents() -> None:
    block = np.ones(300 << 17)  # 300 MiB, really touched
    peak = "machine.peak_memory_bytes()"
    before, after = map(int, printed(f"a = {peak}; b = bytearray(200 << 20); del b; print(a, {peak})").split())
    assert 190 << 20 < after - before < 260 << 20
    if sys.platform == "linux":  # reads /proc/self/status
        own = machine.peak_memory_bytes()
        assert own is not None and own > block.nbytes > before


def test_cores_follow_the_affinity() -> None:
    if not hasattr(os, "sched_setaffinity") or len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two CPUs whose affinity can be set")
    assert printed("os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); print(machine.available_cores())") == "1"


def test_machine_info_asks_no_package() -> None:
    packages = "('numpy', 'cv2', 'torch', 'onnxruntime', 'rich')"
    assert printed(f"machine.machine_info(); print([m for m in {packages} if m in sys.modules])") == "[]"
    assert machine.machine_info()["python"].startswith("3.")


@pytest.mark.parametrize(
    ("board", "found", "driver", "there"),
    [
        (None, [], False, False),
        ("Raspberry Pi 5 Model B", [], False, False),
        (None, [], True, True),  # without nvidia-ml-py, or in a container that was given no GPU
        ("NVIDIA Jetson Orin Nano Developer Kit", [], False, True),
        ("NVIDIA Jetson AGX Thor Developer Kit", [Gpu("NVIDIA Thor", "570", "11.0", None)], True, True),
    ],
)
def test_a_gpu_is_known_whether_or_not_it_can_be_used(
    board: str | None, found: list[Gpu], driver: bool, there: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(machine, "_board", lambda: board)
    monkeypatch.setattr(machine, "gpus", lambda: found)
    monkeypatch.setattr(machine, "DRIVER_FILE", tmp_path / "version")
    if driver:
        (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  Thu\n")
    assert machine.has_nvidia_gpu() is there
