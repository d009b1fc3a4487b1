"""The interface of the runtimes, and ``auto``: the order of the candidates, what passes one over, what is told."""

from __future__ import annotations

import builtins
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fake_gpu import CPU, CUDA, FakeGpu
from toy import make_toy_bundle

from moebius_edge.bundle.bundle import Bundle
from moebius_edge.bundle.manifest import resolved_components
from moebius_edge.errors import BundleError, MachineError, UsageError
from moebius_edge.runtimes import auto, create_runtime, cuda, engine_files, providers
from moebius_edge.runtimes.auto import Candidate, select
from moebius_edge.runtimes.base import Arrays, Runtime, drawn_feeds
from moebius_edge.system import machine, packages

FEEDS = drawn_feeds(resolved_components(64)["denoiser"], 2)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return Bundle.load(make_toy_bundle(tmp_path / "toy"))


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without one, whatever runs the tests."""
    monkeypatch.setattr(machine, "gpus", lambda: [])
    monkeypatch.setattr(machine, "_board", lambda: None)
    monkeypatch.setattr(machine, "DRIVER_FILE", Path("/nowhere"))


class Recorder(Runtime):
    """A runtime that answers zeros and records what the base class does to it."""

    def __init__(self, answer: Arrays | None = None, fail: bool = False) -> None:
        super().__init__(resolved_components(64))
        self.calls: list[str] = []
        self.answer, self.fail = answer, fail

    @property
    def info(self) -> dict[str, str]:
        return {"name": "recorder"}

    def activate(self) -> None:
        self.calls.append("activate")
        if self.fail:
            raise MachineError("no device")

    def deactivate(self) -> None:
        self.calls.append("deactivate")

    def _run(self, component: str, feeds: Arrays, outputs: Sequence[str]) -> Arrays:
        self.calls.append("run")
        assert all(a.flags.c_contiguous for a in feeds.values())
        if self.answer is not None:
            return self.answer
        batch = len(next(iter(feeds.values())))
        return {t.name: np.zeros((batch, *t.shape[1:]), t.dtype) for t in self.components[component].outputs}


def test_the_device_is_touched_only_inside_with() -> None:
    runtime = Recorder()
    assert runtime.calls == [] and not runtime.active
    with pytest.raises(RuntimeError, match="Recorder is not active: use it inside `with runtime:`"):
        runtime.run("denoiser", FEEDS)
    with runtime as entered:
        assert entered is runtime and runtime.active
        view = FEEDS["sample"].transpose(0, 2, 3, 1).copy().transpose(0, 3, 1, 2)  # which ``_run`` gets contiguous
        assert runtime.run("denoiser", FEEDS | {"sample": view})["noise"].shape == (2, 4, 8, 8)
        with pytest.raises(RuntimeError, match="already active"):
            runtime.__enter__()
    assert runtime.calls == ["activate", "run", "deactivate"] and not runtime.active


def test_what_was_taken_is_freed_after_any_failure() -> None:
    runtime = Recorder(fail=True)
    with pytest.raises(MachineError, match="no device"), runtime:
        raise AssertionError("never entered")
    assert runtime.calls == ["activate", "deactivate"] and not runtime.active

    runtime = Recorder()
    with pytest.raises(KeyboardInterrupt), runtime:
        raise KeyboardInterrupt
    assert runtime.calls == ["activate", "deactivate"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"branch": None}, "denoiser must have the input sample, timestep, branch, got sample, timestep$"),
        ({"prompt": np.zeros(2)}, "must have the input sample, timestep, branch, got sample, timestep, branch, prompt"),
        ({"timestep": np.zeros(2)}, r"denoiser input 'timestep' must be float32 of shape \(2,\), got float64 of"),
        ({"branch": np.zeros(2, np.int32)}, r"denoiser input 'branch' must be int64 of .*, got int32 of"),
        ({"timestep": np.zeros(3, np.float32)}, r"'timestep' must be float32 of shape \(2,\), got .* shape \(3,\)"),
        ({"timestep": np.float32(1)}, r"'timestep' must be .* shape \(2,\), got float32 of shape \(\)"),
        ({"sample": np.zeros((2, 9, 8, 16), np.float32)}, r"must be .* \(2, 9, 8, 8\), got .* \(2, 9, 8, 16\)"),
        ({name: array[:0] for name, array in FEEDS.items()}, "denoiser input has an empty batch"),
    ],
)
def test_feeds_are_checked_once_for_every_runtime(change: dict, message: str) -> None:
    feeds = {k: v for k, v in (FEEDS | change).items() if v is not None}
    with Recorder() as runtime:
        with pytest.raises(ValueError, match=message):
            runtime.run("denoiser", feeds)
        with pytest.raises(ValueError, match="no component 'unet': there are vae_encoder, denoiser, vae_decoder"):
            runtime.run("unet", feeds)
        assert "run" not in runtime.calls


@pytest.mark.parametrize(
    "answer",
    [
        {"noise": np.zeros((1, 4, 8, 8), np.float32)},  # half the batch
        {"noise": np.zeros((2, 4, 8, 8), np.float16)},
        {"epsilon": np.zeros((2, 4, 8, 8), np.float32)},
    ],
)
def test_a_graph_that_breaks_the_contract_is_the_bundles_fault(answer: Arrays) -> None:
    with Recorder(answer) as runtime, pytest.raises(BundleError, match=r"the graph is not what bundle\.json says"):
        runtime.run("denoiser", FEEDS)


# --- auto ------------------------------------------------------------------------------------------------


def test_without_a_gpu_nothing_changes(bundle: Bundle) -> None:
    runtime = create_runtime("auto", bundle, "auto")
    assert (runtime.info["name"], runtime.info["device"]) == ("onnxruntime", "cpu")
    assert runtime.notes == [], "there was nothing to choose"
    assert runtime.selection is not None and set(runtime.selection["passed_over"]) == {
        "tensorrt on cuda",
        "tensorrt-rtx on cuda",
        "onnxruntime on cuda",
        "openvino on cpu",
    }
    assert runtime.report()["selection"] == runtime.selection and "selection" not in runtime.info
    by_name = create_runtime("onnxruntime", bundle, "cpu")
    assert by_name.selection is None and by_name.info == runtime.info == by_name.report()


def test_the_note_says_what_was_passed_over_and_why(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGpu(monkeypatch)

    def chosen() -> tuple[str, str]:
        runtime = create_runtime("auto", bundle, "auto")
        return runtime.info["device"], " ".join(runtime.notes)

    device, note = chosen()
    assert device == "cuda" and note.startswith("onnxruntime on cuda is the fastest that works here (not tensorrt on c")
    gpu.broken = {CUDA}
    assert chosen()[0] == "cpu"
    gpu.broken, gpu.providers = set(), (CPU,)
    monkeypatch.setattr(machine, "_board", lambda: "NVIDIA Jetson Orin Nano Developer Kit")
    device, note = chosen()  # a GPU that is left idle
    assert note.startswith("onnxruntime on cpu is the fastest that works here (not tensorrt on cuda: ")
    assert "not onnxruntime on cuda: this onnxruntime" in note and f"has no {CUDA}" in note


def test_what_is_asked_for_is_never_exchanged(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGpu(monkeypatch)
    gpu.broken = {CUDA}
    with pytest.raises(MachineError, match=f"nothing works here on cuda; .*could not start {CUDA}"):
        create_runtime("auto", bundle, "cuda")
    runtime = create_runtime("onnxruntime", bundle, "cuda")
    assert runtime.notes == [] and runtime.selection is None, "nothing was chosen"
    with pytest.raises(MachineError, match=f"could not start {CUDA}"), runtime:
        pass
    gpu.providers = (CPU,)
    for name in ("auto", "onnxruntime"):
        with pytest.raises(MachineError, match=f"has no {CUDA}"):
            create_runtime(name, bundle, "cuda")
    assert create_runtime("onnxruntime", bundle, "auto").info["device"] == "cpu"


@pytest.mark.parametrize(
    ("runtime", "device", "message"),
    [
        ("auto", "tpu", "there is no device 'tpu': choose one of cuda, cpu, or auto"),
        ("auto", "npu", "choose one of .*, or auto; gpu and npu are for --runtime openvino"),
        ("onnxruntime", "tensorrt", "has no device 'tensorrt': choose one of cpu, cuda"),
        ("onnxruntime", "tpu", "has no device 'tpu': choose one of cpu, cuda"),
        ("caffe", "auto", "unknown runtime 'caffe': choose one of onnxruntime, openvino, tensorrt, .*, or auto"),
    ],
)
def test_wrong_names(bundle: Bundle, runtime: str, device: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        create_runtime(runtime, bundle, device)


def test_native_engines_come_first_where_they_fit(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a GPU, a package and an engine that are put in place of real ones."""
    native, rtx = auto.CANDIDATES[:2]
    assert (native.name, rtx.name) == ("tensorrt on cuda", "tensorrt-rtx on cuda")

    def refuse() -> Any:
        raise MachineError("CUDA cannot use a GPU here", "unset CUDA_VISIBLE_DEVICES")

    monkeypatch.setattr(cuda, "require_gpu", refuse)
    assert native.problem(bundle) == "CUDA cannot use a GPU here: unset CUDA_VISIBLE_DEVICES"
    gpu = cuda.Gpu("Orin", (8, 7), 8 << 30, True, "12.6")
    monkeypatch.setattr(cuda, "require_gpu", lambda: gpu)
    asked: list[Any] = []

    def package(variant: engine_files.Variant) -> Any:
        if variant.name != "tensorrt":
            raise MachineError("the package tensorrt_rtx is missing")
        return SimpleNamespace(__version__="10.3.0")

    monkeypatch.setattr(engine_files, "load_package", package)
    assert "has no TensorRT engine: run `moebius-edge export" in native.problem(bundle)
    monkeypatch.setattr(engine_files, "choose_engine", lambda *given, **options: asked.append((given, options)))
    assert native.problem(bundle) == ""
    assert asked == [((bundle, engine_files.VARIANTS["tensorrt"], "10.3.0", gpu), {})]
    assert rtx.problem(bundle) == "the package tensorrt_rtx is missing"


def test_candidates_are_tried_in_order(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def candidate(runtime: str, device: str, problem: str) -> Candidate:
        return Candidate(runtime, device, lambda given: asked.append(f"{runtime} on {device}") or problem)

    rows = tuple(
        candidate(*row) for row in (("fast", "cuda", "no engine"), ("slower", "cuda", "no driver"), ("slow", "cpu", ""))
    )
    monkeypatch.setattr(auto, "CANDIDATES", rows)
    selection = select(bundle)
    assert selection.candidate is rows[2] and asked == ["fast on cuda", "slower on cuda", "slow on cpu"]
    assert selection.passed_over == {"fast on cuda": "no engine", "slower on cuda": "no driver"}
    with pytest.raises(MachineError, match="on cuda; fast on cuda: no engine; slower on cuda: no driver$"):
        select(bundle, device="cuda")
    asked.clear()
    only = select(bundle, runtime="fast")
    assert only.candidate is rows[0] and asked == [], "creating it says what is wrong"
    assert not only.tried and not only.note


@pytest.mark.parametrize("runtime", ["auto", "onnxruntime"])
def test_a_missing_package_names_the_command(bundle: Bundle, monkeypatch: pytest.MonkeyPatch, runtime: str) -> None:
    real = builtins.__import__

    def without(name: str, *arguments: Any, **options: Any) -> Any:
        if name == "onnxruntime":
            raise ImportError("No module named 'onnxruntime'")
        return real(name, *arguments, **options)

    monkeypatch.delitem(sys.modules, "onnxruntime", raising=False)
    monkeypatch.setattr(builtins, "__import__", without)
    for module in (packages, providers):
        monkeypatch.setattr(module, "package_version", lambda *names: None)
    with pytest.raises(MachineError, match=r'onnxruntime is missing .*`pip install "moebius-edge\[cpu\]"`'):
        create_runtime(runtime, bundle, "auto")
