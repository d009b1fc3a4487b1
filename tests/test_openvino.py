"""OpenVINO: the same results as ONNX Runtime, the types it computes in, and compiled models that are kept."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from PIL import Image
from toy import call_int8, flip_byte, make_toy_bundle

from moebius_edge.bundle.bundle import Bundle
from moebius_edge.cli import main
from moebius_edge.errors import BundleError, MachineError, UsageError
from moebius_edge.runtimes import Runtime, auto, create_runtime, onnx_inline
from moebius_edge.runtimes import openvino as module
from moebius_edge.runtimes.base import drawn_feeds
from moebius_edge.system import machine

openvino = pytest.importorskip("openvino", reason="OpenVINO is not installed: pip install moebius-edge[openvino]")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(machine, "gpus", lambda: [])
    return tmp_path / "cache" / "moebius-edge" / "openvino"


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return Bundle.load(make_toy_bundle(tmp_path / "toy"))


def call_half(bundle: Bundle) -> Bundle:
    """The same files, which ``bundle.json`` now says to be in half precision, but for the decoder."""
    path = bundle.path / "bundle.json"
    changes = {"precision": "float16", "float32_islands": {"vae_decoder": "all"}}
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return Bundle.load(bundle.path)


def noise(runtime: Runtime, bundle: Bundle, rows: int = 2) -> np.ndarray:
    with runtime:
        return runtime.run("denoiser", drawn_feeds(bundle.components["denoiser"], rows), ("noise",))["noise"]


def let_the_cpu_have(monkeypatch: pytest.MonkeyPatch, *types: str) -> None:
    real = openvino.Core.get_property

    def ask(core: Any, device: str, name: str) -> Any:
        return [*types, "FP32", "INT8"] if name == "OPTIMIZATION_CAPABILITIES" else real(core, device, name)

    monkeypatch.setattr(openvino.Core, "get_property", ask)


@pytest.mark.parametrize("rows", [1, 2])
def test_it_computes_what_onnx_runtime_does(bundle: Bundle, rows: int) -> None:
    expected = noise(create_runtime("onnxruntime", bundle, "cpu"), bundle, rows)
    runtime = create_runtime("openvino", bundle, "cpu")
    assert np.abs(noise(runtime, bundle, rows) - expected).max() < 1e-5
    assert runtime.notes == [] and runtime.info["precision"]["denoiser"] == "f32"


def test_local_functions_are_written_out_and_float32_is_computed_in_float32() -> None:
    """The bundled model's shallow part has both lambda operators; bfloat16 would be a thousand times as far off."""
    tiny = Bundle.load("tiny", verify=False)
    component, path = tiny.components["denoiser_shallow"], tiny.component_path("denoiser_shallow")
    assert b"LocalLambda" in path.read_bytes() and b"LocalLambda" not in onnx_inline.inline_functions(path)
    feeds, results = drawn_feeds(component, 1), []
    for name in ("onnxruntime", "openvino"):
        runtime = create_runtime(name, tiny, "cpu")
        runtime.paths = {component.name: path}  # type: ignore[attr-defined]
        if name == "openvino":
            runtime._rows = {}  # type: ignore[attr-defined]
        with runtime:
            results.append(runtime.run(component.name, feeds)["noise"])
    assert np.abs(results[0] - results[1]).max() < 2e-5 * np.abs(results[0]).max()


@pytest.mark.parametrize(
    ("types", "expected"), [(("BF16", "FP16"), "bf16"), (("FP16",), "f16"), ((), "f32")], ids=["both", "f16", "neither"]
)
def test_half_precision_is_the_fastest_type_that_the_device_has(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, types: tuple[str, ...], expected: str
) -> None:
    let_the_cpu_have(monkeypatch, *types)
    plain = create_runtime("openvino", bundle, "cpu")
    assert set(plain.info["precision"].values()) == {"f32"} and plain.notes == []
    halved = create_runtime("openvino", call_half(bundle), "cpu")
    assert halved.info["precision"] == {"vae_encoder": expected, "denoiser": expected, "vae_decoder": "f32"}
    assert len(halved.notes) == (expected == "f32")
    assert all("neither in bfloat16 nor in float16: OpenVINO takes float32" in note for note in halved.notes)


@pytest.mark.parametrize("rest", ["float16", "float32"])
def test_the_rest_of_an_int8_bundle_has_the_type_that_it_names(bundle: Bundle, rest: str) -> None:
    runtime = create_runtime("openvino", Bundle.load(call_int8(bundle.path, rest=rest)))
    assert (runtime.info["precision"]["denoiser"] == "f32") == (rest == "float32")


WAVES = """<ir_version: 9, opset_import: ["": 20]>
waves (float[N] timestep) => (float[N, 64] noise) <int64[1] axis = {1}> {
    column = Unsqueeze(timestep, axis) [product] argument = Mul(column, frequencies) c = Cos(argument) s = Sin(argument)
    both = Concat <axis = 1> (c, s) mixed = MatMul(both, same) noise = MatMul(mixed, same)
}"""


@pytest.mark.parametrize("precise", [True, False])
def test_sines_of_a_timestep_are_of_that_timestep(precise: bool) -> None:
    """In bfloat16 850 is 848, and the arguments of its sines are off by up to 2; without the function they are."""
    core, frequencies = module.shared_core(), np.exp(-np.arange(32) * np.log(1e4) / 32).astype(np.float32)
    if "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("this processor does not compute in bfloat16")
    graph = onnx.parser.parse_model(WAVES)
    arrays = {"frequencies": frequencies[None], "same": np.eye(64, dtype=np.float32)}
    graph.graph.initializer.extend(onnx.numpy_helper.from_array(value, name) for name, value in arrays.items())
    model = core.read_model(graph.SerializeToString())
    model.reshape({"timestep": [2]})
    if precise:
        module.keep_timestep_precise(model)
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "bf16"})
    (noise,) = compiled([np.array([850, 333], np.float32)]).values()
    arguments = np.outer([850, 333], frequencies)
    error = np.abs(noise - np.concatenate([np.cos(arguments), np.sin(arguments)], 1)).max(1)
    assert (error < 0.02).tolist() == [precise, precise]


def test_what_has_no_kernel_in_half_precision_is_computed_in_float32(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As OpenVINO 2026.4 has none for an INT8 file whose rest is float16, which is what an Arm processor has."""
    expected, plain = noise(create_runtime("openvino", bundle), bundle), openvino.Core.compile_model

    def compile_model(core: Any, model: Any, device: str, config: dict[str, Any]) -> Any:
        if config["INFERENCE_PRECISION_HINT"] == "f16":
            raise RuntimeError(
                "Exception from src/a.cpp:1:\nCheck 'x' failed\nArguments do not have the same element type"
            )
        return plain(core, model, device, config)

    monkeypatch.setattr(openvino.Core, "compile_model", compile_model)
    let_the_cpu_have(monkeypatch, "FP16")
    runtime = create_runtime("openvino", call_half(bundle))
    assert np.array_equal(noise(runtime, bundle), expected)
    assert set(runtime.info["precision"].values()) == {"f32"}
    reason = "Arguments do not have the same element type"
    assert f"OpenVINO cannot compile denoiser in f16 here ({reason}): it takes float32" in runtime.notes


def test_a_processor_without_avx512(bundle: Bundle, tmp_path: Path) -> None:
    """oneDNN, which computes for OpenVINO, is told to leave newer instructions alone, in a process of its own."""
    code = """
import numpy, sys
from moebius_edge.bundle.bundle import Bundle
from moebius_edge.runtimes import create_runtime
from moebius_edge.runtimes.base import drawn_feeds
bundle = Bundle.load(sys.argv[1])
with create_runtime("openvino", bundle, "cpu", 1) as runtime:
    numpy.save(sys.argv[2], runtime.run("denoiser", drawn_feeds(bundle.components["denoiser"], 2))["noise"])
"""
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    arguments = [sys.executable, "-c", code, str(bundle.path), str(tmp_path / "noise.npy")]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    expected = noise(create_runtime("onnxruntime", bundle, "cpu"), bundle)
    assert np.abs(np.load(tmp_path / "noise.npy") - expected).max() < 1e-5


def test_threads_are_the_cores_that_the_process_may_use(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moebius_edge.runtimes.base.available_cores", lambda: 1)  # as in a container with a quota
    runtime = create_runtime("openvino", bundle)
    asked, plain = [], openvino.Core.compile_model

    def compile_model(core: Any, model: Any, device: str, config: dict[str, Any]) -> Any:
        compiled = plain(core, model, device, config)
        asked.append(compiled.get_property("INFERENCE_NUM_THREADS"))
        return compiled

    monkeypatch.setattr(openvino.Core, "compile_model", compile_model)
    noise(runtime, bundle)
    assert runtime.info["threads"] == 1 and set(asked) == {1}
    assert create_runtime("openvino", bundle, threads=3).info["threads"] == 3
    with pytest.raises(UsageError, match="threads must be 1 or more, got 0"):
        create_runtime("openvino", bundle, threads=0)


# --- compiled models that are kept -------------------------------------------------------------------------------


def test_a_model_is_compiled_once_for_a_number_of_rows(bundle: Bundle, cache: Path) -> None:
    first, again = create_runtime("openvino", bundle), create_runtime("openvino", bundle)
    before = noise(first, bundle, 1)
    with again:
        assert again.info["from_cache"] == {"vae_encoder of 1": True, "denoiser of 2": True, "vae_decoder of 1": True}
    assert np.array_equal(noise(again, bundle, 1), before)
    assert sorted(path.name.rpartition("-")[0] for path in cache.iterdir()) == [
        *("denoiser-1", "denoiser-2", "vae_decoder-1", "vae_encoder-1")
    ]


def test_other_weights_types_and_versions_have_other_models(
    bundle: Bundle, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compiled() -> int:
        noise(create_runtime("openvino", Bundle.load(bundle.path)), bundle)
        return len(list(cache.iterdir()))

    assert compiled() == 3
    call_half(bundle)
    assert compiled() == 5, "the decoder is in float32 as it was"
    monkeypatch.setattr(openvino, "get_version", lambda: "2027.1")
    assert compiled() == 8
    toy = Bundle.load(make_toy_bundle(tmp_path / "other", distilled_guidance=3.0))
    with create_runtime("openvino", toy) as runtime:
        assert runtime.info["from_cache"]["denoiser of 1"] is False


def test_a_file_that_is_not_the_bundles_is_compiled_and_not_kept(bundle: Bundle, cache: Path) -> None:
    path = bundle.component_path("vae_encoder")
    path.write_bytes(path.read_bytes().replace(b"blocks", b"BLOCKS"))
    noise(create_runtime("openvino", bundle), bundle)
    assert not any(path.name.startswith("vae_encoder") for path in cache.iterdir())


@pytest.mark.parametrize("kind", ["flipped", "cut", "empty", "foreign"])
def test_a_damaged_or_foreign_model_is_compiled_again(bundle: Bundle, cache: Path, kind: str) -> None:
    before = noise(create_runtime("openvino", bundle), bundle)
    (path,) = cache.glob("denoiser-2-*")
    whole = path.read_bytes()
    foreign = b"made by another program" * 100
    damaged = {"cut": whole[:-9], "empty": b"", "foreign": hashlib.sha256(foreign).hexdigest().encode() + foreign}
    path.write_bytes(damaged.get(kind, whole))
    if kind == "flipped":
        flip_byte(path)
    runtime = create_runtime("openvino", bundle)
    assert np.array_equal(noise(runtime, bundle), before)
    (note,) = runtime.notes
    assert note.startswith(f"the compiled model {path} is not usable (") and note.endswith("it is compiled again")
    again = create_runtime("openvino", bundle)
    noise(again, bundle)
    assert again.notes == [], "it was replaced"


def test_without_a_place_for_them_models_are_compiled_each_time(bundle: Bundle, cache: Path) -> None:
    cache.parents[1].write_text("a file where the folder should be")
    runtime = create_runtime("openvino", bundle)
    noise(runtime, bundle)
    (note,) = runtime.notes
    assert note.startswith(f"compiled models are not kept in {cache} (") and "each start compiles them again" in note


def test_two_processes_share_the_cache(bundle: Bundle, cache: Path, tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), "red").save(tmp_path / "image.png")
    Image.new("L", (64, 64), 255).save(tmp_path / "mask.png")
    command = [sys.executable, "-m", "moebius_edge", "run", "image.png", "mask.png", "-b", str(bundle.path)]
    command += ["--runtime", "openvino", "--steps", "2", "-o"]
    both = [subprocess.Popen([*command, f"{n}.png"], cwd=tmp_path, env=os.environ, text=True, stderr=subprocess.PIPE,
                             stdout=subprocess.PIPE) for n in "ab"]  # fmt: skip
    for process in both:
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0 and "not usable" not in err, err
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert len(list(cache.iterdir())) == 3


# --- what is missing, and what auto takes ------------------------------------------------------------------------


def test_a_missing_package_names_the_command(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    Image.new("L", (64, 64), 255).save(tmp_path / "mask.png")
    mask = str(tmp_path / "mask.png")
    arguments = ["run", mask, mask, "-b", str(bundle.path), "--runtime", "openvino", "-o", str(tmp_path / "o.png")]
    assert main(arguments) == 3
    err = capsys.readouterr().err
    assert "the package openvino is missing" in err and 'run `pip install "moebius-edge[openvino]"`' in err


def test_a_device_that_is_not_there(bundle: Bundle) -> None:
    with pytest.raises(MachineError, match=r"OpenVINO .* finds no npu here, only .*CPU.*: install the driver"):
        create_runtime("openvino", bundle, "npu")
    with pytest.raises(UsageError, match="runtime openvino has no device 'cuda': choose one of cpu, gpu, npu"):
        module.OpenVinoRuntime(bundle.components, bundle.paths, "cuda")
    assert create_runtime("openvino", bundle, "auto").info["device"] == "cpu"


def test_auto_takes_it_on_a_cpu_and_says_so(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    real = [replace(c, problem=auto._openvino_problem) if c.runtime == "openvino" else c for c in auto.CANDIDATES]
    monkeypatch.setattr(auto, "CANDIDATES", tuple(real))

    def chosen() -> tuple[str, str]:
        runtime = create_runtime("auto", Bundle.load(bundle.path))
        assert runtime.report()["selection"]["runtime"] == runtime.info["name"]
        return runtime.info["name"], " ".join(runtime.notes)

    fastest = "openvino on cpu is the fastest that works here"
    rounding = f"{fastest} (it rounds otherwise than onnxruntime, in which the gate was taken"
    assert chosen() == ("openvino", f"{rounding})")
    call_half(bundle)
    assert chosen() == ("openvino", f"{rounding}, and in bfloat16 where the CPU has it)")
    call_int8(bundle.path)
    assert chosen()[0] == "openvino"
    path = bundle.path / "bundle.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "gate": {"psnr_db": 50.0, "runtime": "openvino"}}))
    assert chosen() == ("openvino", "")
    monkeypatch.setitem(sys.modules, "openvino", None)
    assert chosen()[0] == "onnxruntime"


def test_a_signal_after_two_runtimes_does_not_end_the_process(bundle: Bundle) -> None:
    """Cores that live at the same time leave a stack for signals that is freed: the kernel then kills the process."""
    first, second = create_runtime("openvino", bundle), create_runtime("openvino", bundle)
    noise(first, bundle)
    del first
    noise(second, bundle)
    del second
    gc.collect()
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)


def test_a_graph_that_is_not_what_the_bundle_says(bundle: Bundle) -> None:
    path = bundle.component_path("vae_encoder")
    path.write_bytes(path.read_bytes().replace(b"latent", b"LATENT"))
    with pytest.raises(BundleError, match="has the outputs LATENT, bundle.json says latent"):
        noise(create_runtime("openvino", bundle), bundle)
