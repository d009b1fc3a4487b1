"""One configuration's figures, measured in this process on toy bundles whose results are known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from reporting import rows, spec, write_inputs
from toy import make_toy_bundle

from moebius_edge.errors import UsageError
from moebius_edge.progress import no_progress
from moebius_edge.report import inputs as inputs_module
from moebius_edge.report import measure as module
from moebius_edge.report.collect import supervise
from moebius_edge.report.grid import baseline_rows
from moebius_edge.report.measure import measure
from moebius_edge.report.power import open_meter


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    return make_toy_bundle(tmp_path / "toy")


def test_every_stage_of_every_run_counts_and_the_warm_up_does_not(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    absent = open_meter("cuda", tmp_path)  # whatever this machine has
    monkeypatch.setattr(module, "open_meter", lambda device: absent)
    seen = []
    (row,) = rows(toy)
    wanted = spec(tmp_path / "out", row, write_inputs(tmp_path), runs=3, warmup=2)
    figures = measure(wanted, lambda *step: seen.append(step))
    stages = figures["latency"]["stages"]
    counts = {name: stage["count"] for name, stage in stages.items()}
    assert counts["total"] == 3 * 2 and counts["denoise"] == 3 * 2 * 2 and counts["vae_encode"] == 3 * 2 * 2
    for stage in stages.values():
        assert set(stage) == {"count", "first_ms", "median_ms", "p95_ms", "p99_ms", "iqr_ms", "total_ms"}
        assert stage["median_ms"] <= stage["p95_ms"] <= stage["p99_ms"]
    assert figures["latency"]["load_ms"] > 0
    assert figures["memory"]["peak_host_bytes"] > 10**7 and figures["memory"]["peak_device_bytes"] is None
    assert "CPU" in figures["memory"]["reason"] and figures["energy"]["reason"]
    assert figures["runtime"]["name"] == "onnxruntime" and figures["sustained"] is None
    assert [what for what, _, _ in seen][:2] == ["loading", "warm-up 1 of 2"] and seen[-1] == ("accuracy", 1, 2)


def test_the_first_call_is_the_processes(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a stage that takes 100 ms once and 1 ms from then on, the warm-up pays."""
    calls = []

    def fill(self: Any, loaded: Any, timer: Any, trace: Any = None) -> np.ndarray:
        calls.append(trace)
        if timer is not None:
            timer.add("total", 100.0 if len(calls) == 1 else 1.0)
            timer.add("denoise", 1.0)
        return inputs_module.rgb8(loaded.picture)

    monkeypatch.setattr(module.BundleTarget, "fill", fill)
    (row,) = rows(toy)
    figures = measure(spec(tmp_path / "out", row, write_inputs(tmp_path, "a"), runs=4, warmup=1), no_progress)
    total = figures["latency"]["stages"]["total"]
    assert (total["first_ms"], total["median_ms"], total["p99_ms"], total["count"]) == (100.0, 1.0, 1.0, 4)
    assert len(calls) == 6, "a warm-up, four runs, and one to compare the pictures"


def test_a_reference_keeps_its_traces_and_reuse_is_compared_with_them(tmp_path: Path) -> None:
    inputs, folder = write_inputs(tmp_path), tmp_path / "traces"
    deep = make_toy_bundle(tmp_path / "deep", name="deep", deep=True)
    row, reusing = rows(deep, steps=(6,), cache_intervals=(1, 3))
    against = {"id": row.id, "folder": str(folder)}
    own = measure(spec(tmp_path / "out", row, inputs, record=str(folder), reference=against), no_progress)
    assert [p.name for p in sorted(folder.iterdir())] == ["0000.npy", "0001.npy"]
    figures = own["accuracy"]["against_reference"]
    assert (figures["psnr_db"], figures["images"]) == (200.0, 2)
    compared = measure(spec(tmp_path / "out", reusing, inputs, reference=against), no_progress)["accuracy"]
    assert compared["against_reference"]["hole_psnr_db"] < 100 and compared["against_truth"]["images"] == 2
    assert sorted(own["pictures"]) == ["a.png", "b.png"]
    for name, path in own["pictures"].items():
        with Image.open(tmp_path / "out" / path) as result, Image.open(tmp_path / "images" / name) as image:
            a, b = np.asarray(result), np.asarray(image)
        assert (a != b).any() and np.array_equal(a[:20], b[:20])


def test_a_baseline_has_one_stage_and_no_reference(tmp_path: Path) -> None:
    (row,) = baseline_rows(["telea"])
    figures = measure(spec(tmp_path / "out", row, write_inputs(tmp_path), runs=2), no_progress)
    assert list(figures["latency"]["stages"]) == ["total"]
    assert figures["accuracy"]["against_reference"] is None
    assert figures["accuracy"]["against_truth"]["hole_psnr_db"] > 5
    assert figures["runtime"]["name"] == "opencv"


def test_memory_on_a_gpu_is_what_the_process_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    for held, reason in ((724 << 20, None), (None, "NVML does not list this process's GPU memory")):
        monkeypatch.setattr(module, "gpu_memory_in_use", lambda held=held: held)
        assert module.peak_device_memory("cuda") == {"peak_device_bytes": held, "reason": reason}


def test_sustained_is_the_last_minute_against_the_runs(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_MINUTE_S", 0.3)
    (row,) = rows(toy)
    inputs = [source._replace(truth=None) for source in write_inputs(tmp_path)]
    figures = measure(spec(tmp_path / "out", row, inputs, sustained_minutes=2.5), no_progress)
    assert figures["accuracy"] == {"against_reference": None, "against_truth": None}, "neither was given"
    sustained = figures["sustained"]
    assert 3 <= len(sustained["by_minute_ms"]) <= 4 and sustained["minutes"] == 2.5
    assert sustained["soaked_median_ms"] == sustained["by_minute_ms"][-1]
    assert sustained["cold_median_ms"] == figures["latency"]["stages"]["total"]["median_ms"]


def test_inputs_that_cannot_be_used(tmp_path: Path) -> None:
    (source,) = write_inputs(tmp_path, "a")
    (other,) = write_inputs(tmp_path / "other", "a", size=(80, 80))
    with pytest.raises(UsageError, match=r"truth .* has \(80, 80\) pixels and .* \(96, 80\)"):
        inputs_module.load_input(source._replace(truth=other.image))
    Image.fromarray(np.zeros((80, 96), np.uint8)).save(source.mask)
    with pytest.raises(UsageError, match=r"a.png is empty, nothing would be filled"):
        inputs_module.load_input(source)


def test_a_nan_is_gated(tmp_path: Path) -> None:
    (row,) = rows(make_toy_bundle(tmp_path / "nan", nan_in="denoiser"))
    outcome = supervise(spec(tmp_path / "out", row, write_inputs(tmp_path)), no_progress)
    assert outcome["status"] == "gated" and outcome["reason"].startswith("denoiser returned NaN at step 1 of 2")
    assert not (tmp_path / "out").exists()
