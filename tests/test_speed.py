"""The two speeds: measured in turns on runtimes whose clock the test winds, and what is said of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto
from toy import make_toy_bundle

from moebius_edge.bundle.bundle import Bundle
from moebius_edge.calibration import speed as speed_module
from moebius_edge.calibration.speed import (
    ROUNDS,
    WARM_UPS,
    advice,
    compare_speed,
    denoiser_runtime,
    fastest_device,
    measure_speed,
)
from moebius_edge.runtimes.base import Arrays, Runtime


class Clock:
    """Stands for ``time``; runs only while a ``Timed`` runtime does."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


class Timed(Runtime):
    """A denoiser whose calls take ``milliseconds``, and the first few much longer; tells ``calls`` its name."""

    def __init__(self, bundle: Bundle, clock: Clock, name: str, milliseconds: list[float], calls: list[str]) -> None:
        super().__init__({"denoiser": bundle.components["denoiser"]})
        self.clock, self.name, self.milliseconds, self.calls = clock, name, milliseconds, calls
        self.feeds: list[Arrays] = []

    @property
    def info(self) -> dict[str, Any]:
        return {"name": self.name}

    def activate(self) -> None: ...

    def deactivate(self) -> None: ...

    def _run(self, component: str, feeds: Arrays, outputs: Sequence[str]) -> Arrays:
        number = self.calls.count(self.name)
        self.clock.now += (1000.0 if number < WARM_UPS else self.milliseconds[number - WARM_UPS]) / 1e3
        self.calls.append(self.name)
        self.feeds.append({k: v.copy() for k, v in feeds.items()})
        return {"noise": np.zeros((len(feeds["timestep"]), 4, 8, 8), np.float32)}


@pytest.fixture
def toy(tmp_path: Path) -> Bundle:
    return Bundle.load(make_toy_bundle(tmp_path / "toy"))


def test_the_ratio_is_of_medians_without_warm_ups(toy: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, calls = Clock(), list[str]()
    monkeypatch.setattr(speed_module, "time", clock)
    fast = Timed(toy, clock, "int8", [10, 11, 9, 500, 9, 8, 12, 12, 8], calls)
    slow = Timed(toy, clock, "other", [25, 30, 20, 24, 26, 24, 30, 900, 20], calls)
    told: list[tuple[int, int]] = []
    with fast, slow:
        found = compare_speed(fast, slow, 2, lambda done, total: told.append((done, total)))
    assert found == {"int8_ms": 10.0, "other_ms": 25.0, "speedup": 2.5, "rows": 2}
    assert calls == ["int8", "other"] * (WARM_UPS + ROUNDS), "they take turns"
    assert told == [(i + 1, WARM_UPS + ROUNDS) for i in range(WARM_UPS + ROUNDS)]
    first = fast.feeds[0]
    assert first["branch"].tolist() == [0, 1] and first["timestep"].tolist() == [500.0, 500.0]
    assert 0.5 < first["sample"].std() < 2 and np.isfinite(first["sample"]).all()
    for name in first:
        assert np.array_equal(first[name], slow.feeds[-1][name]), "both get the same"


def test_only_the_denoiser_is_loaded(toy: Bundle) -> None:
    (toy.path / "vae_encoder.onnx").write_bytes(b"no graph")
    runtime = denoiser_runtime(toy)
    with runtime:
        assert list(runtime.components) == ["denoiser"]


@pytest.mark.parametrize(("distilled", "rows"), [(None, 2), (3.0, 1)])
def test_on_a_cpu_it_is_beside_float32(tmp_path: Path, distilled: float | None, rows: int) -> None:
    reference, candidate = (
        Bundle.load(make_toy_bundle(tmp_path / name, distilled_guidance=distilled)) for name in ("a", "b")
    )
    told: list[tuple[str, int, int]] = []
    speed = measure_speed(reference, candidate, "cpu", lambda *values: told.append(values))
    assert {k: speed[k] for k in ("other", "device", "rows")} == {"other": "float32", "device": "cpu", "rows": rows}
    assert speed["runtime"].startswith("onnxruntime ") and speed["threads"] >= 1
    assert speed["int8_ms"] > 0 and speed["speedup"] == pytest.approx(speed["other_ms"] / speed["int8_ms"], rel=0.5)
    assert told[-1] == ("speed beside INT8", WARM_UPS + ROUNDS, WARM_UPS + ROUNDS)


def test_on_a_gpu_it_is_beside_fp16_that_is_gone_afterwards(toy: Bundle, tmp_path: Path) -> None:
    mine = tmp_path / ".toy-fp16"
    mine.mkdir()
    with speed_module._alternative(toy, tmp_path / "output", "cuda") as other:
        assert other.precision == "float16" and other.path.parent == tmp_path
        types = {t.data_type for t in onnx.load(other.component_path("denoiser")).graph.initializer}
        assert TensorProto.FLOAT16 in types
        assert Bundle.load(other.path).defaults == toy.defaults
        folder = other.path
    assert not folder.exists() and mine.is_dir() and Bundle.load(toy.path).precision == "float32"
    with speed_module._alternative(toy, tmp_path / "output", "cpu") as other:
        assert other is toy


def test_a_file_for_a_cpu_is_measured_there(monkeypatch: pytest.MonkeyPatch) -> None:
    lacks: dict[str, str] = {}
    monkeypatch.setattr(speed_module, "absence", lambda ort, device: lacks.get(device, ""))
    monkeypatch.setattr(speed_module, "start_problem", lambda ort, device: "")
    assert fastest_device("cpu") == "cpu"
    assert fastest_device("tensorrt") == "tensorrt"
    lacks["tensorrt"] = "not in this build"
    assert fastest_device("tensorrt") == "cuda"
    monkeypatch.setattr(speed_module, "start_problem", lambda ort, device: "no driver")
    assert fastest_device("tensorrt") == "cpu"


def test_advice() -> None:
    def said(speedup: float, device: str, target: str, other: str = "float32") -> list[str]:
        speed: Mapping[str, Any] = {
            **{"speedup": speedup, "int8_ms": 20.5, "other_ms": 20.5 * speedup},
            **{"device": device, "other": other},
        }
        return advice(dict(speed), target)

    assert said(1.01, "cpu", "cpu") == said(2.0, "tensorrt", "tensorrt", "float16") == []
    assert said(0.8, "cpu", "cpu") == [
        "INT8 does not pay on this machine's cpu: 20.5 ms a call, float32 16.4 ms; use --precision fp32 here"
    ]
    assert said(1.0, "cuda", "tensorrt", "float16") == [
        "INT8 does not pay on this machine's cuda: 20.5 ms a call, float16 20.5 ms; use --precision fp16 here"
    ]
    (text,) = said(0.8, "cpu", "tensorrt")
    assert text.endswith("or try --target cpu; this file is for TensorRT and GPUs, and must be measured there")
