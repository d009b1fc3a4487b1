"""The runtime interface and ONNX Runtime behind it, on graphs whose results are known in closed form."""

from __future__ import annotations

import builtins
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fake_gpu import CPU, CUDA, TENSORRT, FakeGpu
from toy import call_int8, decode, encode, expected_latent, flip_byte, make_toy_bundle

from moebius_edge.bundle.bundle import Bundle
from moebius_edge.errors import BundleError, MachineError, UsageError
from moebius_edge.runtimes import RUNTIMES, create_runtime
from moebius_edge.runtimes.base import Arrays, Runtime
from moebius_edge.spec import COMPONENTS, Component
from moebius_edge.system.files import sha256_file


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return Bundle.load(make_toy_bundle(tmp_path_factory.mktemp("bundles") / "toy"))


def image(batch: int = 1) -> np.ndarray:
    return np.random.default_rng(batch).uniform(-1, 1, (batch, 3, 64, 64)).astype(np.float32)


def denoiser_feeds(batch: int) -> Arrays:
    return {
        "sample": np.zeros((batch, 9, 8, 8), np.float32),
        "timestep": np.zeros(batch, np.float32),
        "branch": np.zeros(batch, np.int64),
    }


class Recorder(Runtime):
    """A back-end that answers zeros and records what the base class does to it."""

    def __init__(self, answer: Arrays | None = None, fail: bool = False) -> None:
        super().__init__({name: component_of(name) for name in COMPONENTS})
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


def component_of(name: str) -> Component:
    c = COMPONENTS[name]
    return replace(
        c, inputs=tuple(t.resolved(64) for t in c.inputs), outputs=tuple(t.resolved(64) for t in c.outputs)
    )


def make_manifest_true(folder: Path) -> Path:
    """Record the files' present hashes, as an exporter with a bug would."""
    manifest = json.loads((folder / "bundle.json").read_text())
    for name in manifest["files"]:
        path = folder / name
        manifest["files"][name] = {"sha256": sha256_file(path), "bytes": path.stat().st_size}
    (folder / "bundle.json").write_text(json.dumps(manifest))
    return folder


# --- the interface ---------------------------------------------------------------------------------------


def test_the_device_is_touched_only_inside_with() -> None:
    runtime = Recorder()
    assert runtime.calls == [] and not runtime.active
    with pytest.raises(RuntimeError, match="not active: call run inside `with runtime:`"):
        runtime.run("denoiser", denoiser_feeds(1))
    with runtime as entered:
        assert entered is runtime and runtime.active
        with pytest.raises(RuntimeError, match="already active"):
            runtime.__enter__()
    assert runtime.calls == ["activate", "deactivate"] and not runtime.active


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
        ({"branch": None}, r"denoiser lacks input branch"),
        ({"prompt": np.zeros(2)}, r"denoiser has no input prompt: it has sample, timestep, branch"),
        ({"timestep": np.zeros(2)}, r"denoiser input 'timestep' must be float32, got float64"),
        ({"branch": np.zeros(2, np.int32)}, r"denoiser input 'branch' must be int64, got int32"),
        ({"timestep": np.zeros(3, np.float32)}, r"'timestep' must have shape \(2,\), got \(3,\)"),
        ({"timestep": np.float32(1)}, r"'timestep' must have shape \(2,\), got \(\)"),
        (
            {"sample": np.zeros((2, 9, 8, 16), np.float32)},
            r"'sample' must have shape \(2, 9, 8, 8\), got \(2, 9, 8, 16\)",
        ),
    ],
)
def test_feeds_are_checked_once_for_every_back_end(change: dict, message: str) -> None:
    feeds = {k: v for k, v in (denoiser_feeds(2) | change).items() if v is not None}
    with Recorder() as runtime:
        with pytest.raises(ValueError, match=message):
            runtime.run("denoiser", feeds)
        assert "run" not in runtime.calls
    with (
        Recorder() as runtime,
        pytest.raises(ValueError, match="no component 'unet': this bundle has vae_enc"),
    ):
        runtime.run("unet", feeds)


def test_an_empty_batch_is_refused() -> None:
    with Recorder() as runtime, pytest.raises(ValueError, match="denoiser input has an empty batch"):
        runtime.run("denoiser", denoiser_feeds(0))


@pytest.mark.parametrize(
    "answer",
    [
        {"noise": np.zeros((1, 4, 8, 8), np.float32)},  # half the batch
        {"noise": np.zeros((2, 4, 8, 8), np.float16)},
        {"epsilon": np.zeros((2, 4, 8, 8), np.float32)},
    ],
)
def test_a_graph_that_breaks_the_contract_is_the_bundles_fault(answer: Arrays) -> None:
    with (
        Recorder(answer) as runtime,
        pytest.raises(BundleError, match=r"the graph is not what bundle\.json says"),
    ):
        runtime.run("denoiser", denoiser_feeds(2))


def test_a_view_reaches_the_back_end_contiguous() -> None:
    feeds = denoiser_feeds(2)
    feeds["sample"] = np.zeros((2, 8, 8, 9), np.float32).transpose(0, 3, 1, 2)
    with Recorder() as runtime:
        assert runtime.run("denoiser", feeds)["noise"].shape == (2, 4, 8, 8)


# --- ONNX Runtime ----------------------------------------------------------------------------------------


def test_onnxruntime_computes_what_the_graphs_say(bundle: Bundle) -> None:
    with create_runtime("onnxruntime", bundle, "cpu") as runtime:
        latent = runtime.run("vae_encoder", {"image": image(3)})["latent"]
        np.testing.assert_allclose(latent, encode(image(3)), atol=1e-6)
        decoded = runtime.run("vae_decoder", {"latent": latent})["image"]
        np.testing.assert_allclose(decoded, decode(latent), atol=1e-6)

        # At t = 0 with x_t = x̂ there is hardly any noise left to predict; the branches differ by a tenth.
        mask = np.zeros((1, 1, 8, 8), np.float32)
        mask[:, :, 2:5, 3:6] = 1
        masked = latent[:1] * (1 - mask)
        clean = expected_latent(mask, masked, 1.0)
        sample = np.concatenate([clean * np.float32(np.sqrt(0.99915)), mask, masked], axis=1)
        noise = runtime.run(
            "denoiser",
            {
                "sample": np.repeat(sample, 2, axis=0),
                "timestep": np.zeros(2, np.float32),
                "branch": np.array([1, 0]),
            },
        )["noise"]
        np.testing.assert_allclose(noise[1], 0, atol=1e-4)
        np.testing.assert_allclose(noise[0], 0.1 * clean[0] * np.sqrt(0.99915 / 0.00085), atol=1e-3)


def test_building_is_cheap_and_info_says_what_executes(bundle: Bundle) -> None:
    import onnxruntime

    runtime = create_runtime("onnxruntime", bundle, threads=1)
    assert not runtime.active
    assert runtime.info == {
        "name": "onnxruntime",
        "version": onnxruntime.__version__,
        "device": "cpu",
        "provider": "CPUExecutionProvider",
        "threads": 1,
    }
    assert create_runtime("onnxruntime", bundle).info["threads"] >= 1


def test_unknown_choices_name_the_known_ones(bundle: Bundle) -> None:
    assert RUNTIMES == ("onnxruntime", "tensorrt", "tensorrt-rtx")
    with pytest.raises(UsageError, match="unknown runtime 'caffe': choose one of onnxruntime, tensorrt, tensorrt-rtx"):
        create_runtime("caffe", bundle)
    with pytest.raises(UsageError, match="has no device 'tpu': choose one of cpu, cuda, tensorrt"):
        create_runtime("onnxruntime", bundle, device="tpu")
    with pytest.raises(UsageError, match="threads must be 1 or more, got 0"):
        create_runtime("onnxruntime", bundle, threads=0)


def test_a_provider_that_is_not_there_is_an_error_with_the_command(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(
        MachineError, match=r"has no CUDAExecutionProvider .*moebius-edge\[gpu\].*the device cpu"
    ):
        create_runtime("onnxruntime", bundle, "cuda")


def test_a_provider_that_does_not_start_is_an_error(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    monkeypatch.setattr(
        onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    )

    class Session:  # what ONNX Runtime gives when CUDA's libraries do not load: a CPU session
        def __init__(self, *args: object, **kwargs: object) -> None: ...
        def get_providers(self) -> list[str]:
            return ["CPUExecutionProvider"]

    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    with (
        pytest.raises(MachineError, match="could not start CUDAExecutionProvider"),
        create_runtime("onnxruntime", bundle, "cuda"),
    ):
        pass


def test_a_missing_package_names_the_command(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: object, **kwargs: object) -> object:
        if name == "onnxruntime":
            raise ImportError("No module named 'onnxruntime'")
        return real(name, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.delitem(sys.modules, "onnxruntime", raising=False)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MachineError, match=r'onnxruntime is missing .*`pip install "moebius-edge\[cpu\]"`'):
        create_runtime("onnxruntime", bundle, "cpu")


def test_a_file_that_is_no_graph_is_one_line_without_the_stack(
    tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    folder = make_toy_bundle(tmp_path / "toy")
    (folder / "denoiser.onnx").write_bytes(b"not a graph")
    with pytest.raises(BundleError) as caught, create_runtime("onnxruntime", Bundle.load(make_manifest_true(folder)), "cpu"):
        pass
    message = str(caught.value)
    assert "denoiser.onnx is no ONNX file" in message and "export the bundle again" in message
    assert "\n" not in message
    assert capfd.readouterr() == ("", "")


def test_a_graph_of_another_component_is_refused(tmp_path: Path) -> None:
    folder = make_toy_bundle(tmp_path / "toy")
    (folder / "vae_decoder.onnx").write_bytes((folder / "vae_encoder.onnx").read_bytes())
    bundle = Bundle.load(make_manifest_true(folder))
    with (
        pytest.raises(BundleError, match=r"has the inputs image, bundle\.json says latent"),
        create_runtime("onnxruntime", bundle, "cpu"),
    ):
        pass


def test_a_failing_node_and_a_lack_of_memory_are_told_apart(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken:
        def __init__(self, text: str) -> None:
            self.text = text

        def run(self, *args: object) -> None:
            raise RuntimeError(self.text)

    with create_runtime("onnxruntime", bundle, "cpu") as runtime:
        text = "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Non-zero status code\nstack"
        monkeypatch.setitem(runtime._sessions, "denoiser", Broken(text))
        with pytest.raises(
            BundleError, match=r"denoiser failed in onnxruntime .* \(Non-zero status code\): run"
        ):
            runtime.run("denoiser", denoiser_feeds(1))
        monkeypatch.setitem(runtime._sessions, "denoiser", Broken("std::bad_alloc"))
        with pytest.raises(MachineError, match="denoiser failed: not enough memory on cpu"):
            runtime.run("denoiser", denoiser_feeds(1))


# --- ONNX Runtime on a GPU, as far as it shows without one ------------------------------------------------


@pytest.mark.parametrize(("device", "provider"), [("cuda", CUDA), ("tensorrt", TENSORRT)])
def test_a_gpu_session_computes_in_bound_buffers(
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
        runtime.run("denoiser", denoiser_feeds(2))
        assert gpu.buffers == allocated, "warming up has allocated what a guided run needs"
        assert set(runtime.info["nodes"]) == set(COMPONENTS)
        assert set(runtime.info["nodes"]["denoiser"]) == {provider}
        assert runtime.info["provider"] == provider and runtime.info["nodes"]["denoiser"][provider] > 5
    assert not runtime._bound and not runtime._sessions


def test_engines_that_must_be_built_first_are_announced(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    FakeGpu(monkeypatch)
    assert create_runtime("onnxruntime", bundle, "cuda").notes == []
    (note,) = create_runtime("onnxruntime", bundle, "tensorrt").notes
    assert "TensorRT builds engines for vae_encoder, denoiser, vae_decoder first" in note
    assert str(bundle.path / "engines") in note


@pytest.mark.parametrize(
    ("target", "device", "said"),
    [
        ("tensorrt", "cpu", "INT8 for tensorrt: on cpu it gives the same pictures slowly; export with --target cpu"),
        ("cpu", "cuda", "INT8 for cpu: on cuda it gives the same pictures slowly; export with --target tensorrt"),
        ("tensorrt", "cuda", None),
        ("cpu", "cpu", None),
    ],
)
def test_an_int8_file_that_is_made_for_something_else_is_announced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, device: str, said: str | None
) -> None:
    FakeGpu(monkeypatch)
    quantised = Bundle.load(call_int8(make_toy_bundle(tmp_path / "toy"), target=target))
    notes = create_runtime("onnxruntime", quantised, device).notes
    assert len(notes) == (said is not None) and (said is None or said in notes[0])


def test_a_gpu_that_is_given_nothing_is_an_error(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGpu(monkeypatch)
    gpu.idle = True
    with pytest.raises(MachineError, match=f"{CUDA} executes no node of vae_encoder"), create_runtime("onnxruntime", bundle, "cuda"):
        pass
    gpu.idle, gpu.left_to_cpu = False, {"Conv"}
    with pytest.raises(MachineError, match="vae_encoder would run 1 Conv on the CPU"), create_runtime("onnxruntime", bundle, "cuda"):
        pass
    gpu.left_to_cpu = {"Gather", "Unsqueeze"}
    with create_runtime("onnxruntime", bundle, "cuda") as runtime:
        assert runtime.info["nodes"]["denoiser"][CPU] >= 2


def test_a_gpu_without_memory_says_so(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    FakeGpu(monkeypatch)
    with create_runtime("onnxruntime", bundle, "cuda") as runtime:

        class Full:
            def run(self, feeds: Arrays, outputs: Sequence[str]) -> Arrays:
                raise RuntimeError("[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Failed to allocate memory for 1 GB")

        monkeypatch.setitem(runtime._bound, "denoiser", Full())
        with pytest.raises(MachineError, match=r"denoiser failed: not enough memory on cuda \(Failed to allocate"):
            runtime.run("denoiser", denoiser_feeds(1))


def test_an_engine_of_another_tensorrt(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    FakeGpu(monkeypatch)
    runtime = create_runtime("onnxruntime", bundle, "tensorrt")
    error = RuntimeError("[ONNXRuntimeError] : 11 : EP_FAIL : TensorRT EP could not deserialize engine from cache: x")
    problem = runtime._problem("cannot load denoiser.onnx", error)
    assert isinstance(problem, MachineError)
    assert f"run `rm -r {bundle.path / 'engines' / 'onnxruntime-'}" in str(problem)
    assert isinstance(create_runtime("onnxruntime", bundle, "cuda")._problem("cannot load denoiser.onnx", error), BundleError)


def test_an_engine_cache_that_cannot_be_made(bundle: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    FakeGpu(monkeypatch)
    (tmp_path / "cache").write_text("a file")
    monkeypatch.setattr("moebius_edge.runtimes.providers.ASSETS", bundle.path.parent)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    runtime = create_runtime("onnxruntime", bundle, "tensorrt")
    with pytest.raises(MachineError, match="cannot make the engine cache .*run `mkdir -p"), runtime:
        pass


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda", "tensorrt"])
def test_a_real_gpu_agrees_with_the_cpu(device: str, tmp_path: Path) -> None:
    bundle = Bundle.load(make_toy_bundle(tmp_path / "toy"))
    feeds = denoiser_feeds(2) | {"sample": np.random.default_rng(0).normal(size=(2, 9, 8, 8)).astype(np.float32)}
    with create_runtime("onnxruntime", bundle, "cpu") as cpu, create_runtime("onnxruntime", bundle, device) as gpu:
        for component, given in (("denoiser", feeds), ("vae_encoder", {"image": image(1)})):
            expected, found = cpu.run(component, given), gpu.run(component, given)
            for name, array in expected.items():
                np.testing.assert_allclose(found[name], array, rtol=1e-4, atol=1e-4)


# --- the toy itself --------------------------------------------------------------------------------------


def test_the_toy_variants_are_what_they_say(tmp_path: Path) -> None:
    folder = make_toy_bundle(tmp_path / "nan", nan_in="vae_decoder")
    with create_runtime("onnxruntime", Bundle.load(folder), "cpu") as runtime:
        assert np.isfinite(runtime.run("vae_encoder", {"image": image()})["latent"]).all()
        assert np.isnan(
            runtime.run("vae_decoder", {"latent": np.ones((1, 4, 8, 8), np.float32)})["image"]
        ).any()
    flip_byte(folder / "denoiser.onnx")
    with pytest.raises(BundleError, match="denoiser.onnx was altered"):
        Bundle.load(folder)
