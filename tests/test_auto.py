"""``auto``: the order of the candidates, what passes one over, and what the user is told."""

from __future__ import annotations

import builtins
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fake_gpu import CPU, CUDA, TENSORRT, FakeGpu
from toy import make_toy_bundle

from moebius_edge.bundle.bundle import Bundle
from moebius_edge.errors import MachineError, UsageError
from moebius_edge.runtimes import RUNTIMES, auto, create_runtime
from moebius_edge.runtimes.auto import Candidate, select
from moebius_edge.runtimes.providers import engine_folder
from moebius_edge.system import machine


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return Bundle.load(make_toy_bundle(tmp_path / "toy"))


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without one, whatever runs the tests."""
    monkeypatch.setattr(machine, "gpus", lambda: [])
    monkeypatch.setattr(machine, "_board", lambda: None)


def add_engines(bundle: Bundle) -> None:
    import onnxruntime

    for name in bundle.components:
        folder = engine_folder(bundle, name, onnxruntime.__version__)
        folder.mkdir(parents=True)
        (folder / "x.engine").touch()


def test_without_a_gpu_nothing_changes(bundle: Bundle) -> None:
    runtime = create_runtime("auto", bundle, "auto")
    assert (runtime.info["name"], runtime.info["device"]) == ("onnxruntime", "cpu")
    assert runtime.notes == [], "there was nothing to choose"
    assert runtime.selection is not None and set(runtime.selection["passed_over"]) == {
        "tensorrt on cuda",
        "tensorrt-rtx on cuda",
        "onnxruntime on tensorrt",
        "onnxruntime on cuda",
    }
    assert runtime.report()["selection"] == runtime.selection and "selection" not in runtime.info
    by_name = create_runtime("onnxruntime", bundle, "cpu")
    assert by_name.selection is None and by_name.info == runtime.info == by_name.report()


def test_a_gpu_that_is_left_idle_is_told(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    FakeGpu(monkeypatch, providers=(CPU,))
    monkeypatch.setattr(machine, "_board", lambda: "NVIDIA Jetson Orin Nano Developer Kit")
    (note,) = create_runtime("auto", bundle, "auto").notes
    assert note.startswith("onnxruntime on cpu is the fastest that works here (not tensorrt on cuda: this machine has")
    assert "not onnxruntime on tensorrt: this onnxruntime" in note
    assert "not onnxruntime on cuda: this onnxruntime" in note and f"has no {CUDA}" in note


def test_cuda_is_taken_where_it_starts(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGpu(monkeypatch)
    runtime = create_runtime("auto", bundle, "auto")
    assert runtime.info["device"] == "cuda"
    (note,) = runtime.notes
    assert "not onnxruntime on tensorrt: no engines are built for this bundle yet: `--device tensorrt`" in note
    gpu.broken = {CUDA}
    assert create_runtime("auto", bundle, "auto").info["device"] == "cpu"
    gpu.broken, gpu.providers = set(), (CUDA, CPU)
    assert f"has no {TENSORRT}" in create_runtime("auto", bundle, "auto").notes[0]


def test_tensorrt_is_taken_once_its_engines_are_there(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGpu(monkeypatch)
    add_engines(bundle)
    runtime = create_runtime("auto", bundle, "auto")
    assert runtime.info["device"] == "tensorrt"
    (note,) = runtime.notes
    assert note.startswith("onnxruntime on tensorrt is the fastest that works here (not tensorrt on cuda: ")
    gpu.broken = {TENSORRT}
    (note,) = create_runtime("auto", bundle, "auto").notes
    assert "onnxruntime on cuda is the fastest that works" in note and "(Please install TensorRT)" in note


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


def test_wrong_names(bundle: Bundle) -> None:
    with pytest.raises(UsageError, match="there is no device 'tpu': choose one of cuda, tensorrt, cpu, or auto"):
        create_runtime("auto", bundle, "tpu")
    with pytest.raises(UsageError, match="unknown runtime 'caffe': choose one of onnxruntime, tensorrt, .* or auto"):
        create_runtime("caffe", bundle, "auto")


def test_native_engines_come_first_where_they_fit(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """The probe of TensorRT's own back-end, with a GPU, a package and an engine that are put in place of real ones."""
    from moebius_edge.runtimes import cuda, engine_files, flavours

    probe = auto.CANDIDATES[0]
    assert (probe.runtime, probe.device) == ("tensorrt", "cuda") and auto.CANDIDATES[1].runtime == "tensorrt-rtx"
    assert "no NVIDIA GPU" in probe.usable(bundle)
    gpu = cuda.Gpu("Orin", (8, 7), 8 << 30, True, "12.6")
    monkeypatch.setattr(cuda, "find_gpu", lambda: gpu)
    asked = []

    def package(flavour: flavours.Flavour) -> Any:
        if flavour.name != "tensorrt":
            raise MachineError("the package tensorrt_rtx is missing")
        return SimpleNamespace(__version__="10.3.0")

    def choose(*given: Any, **options: Any) -> None:
        asked.append((given, options))

    monkeypatch.setattr(flavours, "load_package", package)
    assert "has no TensorRT engine: run `moebius-edge export" in probe.usable(bundle)
    monkeypatch.setattr(engine_files, "choose_engine", choose)
    assert probe.usable(bundle) == ""
    assert asked == [((bundle, flavours.FLAVOURS["tensorrt"], "10.3.0", gpu), {"verify": False})]
    assert auto.CANDIDATES[1].usable(bundle) == "the package tensorrt_rtx is missing"


def test_a_candidate_list_takes_others(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def candidate(runtime: str, device: str, problem: str) -> Candidate:
        def usable(given: Bundle) -> str:
            assert given is bundle
            asked.append(f"{runtime} on {device}")
            return problem

        return Candidate(runtime, device, usable)

    rows = (
        candidate("fast", "cuda", "no engine"),
        candidate("slower", "cuda", "no driver"),
        candidate("slow", "cpu", ""),
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
    assert not only.tried and not only.notable


def test_every_candidate_can_be_created() -> None:
    assert {c.runtime for c in auto.CANDIDATES} == set(RUNTIMES)
    assert auto.CANDIDATES[-1].device == "cpu", "the last resort"


def test_a_missing_package_is_the_error_it_always_was(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *arguments: Any, **options: Any) -> Any:
        if name == "onnxruntime":
            raise ImportError("No module named 'onnxruntime'")
        return real(name, *arguments, **options)

    monkeypatch.delitem(sys.modules, "onnxruntime", raising=False)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MachineError, match=r'onnxruntime is missing .*`pip install "moebius-edge\[cpu\]"`'):
        create_runtime("auto", bundle, "auto")
