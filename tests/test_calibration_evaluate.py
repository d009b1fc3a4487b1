"""Candidates beside the float32 bundle on the toy whose trajectories numpy can follow, and the measurement of speed."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper
from toy import alpha_bars, decode, encode, expected_latent, make_toy_bundle

from moebius_edge.bundle.bundle import Bundle
from moebius_edge.calibration import evaluate as evaluate_module
from moebius_edge.calibration.evaluate import (
    ROUNDS,
    WARM_UPS,
    CandidateEvaluator,
    Case,
    CombinedRuntime,
    gate_device,
    make_cases,
    mean_hole_psnr_db,
    measure_speed,
)
from moebius_edge.data.calibration_pictures import draw_hole, square
from moebius_edge.data.sources import open_pictures
from moebius_edge.errors import BundleError
from moebius_edge.imaging.masks import latent_mask
from moebius_edge.metrics.trajectory import SEED, draw_scene
from moebius_edge.pipeline.inpainter import STRENGTH, initial_noise
from moebius_edge.progress import no_progress
from moebius_edge.runtimes import Runtime, create_runtime
from moebius_edge.runtimes.base import Arrays
from moebius_edge.sampling.scheduler import DDIM

STEPS, GUIDANCE = 4, 2.0
CALLS = len(DDIM(STEPS, STRENGTH).timesteps)
CASES: list[Case] = [(f"scene {seed}", draw_scene(64, seed)) for seed in (1, 2)]


@pytest.fixture
def toy(tmp_path: Path) -> Bundle:
    return Bundle.load(make_toy_bundle(tmp_path / "toy"))


@pytest.fixture
def evaluator(toy: Bundle) -> CandidateEvaluator:
    return CandidateEvaluator(toy, CASES, GUIDANCE, STEPS)


def scaled(toy: Bundle, folder: Path, factor: float, component: str = "denoiser") -> Path:
    """A folder with a component of the toy whose weight is ``factor`` times as large: a denoiser's noise."""
    model = onnx.load(toy.component_path(component))
    weight = next(t for t in model.graph.initializer if t.name == "weight")
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(factor), "weight"))
    folder.mkdir(exist_ok=True)
    onnx.save(model, folder / f"{component}.onnx")
    return folder


def picture(case: Case, factor: float) -> np.ndarray:
    """What a denoiser whose noise is ``factor`` times the right one ends in: DDIM in float64, nothing of ours."""
    image, hole = case[1]
    mask = latent_mask(hole, 8)[None, None].astype(np.float64)
    original, masked = encode(image).astype(np.float64), encode(image * ~hole).astype(np.float64)
    clean = expected_latent(mask, masked, GUIDANCE)
    alphas = [*alpha_bars()[[int(t) for t in DDIM(STEPS, STRENGTH).timesteps]], 1.0]
    x = math.sqrt(alphas[0]) * original + math.sqrt(1 - alphas[0]) * initial_noise(SEED, 0, original.shape)
    for now, after in zip(alphas, alphas[1:], strict=False):
        noise = factor * (x - math.sqrt(now) * clean) / math.sqrt(1 - now)
        guess = (x - math.sqrt(1 - now) * noise) / math.sqrt(now)
        x = math.sqrt(after) * guess + math.sqrt(1 - after) * noise
    return decode(x)


def test_the_references_own_denoiser_is_the_same(toy: Bundle, evaluator: CandidateEvaluator) -> None:
    progress: list[tuple[str, int, int]] = []
    metrics = evaluator.evaluate(toy.path, "itself", lambda *update: progress.append(update))
    assert [m["name"] for m in metrics] == ["scene 1", "scene 2"]
    for m in metrics:
        assert (m["hole_psnr_db"], m["psnr_db"], m["hole_ssim"], m["ssim"]) == (200.0, 200.0, 1.0, 1.0)
        assert m["latent_rms_drift"] == [0.0] * CALLS
    assert mean_hole_psnr_db(metrics) == 200.0
    squared = [{"hole_psnr_db": psnr_db} for psnr_db in (30.0, 40.0)]
    assert mean_hole_psnr_db(squared) == round(-10 * math.log10((1e-3 + 1e-4) / 2), 2) == 32.6
    assert progress[: 2 * CALLS] == [("itself: float32", i + 1, 2 * CALLS) for i in range(2 * CALLS)]
    assert progress[2 * CALLS :] == [("itself", i + 1, 2 * CALLS) for i in range(2 * CALLS)]


@pytest.mark.parametrize("factor", [0.7, 1.4])
def test_metrics_are_those_of_a_numpy_sampler(
    toy: Bundle, evaluator: CandidateEvaluator, tmp_path: Path, factor: float
) -> None:
    metrics = evaluator.evaluate(scaled(toy, tmp_path / "scaled", factor), "scaled", no_progress)
    for case, m in zip(CASES, metrics, strict=True):
        error = (picture(case, factor).astype(np.float64) - picture(case, 1.0)) ** 2
        expected = [10 * math.log10(4 / e) for e in (error[..., case[1][1]].mean(), error.mean())]
        assert [m["hole_psnr_db"], m["psnr_db"]] == pytest.approx(expected, abs=0.008)
        assert abs(expected[0] - expected[1]) > 0.02, "the hole is not the picture"
        assert m["hole_ssim"] < 1 and m["latent_rms_drift"][-1] > 0


def test_a_runtime_of_another_bundle_is_measured_with_its_own_autoencoder(
    toy: Bundle, evaluator: CandidateEvaluator, tmp_path: Path
) -> None:
    other = scaled(toy, make_toy_bundle(tmp_path / "other"), 0.5, "vae_decoder")
    with create_runtime("onnxruntime", Bundle.load(other, verify=False), "cpu") as runtime:
        (first, _) = evaluator.evaluate(runtime, "other", no_progress)
    error = ((picture(CASES[0], 1.0) / 2)[..., CASES[0][1][1]] ** 2).mean()
    assert first["latent_rms_drift"][-1] == 0.0
    assert first["hole_psnr_db"] == pytest.approx(10 * math.log10(4 / error), abs=0.5)  # but for what decode clips


def test_each_picture_is_encoded_once_and_the_reference_sampled_once(
    toy: Bundle, evaluator: CandidateEvaluator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: Counter[str] = Counter()
    real = Runtime.run

    def counting(self: Runtime, component: str, *arguments: Any) -> Arrays:
        calls[component] += not isinstance(self, CombinedRuntime)
        return real(self, component, *arguments)

    monkeypatch.setattr(Runtime, "run", counting)
    for number in (1, 2):
        evaluator.evaluate(scaled(toy, tmp_path / f"{number}", 1 + number / 100), "scaled", no_progress)
        # The picture and the picture without its hole, of two cases; reference and candidates sample and decode.
        assert calls["vae_encoder"] == 4
        assert calls["denoiser"] == 2 * CALLS * (1 + number) and calls["vae_decoder"] == 2 * (1 + number)


def test_what_is_not_finite_is_named(evaluator: CandidateEvaluator, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"denoiser"):
        evaluator.evaluate(make_toy_bundle(tmp_path / "damaged", nan_in="denoiser"), "damaged", no_progress)


def test_distilled_guidance_runs_the_conditional_branch_alone(tmp_path: Path) -> None:
    """The other branch of this toy is NaN."""
    bundle = Bundle.load(make_toy_bundle(tmp_path / "distilled", distilled_guidance=2.0))
    evaluator = CandidateEvaluator(bundle, CASES[:1], None, STEPS)
    assert evaluator.evaluate(bundle.path, "itself", no_progress)[0]["hole_psnr_db"] == 200.0


def test_own_masks_come_first_and_drawn_ones_in_the_next_rounds(tmp_path: Path) -> None:
    hole = np.zeros((100, 120), np.uint8)
    hole[4:8, 4:8] = hole[80:92, 90:110] = 255  # two holes far apart, the second the larger one
    for folder in ("pictures", "masks"):
        (tmp_path / folder).mkdir()
    rng = np.random.default_rng(0)
    for name in "ab":
        cv2.imwrite(str(tmp_path / "pictures" / f"{name}.png"), rng.integers(0, 256, (100, 120, 3), np.uint8))
    cv2.imwrite(str(tmp_path / "masks" / "a.png"), hole)
    pictures = open_pictures(tmp_path / "pictures", tmp_path / "masks")
    cases = make_cases(pictures, 5, 32, seed=7)
    assert [name for name, _ in cases] == ["a.png", "b.png", "a.png, hole 2", "b.png, hole 2", "a.png, hole 3"]
    for _, (image, seen) in cases:
        assert image.shape == (1, 3, 32, 32) and image.dtype == np.float32
        assert seen.shape == (32, 32) and seen.dtype == np.bool_
    assert 16 < cases[0][1][1].sum() < 512, "the larger hole, in a part of the picture"
    for k in (1, 2, 3, 4):
        assert np.array_equal(cases[k][1][1], draw_hole(7, k, 32)), k
    expected = square(pictures.read(1)[0], 32).astype(np.float64).transpose(2, 0, 1)[None] / 127.5 - 1
    assert np.abs(cases[1][1][0] - expected).max() < 1e-6


class Timed(Runtime):
    """A denoiser whose calls advance ``clock`` by ``milliseconds``, and the first few by much more."""

    clock = 0.0
    calls: list[str] = []

    def __init__(self, bundle: Bundle, milliseconds: Sequence[float]) -> None:
        super().__init__({"denoiser": bundle.components["denoiser"]})
        self.name, self.milliseconds = bundle.path.name, [1000.0] * WARM_UPS + [*milliseconds]
        self.feeds: list[Arrays] = []

    @property
    def info(self) -> dict[str, Any]:
        return {"version": "1.23.0", "threads": 4}

    def activate(self) -> None: ...

    def deactivate(self) -> None: ...

    def _run(self, component: str, feeds: Arrays, outputs: Sequence[str]) -> Arrays:
        Timed.clock += self.milliseconds[len(self.feeds)] / 1e3
        Timed.calls.append(self.name)
        self.feeds.append({k: v.copy() for k, v in feeds.items()})
        return {"noise": np.zeros((len(feeds["timestep"]), 4, 8, 8), np.float32)}


@pytest.mark.parametrize(("distilled", "rows"), [(None, 2), (3.0, 1)])
def test_the_ratio_is_of_medians_without_warm_ups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, distilled: float | None, rows: int
) -> None:
    names = ("reference", "int8")
    reference, int8 = (Bundle.load(make_toy_bundle(tmp_path / n, distilled_guidance=distilled)) for n in names)
    fast = Timed(int8, [10, 11, 9, 500, 9, 8, 12, 12, 8])
    slow = Timed(reference, [25, 30, 20, 24, 26, 24, 30, 900, 20])
    runtimes = iter((fast, slow))
    monkeypatch.setattr(evaluate_module, "create_runtime", lambda *arguments: next(runtimes))
    monkeypatch.setattr(evaluate_module.time, "perf_counter", lambda: Timed.clock)
    monkeypatch.setattr(Timed, "calls", [])
    progress: list[tuple[str, int, int]] = []
    speed = measure_speed(reference, int8, "onnxruntime", lambda *update: progress.append(update))
    assert speed == {
        **{"other": "float32", "device": "cpu", "runtime": "onnxruntime 1.23.0", "threads": 4},
        **{"int8_ms": 10.0, "other_ms": 25.0, "speedup": 2.5, "rows": rows},
    }
    rounds = WARM_UPS + ROUNDS
    assert Timed.calls == ["int8", "reference"] * rounds, "they take turns"
    assert progress == [("speed beside INT8", i + 1, rounds) for i in range(rounds)]
    first = fast.feeds[0]
    assert first["branch"].tolist() == [0, 1][:rows] and 0.5 < first["sample"].std() < 2
    assert all(np.array_equal(first[name], slow.feeds[-1][name]) for name in first), "both get the same"


def test_on_a_gpu_it_is_beside_fp16_that_is_gone_afterwards(toy: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Bundle] = []

    def on_the_cpu(name: str, bundle: Bundle, device: str) -> Runtime:
        assert device == "cuda"
        opened.append(bundle)
        types = {t.data_type for t in onnx.load(bundle.component_path("denoiser")).graph.initializer}
        assert (TensorProto.FLOAT16 in types) == (len(opened) == 2) and list(bundle.components) == ["denoiser"]
        return create_runtime(name, bundle, "cpu")

    monkeypatch.setattr(evaluate_module, "create_runtime", on_the_cpu)
    monkeypatch.setattr(evaluate_module, "gate_device", lambda runtime: "cuda")
    speed = measure_speed(toy, toy, "onnxruntime", no_progress)
    assert (speed["other"], speed["device"]) == ("float16", "cuda") and speed["speedup"] > 0
    assert [bundle.path.exists() for bundle in opened] == [True, False]


def test_the_gate_is_on_the_gpu_where_onnx_runtime_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate_module, "absence", lambda ort, device: "")
    monkeypatch.setattr(evaluate_module, "start_problem", lambda ort, device: "")
    assert (gate_device("openvino"), gate_device("onnxruntime")) == ("cpu", "cuda")
    monkeypatch.setattr(evaluate_module, "start_problem", lambda ort, device: "no driver")
    assert gate_device("onnxruntime") == "cpu"
