"""The steps of ``make gpu``, each at a tiny size on the CPU: where there is a GPU, none may fail for a slip."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from diffusers import AutoencoderKL
from onnx import numpy_helper

pytest.importorskip("triton", reason="the kernel is interpreted on x86-64 Linux")
from benchmarks.gpu import decoder, run, shares
from moebius_edge.bundle.manifest import resolved_components
from moebius_edge.export.autoencoder import divide, divisible_tensors
from moebius_edge.export.onnx_file import write_onnx
from moebius_edge.runtimes.cuda import Gpu
from moebius_edge.training.recipe import preset_recipe

ROOT = Path(__file__).resolve().parents[1]
DECODERS = ("float32", "TF32", "BF16", "FP16", "FP16 rescaled", "FP16 rescaled, channels last")
# What a step must have found, besides its seconds.
FOUND = {
    "ceilings": {"copy_gb_per_s", "fp16_tflops", "bf16_tflops", "tf32_tflops"},
    "operator": {f"16 {form} ms" for form in run.FORMS},
    "fused": {"16 relative error", "16 4 warps ms"},
    "plain": {"float32 ms", "FP16 ms"},
    "network": {"gmacs a row"}
    | {f"{form} {rows} rows{kind} ms" for form in ("tiled", "fused") for rows in (1, 2) for kind in ("", " cached")}
    | {f"{form} 2 rows channels last ms" for form in ("tiled", "fused")},
    "shares": {"floor", "tiled", "fused"},
    "decoder": {"divisor"} | {f"{name} {figure}" for name in DECODERS for figure in ("psnr_db", "ms", "graph ms")},
    "training": {"eager images/s", "optimiser ms", "compile_s", "compiled images/s"},
    "compiled": {"compile_s", "FP16 ms"},
}


@pytest.mark.benchmark
@pytest.mark.slow
@pytest.mark.parametrize("step", FOUND)
def test_a_step_finds_what_it_promises(step: str, tmp_path: Path) -> None:
    result = run.run_step(step, small=True, out=tmp_path)
    assert set(result) == FOUND[step] | {"seconds"}
    figures = [value for name, value in result.items() if name != "seconds" and not isinstance(value, str | dict)]
    assert all(value > 0 for value in figures)
    assert json.loads((tmp_path / f"{step}.json").read_text()) == result
    if step == "fused":
        assert result["16 relative error"] < 1e-3
    if step == "decoder":
        assert result["FP16 psnr_db"] == "not finite" and result["FP16 rescaled psnr_db"] > 40
    if step == "shares":
        for form in ("tiled", "fused"):
            classes = result[form]["classes"]
            assert sum(entry["percent"] for entry in classes.values()) == pytest.approx(100, abs=1)
            assert classes["convolutions"]["ms"] > 0 and classes["local lambda, products"]["ms"] > 0
        assert "local lambda, gathers" in result["tiled"]["classes"]
        assert "local lambda, gathers" not in result["fused"]["classes"]


def test_the_floor_counts_every_product_and_is_the_longer_of_arithmetic_and_memory() -> None:
    network = torch.nn.Sequential(torch.nn.Conv2d(4, 8, 3, padding=1), torch.nn.Flatten(), torch.nn.Linear(512, 10))
    with torch.no_grad():
        found = shares.floors(network, (torch.zeros(2, 4, 8, 8),), 1, {"fp16_tflops": 1e-3, "copy_gb_per_s": 1e6})
    assert found["convolutions"]["gmacs"] * 1e9 == pytest.approx(2 * 64 * 8 * 4 * 9)
    assert found["products"]["gmacs"] * 1e9 == pytest.approx(2 * 512 * 10)
    assert found["products"]["gb"] * 1e9 == pytest.approx(4 * (2 * 512 + 512 * 10 + 10 + 2 * 10))
    assert found["products"]["floor_ms"] == pytest.approx(2 * 2 * 512 * 10 / 1e9 * 1e3)


@pytest.mark.benchmark
@pytest.mark.slow
@torch.no_grad()
def test_the_decoder_is_the_autoencoders_and_is_rescaled_as_the_exported_file_is(tmp_path: Path) -> None:
    channels = (32, 64, 64, 64)
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=channels, layers_per_block=2,
    ).eval()  # fmt: skip
    ours = decoder.loud_decoder(channels)
    vae.decoder.load_state_dict(ours.state_dict())
    latent = torch.randn(1, 4, 8, 8)
    expected = vae.decoder(latent)
    assert (ours(latent) - expected).abs().max() < 1e-5

    write_onnx(ours, resolved_components(64)["vae_decoder"], tmp_path / "decoder.onnx")
    divisor = decoder.rescale(ours, latent)
    assert divisor >= 8 and (ours(latent) - expected).abs().max() < 1e-5
    model = onnx.shape_inference.infer_shapes(onnx.load(tmp_path / "decoder.onnx"))
    divide(model, divisible_tensors(model), divisor)
    weights = {t.name.removesuffix(f"_over_{divisor}"): numpy_helper.to_array(t) for t in model.graph.initializer}
    convolutions = [name for name in ours.state_dict() if "conv" in name and "norm" not in name]
    assert len(convolutions) > 50
    for name in [*convolutions, "mid_block.attentions.0.to_v.bias", "mid_block.attentions.0.to_out.0.bias"]:
        np.testing.assert_array_equal(weights[name], ours.get_parameter(name), name)
    epsilons = [a.f for node in model.graph.node for a in node.attribute if a.name == "epsilon"]
    assert epsilons == pytest.approx([m.eps for m in ours.modules() if isinstance(m, torch.nn.GroupNorm)])


def test_the_training_step_is_of_the_demonstrations_shape() -> None:
    recipe = preset_recipe("tiny", "student").student.to_dict()
    assert run.demonstration().to_dict() == {**recipe, "latent_channels": 16}


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


def test_what_was_found_before_a_limit_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(bench: run.Bench) -> run.Result:
        bench.found.measure("first", lambda: 1.0)
        bench.found.measure("second", lambda: 1 / 0)
        time.sleep(60)
        return bench.found

    monkeypatch.setitem(run.STEPS, "graph", (slow, 1))
    monkeypatch.setitem(run.STEPS, "plain", (lambda bench: os._exit(3), 20))
    run.run_all(["plain", "graph"], True, tmp_path)
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["plain"] == {"failed": "it ended with code 3"}
    assert found["graph"]["first"] == 1.0 and found["graph"]["second failed"].startswith("ZeroDivisionError")
    assert found["graph"]["failed"] == "it took more than 1 s"


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
    results["decoder"] = {"FP16 psnr_db": "not finite", "FP16 ms": 3.0, "FP16 graph ms failed": "OutOfMemoryError"}
    assert run.table(results).splitlines()[-1] == "| FP16 | not finite | 3.00 | - |"
    assert sum(limit for _, limit in run.STEPS.values()) <= run.TOTAL_S


@pytest.mark.benchmark
@pytest.mark.slow
def test_it_needs_nothing_but_pytorch_triton_and_numpy(tmp_path: Path) -> None:
    absent = ("onnx", "onnxscript", "onnxruntime", "pydantic", "safetensors", "cv2", "PIL", "diffusers", "polygraphy")
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({absent}))\n")
    command = [sys.executable, "-m", "benchmarks.gpu.run", "--small"]
    done = subprocess.run(
        [*command, "--step", "network", "--step", "decoder", "--out", str(tmp_path / "out")],
        capture_output=True, text=True, cwd=ROOT, env={"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert all(FOUND[step] <= set(found[step]) for step in ("network", "decoder")), done.stdout
