"""The TensorRT runtime: its host logic on a fake driver and a fake package, then, marked ``gpu``, the real ones."""

from __future__ import annotations

import json
import mmap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_trt import ORIN, OUT_OF_MEMORY, FakeCuda, FakeTensorRT, trt_runtime, write_document, write_engine
from PIL import Image
from toy import decode, encode, make_toy_bundle

from moebius_edge.bundle.bundle import Bundle
from moebius_edge.bundle.manifest import resolved_components
from moebius_edge.cli import main
from moebius_edge.errors import BundleError, MachineError, OutOfMemory, UsageError
from moebius_edge.imaging.pictures import read_picture
from moebius_edge.options import VERBOSE
from moebius_edge.pipeline.inpainter import Inpainter
from moebius_edge.pipeline.loop import denoise
from moebius_edge.runtimes import create_runtime
from moebius_edge.runtimes.base import Arrays, drawn_feeds
from moebius_edge.runtimes.engine_files import make_logger, read_engine
from moebius_edge.runtimes.trt import TrtRuntime, _logger
from moebius_edge.sampling.calls import Sampling
from moebius_edge.sampling.scheduler import DDIM, DPMSolverPP2M
from moebius_edge.system.files import sha256_file

DENOISER = resolved_components(64)["denoiser"]


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return Bundle.load(make_toy_bundle(tmp_path / "toy"))


def feeds(rows: int, seed: int = 0) -> Arrays:
    drawn, timestep = drawn_feeds(DENOISER, rows), np.random.default_rng(seed).integers(0, 1000, rows)
    return drawn | {"sample": drawn["sample"] * np.float32(1 + seed), "timestep": timestep.astype(np.float32)}


def expected(bundle: Bundle, given: Arrays) -> np.ndarray:
    with create_runtime("onnxruntime", bundle, "cpu", 1) as reference:
        return reference.run("denoiser", given)["noise"]


def refuse_to_enter(runtime: TrtRuntime, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message), runtime:
        raise AssertionError("never entered")


def test_every_call_gives_the_graphs_own_numbers(bundle: Bundle) -> None:
    """Through plain launches, a recording, its replays, other shapes, and back: bit for bit, and the caller's own."""
    write_engine(bundle, max_batch=2)
    cuda = FakeCuda()
    runtime, _ = trt_runtime(bundle, cuda)
    with runtime:
        results = []
        for seed, rows in enumerate([2, 2, 2, 4, 1, 1, 1, 2, 2, 2]):
            results.append((runtime.run("denoiser", feeds(rows, seed))["noise"], expected(bundle, feeds(rows, seed))))
        for noise, right in results:
            np.testing.assert_array_equal(noise, right)
        picture = np.random.default_rng(1).uniform(-1, 1, (2, 3, 64, 64)).astype(np.float32)
        latent = runtime.run("vae_encoder", {"image": picture})["latent"]
        np.testing.assert_allclose(latent, encode(picture), atol=1e-6)
        np.testing.assert_allclose(runtime.run("vae_decoder", {"latent": latent})["image"], decode(latent), atol=1e-6)
    assert cuda.left() == []


def test_run_is_onnxruntimes_byte_for_byte(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command, from picture to picture, and what its report says of the runtime."""
    engine = write_engine(bundle)
    cuda = FakeCuda()
    monkeypatch.setattr("moebius_edge.runtimes.trt.load_package", lambda variant: FakeTensorRT(cuda))
    monkeypatch.setattr("moebius_edge.runtimes.trt.Cuda", lambda: cuda)
    picture, mask = tmp_path / "photo.png", tmp_path / "mask.png"
    pixels = np.random.default_rng(5).integers(0, 256, (96, 80, 3), np.uint8)
    Image.fromarray(pixels).save(picture)
    hole = np.zeros((96, 80), np.uint8)
    hole[40:60, 30:50] = 255
    Image.fromarray(hole).save(mask)
    results = []
    for name in ("tensorrt", "onnxruntime"):
        out = tmp_path / f"{name}.png"
        command = ["run", str(picture), str(mask), "-b", str(bundle.path), "-o", str(out), "--json", "--steps", "5"]
        assert main([*command, "--runtime", name]) == 0
        document = json.loads(capsys.readouterr().out)
        results.append((np.asarray(Image.open(out)), document["latency"]["runtime"]))
    np.testing.assert_array_equal(results[0][0], results[1][0])
    assert (results[0][0] != pixels).any()
    assert results[0][1]["provider"] == engine.key.folder and results[0][1]["cuda_graph"] == "recorded"
    assert cuda.left() == []


@pytest.fixture
def rtx(bundle: Bundle) -> Path:
    """The folder of the bundle's engine for TensorRT for RTX."""
    return write_engine(bundle, variant="tensorrt-rtx", gpu="any", compute_capabilities=("8.6", "8.7")).path


def test_tensorrt_for_rtx_records_by_itself(bundle: Bundle, rtx: Path) -> None:
    cuda = FakeCuda()
    runtime, package = trt_runtime(bundle, cuda, "tensorrt-rtx")
    with runtime:
        for seed in range(3):
            given = feeds(2, seed)
            np.testing.assert_array_equal(runtime.run("denoiser", given)["noise"], expected(bundle, given))
        assert "begin_capture" not in cuda.calls
        assert [config.cuda_graph_strategy for config in package.configs] == ["whole"] * 4
        assert runtime.info["cuda_graph"] == "TensorRT's own" and runtime.info["runtime_cache"] == "new"
    assert cuda.left() == [] and (rtx / "runtime-orin.cache").is_file()
    with runtime:
        np.testing.assert_array_equal(runtime.run("denoiser", given)["noise"], expected(bundle, given))
        assert runtime.info["runtime_cache"] == "loaded"
    assert cuda.left() == []


def use_once(bundle: Bundle, environment: str = "driver 580") -> tuple[TrtRuntime, FakeTensorRT]:
    runtime, package = trt_runtime(bundle, FakeCuda(), "tensorrt-rtx")
    package.environment = environment
    with runtime:
        runtime.run("vae_decoder", {"latent": np.zeros((1, 4, 8, 8), np.float32)})
    return runtime, package


def test_what_tensorrt_for_rtx_compiles_is_kept(bundle: Bundle, rtx: Path) -> None:
    """One cache for all engines; it is written when there is more in it, and is not part of what a bundle records."""
    file = rtx / "runtime-orin.cache"
    first, package = use_once(bundle)
    content = file.read_bytes()
    assert content == b"driver 580:image 1,next_sample+next_clean+magnitude 1,next_sample+next_clean+magnitude 2," + (
        b"noise 1,noise 2"
    )
    assert all(config.cache is package.configs[0].cache for config in package.configs) and first.notes == []
    stamp = file.stat().st_mtime_ns
    again, package = use_once(bundle)
    assert again.info["runtime_cache"] == "loaded" and again.notes == []
    assert file.stat().st_mtime_ns == stamp and sorted(p.suffix for p in rtx.iterdir())[0] == ".cache"
    read_engine(rtx).verify("")


@pytest.mark.parametrize("content", [b"driver 570:image 1", b"rubbish", b"driver 580"[:7]])
def test_a_foreign_or_damaged_runtime_cache_is_replaced(bundle: Bundle, rtx: Path, content: bytes) -> None:
    file = rtx / "runtime-orin.cache"
    file.write_bytes(content)
    runtime, _ = use_once(bundle)
    assert runtime.info["runtime_cache"] == "rebuilt"
    (note,) = runtime.notes
    assert note.startswith(f"{file} is damaged, or of another driver, GPU or version: TensorRT compiles its kernels")
    assert file.read_bytes().startswith(b"driver 580:image 1") and use_once(bundle)[0].notes == []


def test_a_runtime_cache_that_cannot_be_kept_is_no_failure(
    bundle: Bundle, rtx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moebius_edge.runtimes.engine_files.os.access", lambda path, mode: False)
    runtime, _ = use_once(bundle)
    assert "is write-protected, so no runtime cache is kept there" in runtime.notes[0]
    assert not list(rtx.glob("*.cache"))
    monkeypatch.undo()
    (rtx / "runtime-orin.cache").mkdir()
    runtime, _ = use_once(bundle)
    assert runtime.info["runtime_cache"].startswith("not written: output ")
    (rtx / "runtime-orin.cache").rmdir()
    victim = tmp_path / "victim"
    victim.write_bytes(b"the user's")
    (rtx / "runtime-orin.cache").symlink_to(victim)
    with pytest.raises(BundleError, match=r"runtime-orin\.cache"):
        use_once(bundle)
    assert victim.read_bytes() == b"the user's"


def test_info_says_what_executes_and_too_many_rows_name_the_option(bundle: Bundle) -> None:
    engine = write_engine(bundle)
    runtime, _ = trt_runtime(bundle, FakeCuda())
    assert runtime.info["provider"] == "" and not runtime.active
    most = r"denoiser takes 2 rows and this call has 6: run .* --max-batch 3"
    with runtime, pytest.raises(BundleError, match=most):
        named = {"name": "tensorrt", "version": "10.3.0", "device": "cuda", "provider": engine.key.folder}
        assert runtime.info == {**named, "gpu": "Orin", "cuda_graph": "recorded"}
        runtime.run("denoiser", feeds(6))


@pytest.mark.parametrize("call", ["allocate", "allocate_host", "create_stream"])
def test_what_was_taken_is_freed_when_memory_runs_out(bundle: Bundle, call: str) -> None:
    write_engine(bundle)
    cuda = FakeCuda()
    runtime, _ = trt_runtime(bundle, cuda)
    cuda.fail[call] = OUT_OF_MEMORY
    refuse_to_enter(runtime, OutOfMemory, "not enough memory on the GPU: close other programs")
    assert cuda.left() == []


def test_a_failing_launch_is_one_line_and_frees_all(bundle: Bundle) -> None:
    write_engine(bundle)
    cuda = FakeCuda()
    runtime, package = trt_runtime(bundle, cuda)
    with runtime:
        package.refuse_launches = True
        with pytest.raises(BundleError, match=r"cannot run denoiser \(the launch was refused\): run .* --force"):
            runtime.run("denoiser", feeds(2))
        package.refuse_launches = False
        cuda.fail["synchronise"] = 700
        with pytest.raises(MachineError, match="cannot run denoiser .*check the GPU with `nvidia-smi`"):
            runtime.run("denoiser", feeds(2))
    assert cuda.left() == []
    cuda.fail.clear()
    with pytest.raises(MachineError, match="cannot run denoiser"), runtime:  # what cannot be freed does not hide it
        cuda.fail.update(dict.fromkeys(("synchronise", "free", "free_host", "destroy_stream", "close"), 700))
        runtime.run("denoiser", feeds(2))


@pytest.mark.parametrize(
    "refusal",
    [
        "the plan is corrupt",
        "The engine plan file is generated on an incompatible device, expecting compute 8.7 got compute 8.9, please re",
        "The engine plan file is not compatible with this version of TensorRT, expecting library version 10.3.0.26",
    ],
)
def test_a_plan_that_tensorrt_refuses(bundle: Bundle, refusal: str) -> None:
    """Its hash is right, so it is TensorRT that finds it wrong, or for another machine, and says so on its log."""
    engine = write_engine(bundle)
    path = engine.plan_path("denoiser")
    path.write_bytes(b"no plan")
    engine.plans["denoiser"].update(sha256=sha256_file(path), bytes=7)
    write_document(engine)
    cuda = FakeCuda()
    runtime, package = trt_runtime(bundle, cuda)
    package.refusal = refusal
    refuse_to_enter(runtime, BundleError, rf"cannot load .*denoiser\.plan \({refusal}\): run .* with --force")
    assert cuda.left() == []


def test_a_plan_that_was_altered_or_cut_is_refused_before_tensorrt_sees_it(bundle: Bundle) -> None:
    engine, cuda = write_engine(bundle), FakeCuda()
    path = engine.plan_path("vae_encoder")
    content = path.read_bytes()
    for damaged, message in ((content[:-9], "has \\d+ bytes, \\d+ are recorded"), (b"x" + content[1:], "was altered")):
        path.write_bytes(damaged)
        runtime, package = trt_runtime(bundle, cuda)
        refuse_to_enter(runtime, BundleError, rf"vae_encoder\.plan {message}.*--engine tensorrt` (with )?--force")
        assert package.engines == [] and cuda.left() == []


def test_an_engine_reads_no_onnx_file(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a bundle that is named, the files are compared where ONNX Runtime will read them, and only there."""
    write_engine(bundle)
    cuda = FakeCuda()
    monkeypatch.setattr("moebius_edge.runtimes.trt.load_package", lambda variant: FakeTensorRT(cuda))
    monkeypatch.setattr("moebius_edge.runtimes.trt.Cuda", lambda: cuda)
    hashed: list[str] = []
    monkeypatch.setattr("moebius_edge.bundle.bundle.sha256_file", lambda path: hashed.append(path.name) or "")
    Inpainter(bundle.path, "tensorrt")
    assert hashed == []
    with pytest.raises(BundleError, match=r"\.onnx was altered"):
        Inpainter(bundle.path, "onnxruntime")
    assert len(hashed) == 1


@pytest.mark.parametrize("call", ["execute_async_v3", "launch_graph"])
def test_memory_that_runs_out_in_a_picture_costs_that_picture_alone(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], call: str
) -> None:
    """One line and no file for the second of three, whoever refused it: TensorRT on its log, or the driver."""
    write_engine(bundle)
    cuda = FakeCuda()
    package = FakeTensorRT(cuda)
    monkeypatch.setattr("moebius_edge.runtimes.trt.load_package", lambda variant: package)
    monkeypatch.setattr("moebius_edge.runtimes.trt.Cuda", lambda: cuda)
    photos, hole = tmp_path / "photos", np.zeros((64, 64), np.uint8)
    photos.mkdir()
    hole[20:40, 20:40] = 255
    for number in (1, 2, 3):
        pixels = np.random.default_rng(number).integers(0, 256, (64, 64, 3), np.uint8)
        Image.fromarray(pixels).save(photos / f"{number}.png")
        Image.fromarray(hole).save(photos / f"{number}_mask.png")

    def read(path: Path) -> Any:
        second = path.name == "2.png"
        package.refuse_launches = second and call == "execute_async_v3"
        package.refusal = "[executor.cpp::run::9] Error Code 1: Cuda Runtime (out of memory)" if second else ""
        cuda.fail = {call: OUT_OF_MEMORY} if second and call == "launch_graph" else {}
        return read_picture(path)

    pictures = {}
    for runtime, code in (("onnxruntime", 0), ("tensorrt", 6)):
        out = tmp_path / runtime
        command = ["run", str(photos), str(photos), "-b", str(bundle.path), "-o", str(out), "--steps", "3", "-j", "1"]
        assert main([*command, "--runtime", runtime, "--device", "cpu" if code == 0 else "cuda"]) == code
        pictures[runtime] = {path.name: np.asarray(Image.open(path)) for path in sorted(out.glob("*.png"))}
        monkeypatch.setattr("moebius_edge.imaging.pictures.read_picture", read)
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "2.png: TensorRT 10.3.0 cannot run" in errors[0] and "not enough memory on the GPU: close other" in errors[0]
    assert errors[1:] == ["error: 2 of 3 done, 1 failed"] and cuda.left() == []
    assert list(pictures["tensorrt"]) == ["1.png", "3.png"]
    for name, picture in pictures["tensorrt"].items():
        np.testing.assert_array_equal(picture, pictures["onnxruntime"][name])


def test_an_engine_of_another_component_is_refused(bundle: Bundle) -> None:
    engine = write_engine(bundle)
    engine.plans["vae_decoder"], engine.plans["vae_encoder"] = engine.plans["vae_encoder"], engine.plans["vae_decoder"]
    write_document(engine)
    message = r"the engine of vae_encoder has .* and should have .*--force"
    refuse_to_enter(trt_runtime(bundle, FakeCuda())[0], BundleError, message)


def test_what_is_missing_names_the_command(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    command = rf"has no TensorRT engine: run `moebius-edge export {bundle.path} --engine tensorrt`"
    refuse_to_enter(trt_runtime(bundle, FakeCuda())[0], BundleError, command)
    with pytest.raises(UsageError, match="runtime tensorrt has no device 'cpu': leave --device out"):
        create_runtime("tensorrt", bundle, device="cpu")
    monkeypatch.setitem(__import__("sys").modules, "tensorrt", None)
    with pytest.raises(MachineError, match=r"package tensorrt is missing .*moebius-edge\[tensorrt\]"):
        create_runtime("tensorrt", bundle)


def test_the_real_package_has_what_the_fake_one_has(tmp_path: Path) -> None:
    """The names, and that it takes a mapped plan, which it refuses here, and lets go of it."""
    trt = pytest.importorskip("tensorrt_rtx", reason="the extra rtx is not installed")
    names = {
        "IRuntimeConfig": "create_runtime_cache set_runtime_cache set_execution_context_allocation_strategy "
        "cuda_graph_strategy dynamic_shapes_kernel_specialization_strategy",
        "IRuntimeCache": "deserialize serialize",
        "ICudaEngine": "create_runtime_config create_execution_context device_memory_size_v2 get_tensor_profile_shape",
        "IExecutionContext": "set_device_memory set_tensor_address set_input_shape get_tensor_shape execute_async_v3",
        "CudaGraphStrategy": "WHOLE_GRAPH_CAPTURE",
        "DynamicShapesKernelSpecializationStrategy": "EAGER",
        "ExecutionContextAllocationStrategy": "USER_MANAGED",
    }
    for owner, members in names.items():
        assert [m for m in members.split() if not hasattr(getattr(trt, owner), m)] == [], owner
    (tmp_path / "x.plan").write_bytes(b"x" * 5000)
    logged: list[str] = []
    runtime = trt.Runtime(make_logger(trt, lambda severity, text: logged.append(text)))
    with (tmp_path / "x.plan").open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as plan:
        assert runtime.deserialize_cuda_engine(plan) is None and any("header.magicTag" in text for text in logged)


def test_what_tensorrt_logs_is_shown_for_verbose_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trt = FakeTensorRT(FakeCuda())
    monkeypatch.delenv(VERBOSE, raising=False)
    _logger(trt).log("Severity.INFO", "silent")
    monkeypatch.setenv(VERBOSE, "1")
    _logger(trt).log("Severity.INFO", "shown")
    assert capsys.readouterr().err == "tensorrt info: shown\n"


# --- a real GPU ------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("variant", ["tensorrt", "tensorrt-rtx"])
def test_a_real_engine_agrees_with_onnxruntime(bundle: Bundle, variant: str) -> None:
    """Build the toy's engines, run each component through recording and replay, compare."""
    from moebius_edge.export import EngineOptions, build_engines
    from moebius_edge.runtimes.cuda import find_gpu

    if find_gpu() is None:
        pytest.skip("no GPU in this machine")
    pytest.importorskip(variant.replace("-", "_"), reason=f"{variant} is not installed")
    options = EngineOptions(variant, max_batch=2)
    build_engines(bundle, options)
    with TrtRuntime(bundle, variant) as runtime, create_runtime("onnxruntime", bundle, "cpu") as reference:
        for seed, rows in enumerate([2, 2, 2, 4, 1, 1, 1]):
            actual, right = (r.run("denoiser", feeds(rows, seed))["noise"] for r in (runtime, reference))
            np.testing.assert_allclose(actual, right, rtol=1e-3, atol=1e-3)
        picture = np.random.default_rng(1).uniform(-1, 1, (2, 3, 64, 64)).astype(np.float32)
        latent = runtime.run("vae_encoder", {"image": picture})["latent"]
        np.testing.assert_allclose(latent, encode(picture), atol=1e-3)
        np.testing.assert_allclose(runtime.run("vae_decoder", {"latent": latent})["image"], decode(latent), atol=1e-3)
        for scheduler in (DDIM(6), DPMSolverPP2M(6)):
            for guidance in (2.0, 1.0, 2.0):
                start = (latent, np.zeros((2, 1, 8, 8), np.float32), latent, Sampling(scheduler, guidance))
                np.testing.assert_allclose(*(denoise(r, *start) for r in (runtime, reference)), rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
def test_the_real_driver() -> None:
    """Memory there and back through a recorded graph."""
    from moebius_edge.runtimes.cuda import Cuda, find_gpu

    if find_gpu() is None:
        pytest.skip("no GPU in this machine")
    cuda = Cuda()
    assert cuda.gpu().memory_bytes > 10**9 and cuda.gpu() != ORIN
    cuda.open()
    stream, device, other = cuda.create_stream(), cuda.allocate(64), cuda.allocate(64)
    there, back = cuda.allocate_host(64), cuda.allocate_host(64)
    cuda.begin_capture(stream)
    cuda.upload(device, there, 64, stream)
    cuda.copy(other, device, 64, stream)
    cuda.download(back, other, 64, stream)
    graph = cuda.end_capture(stream)
    for value in (3, 5):
        there[:] = value
        cuda.launch_graph(graph, stream)
        cuda.synchronise(stream)
        assert (back == value).all()
    cuda.destroy_graph(graph)
    for address in (device, other):
        cuda.free(address)
    for memory in (there, back):
        cuda.free_host(memory)
    cuda.destroy_stream(stream)
    cuda.close()
