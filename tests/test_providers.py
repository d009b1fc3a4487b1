"""What ONNX Runtime's providers are given, where engines are kept, and how a provider is proven to start."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from fake_gpu import CPU, CUDA, TENSORRT, FakeGpu
from toy import make_toy_bundle

from moebius_edge.bundle import bundle as bundle_module
from moebius_edge.bundle.bundle import Bundle
from moebius_edge.runtimes import providers
from moebius_edge.runtimes.providers import (
    PROBE,
    absence,
    engine_folder,
    engines_missing,
    session_providers,
    start_problem,
)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return Bundle.load(make_toy_bundle(tmp_path / "toy"))


def test_the_probe_is_one_addition() -> None:
    model = onnx.load_from_string(PROBE)
    onnx.checker.check_model(model, full_check=True)
    assert [(n.op_type, list(n.input), list(n.output)) for n in model.graph.node] == [("Add", ["x", "x"], ["y"])]
    session = onnxruntime.InferenceSession(PROBE, providers=[CPU])
    assert session.run(None, {"x": np.array([1, 2], np.float32)})[0].tolist() == [2, 4]


def test_a_provider_that_works_and_those_that_do_not(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    gpu = FakeGpu(monkeypatch)
    assert [start_problem(onnxruntime, device) for device in ("cpu", "cuda", "tensorrt")] == ["", "", ""]
    gpu.broken = {CUDA}
    assert start_problem(onnxruntime, "cuda") == (
        f"onnxruntime could not start {CUDA}: check the driver with `nvidia-smi`"
    )
    gpu.broken = {TENSORRT}
    assert start_problem(onnxruntime, "tensorrt") == (
        f"onnxruntime could not start {TENSORRT} (Please install TensorRT): check the driver with `nvidia-smi`"
    )
    assert capfd.readouterr() == ("", ""), "--json has stdout to itself"


@pytest.mark.parametrize(
    ("complaint", "found", "remedy"),
    [
        ("libcudnn.so.9: cannot open shared object file: No such file or directory", True, "[cuda,cudnn]"),
        ("libnvinfer.so.10: cannot open shared object file: No such file or directory", True, '"tensorrt<11"'),
        ("libcuda.so.1: cannot open shared object file: No such file or directory", True, "nvidia-smi"),
        ("FOLDER/x.so: undefined symbol: Provider_GetHost", False, "nvidia-smi"),
        ("FOLDER/LIBRARY: cannot open shared object file: No such file or directory", False, "nvidia-smi"),
    ],
)
def test_the_library_that_is_missing_is_named(
    complaint: str, found: bool, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    FakeGpu(monkeypatch).broken = {CUDA, TENSORRT}
    loaded: list[str] = []

    def load(path: str, *mode: int) -> None:
        loaded.append(Path(path).name)
        folder, name = os.path.split(path)
        raise OSError(complaint.replace("FOLDER", folder).replace("LIBRARY", name))

    monkeypatch.setattr("ctypes.CDLL", load)
    problem = start_problem(onnxruntime, "tensorrt")
    assert loaded == ["libonnxruntime_providers_shared.so", "libonnxruntime_providers_tensorrt.so"]
    assert remedy in problem and (f"({complaint.split(':')[0]}: cannot open shared object file)" in problem) == found


def test_a_device_that_computes_nonsense_is_not_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeGpu(monkeypatch)
    monkeypatch.setattr(onnxruntime.InferenceSession, "run", lambda *a: [np.zeros(2, np.float32)])
    assert "computes 1 + 1 = 0.0" in start_problem(onnxruntime, "cuda")


def test_the_command_fits_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeGpu(monkeypatch, providers=(CPU,))
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    assert absence(onnxruntime, "cpu") == ""
    assert 'pip install "moebius-edge[gpu]" "tensorrt<11"`' in absence(onnxruntime, "tensorrt")
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    text = absence(onnxruntime, "cuda")
    assert "pip install" not in text and "docs/jetson.md" in text


def test_options_keep_the_files_precision(monkeypatch: pytest.MonkeyPatch, bundle: Bundle) -> None:
    FakeGpu(monkeypatch)
    (name, cuda), last = session_providers(onnxruntime, "cuda", bundle.components["denoiser"], Path("/e"))
    assert (name, last) == (CUDA, CPU)
    assert cuda["use_tf32"] == "0" and cuda["arena_extend_strategy"] == "kSameAsRequested"

    (name, options), (second, again), last = session_providers(
        onnxruntime, "tensorrt", bundle.components["denoiser"], Path("/e")
    )
    assert (name, second, last, again) == (TENSORRT, CUDA, CPU, cuda)
    assert options["trt_fp16_enable"] == options["trt_int8_enable"] == "0"
    assert options["trt_engine_cache_path"] == options["trt_timing_cache_path"] == "/e"
    assert options["trt_profile_min_shapes"] == "sample:1x9x8x8,timestep:1,branch:1"
    for most in ("trt_profile_opt_shapes", "trt_profile_max_shapes"):
        assert options[most] == "sample:2x9x8x8,timestep:2,branch:2"
    (_, encoder), *_ = session_providers(onnxruntime, "tensorrt", bundle.components["vae_encoder"], Path("/e"))
    assert encoder["trt_profile_max_shapes"] == "image:1x3x64x64"


def test_engines_lie_beside_the_bundle_by_content_version_and_gpu(
    monkeypatch: pytest.MonkeyPatch, bundle: Bundle
) -> None:
    monkeypatch.setattr(providers, "gpu_name", lambda: "NVIDIA GeForce RTX 4090")
    monkeypatch.setattr(providers, "package_version", lambda *names: None)
    digest = bundle.files["denoiser.onnx"]["sha256"][:12]
    folder = engine_folder(bundle, "denoiser", "1.23.2")
    inner = Path("onnxruntime-1.23.2-nvidia-geforce-rtx-4090") / f"denoiser-{digest}"
    assert folder == bundle.path / "engines" / inner
    assert engines_missing(bundle, "1.23.2") == ["vae_encoder", "denoiser", "vae_decoder"]
    for name in ("denoiser", "vae_decoder"):
        made = engine_folder(bundle, name, "1.23.2")
        made.mkdir(parents=True)
        (made / "TensorrtExecutionProvider_graph_sm89.engine").touch()
    assert engines_missing(bundle, "1.23.2") == ["vae_encoder"]
    assert len(engines_missing(bundle, "1.24.0")) == 3, "another version builds its own"
    monkeypatch.setattr(providers, "package_version", lambda *names: ("tensorrt", "10.13.2.6"))
    assert "onnxruntime-1.23.2-tensorrt-10.13.2.6-nvidia" in str(engine_folder(bundle, "denoiser", "1.23.2"))
    assert len(engines_missing(bundle, "1.23.2")) == 3
    Bundle.load(bundle.path)  # an engine is no part of the bundle's files


def test_engines_of_an_installed_or_read_only_bundle_are_in_the_cache(
    monkeypatch: pytest.MonkeyPatch, bundle: Bundle, tmp_path: Path
) -> None:
    monkeypatch.setattr(providers, "gpu_name", lambda: None)
    monkeypatch.setattr(providers, "package_version", lambda *names: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    writable = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != bundle.path and writable(path, mode))
    expected = tmp_path / "cache" / "moebius-edge" / "engines" / "onnxruntime-1-gpu"
    assert engine_folder(bundle, "vae_encoder", "1").parent == expected
    monkeypatch.setattr(os, "access", writable)
    assert engine_folder(bundle, "vae_encoder", "1").is_relative_to(bundle.path)
    monkeypatch.setattr(providers, "ASSETS", bundle.path.parent)
    assert engine_folder(bundle, "vae_encoder", "1").parent == expected
    assert providers.ENGINES_FOLDER == bundle_module.ENGINES_FOLDER
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert engine_folder(bundle, "vae_encoder", "1").is_relative_to(Path.home() / ".cache")
