"""The TensorRT runtime: its host logic on a fake driver and a fake package, then, marked ``gpu``, the real ones."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from fake_trt import ORIN, OUT_OF_MEMORY, FakeCuda, FakeTensorRT, trt_runtime, write_document, write_engine
from PIL import Image
from toy import decode, encode, make_toy_bundle

from moebius_edge.bundle.bundle import Bundle
from moebius_edge.bundle.manifest import resolved_components
from moebius_edge.cli import main
from moebius_edge.errors import BundleError, MachineError, OutOfMemory, UsageError
from moebius_edge.pipeline.loop import denoise
from moebius_edge.runtimes import create_runtime
from moebius_edge.runtimes.base import Arrays, drawn_feeds
from moebius_edge.runtimes.trt import TrtRuntime
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


def test_tensorrt_for_rtx_records_by_itself(bundle: Bundle) -> None:
    write_engine(bundle, variant="tensorrt-rtx", gpu="any", compute_capabilities=("8.6", "8.7"))
    cuda = FakeCuda()
    runtime, package = trt_runtime(bundle, cuda, "tensorrt-rtx")
    with runtime:
        for seed in range(3):
            given = feeds(2, seed)
            np.testing.assert_array_equal(runtime.run("denoiser", given)["noise"], expected(bundle, given))
        assert "begin_capture" not in cuda.calls
        assert [c.config.cuda_graph_strategy for c in package.contexts] == ["whole"] * 4
        assert runtime.info["cuda_graph"] == "TensorRT's own"
    assert cuda.left() == []


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
    with pytest.raises(MachineError, match="cannot run denoiser"), runtime:  # what cannot be freed does not hide it
        cuda.fail.update(dict.fromkeys(("synchronise", "free", "free_host", "destroy_stream", "close"), 700))
        runtime.run("denoiser", feeds(2))


def test_a_plan_that_tensorrt_refuses(bundle: Bundle) -> None:
    """Its hash is right, so it is TensorRT that finds it wrong, and says so on its log."""
    engine = write_engine(bundle)
    path = engine.plan_path("denoiser")
    path.write_bytes(b"no plan")
    engine.plans["denoiser"].update(sha256=sha256_file(path), bytes=7)
    write_document(engine)
    cuda = FakeCuda()
    message = r"cannot load .*denoiser\.plan .*the plan is corrupt.*--force"
    refuse_to_enter(trt_runtime(bundle, cuda)[0], BundleError, message)
    assert cuda.left() == []


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
