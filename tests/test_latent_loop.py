"""Sampling with the latents on the device, on the fake driver, against the same in numpy; and what it carries."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_trt import NOT_PERMITTED, FakeCuda, FakeTensorRT, trt_runtime, write_engine
from toy import expected_latent, make_toy_bundle

from moebius_edge.bundle.bundle import Bundle
from moebius_edge.errors import BundleError, MachineError, OutOfMemory
from moebius_edge.pipeline.latency import StageTimer
from moebius_edge.pipeline.loop import Step, denoise
from moebius_edge.pipeline.presets import preset_settings
from moebius_edge.runtimes import Runtime, create_runtime
from moebius_edge.runtimes.base import drawn_feeds
from moebius_edge.runtimes.latent_loop import guidance_rows, update_component
from moebius_edge.runtimes.trt import TrtRuntime
from moebius_edge.sampling.calls import Sampling
from moebius_edge.sampling.guidance import Interval
from moebius_edge.sampling.scheduler import DDIM, SCHEDULERS, DPMSolverPP2M

Start = tuple[np.ndarray, np.ndarray, np.ndarray]
TOLERANCES = {"ddim": 0.0, "dpm++2m": 2e-5}


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return Bundle.load(make_toy_bundle(tmp_path / "toy"))


@pytest.fixture
def deep(tmp_path: Path) -> Bundle:
    return Bundle.load(make_toy_bundle(tmp_path / "deep", deep=True))


def on_gpu(
    bundle: Bundle, cuda: FakeCuda, max_batch: int = 3, variant: str = "tensorrt"
) -> tuple[TrtRuntime, FakeTensorRT]:
    write_engine(bundle, max_batch, **({"variant": variant, "gpu": "any"} if variant == "tensorrt-rtx" else {}))
    return trt_runtime(bundle, cuda, variant)


def start(batch: int, seed: int = 0, size: int = 8) -> Start:
    """Latents, mask and masked latents, another of each for every picture."""
    draw = np.random.default_rng(seed)
    latents, masked = draw.normal(size=(2, batch, 4, size, size)).astype(np.float32)
    mask = (draw.random((batch, 1, size, size)) < 0.4).astype(np.float32)
    return latents, mask, masked * (1 - mask)


def latents_of(runtime: Runtime, given: Start, sampling: Sampling) -> list[np.ndarray]:
    latents: list[np.ndarray] = []
    last = denoise(runtime, *given, sampling, lambda step: latents.append(step.latent))
    np.testing.assert_array_equal(latents[-1], last)
    return latents


def spoil(package: FakeTensorRT, call: int, value: float) -> None:
    """Put ``value`` into the last row of what the denoiser predicts at its ``call``-th call."""
    engine = next(engine for engine in package.engines if "timestep" in engine.inputs)
    compute, calls = engine.compute, []

    def spoilt(feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        calls.append(1)
        noise = compute(feeds)["noise"].copy()
        if len(calls) == call:
            noise[-1, 2, 3, 4] = value
        return {"noise": noise}

    engine.compute = spoilt


@pytest.mark.parametrize("variant", ["tensorrt", "tensorrt-rtx"])
def test_every_latent_is_numpys_at_any_batch_guidance_interval_reuse_and_sampler(deep: Bundle, variant: str) -> None:
    """On one runtime, one after another, so that nothing of a batch is left over in the next.

    Rows come and go on the way, and full and cached calls take turns. DDIM is two products and a sum, in the same
    order on both sides, and so bit for bit the same. DPM-Solver's numbers are gathered differently, and so rounded.
    """
    runs: list[tuple[int, float, Interval | None, int]] = [
        *[(1, 2.0, None, 1), (1, 2.0, None, 1), (3, 2.0, None, 1), (1, 1.0, None, 1), (2, 0.0, None, 1)],
        *[(1, 3.0, (0, 500), 1), (2, 3.0, (500, 1000), 1), (3, 3.0, (200, 800), 1), (1, 3.0, (0, 0), 1)],
        *[(1, 3.0, None, 3), (2, 3.0, (0, 500), 3), (3, 3.0, (200, 800), 3), (1, 3.0, None, 100), (1, 2.0, None, 1)],
    ]
    with on_gpu(deep, FakeCuda(), variant=variant)[0] as runtime, create_runtime("onnxruntime", deep, "cpu", 1) as host:
        for name, tolerance in TOLERANCES.items():
            for seed, (batch, guidance, interval, cache) in enumerate(runs):
                sampling = Sampling(SCHEDULERS[name](10, 0.9), guidance, interval, cache)
                actual, expected = (latents_of(r, start(batch, seed), sampling) for r in (runtime, host))
                assert len(actual) == 9
                np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance)
                full = latents_of(host, start(batch, seed), Sampling(SCHEDULERS[name](10, 0.9), guidance, interval))
                assert (np.abs(np.subtract(actual, full)).max() > 0.01) == (cache > 1), "the feature's age must show"


@pytest.mark.parametrize("name", sorted(SCHEDULERS))
@pytest.mark.parametrize("steps", [1, 2, 20])
def test_it_ends_where_a_right_sampler_ends(bundle: Bundle, name: str, steps: int) -> None:
    given = start(2)
    with on_gpu(bundle, FakeCuda())[0] as runtime:
        last = denoise(runtime, *given, Sampling(SCHEDULERS[name](steps), 2.0))
    np.testing.assert_allclose(last, expected_latent(given[1], given[2], 2.0), rtol=0, atol=2e-3)
    assert last.dtype == np.float32 and last.flags["C_CONTIGUOUS"]


def test_rows_of_a_picture() -> None:
    cases = ((4, 2, [0, 1, 0, 1], [2, 3, 2, 3]), (2, 1, [0, 0], [1, 1]), (2, 2, [0, 1], [0, 1]))
    for rows, batch, first, last in cases:
        indices = guidance_rows(rows, batch)
        assert (indices["unconditional"].tolist(), indices["conditional"].tolist()) == (first, last)
        assert {a.dtype for a in indices.values()} == {np.dtype(np.int32)}


def test_the_shallow_part_runs_by_itself_too(deep: Bundle) -> None:
    """In the denoiser's buffers, on the device and on the host."""
    draw, cuda = np.random.default_rng(0), FakeCuda()
    with on_gpu(deep, cuda)[0] as runtime, create_runtime("onnxruntime", deep, "cpu", 1) as host:
        for rows in (2, 2, 1, 6):
            feeds = {
                **drawn_feeds(deep.components["denoiser"], rows),
                "timestep": draw.integers(0, 1000, rows).astype(np.float32),
                "deep": draw.normal(size=(rows, 4, 8, 8)).astype(np.float32),
            }
            before = cuda.bytes_down
            noise, expected = (r.run("denoiser_shallow", feeds)["noise"] for r in (runtime, host))
            assert cuda.bytes_down - before == noise.nbytes
            np.testing.assert_array_equal(noise, expected)
        with pytest.raises(BundleError, match=r"denoiser_shallow takes 6 rows and this call has 8: .* --max-batch 4"):
            runtime.run("denoiser_shallow", {n: np.resize(a, (8, *a.shape[1:])) for n, a in feeds.items()})
    assert cuda.left() == []


# --- what travels, and how it is launched -----------------------------------------------------------------


def traffic(runtime: Runtime, cuda: FakeCuda, given: Start, sampling: Sampling) -> np.ndarray:
    """Bytes up, bytes down and graphs launched, before the first step and after each, an entry of the timer each."""
    seen = [(cuda.bytes_up, cuda.bytes_down, cuda.calls.get("launch_graph", 0))]

    def note(step: Step) -> None:
        seen.append((cuda.bytes_up, cuda.bytes_down, cuda.calls.get("launch_graph", 0)))

    denoise(runtime, *given, sampling, note, timer := StageTimer())
    assert timer.summary()["denoise"]["count"] == len(seen) - 1
    return np.array(seen)


@pytest.mark.parametrize(
    ("resolution", "guidance", "batch", "rows"), [(64, 2.0, 1, 2), (64, 1.0, 1, 1), (64, 2.0, 3, 6), (256, 2.0, 3, 6)]
)
def test_between_steps_only_numbers_travel(
    tmp_path: Path, resolution: int, guidance: float, batch: int, rows: int
) -> None:
    """A timestep and six coefficients a row go up, one number a row comes down, whatever the picture's size."""
    bundle, cuda = Bundle.load(make_toy_bundle(tmp_path / "toy", resolution)), FakeCuda()
    with on_gpu(bundle, cuda)[0] as runtime:
        seen = traffic(runtime, cuda, start(batch, size=resolution // 8), Sampling(DDIM(6), guidance))[:, :2]
    assert set(np.diff(seen[1:-1], axis=0).flatten().tolist()) == {28 * rows, 4 * rows}
    plane = 4 * (resolution // 8) ** 2
    first_up = rows * (13 * plane + 8 + 4 + 4 + 28)  # sample and a clean prediction of zeros; branch, indices; a step
    assert (seen[1] - seen[0]).tolist() == [first_up, 4 * rows]
    assert (seen[-1] - seen[-2]).tolist() == [28 * rows, 4 * rows + rows * 9 * plane]


def test_every_step_is_one_launch_from_the_first_on(bundle: Bundle) -> None:
    """For the pictures that loading prepares, which is one and as many as fit; other numbers follow when they come."""
    cuda, calls = FakeCuda(), []
    with on_gpu(bundle, cuda)[0] as runtime:
        assert runtime.info["cuda_graph"] == "recorded"
        assert cuda.calls["begin_capture"] == 4, "one picture and three, of one row each and of two"
        denoise(runtime, *start(1), Sampling(DDIM(6), 2.0), lambda step: calls.append(dict(cuda.calls)))
        changed = {name for name in calls[-2] if calls[-2][name] != calls[0][name]}
        assert changed == {"launch_graph", "synchronise"} and cuda.calls["launch_graph"] == 6
        denoise(runtime, *start(1), Sampling(DPMSolverPP2M(4), 1.0))
        denoise(runtime, *start(3), Sampling(DDIM(4), 2.0))
        assert cuda.calls["begin_capture"] == 4 and cuda.calls["launch_graph"] == 14
        for _ in range(2):
            denoise(runtime, *start(2), Sampling(DDIM(4), 2.0))
        assert cuda.calls["begin_capture"] == 5 and cuda.calls["launch_graph"] == 22
        assert "destroy_graph" not in cuda.calls
    assert cuda.left() == []


@pytest.mark.parametrize(("interval", "rows"), [((500, 1000), (2, 1)), ((0, 500), (1, 2))])
def test_where_guidance_begins_or_ends_no_latent_travels(
    bundle: Bundle, interval: Interval, rows: tuple[int, int]
) -> None:
    """Branches and row numbers go up once, and each step is one launch there too."""
    cuda = FakeCuda()
    with on_gpu(bundle, cuda)[0] as runtime:
        seen = traffic(runtime, cuda, start(1), Sampling(DDIM(10), 2.0, interval))
    step = [[28 * n, 4 * n, 1] for n in rows]
    first = [step[1][0] + 16 * rows[1], step[1][1], 1]
    assert np.diff(seen[1:-1], axis=0).tolist() == [step[0]] * 4 + [first] + [step[1]] * 3
    assert cuda.left() == []


def test_full_and_cached_steps_are_a_launch_each_and_the_feature_does_not_travel(deep: Bundle) -> None:
    cuda = FakeCuda()
    with on_gpu(deep, cuda, max_batch=1)[0] as runtime:
        assert cuda.calls["begin_capture"] == 4
        seen = traffic(runtime, cuda, start(1), Sampling(DDIM(9), 2.0, cache_interval=3))
        assert np.diff(seen[1:-1], axis=0).tolist() == [[56, 8, 1]] * 7
        assert cuda.calls["launch_graph"] == 9 and cuda.calls["begin_capture"] == 4
    assert cuda.left() == []


def test_every_step_of_the_fast_preset_is_a_replay(deep: Bundle) -> None:
    """Here guidance ends on the way too, so rows and networks change within a picture."""
    chosen = preset_settings("fast", {}, deep)
    scheduler = DDIM(20)
    sampling = Sampling(scheduler, 2.0, (37, 499), chosen["cache_interval"])
    kinds = {(call.rows, call.full) for call in sampling.calls()}
    assert kinds == {(1, True), (1, False), (2, True), (2, False)}
    cuda, steps = FakeCuda(), len(scheduler.timesteps)
    with on_gpu(deep, cuda, max_batch=1)[0] as runtime, create_runtime("onnxruntime", deep, "cpu", 1) as host:
        for picture in range(3):
            launched, recorded = cuda.calls.get("launch_graph", 0), cuda.calls["begin_capture"]
            last = denoise(runtime, *start(1, picture), sampling)
            assert cuda.calls["launch_graph"] - launched == steps and cuda.calls["begin_capture"] == recorded
            np.testing.assert_allclose(last, denoise(host, *start(1, picture), sampling), rtol=0, atol=2e-5)


def test_another_use_of_the_denoiser_disturbs_no_graph(bundle: Bundle) -> None:
    """Between two pictures it runs with other inputs and other numbers of rows."""
    cuda, given, sampling = FakeCuda(), start(1), Sampling(DDIM(4), 2.0)
    with on_gpu(bundle, cuda)[0] as runtime, create_runtime("onnxruntime", bundle, "cpu", 1) as host:
        expected = denoise(host, *given, sampling)
        for rows in (2, 1, 5):
            np.testing.assert_array_equal(denoise(runtime, *given, sampling), expected)
            feeds = drawn_feeds(bundle.components["denoiser"], rows)
            noise, right = (r.run("denoiser", feeds)["noise"] for r in (runtime, host))
            np.testing.assert_array_equal(noise, right)
        assert cuda.calls["begin_capture"] == 4 and cuda.calls["launch_graph"] == 12


def test_recording_that_fails_is_told_and_changes_no_result(bundle: Bundle) -> None:
    cuda = FakeCuda()
    cuda.fail["end_capture"] = NOT_PERMITTED
    with on_gpu(bundle, cuda)[0] as runtime, create_runtime("onnxruntime", bundle, "cpu", 1) as host:
        actual, expected = (latents_of(r, start(1), Sampling(DDIM(5), 2.0)) for r in (runtime, host))
        np.testing.assert_array_equal(actual, expected)
        assert runtime.info["cuda_graph"].startswith("failed: end_capture failed")
        assert cuda.calls["begin_capture"] == 1
    assert cuda.left() == []


# --- what goes wrong --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("guidance", "call", "value", "what"),
    [(1.0, 1, np.nan, "NaN"), (2.0, 2, np.nan, "NaN"), (2.0, 5, np.inf, "an infinite"), (1.0, 4, -np.inf, "an infin")],
)
def test_a_noise_that_is_not_finite_names_its_step(
    bundle: Bundle, guidance: float, call: int, value: float, what: str
) -> None:
    runtime, package = on_gpu(bundle, FakeCuda())
    done: list[Step] = []
    with runtime:
        spoil(package, call, value)
        timestep = DDIM(5).timesteps[call - 1]
        with pytest.raises(BundleError, match=rf"denoiser returned {what}.* at step {call} of 5 \(t={timestep}\)"):
            denoise(runtime, *start(3), Sampling(DDIM(5), guidance), done.append)
        assert len(done) == call - 1
        assert np.isfinite(denoise(runtime, *start(3), Sampling(DDIM(5), guidance))).all(), "the next is not spoilt"


def test_two_batches_at_a_time_are_refused(bundle: Bundle) -> None:
    (latents, mask, masked), sampling = start(1), Sampling(DDIM(3), 2.0)
    call, *_ = sampling.calls()

    def begin() -> Any:
        batch = runtime.start_sampling(latents, np.concatenate([mask, masked], axis=1), sampling.scheduler)
        batch.step(call)
        return batch

    with on_gpu(bundle, FakeCuda())[0] as runtime:
        feeds = drawn_feeds(bundle.components["denoiser"], 1)
        others: tuple[Callable[[], Any], ...] = (begin, lambda: runtime.run("denoiser", feeds))
        for other in others:
            first = begin()
            other()
            with pytest.raises(RuntimeError, match="latents are gone: another call has used the denoiser's buffers"):
                first.read()
            with pytest.raises(RuntimeError, match="latents are gone"):
                first.step(call)
        last = begin()
    with pytest.raises(RuntimeError, match="latents are gone"):
        last.read()
    with pytest.raises(RuntimeError, match="TrtRuntime is not active"):
        begin()


@pytest.mark.parametrize(("max_batch", "interval"), [(1, None), (2, (0, 500))])  # three rows at first fit the second
def test_more_pictures_than_the_engine_takes_names_the_option(
    bundle: Bundle, max_batch: int, interval: Interval | None
) -> None:
    most = rf"denoiser takes {2 * max_batch} rows and this call has 6: run .* --max-batch 3"
    with on_gpu(bundle, FakeCuda(), max_batch)[0] as runtime, pytest.raises(BundleError, match=most):
        denoise(runtime, *start(3), Sampling(DDIM(4), 2.0, interval))


@pytest.mark.parametrize(("call", "first"), [("upload", 0), ("synchronise", 2), ("launch_graph", 2)])
def test_a_driver_that_fails_is_one_line_and_frees_all(bundle: Bundle, call: str, first: int) -> None:
    cuda = FakeCuda()

    def fail_after(step: Step) -> None:
        if step.index == first:
            cuda.fail[call] = 700

    with on_gpu(bundle, cuda)[0] as runtime:
        if first == 0:
            cuda.fail[call] = 700
        with pytest.raises(MachineError, match=r"cannot (run denoiser|start sampling) .*the GPU with `nvidia-smi`"):
            denoise(runtime, *start(1), Sampling(DDIM(5), 2.0), fail_after)
    assert cuda.left() == []


def test_memory_that_runs_out_while_rows_are_prepared_spoils_nothing(bundle: Bundle) -> None:
    """Two pictures were not prepared on loading: once memory is there again, they are."""
    cuda, sampling = FakeCuda(), Sampling(DDIM(4), 2.0)
    runtime, package = on_gpu(bundle, cuda)
    with runtime, create_runtime("onnxruntime", bundle, "cpu", 1) as host:
        package.refuse_launches, package.refusal = True, "Error Code 1: Cuda Runtime (out of memory)"
        with pytest.raises(OutOfMemory, match="cannot start sampling .*not enough memory on the GPU"):
            denoise(runtime, *start(2), sampling)
        package.refuse_launches = False
        for batch in (1, 2):
            actual, expected = (denoise(r, *start(batch), sampling) for r in (runtime, host))
            np.testing.assert_array_equal(actual, expected)
        assert cuda.calls["begin_capture"] == 5 and cuda.calls["launch_graph"] == 8
    assert cuda.left() == []


def test_an_update_of_other_tensors_is_refused(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime, _ = on_gpu(bundle, FakeCuda())
    monkeypatch.setattr(
        "moebius_edge.runtimes.trt.update_component", lambda size, channels: update_component(size + 1, channels)
    )
    with pytest.raises(BundleError, match=r"the engine of update has .* and should have .*--force"), runtime:
        raise AssertionError("never entered")
