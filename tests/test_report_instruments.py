"""Energy, work and peaks, with what measures them and without; the modules are stood in for."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from toy import make_toy_bundle

from moebius_edge.bundle import Bundle
from moebius_edge.report import instruments


@dataclass
class Amount:
    multiplications: int
    bytes: int


@dataclass
class Peaks:
    multiplications_per_second: float | None
    bytes_per_second: float | None = None
    runtime: str = "onnxruntime on cpu"
    precision: str = "float32"
    reason: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Work:
    by_class: dict[str, Amount] = field(default_factory=dict)

    def to_dict(self, seconds: float | None = None, peaks: Peaks | None = None) -> dict[str, Any]:
        total = sum(a.multiplications for a in self.by_class.values())
        share = None
        if seconds is not None and peaks is not None and peaks.multiplications_per_second is not None:
            share = total / seconds / peaks.multiplications_per_second
        by_class = {name: asdict(amount) for name, amount in self.by_class.items()}
        return {"multiplications_per_step": total, "by_class": by_class, "share_of_peak": share, "reason": None}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Modules that count 100 multiplications a row and reach 1000 a second; what they were asked."""
    seen: list[Any] = []

    def count_work(path: Path, rows: int) -> Work:
        seen.append((path.name, rows))
        return Work({"convolution": Amount(60 * rows, 1), "other": Amount(40 * rows, 1)})

    def measure_peaks(runtime: dict[str, Any], precision: str) -> Peaks:
        seen.append((runtime["name"], precision))
        return Peaks(1000.0)

    modules = {
        "work": SimpleNamespace(count_work=count_work, Work=Work, Amount=Amount),
        "peaks": SimpleNamespace(measure_peaks=measure_peaks, Peaks=Peaks),
    }
    monkeypatch.setattr(instruments, "_module", modules.get)
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
    peaks = instruments.peak_figures({"name": "onnxruntime"}, "float32")
    assert instruments.measures_peaks() and asked[-1] == ("onnxruntime", "float32")
    assert instruments.with_share(work, 500.0, peaks)["share_of_peak"] == pytest.approx(0.2)
    assert instruments.with_share(work, 500.0, None) == work
    assert instruments.with_share(None, 500.0, peaks) is None
    assert instruments.with_share(work, 500.0, instruments.no_peaks("it crashed"))["share_of_peak"] is None


def test_without_them_there_is_a_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(instruments, "_module", lambda name: None)
    assert instruments.open_meter("cpu") is None and not instruments.measures_peaks()
    energy = instruments.energy_figures(None, 3)
    assert energy.pop("reason") == "power is not measured by this version" and set(energy.values()) == {None}
    assert instruments.work_figures(Bundle.load(make_toy_bundle(tmp_path / "toy")), {"guidance": 1.0}) is None


def test_a_meter_is_asked_for_the_images_of_its_block(monkeypatch: pytest.MonkeyPatch) -> None:
    energy = SimpleNamespace(to_dict=lambda images: {"joules_per_image": 12 / images, "reason": None})
    meter = SimpleNamespace(energy=lambda: energy)
    monkeypatch.setattr(instruments, "_module", lambda name: SimpleNamespace(open_meter=lambda device: meter))
    assert instruments.open_meter("cuda") is meter
    assert instruments.energy_figures(meter, 4)["joules_per_image"] == 3.0
