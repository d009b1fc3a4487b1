"""Sampling with the latents on the device, on the fake driver, against the same in numpy; and what it carries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_trt import NOT_PERMITTED, FakeCuda, FakeTensorRT, write_engine
from toy import expected_latent, make_toy_bundle

from moebius_edge.bundle.bundle import Bundle
from moebius_edge.errors import BundleError, MachineError
from moebius_edge.metrics.trajectory import run_trajectory
from moebius_edge.pipeline.inpainter import denoise
from moebius_edge.pipeline.latency import StageTimer
from moebius_edge.pipeline.loop import Step
from moebius_edge.runtimes import create_runtime
from moebius_edge.runtimes.latent_loop import guidance_rows, update_component
from moebius_edge.runtimes.trt import TrtRuntime
from moebius_edge.sampling.guidance import Interval
from moebius_edge.sampling.scheduler import DDIM, SCHEDULERS, DPMSolverPP2M, Scheduler


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return Bundle.load(make_toy_bundle(tmp_path / "toy"))


def runtime_on(
    bundle: Bundle, cuda: FakeCuda, max_batch: int = 3, flavour: str = "tensorrt"
) -> tuple[TrtRuntime, FakeTensorRT]:
    rtx = {"flavour": flavour, "gpu": "any"} if flavour == "tensorrt-rtx" else {}
    write_engine(bundle, max_batch, **rtx)
    package = FakeTensorRT(cuda, rtx=bool(rtx))
    return TrtRuntime(bundle, flavour, cuda=cuda, package=package), package  # type: ignore[arg-type]


def start(batch: int, seed: int = 0, size: int = 8) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Latents, mask and masked latents, another of each for every picture."""
    draw = np.random.default_rng(seed)
    latents, masked = draw.normal(size=(2, batch, 4, size, size)).astype(np.float32)
    mask = (draw.random((batch, 1, size, size)) < 0.4).astype(np.float32)
    return latents, mask, masked * (1 - mask)


def latents_of(
    runtime: Any,
    given: tuple[Any, ...],
    scheduler: Scheduler,
    guidance: float,
    interval: Interval | None = None,
    cache_interval: int = 1,
) -> list[np.ndarray]:
    steps = denoise(runtime, *given, scheduler, guidance, interval=interval, cache_interval=cache_interval)
    return [step.latent for step in steps]


def spoil(package: FakeTensorRT, call: int, value: float) -> None:
    """Put ``value`` into the last row of what the denoiser predicts at its ``call``-th call."""
    engine = next(c._engine for c in package.contexts if "timestep" in c._engine.inputs)
    compute, calls = engine.compute, []

    def spoilt(feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        calls.append(1)
        noise = compute(feeds)["noise"].copy()
        if len(calls) == call:
            noise[-1, 2, 3, 4] = value
        return {"noise": noise}

    engine.compute = spoilt


# --- the numbers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flavour", ["tensorrt", "tensorrt-rtx"])
def test_every_latent_is_numpys_at_any_batch_guidance_and_sampler(bundle: Bundle, flavour: str) -> None:
    """On one runtime, one after another, so that nothing of a batch is left over in the next.

    DDIM is two products and a sum, in the same order on both sides, and so bit for bit the same here. DPM-Solver's
    numbers are gathered differently, which rounds differently.
    """
    runs = [(1, 2.0), (1, 2.0), (3, 2.0), (1, 1.0), (2, 0.0), (3, 1.0), (2, 3.5), (1, 2.0)]
    with runtime_on(bundle, FakeCuda(), flavour=flavour)[0] as runtime, create_runtime("onnxruntime", bundle, "cpu", 1) as reference:
        for name, tolerance in (("ddim", 0.0), ("dpm++2m", 2e-5)):
            for seed, (batch, guidance) in enumerate(runs):
                given, sampler = start(batch, seed), SCHEDULERS[name]
                made = latents_of(runtime, given, sampler(7, 0.9), guidance)
                wanted = latents_of(reference, given, sampler(7, 0.9), guidance)
                assert len(made) == 6
                np.testing.assert_allclose(made, wanted, rtol=0, atol=tolerance)


@pytest.mark.parametrize("flavour", ["tensorrt", "tensorrt-rtx"])
def test_guidance_on_an_interval_is_numpys_too(bundle: Bundle, flavour: str) -> None:
    """Rows come and go on the way, with all that the sampler remembers; the next picture starts as it should."""
    intervals = [(0, 500), (500, 1000), (200, 800), (0, 0), (0, 1000), (300, 301), (500, 1000)]
    with runtime_on(bundle, FakeCuda(), flavour=flavour)[0] as runtime, create_runtime("onnxruntime", bundle, "cpu", 1) as reference:
        for name, tolerance in (("ddim", 0.0), ("dpm++2m", 2e-5)):
            for seed, interval in enumerate(intervals):
                given, sampler = start(1 + seed % 3, seed), SCHEDULERS[name]
                made = latents_of(runtime, given, sampler(10), 3.0, interval)
                wanted = latents_of(reference, given, sampler(10), 3.0, interval)
                np.testing.assert_allclose(made, wanted, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", sorted(SCHEDULERS))
@pytest.mark.parametrize("steps", [1, 2, 3, 20])
def test_it_ends_where_a_right_sampler_ends(bundle: Bundle, name: str, steps: int) -> None:
    given = start(2)
    with runtime_on(bundle, FakeCuda())[0] as runtime:
        *_, last = denoise(runtime, *given, SCHEDULERS[name](steps), 2.0)
    np.testing.assert_allclose(last.latent, expected_latent(given[1], given[2], 2.0), rtol=0, atol=2e-3)
    assert last.latent.dtype == np.float32 and last.latent.flags["C_CONTIGUOUS"]


def test_a_trajectory_keeps_every_latent(bundle: Bundle) -> None:
    arguments: dict[str, Any] = {"steps": 5, "guidance": 2.0, "on_step": lambda done, total: None}
    made, wanted = (
        run_trajectory(r, **arguments) for r in (runtime_on(bundle, FakeCuda())[0], create_runtime("onnxruntime", bundle, "cpu", 1))
    )
    np.testing.assert_array_equal(made.latents, wanted.latents)
    np.testing.assert_array_equal(made.image, wanted.image)


def test_rows_of_a_picture() -> None:
    cases = ((4, 2, [0, 1, 0, 1], [2, 3, 2, 3]), (2, 1, [0, 0], [1, 1]), (2, 2, [0, 1], [0, 1]))
    for rows, batch, first, last in cases:
        made = guidance_rows(rows, batch)
        assert (made["unconditional"].tolist(), made["conditional"].tolist()) == (first, last)
        assert {a.dtype for a in made.values()} == {np.dtype(np.int32)}


@pytest.fixture
def deep(tmp_path: Path) -> Bundle:
    return Bundle.load(make_toy_bundle(tmp_path / "deep", deep=True))


@pytest.mark.parametrize("flavour", ["tensorrt", "tensorrt-rtx"])
def test_reused_deep_features_are_numpys_too(deep: Bundle, flavour: str) -> None:
    """Whole and shallow calls take turns, rows come and go between them, and pictures with and without reuse follow."""
    runs = [(1, 3, None), (2, 2, (0, 500)), (1, 1, None), (3, 3, (200, 800)), (1, 100, None), (1, 3, (500, 1000))]
    with runtime_on(deep, FakeCuda(), flavour=flavour)[0] as runtime, create_runtime("onnxruntime", deep, "cpu", 1) as reference:
        for name, tolerance in (("ddim", 0.0), ("dpm++2m", 2e-5)):
            for seed, (batch, cache, interval) in enumerate(runs):
                given, sampler = start(batch, seed), SCHEDULERS[name]
                made = latents_of(runtime, given, sampler(10), 3.0, interval, cache)
                wanted = latents_of(reference, given, sampler(10), 3.0, interval, cache)
                np.testing.assert_allclose(made, wanted, rtol=0, atol=tolerance)
                whole = latents_of(reference, given, sampler(10), 3.0, interval)
                assert (np.abs(np.subtract(made, whole)).max() > 0.01) == (cache > 1), "the feature's age must show"


def test_the_shallow_part_runs_by_itself_too(deep: Bundle) -> None:
    """In the denoiser's buffers, on the device and on the host."""
    draw = np.random.default_rng(0)
    cuda = FakeCuda()
    with runtime_on(deep, cuda)[0] as runtime, create_runtime("onnxruntime", deep, "cpu", 1) as reference:
        for rows in (2, 2, 1, 6):
            feeds = {
                "sample": draw.normal(size=(rows, 9, 8, 8)).astype(np.float32),
                "timestep": draw.integers(0, 1000, rows).astype(np.float32),
                "branch": draw.integers(0, 2, rows),
                "deep": draw.normal(size=(rows, 4, 8, 8)).astype(np.float32),
            }
            before = cuda.bytes_down
            noise, right = (r.run("denoiser_shallow", feeds)["noise"] for r in (runtime, reference))
            assert cuda.bytes_down - before == noise.nbytes
            np.testing.assert_array_equal(noise, right)
        with pytest.raises(BundleError, match=r"denoiser_shallow takes 6 rows and this call has 8: .* --max-batch 4"):
            runtime.run("denoiser_shallow", {n: np.resize(a, (8, *a.shape[1:])) for n, a in feeds.items()})
        steps = denoise(runtime, *start(1), DDIM(3), 2.0, cache_interval=2)
        next(steps)
        runtime.run("denoiser_shallow", feeds)
        with pytest.raises(RuntimeError, match="latents are gone"):
            next(steps)
    assert cuda.left() == []


# --- what travels, and how it is launched -----------------------------------------------------------------


@pytest.mark.parametrize(("guidance", "batch", "rows"), [(2.0, 1, 2), (1.0, 1, 1), (2.0, 3, 6)])
@pytest.mark.parametrize("resolution", [64, 512])
def test_between_steps_only_numbers_travel(
    tmp_path: Path, resolution: int, guidance: float, batch: int, rows: int
) -> None:
    """A timestep and six coefficients a row go up, one number a row comes down, whatever the picture's size."""
    bundle = Bundle.load(make_toy_bundle(tmp_path / "toy", resolution))
    cuda = FakeCuda()
    seen = []
    with runtime_on(bundle, cuda)[0] as runtime:
        for _ in denoise(runtime, *start(batch, size=resolution // 8), DDIM(6), guidance):
            seen.append((cuda.bytes_up, cuda.bytes_down))
    assert set(np.diff(seen[:-1], axis=0).flatten().tolist()) == {28 * rows, 4 * rows}
    plane = 4 * (resolution // 8) ** 2
    first_up = rows * (13 * plane + 8 + 4 + 4 + 28)  # sample and a clean prediction of zeros; branch, indices; a step
    assert seen[0] == (first_up, 4 * rows)
    assert np.subtract(seen[-1], seen[-2]).tolist() == [28 * rows, 4 * rows + rows * 9 * plane]


def test_a_step_becomes_one_launch(bundle: Bundle) -> None:
    cuda = FakeCuda()
    with runtime_on(bundle, cuda)[0] as runtime:
        assert runtime.info["cuda_graph"] == "not recorded"
        calls = []
        for _ in denoise(runtime, *start(1), DDIM(6), 2.0):
            calls.append(dict(cuda.calls))
        assert runtime.info["cuda_graph"] == "recorded"
        assert "begin_capture" not in calls[0] and cuda.calls["begin_capture"] == 1
        changed = {name for name in calls[-2] if calls[-2][name] != calls[1][name]}
        assert changed == {"launch_graph", "synchronise"} and cuda.calls["launch_graph"] == 5
        latents_of(runtime, start(1), DPMSolverPP2M(4), 3.0)
        assert cuda.calls["begin_capture"] == 1 and cuda.calls["launch_graph"] == 9, "another sampler, the same graph"
        latents_of(runtime, start(2), DDIM(4), 2.0)
        assert cuda.calls["begin_capture"] == 2 and cuda.calls["destroy_graph"] == 1
        latents_of(runtime, start(1), DDIM(1), 2.0)
        assert cuda.calls["destroy_graph"] == 2 and runtime.info["cuda_graph"] == "not recorded"
    assert cuda.left() == []


@pytest.mark.parametrize(("interval", "rows"), [((500, 1000), (2, 1)), ((0, 500), (1, 2))])
def test_where_guidance_begins_or_ends_no_latent_travels(
    bundle: Bundle, interval: Interval, rows: tuple[int, int]
) -> None:
    """Branches and row numbers go up once, and each part of the trajectory is recorded for itself."""
    cuda, seen = FakeCuda(), []
    with runtime_on(bundle, cuda)[0] as runtime:
        for _ in denoise(runtime, *start(1), DDIM(10), 2.0, interval=interval):
            seen.append((cuda.bytes_up, cuda.bytes_down, cuda.calls.get("launch_graph", 0)))
        assert cuda.calls["begin_capture"] == 2 and cuda.calls["destroy_graph"] == 1
    changes = np.diff(seen[:-1], axis=0).tolist()
    step = [[28 * n, 4 * n, 1] for n in rows]
    first = [step[1][0] + 16 * rows[1], step[1][1], 0]
    assert changes == [step[0]] * 4 + [first] + [step[1]] * 3
    assert cuda.left() == []


def test_whole_and_shallow_steps_become_a_launch_each_and_the_feature_does_not_travel(deep: Bundle) -> None:
    cuda, seen = FakeCuda(), []
    with runtime_on(deep, cuda)[0] as runtime:
        for _ in denoise(runtime, *start(1), DDIM(9), 2.0, cache_interval=3):  # W..W..W..
            seen.append((cuda.bytes_up, cuda.bytes_down, cuda.calls.get("launch_graph", 0)))
        assert np.diff(seen[:-1], axis=0).tolist() == [[56, 8, n] for n in (0, 1, 1, 1, 1, 1, 1)]
        assert cuda.calls["begin_capture"] == 2 and "destroy_graph" not in cuda.calls
        latents_of(runtime, start(1), DDIM(4), 2.0, cache_interval=4)
        assert cuda.calls["launch_graph"] == 7 + 4 and cuda.calls["begin_capture"] == 2, "recorded once for all"
    assert cuda.left() == []


def test_another_use_of_the_denoiser_voids_the_graph(bundle: Bundle) -> None:
    """Between two pictures it has other shapes, and then again the first ones: the graph of before is no good."""
    cuda = FakeCuda()
    with runtime_on(bundle, cuda)[0] as runtime, create_runtime("onnxruntime", bundle, "cpu", 1) as reference:
        given = start(1)
        wanted = latents_of(reference, given, DDIM(4), 2.0)
        for rows in (2, 1, 2):
            np.testing.assert_array_equal(latents_of(runtime, given, DDIM(4), 2.0), wanted)
            sample = np.zeros((rows, 9, 8, 8), np.float32)
            feeds = {"sample": sample, "timestep": sample[:, 0, 0, 0], "branch": np.zeros(rows, np.int64)}
            noise, right = (r.run("denoiser", feeds)["noise"] for r in (runtime, reference))
            np.testing.assert_array_equal(noise, right)
        assert cuda.calls["begin_capture"] == 2


def test_recording_that_fails_is_told_and_changes_no_result(bundle: Bundle) -> None:
    cuda = FakeCuda()
    cuda.fail["end_capture"] = NOT_PERMITTED
    with runtime_on(bundle, cuda)[0] as runtime, create_runtime("onnxruntime", bundle, "cpu", 1) as reference:
        made, wanted = (latents_of(r, start(1), DDIM(5), 2.0) for r in (runtime, reference))
        np.testing.assert_array_equal(made, wanted)
        assert runtime.info["cuda_graph"].startswith("failed: end_capture failed")
        assert cuda.calls["begin_capture"] == 1
    assert cuda.left() == []


def test_one_entry_a_call_in_the_latency_report(bundle: Bundle) -> None:
    timer = StageTimer()
    with runtime_on(bundle, FakeCuda())[0] as runtime:
        list(denoise(runtime, *start(1), DDIM(5), 2.0, timer))
    assert timer.summary()["denoise"]["count"] == 5


# --- what goes wrong --------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize(
    ("call", "value", "what"),
    [(1, np.nan, "NaN"), (2, np.nan, "NaN"), (5, np.inf, "an infinite value"), (4, -np.inf, "an infinite value")],
)
def test_a_noise_that_is_not_finite_names_its_step(
    bundle: Bundle, guidance: float, call: int, value: float, what: str
) -> None:
    runtime, package = runtime_on(bundle, FakeCuda())
    done: list[Step] = []
    with runtime:
        spoil(package, call, value)
        timestep = DDIM(5).timesteps[call - 1]
        with pytest.raises(BundleError, match=rf"denoiser returned {what}.* at step {call} of 5 \(t={timestep}\)"):
            for step in denoise(runtime, *start(2), DDIM(5), guidance):
                done.append(step)
        assert len(done) == call - 1
        assert np.isfinite(latents_of(runtime, start(2), DDIM(5), guidance)).all(), "the next batch is not spoilt"


def test_a_latent_is_there_until_the_next_step_and_the_last_one_for_ever(bundle: Bundle) -> None:
    with runtime_on(bundle, FakeCuda())[0] as runtime:
        steps = list(denoise(runtime, *start(1), DDIM(3), 2.0))
        with pytest.raises(RuntimeError, match="the latent of step 2 is gone: read it before the next step"):
            _ = steps[1].latent
    assert steps[-1].latent.shape == (1, 4, 8, 8)


def test_two_batches_at_a_time_are_refused(bundle: Bundle) -> None:
    zeros = np.zeros((1, 9, 8, 8), np.float32)
    with runtime_on(bundle, FakeCuda())[0] as runtime:
        first, second = (denoise(runtime, *start(1), DDIM(3), 2.0) for _ in range(2))
        kept = next(first)
        next(second)
        for use in (lambda: kept.latent, lambda: next(first)):
            with pytest.raises(RuntimeError, match="latents are gone: another call has used the denoiser's buffers"):
                use()
        assert len(list(second)) == 2
        third = denoise(runtime, *start(1), DDIM(3), 2.0)
        next(third)
        runtime.run("denoiser", {"sample": zeros, "timestep": zeros[:, 0, 0, 0], "branch": np.zeros(1, np.int64)})
        with pytest.raises(RuntimeError, match="latents are gone"):
            next(third)
        kept = next(denoise(runtime, *start(1), DDIM(3), 2.0))
    with pytest.raises(RuntimeError, match="latents are gone"):
        _ = kept.latent
    with pytest.raises(RuntimeError, match="TrtRuntime is not active: call keep_latents inside"):
        next(denoise(runtime, *start(1), DDIM(3), 2.0))


@pytest.mark.parametrize(("max_batch", "interval"), [(1, None), (2, (0, 500))])  # three rows at first fit the second
def test_more_pictures_than_the_engine_takes_names_the_option(
    bundle: Bundle, max_batch: int, interval: Interval | None
) -> None:
    most = rf"denoiser takes {2 * max_batch} rows and this call has 6: run .* --max-batch 3"
    with runtime_on(bundle, FakeCuda(), max_batch)[0] as runtime, pytest.raises(BundleError, match=most):
        latents_of(runtime, start(3), DDIM(4), 2.0, interval)


@pytest.mark.parametrize(("call", "first"), [("copy", 0), ("upload", 0), ("synchronise", 2), ("launch_graph", 2)])
def test_a_driver_that_fails_is_one_line_and_frees_all(bundle: Bundle, call: str, first: int) -> None:
    cuda = FakeCuda()
    with runtime_on(bundle, cuda)[0] as runtime:
        steps = denoise(runtime, *start(1), DDIM(5), 2.0)
        for _ in range(first):
            next(steps)
        cuda.fail[call] = 700
        with pytest.raises(MachineError, match=r"cannot (run denoiser|start sampling) .*the GPU with `nvidia-smi`"):
            next(steps)
    assert cuda.left() == []


def test_an_update_of_other_tensors_is_refused(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime, _ = runtime_on(bundle, FakeCuda())
    monkeypatch.setattr("moebius_edge.runtimes.trt.update_component", lambda size: update_component(size + 1))
    with pytest.raises(BundleError, match=r"the engine of update has .* and should have .*--force"), runtime:
        raise AssertionError("never entered")
