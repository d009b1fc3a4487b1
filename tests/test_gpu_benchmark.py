"""The steps of ``make gpu``, each at a tiny size on the CPU: on the day a GPU is there, none may fail for a slip."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("triton", reason="the kernel is interpreted on x86-64 Linux")
from benchmarks.gpu import run
from moebius_edge.runtimes.cuda import Gpu

ROOT = Path(__file__).resolve().parents[1]
# What a step must have found, besides its seconds.
FOUND = {
    "ceilings": {"copy_gb_per_s", "fp16_tflops", "bf16_tflops", "tf32_tflops"},
    "operator": {f"16 {form} ms" for form in run.FORMS},
    "fused": {"16 relative error", "16 4 warps ms"},
    "plain": {"float32 ms", "FP16 ms"},
    "network": {"gmacs a row"}
    | {f"{form} {rows} rows{kind} ms" for form in ("tiled", "fused") for rows in (1, 2) for kind in ("", " cached")},
    "compiled": {"compile_s", "FP16 ms"},
}


@pytest.mark.benchmark
@pytest.mark.slow
@pytest.mark.parametrize("step", FOUND)
def test_a_step_finds_what_it_promises(step: str, tmp_path: Path) -> None:
    result = run.run_step(step, small=True, out=tmp_path)
    assert set(result) == FOUND[step] | {"seconds"}
    assert all(value > 0 for value in result.values() if not isinstance(value, str))
    assert json.loads((tmp_path / f"{step}.json").read_text()) == result
    if step == "fused":
        assert result["16 relative error"] < 1e-3
        assert ".target sm_87" in (tmp_path / "sm_87-16.ptx").read_text()


@pytest.mark.benchmark
@pytest.mark.slow
def test_the_four_forms_agree() -> None:
    bench = run.Bench(True, Path())
    results = []
    for form in run.FORMS:
        local, inputs = run.one_level(bench, 16, 32, form, run.torch.float32)
        run.torch.manual_seed(1)
        results.append(local.lambdas(*(run.torch.randn_like(t) for t in inputs)).flatten())
    for result in results[1:]:
        assert (result - results[0]).abs().max() < 1e-5 * results[0].abs().max()


class Driver:
    """Stands for ``Cuda``: a kernel that adds 1 to its output's bytes is enough to tell a replay from none."""

    def __init__(self) -> None:
        self.memory: dict[int, np.ndarray] = {}
        self.recording: list[Any] | None = None

    def gpu(self) -> Gpu:
        return Gpu("H100", (9, 0), 1, False, "13.0")

    def allocate_host(self, size: int) -> np.ndarray:
        return np.zeros(size, np.uint8)

    def allocate(self, size: int) -> int:
        self.memory[len(self.memory) + 1] = np.zeros(size, np.uint8)
        return len(self.memory)

    def upload(self, address: int, source: np.ndarray, size: int, stream: int) -> None:
        self.memory[address][:] = source[:size]

    def download(self, target: np.ndarray, address: int, size: int, stream: int) -> None:
        target[:size] = self.memory[address]

    def load_kernel(self, ptx: bytes, name: str) -> int:
        assert b".target sm_90a" in ptx
        return 1

    def launch_kernel(self, kernel: int, grid: Any, threads: int, shared: int, device: list[int], stream: int) -> None:
        assert [len(self.memory[a]) for a in device] == [
            2 * 4096 * 320,
            3200,
            2 * 4096 * 40,
            2 * 240 * 40,
            2 * 4096 * 320,
        ]
        work = lambda: self.memory[device[4]].fill(7)  # noqa: E731
        work() if self.recording is None else self.recording.append(work)

    def begin_capture(self, stream: int) -> None:
        self.recording = []

    def end_capture(self, stream: int) -> int:
        self.graph, self.recording = self.recording or [], None
        return 9

    def launch_graph(self, graph: int, stream: int) -> None:
        assert graph == 9 and len(self.graph) == 1
        self.graph[0]()

    def __getattr__(self, name: str) -> Any:
        assert name in ("open", "close", "create_stream", "destroy_stream", "synchronise", "destroy_graph", "free",
                        "free_host")  # fmt: skip
        return lambda *arguments: 77


def test_a_recorded_kernel_is_compared_with_the_launched_one(tmp_path: Path) -> None:
    found = run.graph(run.Bench(True, tmp_path), Driver())
    assert found["replay_is_the_launch"] and found["ptx"] == 90
    assert found["launch_ms"] > 0 and found["replay_ms"] > 0


def test_a_failure_says_why_and_the_table_leaves_its_row_open(tmp_path: Path) -> None:
    if run.find_gpu() is None:
        assert "no NVIDIA driver" in run.run_step("graph", True, tmp_path)["failed"]
    results = {"plain": {"FP16 ms": 10.0, "float32 ms": 20.0}, "compiled": {"failed": "it took more than 140 s"}}
    results |= {"ceilings": {"fp16_tflops": 500.0}, "network": {"gmacs a row": 250.0, "tiled 2 rows ms": 4.0}}
    rows = run.table(results).splitlines()
    assert rows[2:] == [
        "| plain, eager, float32 | 20.00 | 0.50 | - |",
        "| plain, eager, FP16 | 10.00 | 1.00 | - |",
        "| plain, torch.compile, FP16 | - | - | - |",
        "| ours in a CUDA graph, FP16 | 4.00 | 2.50 | 50% |",
        "| ours with the fused kernel, FP16 | - | - | - |",
    ]
    assert sum(limit for _, limit in run.STEPS.values()) <= run.TOTAL_S


@pytest.mark.benchmark
@pytest.mark.slow
def test_it_needs_nothing_but_pytorch_triton_and_numpy(tmp_path: Path) -> None:
    absent = ("onnx", "onnxscript", "onnxruntime", "pydantic", "safetensors", "cv2", "PIL", "diffusers", "polygraphy")
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({absent}))\n")
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu.run", "--small", "--step", "network", "--out", str(tmp_path / "out")],
        capture_output=True, text=True, cwd=ROOT, env={"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert FOUND["network"] <= set(json.loads((tmp_path / "out" / "network.json").read_text())), done.stdout
