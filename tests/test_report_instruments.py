"""Work by rows and its share of the peak; counting and measuring are tested with what does them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from toy import make_toy_bundle

from moebius_edge.bundle.bundle import Bundle
from moebius_edge.report import instruments
from moebius_edge.report.configurations import Choices, grid
from moebius_edge.report.peaks import Peaks
from moebius_edge.report.rows import row
from moebius_edge.report.work import Amount, Work


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Counting that finds 100 multiplications a row; what it was asked."""
    seen: list[Any] = []

    def count_work(path: Path, rows: int) -> Work:
        seen.append((path.name, rows))
        return Work({"convolution": Amount(60 * rows, 1), "other": Amount(40 * rows, 1)})

    monkeypatch.setattr(instruments, "count_work", count_work)
    return seen


def settings(**changes: Any) -> dict[str, Any]:
    """Of a configuration: 20 steps of which 19 are executed."""
    return {
        "steps": 20,
        "strength": 0.99,
        "scheduler": "ddim",
        "guidance": 2.0,
        "distilled_guidance": None,
        "guidance_interval": None,
        "cache_interval": 1,
        **changes,
    }


def test_a_steps_work_has_two_rows_where_the_sampler_guides(asked: list[Any], tmp_path: Path) -> None:
    guided = Bundle.load(make_toy_bundle(tmp_path / "guided"))
    distilled = Bundle.load(make_toy_bundle(tmp_path / "distilled", distilled_guidance=2.0))
    for bundle, guidance in ((guided, 2.0), (guided, 1.0), (distilled, 2.0)):
        own = settings(guidance=guidance, distilled_guidance=bundle.distilled_guidance)
        instruments.work_figures(bundle, own)
    assert asked == [("denoiser.onnx", 2), ("denoiser.onnx", 1), ("denoiser.onnx", 1)]


def test_the_share_is_that_of_the_median_step(asked: list[Any], tmp_path: Path) -> None:
    bundle = Bundle.load(make_toy_bundle(tmp_path / "toy"))
    work = instruments.work_figures(bundle, settings(guidance=1.0))
    peaks = Peaks(1000.0, 1e9, "onnxruntime on cpu", "float32").to_dict()
    assert instruments.with_share(work, 500.0, peaks)["share_of_peak"] == pytest.approx(0.2)
    assert instruments.with_share(work, 500.0, None) == work
    assert instruments.with_share(None, 500.0, peaks) is None
    assert instruments.with_share(work, 500.0, instruments.no_peaks("it crashed"))["share_of_peak"] is None


def test_calls_of_a_trajectory() -> None:
    """19 of DDIM's, at t = 900, 850 .. 0: one in five whole is 0, 5, 10, 15; from 250 to below 550 six are guided."""
    whole, shallow = "denoiser", "denoiser_shallow"
    calls = instruments.network_calls
    assert calls(settings()) == {(whole, 2): 19}
    assert calls(settings(cache_interval=5)) == {(whole, 2): 4, (shallow, 2): 15}
    assert calls(settings(guidance_interval=[250, 550])) == {(whole, 2): 6, (whole, 1): 13}
    mixed = calls(settings(guidance_interval=[250, 550], cache_interval=5))
    # 8 calls of one row, 6 of two, 5 of one: each series begins with a whole one, and so does its sixth
    assert mixed == {(whole, 1): 3, (shallow, 1): 10, (whole, 2): 2, (shallow, 2): 4}
    assert calls(settings(strength=0.5, guidance=1.0)) == {(whole, 1): 10}


def test_work_is_the_mean_of_the_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = {"denoiser.onnx": 1000, "denoiser_shallow.onnx": 100}
    asked = []

    def count_work(path: Path, rows: int) -> Work:
        asked.append((path.name, rows))
        return Work({"convolution": Amount(counts[path.name] * rows, 7), "other": Amount(0, 3 * rows)})

    monkeypatch.setattr(instruments, "count_work", count_work)
    bundle = Bundle.load(make_toy_bundle(tmp_path / "deep", deep=True))
    work = instruments.work_figures(bundle, settings(cache_interval=5))
    assert work["multiplications_per_step"] == pytest.approx((4 * 2000 + 15 * 200) / 19)
    assert work["by_class"]["other"]["bytes"] == pytest.approx(6) and work["reason"] is None
    assert asked == [("denoiser.onnx", 2), ("denoiser_shallow.onnx", 2)], "each kind once"
    monkeypatch.setattr(instruments, "count_work", lambda path, rows: Work(reason="no onnx"))
    assert instruments.work_figures(bundle, settings(cache_interval=5))["reason"] == "no onnx"


def test_the_share_is_of_the_mean_where_calls_differ(tmp_path: Path) -> None:
    """One of 400 ms and four of 50: the median is a shallow one's."""
    bundle = Bundle.load(make_toy_bundle(tmp_path / "deep", deep=True))
    work = Work({"convolution": Amount(100, 1)}).to_dict()
    stages = {"denoise": {"median_ms": 50.0}}
    outcome = {"status": "ok", "reason": None, "reference_reason": None, "mean_call_ms": 120.0, "work": work}
    outcome["latency"] = {"stages": stages}
    peaks = Peaks(1000.0, 1e9, "onnxruntime on cpu", "float32").to_dict()
    for interval, ms in ((1, 50), (5, 120)):
        (made,) = grid([bundle], Choices(cache_intervals=(interval,)))
        found = row(made, "here", outcome, peaks)
        assert found["work"]["share_of_peak"] == pytest.approx(100 / ms)
        assert "mean_call_ms" not in found
