"""ONNX Runtime on graphs whose results are known, and its GPU providers as far as they show without a GPU."""

from __future__ import annotations

from collections import Counter
from functools import partial
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
from moebius_edge.pipeline.inpainter import Inpainter
from moebius_edge.runtimes import create_runtime, providers
from moebius_edge.runtimes.base import drawn_feeds
from moebius_edge.runtimes.cuda import find_gpu
from moebius_edge.runtimes.ort import BoundSession, check_placement, read_placement
from moebius_edge.runtimes.providers import PROBE, absence, session_providers, start_problem
from moebius_edge.sampling.calls import Sampling
from moebius_edge.sampling.scheduler import DDIM
from moebius_edge.spec import COMPONENTS
from moebius_edge.system import packages

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
        ("Available memory of 1 is smaller than requested bytes of 2", OutOfMemory, "not enough memory on {device}"),
        ("CUDNN failure 4000: CUDNN_STATUS_ALLOC_FAILED ; GPU=0", OutOfMemory, "not enough memory on {device}"),
        (
            "CUDA failure 700: an illegal memory access ; GPU=0 ; hostname=x",
            MachineError,
            r"access\): check the GPU with",
        ),
        ("CUBLAS failure 13: CUBLAS_STATUS_EXECUTION_FAILED", MachineError, "check the GPU with `nvidia-smi`"),
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


def test_a_gpu_session_computes_in_bound_buffers_and_proves_where(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = FakeGpu(monkeypatch)
    runtime = create_runtime("onnxruntime", bundle, "cuda")
    assert gpu.buffers == [] and "nodes" not in runtime.info, "nothing is touched before with"
    assert runtime.info["cuda_graph"] == "not recorded"
    with runtime:
        allocated = list(gpu.buffers)
        assert {kind for kind, _ in allocated} == {"cuda"}
        latent = runtime.run("vae_encoder", {"image": image(1)})["latent"]
        np.testing.assert_allclose(latent, encode(image(1)), atol=1e-5)
        for rows in (2, 1):
            runtime.run("denoiser", drawn_feeds(DENOISER, rows))
        assert gpu.buffers == allocated, "warming up has allocated what a guided run needs"
        assert set(runtime.info["nodes"]) == set(COMPONENTS)
        assert set(runtime.info["nodes"]["denoiser"]) == {CUDA}
        assert runtime.info["provider"] == CUDA and runtime.info["nodes"]["denoiser"][CUDA] > 5
    assert not runtime._bound and not runtime._sessions


@pytest.mark.parametrize(("distilled", "rows"), [(None, ["2", "1"]), (1.5, ["1"])])
def test_every_number_of_rows_is_recorded_while_the_bundle_is_loaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, distilled: float | None, rows: list[str]
) -> None:
    """Each of the denoiser's and its shallow part's after a run that is profiled; the autoencoder's run once."""
    bundle = Bundle.load(make_toy_bundle(tmp_path / "deep", deep=True, distilled_guidance=distilled))
    gpu = FakeGpu(monkeypatch)
    with create_runtime("onnxruntime", bundle, "cuda") as runtime:
        assert gpu.graphs == ["-1", "-1", *rows, "-1", *rows, "-1"] and runtime.info["cuda_graph"] == "recorded"
        gpu.graphs.clear()
        runtime.run("denoiser", drawn_feeds(bundle.components["denoiser"], 1))
        assert gpu.graphs == ["1"]
    assert [dict(given[0][1])["enable_cuda_graph"] for given in gpu.sessions[1:]] == ["0", "1", "1", "0"]


def test_a_denoiser_that_cannot_be_recorded_runs_without_and_says_why(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = FakeGpu(monkeypatch)
    gpu.no_graphs = "This session cannot use the graph capture feature as requested by the user"
    with create_runtime("onnxruntime", bundle, "cuda") as runtime:
        state = runtime.info["cuda_graph"]
        assert state.startswith("failed: cannot load ") and "cannot use the graph capture feature" in state
        assert set(gpu.graphs) == {"-1"} and len(gpu.graphs) == 4, "both numbers of rows are warmed up all the same"
        with create_runtime("onnxruntime", bundle, "cpu") as cpu:
            feeds = drawn_feeds(DENOISER, 2)
            np.testing.assert_allclose(runtime.run("denoiser", feeds)["noise"], cpu.run("denoiser", feeds)["noise"])


def test_the_deep_feature_stays_on_the_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bundle = Bundle.load(make_toy_bundle(tmp_path / "deep", deep=True))
    draw = np.random.default_rng(0)
    latents, condition = (draw.standard_normal((1, n, 8, 8)).astype(np.float32) for n in (4, 5))
    sampling = Sampling(DDIM(6), 2.0, (300, 1000), cache_interval=2)

    def sample(device: str) -> np.ndarray:
        with create_runtime("onnxruntime", bundle, device) as runtime:
            crossed: list[str] = []
            for bound in getattr(runtime, "_bound", {}).values():
                monkeypatch.setattr(bound, "run", partial(carried, bound.run, crossed))
            batch = runtime.start_sampling(latents, condition, sampling.scheduler)
            for call in sampling.calls():
                batch.step(call)
            assert "deep" not in crossed and (device == "cpu" or crossed.count("noise") == 6)
            return batch.read()

    def carried(run: Any, crossed: list[str], feeds: dict[str, Any], outputs: list[str]) -> Any:
        crossed += [*feeds, *outputs]
        return run(feeds, outputs)

    expected = sample("cpu")
    assert {call.full for call in sampling.calls()} == {True, False} and {c.rows for c in sampling.calls()} == {1, 2}
    gpu = FakeGpu(monkeypatch)
    np.testing.assert_array_equal(sample("cuda"), expected)
    assert len(gpu.buffers) == 2 + 2 * 5 + 2 * 4 + 2, "the shallow part reads the denoiser's, at both numbers of rows"


def test_a_deep_feature_that_another_call_has_replaced_is_not_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bundle = Bundle.load(make_toy_bundle(tmp_path / "deep", deep=True))
    FakeGpu(monkeypatch)
    sampling = Sampling(DDIM(4), 2.0, cache_interval=2)
    full, cached = sampling.calls()[:2]
    with create_runtime("onnxruntime", bundle, "cuda") as runtime:
        first, second = (runtime.start_sampling(noise(4), noise(5), sampling.scheduler) for _ in range(2))
        first.step(full)
        second.step(full)
        with pytest.raises(RuntimeError, match="has replaced the deep feature"):
            first.step(cached)
        second.step(cached)
        second.step(full)
        runtime.run("denoiser", drawn_feeds(bundle.components["denoiser"], 2))
        with pytest.raises(RuntimeError, match="has replaced the deep feature"):
            second.step(cached)


def noise(channels: int) -> np.ndarray:
    return np.random.default_rng(channels).standard_normal((1, channels, 8, 8)).astype(np.float32)


@pytest.mark.parametrize(
    "text", ["CUDA failure 2: out of memory ; GPU=0 ; hostname=h ; file=f", "Failed to allocate memory for requested"]
)
def test_memory_that_runs_out_in_the_middle_of_a_picture(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    """One error, and once the memory is there again the next picture is what it would have been."""
    gpu = FakeGpu(monkeypatch)
    picture, hole = np.full((64, 64, 3), 99, np.uint8), np.zeros((64, 64), bool)
    hole[20:40, 20:40] = True

    def fail(step: Any) -> None:
        gpu.failure = text if step.index == 2 else ""

    with Inpainter(bundle, "onnxruntime", "cuda") as inpainter:
        expected = inpainter.inpaint(picture, hole, steps=4).image
        with pytest.raises(
            OutOfMemory, match=r"denoiser failed: not enough memory on cuda \([^;\n]*\): close"
        ) as caught:
            inpainter.inpaint(picture, hole, steps=4, on_step=fail)
        assert "\n" not in str(caught.value) and "hostname" not in str(caught.value)
        gpu.failure = ""
        np.testing.assert_array_equal(inpainter.inpaint(picture, hole, steps=4).image, expected)


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


@pytest.mark.parametrize(
    ("device", "remedy"),
    [
        ("cpu", "use --runtime openvino, or export with --precision fp32"),
        ("cuda", "build engines with --engine tensorrt, or export with --precision fp16"),
    ],
)
def test_an_int8_file_is_announced_as_slow(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, device: str, remedy: str
) -> None:
    """CUDA's provider has no INT8 kernels: it would convert to FP16 and back."""
    FakeGpu(monkeypatch)
    (note,) = create_runtime("onnxruntime", Bundle.load(call_int8(bundle.path)), device).notes
    slow = f"this bundle is INT8, for which onnxruntime has no kernels on {device}: it gives the same pictures slowly"
    assert note == f"{slow}; {remedy}"


@pytest.mark.gpu
def test_a_real_gpu_agrees_with_the_cpu(bundle: Bundle) -> None:
    if find_gpu() is None:
        pytest.skip("no GPU in this machine")
    with create_runtime("onnxruntime", bundle, "cpu") as cpu, create_runtime("onnxruntime", bundle, "cuda") as gpu:
        assert gpu.info["cuda_graph"] == "recorded"
        for component, feeds in (("denoiser", drawn_feeds(DENOISER, 2)), ("vae_encoder", {"image": image(1)})):
            expected, actual = cpu.run(component, feeds), gpu.run(component, feeds)
            for name, array in expected.items():
                np.testing.assert_allclose(actual[name], array, rtol=1e-4, atol=1e-4)


# --- providers -------------------------------------------------------------------------------------------


def test_the_probe_is_a_convolution_and_a_product() -> None:
    """CUDA's provider loads cuDNN and cuBLAS when they are first used."""
    model = onnx.load_from_string(PROBE)
    onnx.checker.check_model(model, full_check=True)
    assert [(n.op_type, list(n.input)) for n in model.graph.node] == [("Conv", ["x", "x"]), ("MatMul", ["c", "x"])]
    session = onnxruntime.InferenceSession(PROBE, providers=[CPU])
    (y,) = session.run(None, {"x": np.ones((1, 1, 2, 2), np.float32)})
    assert y[0, 0].tolist() == [[6, 6], [3, 3]]


def test_a_provider_that_works_and_those_that_do_not(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    gpu = FakeGpu(monkeypatch)
    monkeypatch.setattr(packages, "package_version", lambda *names: ("onnxruntime-gpu", "1"))
    assert [start_problem(onnxruntime, device) for device in ("cpu", "cuda")] == ["", ""]
    gpu.failure = "CUDNN failure 1001: CUDNN_STATUS_NOT_INITIALIZED ; GPU=0 ; hostname=secret ; file=x.cc"
    expected = (
        f"onnxruntime could not start {CUDA} (CUDNN failure 1001: CUDNN_STATUS_NOT_INITIALIZED): run `pip install"
    )
    assert start_problem(onnxruntime, "cuda") == f'{expected} -U "onnxruntime-gpu[cuda,cudnn]"`'
    gpu.failure = "CUDA failure 2: out of memory ; GPU=0"
    assert start_problem(onnxruntime, "cuda").endswith("(CUDA failure 2: out of memory): close other programs")
    gpu.broken = {CUDA}
    assert f"could not start {CUDA} (it took {CPU} instead): run `pip" in start_problem(onnxruntime, "cuda")
    monkeypatch.setattr(packages, "driver_version", lambda: "570.86.15")
    assert '-U "onnxruntime-gpu[cuda,cudnn]<1.27"`' in start_problem(onnxruntime, "cuda")

    def refuse() -> Any:
        raise MachineError("CUDA cannot use a GPU here", "unset CUDA_VISIBLE_DEVICES")

    monkeypatch.setattr(providers, "require_gpu", refuse)
    assert start_problem(onnxruntime, "cuda") == "CUDA cannot use a GPU here: unset CUDA_VISIBLE_DEVICES"
    assert capfd.readouterr() == ("", ""), "--json has stdout to itself"


def test_a_build_without_the_provider(monkeypatch: pytest.MonkeyPatch, bundle: Bundle) -> None:
    FakeGpu(monkeypatch, providers=(CPU,))
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    assert absence(onnxruntime, "cpu") == ""
    with pytest.raises(MachineError, match=rf"has no {CUDA} .*moebius-edge\[gpu\].*, or use the device cpu"):
        create_runtime("onnxruntime", bundle, "cuda")


def test_options_keep_the_files_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """And TensorRT's provider is not given anything, although the build has it."""
    FakeGpu(monkeypatch, providers=(TENSORRT, CUDA, CPU))
    (name, cuda), last = session_providers(onnxruntime, "cuda")
    assert (name, last) == (CUDA, CPU)
    assert cuda["use_tf32"] == "0" and cuda["arena_extend_strategy"] == "kSameAsRequested"
    assert session_providers(onnxruntime, "cpu") == [CPU]
