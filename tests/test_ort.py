"""ONNX Runtime on graphs whose results are known, and its GPU providers as far as they show without a GPU."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from fake_gpu import CPU, CUDA, TENSORRT, FakeGpu
from toy import call_int8, decode, describe_again, encode, expected_latent, make_toy_bundle

from moebius_edge.bundle.bundle import Bundle
from moebius_edge.bundle.manifest import resolved_components
from moebius_edge.errors import BundleError, MachineError, OutOfMemory, UsageError
from moebius_edge.runtimes import create_runtime, providers
from moebius_edge.runtimes.base import drawn_feeds
from moebius_edge.runtimes.cuda import find_gpu
from moebius_edge.runtimes.ort import BoundSession, check_placement, read_placement
from moebius_edge.runtimes.providers import (
    PROBE,
    absence,
    engine_folder,
    engines_missing,
    session_providers,
    start_problem,
)
from moebius_edge.spec import COMPONENTS

DENOISER = resolved_components(64)["denoiser"]


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return Bundle.load(make_toy_bundle(tmp_path / "toy"))


def image(batch: int = 1) -> np.ndarray:
    return np.random.default_rng(batch).uniform(-1, 1, (batch, 3, 64, 64)).astype(np.float32)


class Broken:
    """A session, or its buffers, whose calls fail with ``text``."""

    def __init__(self, text: str) -> None:
        self.text = text

    def run(self, *arguments: object) -> None:
        raise RuntimeError(self.text)


def refuse_to_enter(runtime: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught, runtime:
        raise AssertionError("never entered")
    assert "\n" not in str(caught.value)


def test_it_computes_what_the_graphs_say(bundle: Bundle) -> None:
    with create_runtime("onnxruntime", bundle, "cpu") as runtime:
        latent = runtime.run("vae_encoder", {"image": image(3)})["latent"]
        np.testing.assert_allclose(latent, encode(image(3)), atol=1e-6)
        np.testing.assert_allclose(runtime.run("vae_decoder", {"latent": latent})["image"], decode(latent), atol=1e-6)

        # At t = 0 with x_t = x̂ there is hardly any noise left to predict; the branches differ by a tenth.
        mask = np.zeros((1, 1, 8, 8), np.float32)
        mask[:, :, 2:5, 3:6] = 1
        masked = latent[:1] * (1 - mask)
        clean = expected_latent(mask, masked, 1.0)
        sample = np.concatenate([clean * np.float32(np.sqrt(0.99915)), mask, masked], axis=1)
        feeds = {"sample": np.repeat(sample, 2, axis=0), "timestep": np.zeros(2, np.float32), "branch": np.arange(2)}
        noise = runtime.run("denoiser", feeds)["noise"]
        np.testing.assert_allclose(noise[0], 0, atol=1e-4)
        np.testing.assert_allclose(noise[1], 0.1 * clean[0] * np.sqrt(0.99915 / 0.00085), atol=1e-3)


def test_building_is_cheap_and_info_says_what_executes(bundle: Bundle) -> None:
    runtime = create_runtime("onnxruntime", bundle, threads=1)
    assert not runtime.active
    named = {"name": "onnxruntime", "version": onnxruntime.__version__, "device": "cpu", "provider": CPU}
    assert runtime.info == {**named, "threads": 1}
    assert create_runtime("onnxruntime", bundle).info["threads"] >= 1
    with pytest.raises(UsageError, match="threads must be 1 or more, got 0"):
        create_runtime("onnxruntime", bundle, threads=0)


def test_no_graph_and_one_of_another_component_are_one_line_without_the_stack(
    bundle: Bundle, capfd: pytest.CaptureFixture
) -> None:
    encoder = (bundle.path / "vae_encoder.onnx").read_bytes()
    for content, message in (
        (b"not a graph", r"vae_decoder.onnx is no ONNX file .*export the"),
        (encoder, r"has the inputs image, bundle\.json says latent"),
    ):
        (bundle.path / "vae_decoder.onnx").write_bytes(content)
        again = Bundle.load(describe_again(bundle.path))
        refuse_to_enter(create_runtime("onnxruntime", again, "cpu"), BundleError, message)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("Non-zero status code\nstack", BundleError, r"failed in onnxruntime .* \(Non-zero status code\): run"),
        ("std::bad_alloc", OutOfMemory, "denoiser failed: not enough memory on {device}"),
        ("Failed to allocate 1 GB", OutOfMemory, r"failed: not enough memory on {device} \(Failed to allocate"),
    ],
)
def test_a_failing_node_and_a_lack_of_memory_are_told_apart(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, device: str, text: str, error: type[Exception], message: str
) -> None:
    FakeGpu(monkeypatch)
    with create_runtime("onnxruntime", bundle, device) as runtime:
        broken = Broken(f"[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : {text}")
        monkeypatch.setitem(runtime._sessions if device == "cpu" else runtime._bound, "denoiser", broken)
        with pytest.raises(error, match=message.format(device=device)):
            runtime.run("denoiser", drawn_feeds(DENOISER, 1))


# --- a GPU -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("device", "provider"), [("cuda", CUDA), ("tensorrt", TENSORRT)])
def test_a_gpu_session_computes_in_bound_buffers_and_proves_where(
    device: str, provider: str, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = FakeGpu(monkeypatch)
    runtime = create_runtime("onnxruntime", bundle, device)
    assert gpu.buffers == [] and "nodes" not in runtime.info, "nothing is touched before with"
    with runtime:
        allocated = list(gpu.buffers)
        assert {kind for kind, _ in allocated} == {"cuda"}
        latent = runtime.run("vae_encoder", {"image": image(1)})["latent"]
        np.testing.assert_allclose(latent, encode(image(1)), atol=1e-5)
        runtime.run("denoiser", drawn_feeds(DENOISER, 2))
        assert gpu.buffers == allocated, "warming up has allocated what a guided run needs"
        assert set(runtime.info["nodes"]) == set(COMPONENTS)
        assert set(runtime.info["nodes"]["denoiser"]) == {provider}
        assert runtime.info["provider"] == provider and runtime.info["nodes"]["denoiser"][provider] > 5
    assert not runtime._bound and not runtime._sessions


def test_bound_buffers_are_kept_and_their_results_are_the_callers(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Really executed, on the CPU."""
    real, shapes = onnxruntime.OrtValue.ortvalue_from_shape_and_type, []

    def counted(shape: list[int], *rest: Any) -> Any:
        shapes.append(tuple(shape))
        return real(shape, *rest)

    monkeypatch.setattr(onnxruntime.OrtValue, "ortvalue_from_shape_and_type", counted)
    session = onnxruntime.InferenceSession(bundle.paths["vae_encoder"], providers=[CPU])
    bound = BoundSession(onnxruntime, session, bundle.components["vae_encoder"], "cpu")
    results = [(image(batch), bound.run({"image": image(batch)}, ["latent"])["latent"]) for batch in (1, 3, 1, 3)]
    for pictures, latent in results:  # an earlier result outlives the later calls
        np.testing.assert_allclose(latent, encode(pictures), atol=1e-5)
    results[0][1][...] = 0  # nor does writing to it reach the buffers
    np.testing.assert_array_equal(bound.run({"image": image(1)}, ["latent"])["latent"], results[2][1])
    assert shapes == [(1, 3, 64, 64), (1, 4, 8, 8), (3, 3, 64, 64), (3, 4, 8, 8)], "once for each batch size"

    deep = Bundle.load(make_toy_bundle(tmp_path / "deep", deep=True))
    session = onnxruntime.InferenceSession(deep.paths["denoiser"], providers=[CPU])
    bound = BoundSession(onnxruntime, session, deep.components["denoiser"], "cpu")
    both = bound.run(drawn_feeds(DENOISER, 2), ["noise", "deep"])
    bound._buffers[2][2]["deep"] = None  # an output that is not asked for is not read
    np.testing.assert_array_equal(bound.run(drawn_feeds(DENOISER, 2), ["noise"])["noise"], both["noise"])


def test_a_gpu_that_is_given_nothing_or_no_products_is_an_error(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shape arithmetic may be left to the CPU."""
    gpu = FakeGpu(monkeypatch)
    gpu.idle = True
    message = rf"{CUDA} executes no node of vae_encoder \(\d+ on CPUE"
    refuse_to_enter(create_runtime("onnxruntime", bundle, "cuda"), MachineError, message)
    gpu.idle, gpu.left_to_cpu = False, {"Conv"}
    message = "vae_encoder would run 1 Conv on the CPU"
    refuse_to_enter(create_runtime("onnxruntime", bundle, "cuda"), MachineError, message)
    for operator in ("FusedMatMul", "QLinearConv", "Gemm", "Einsum"):
        placement = {CUDA: Counter(Add=40), CPU: Counter({operator: 2, "Shape": 1})}
        with pytest.raises(MachineError, match=f"would run 2 {operator} on the CPU"):
            check_placement("denoiser", placement, CUDA, "cuda")
    gpu.left_to_cpu = {"Gather", "Unsqueeze"}
    with create_runtime("onnxruntime", bundle, "cuda") as runtime:
        assert runtime.info["nodes"]["denoiser"][CPU] >= 2


def test_a_real_profile_is_read(bundle: Bundle, tmp_path: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.enable_profiling = True
    options.profile_file_prefix = str(tmp_path / "profile")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(bundle.paths["vae_encoder"], options, providers=[CPU])
    session.run(None, {"image": image()})
    assert read_placement(Path(session.end_profiling())) == {CPU: Counter({"AveragePool": 1, "Conv": 1})}


def test_engines_that_must_be_built_first_are_announced(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    FakeGpu(monkeypatch)
    assert create_runtime("onnxruntime", bundle, "cuda").notes == []
    (note,) = create_runtime("onnxruntime", bundle, "tensorrt").notes
    assert "TensorRT builds engines for vae_encoder, denoiser, vae_decoder first" in note
    assert str(bundle.path / "engines") in note
    (tmp_path / "cache").write_text("a file")
    monkeypatch.setattr(providers, "ASSETS", bundle.path.parent)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    message = "cannot make the engine cache .*run `mkdir -p"
    refuse_to_enter(create_runtime("onnxruntime", bundle, "tensorrt"), MachineError, message)


@pytest.mark.parametrize(("target", "device", "other"), [("tensorrt", "cpu", "cpu"), ("cpu", "cuda", "tensorrt")])
def test_an_int8_file_that_is_made_for_something_else_is_announced(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, target: str, device: str, other: str
) -> None:
    FakeGpu(monkeypatch)
    (note,) = create_runtime("onnxruntime", Bundle.load(call_int8(bundle.path, target=target)), device).notes
    slowly = f"INT8 for {target}: on {device} it gives the same pictures slowly; export with --target {other}"
    assert slowly in note
    assert create_runtime("onnxruntime", Bundle.load(call_int8(bundle.path, target=other)), device).notes == []


def test_an_engine_of_another_tensorrt(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    FakeGpu(monkeypatch)
    text = "[ONNXRuntimeError] : 11 : EP_FAIL : TensorRT EP could not deserialize engine from cache: x"
    for device, error in (("tensorrt", MachineError), ("cuda", BundleError)):
        with create_runtime("onnxruntime", bundle, device) as runtime:
            monkeypatch.setitem(runtime._bound, "denoiser", Broken(text))
            with pytest.raises(error) as caught:
                runtime.run("denoiser", drawn_feeds(DENOISER, 1))
        command = f"run `rm -r {bundle.path / 'engines' / 'onnxruntime-'}"
        assert (command in str(caught.value)) == (device == "tensorrt")


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda", "tensorrt"])
def test_a_real_gpu_agrees_with_the_cpu(device: str, bundle: Bundle) -> None:
    if find_gpu() is None:
        pytest.skip("no GPU in this machine")
    with create_runtime("onnxruntime", bundle, "cpu") as cpu, create_runtime("onnxruntime", bundle, device) as gpu:
        for component, feeds in (("denoiser", drawn_feeds(DENOISER, 2)), ("vae_encoder", {"image": image(1)})):
            expected, actual = cpu.run(component, feeds), gpu.run(component, feeds)
            for name, array in expected.items():
                np.testing.assert_allclose(actual[name], array, rtol=1e-4, atol=1e-4)


# --- providers -------------------------------------------------------------------------------------------


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
    causes = {"cuda": f"it took {CPU} instead", "tensorrt": "Please install TensorRT"}
    for (device, why), name in zip(causes.items(), (CUDA, TENSORRT), strict=True):
        gpu.broken = {name}
        expected = f"onnxruntime could not start {name} ({why}): check the driver with `nvidia-smi`, then run `pip"
        assert start_problem(onnxruntime, device).startswith(expected)
    assert capfd.readouterr() == ("", ""), "--json has stdout to itself"


def test_the_command_fits_the_machine(monkeypatch: pytest.MonkeyPatch, bundle: Bundle) -> None:
    FakeGpu(monkeypatch, providers=(CPU,))
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    assert absence(onnxruntime, "cpu") == ""
    assert 'pip install "moebius-edge[gpu]" "tensorrt<11"`' in absence(onnxruntime, "tensorrt")
    with pytest.raises(MachineError, match=rf"has no {CUDA} .*moebius-edge\[gpu\].*, or use the device cpu"):
        create_runtime("onnxruntime", bundle, "cuda")
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    text = absence(onnxruntime, "cuda")
    assert "pip install" not in text and "docs/jetson.md" in text


def test_options_keep_the_files_precision(monkeypatch: pytest.MonkeyPatch, bundle: Bundle) -> None:
    FakeGpu(monkeypatch)

    def given(device: str, component: str = "denoiser", engines: Path | None = Path("/e")) -> Sequence[Any]:
        return session_providers(onnxruntime, device, bundle.components[component], engines)

    (name, cuda), last = given("cuda")
    assert (name, last) == (CUDA, CPU)
    assert cuda["use_tf32"] == "0" and cuda["arena_extend_strategy"] == "kSameAsRequested"
    (name, options), (second, again), last = given("tensorrt")
    assert (name, second, last, again) == (TENSORRT, CUDA, CPU, cuda)
    assert options["trt_fp16_enable"] == options["trt_int8_enable"] == "0"
    assert options["trt_engine_cache_path"] == options["trt_timing_cache_path"] == "/e"
    assert options["trt_profile_min_shapes"] == "sample:1x9x8x8,timestep:1,branch:1"
    for most in ("trt_profile_opt_shapes", "trt_profile_max_shapes"):
        assert options[most] == "sample:2x9x8x8,timestep:2,branch:2"
    assert given("tensorrt", "vae_encoder")[0][1]["trt_profile_max_shapes"] == "image:1x3x64x64"
    assert "trt_engine_cache_enable" not in given("tensorrt", engines=None)[0][1]


def test_engines_lie_beside_the_bundle_by_content_version_and_gpu(
    monkeypatch: pytest.MonkeyPatch, bundle: Bundle
) -> None:
    monkeypatch.setattr(providers, "gpu_name", lambda: "NVIDIA GeForce RTX 4090")
    monkeypatch.setattr(providers, "package_version", lambda *names: None)
    digest = bundle.files["denoiser.onnx"]["sha256"][:12]
    inner = Path("onnxruntime-1.23.2-nvidia-geforce-rtx-4090") / f"denoiser-{digest}"
    assert engine_folder(bundle, "denoiser", "1.23.2") == bundle.path / "engines" / inner
    assert engines_missing(bundle, "1.23.2") == ["vae_encoder", "denoiser", "vae_decoder"]
    for name in ("denoiser", "vae_decoder"):
        folder = engine_folder(bundle, name, "1.23.2")
        folder.mkdir(parents=True)
        (folder / "TensorrtExecutionProvider_graph_sm89.engine").touch()
    assert engines_missing(bundle, "1.23.2") == ["vae_encoder"]
    assert len(engines_missing(bundle, "1.24.0")) == 3, "another version builds its own"
    monkeypatch.setattr(providers, "package_version", lambda *names: ("tensorrt", "10.13.2.6"))
    assert "onnxruntime-1.23.2-tensorrt-10.13.2.6-nvidia" in str(engine_folder(bundle, "denoiser", "1.23.2"))
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
