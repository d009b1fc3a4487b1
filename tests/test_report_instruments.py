"""Work by rows and its share of the peak; counting and measuring are tested with what does them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from toy import make_toy_bundle

from moebius_edge.bundle import Bundle
from moebius_edge.report import instruments
from moebius_edge.report.peaks import Peaks
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


def test_a_steps_work_has_two_rows_where_the_sampler_guides(asked: list[Any], tmp_path: Path) -> None:
    guided = Bundle.load(make_toy_bundle(tmp_path / "guided"))
    distilled = Bundle.load(make_toy_bundle(tmp_path / "distilled", distilled_guidance=2.0))
    for bundle, guidance in ((guided, 2.0), (guided, 1.0), (distilled, 2.0)):
        instruments.work_figures(bundle, {"guidance": guidance})
    assert asked == [("denoiser.onnx", 2), ("denoiser.onnx", 1), ("denoiser.onnx", 1)]


def test_the_share_is_that_of_the_median_step(asked: list[Any], tmp_path: Path) -> None:
    bundle = Bundle.load(make_toy_bundle(tmp_path / "toy"))
    work = instruments.work_figures(bundle, {"guidance": 1.0})
    peaks = Peaks(1000.0, 1e9, "onnxruntime on cpu", "float32").to_dict()
    assert instruments.with_share(work, 500.0, peaks)["share_of_peak"] == pytest.approx(0.2)
    assert instruments.with_share(work, 500.0, None) == work
    assert instruments.with_share(None, 500.0, peaks) is None
    assert instruments.with_share(work, 500.0, instruments.no_peaks("it crashed"))["share_of_peak"] is None
