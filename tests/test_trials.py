"""Whole trajectories of candidates beside the float32 bundle's, on the toy whose trajectories numpy can follow."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from toy import alpha_bars, decode, encode, expected_latent, make_toy_bundle

from moebius_edge.bundle.bundle import Bundle
from moebius_edge.calibration.cases import Case
from moebius_edge.calibration.trials import Figures, Trials, mean_hole_psnr_db
from moebius_edge.errors import BundleError
from moebius_edge.imaging.masks import latent_mask
from moebius_edge.metrics.trajectory import SEED, draw_scene
from moebius_edge.pipeline.inpainter import STRENGTH, initial_noise
from moebius_edge.runtimes import create_runtime
from moebius_edge.runtimes.ort import OrtRuntime
from moebius_edge.sampling.scheduler import DDIM

STEPS, GUIDANCE = 4, 2.0
CASES = [Case(f"scene {seed}", draw_scene(64, seed)) for seed in (1, 2)]


def silent(label: str, done: int, total: int) -> None:
    """The progress of a test that looks at none."""


@pytest.fixture
def toy(tmp_path: Path) -> Bundle:
    return Bundle.load(make_toy_bundle(tmp_path / "toy"))


@pytest.fixture
def trials(toy: Bundle) -> Iterator[Trials]:
    with Trials(toy, CASES, STEPS, GUIDANCE) as opened:
        yield opened


def scaled(toy: Bundle, file: Path, factor: float) -> Path:
    """The toy's denoiser with its noise times ``factor``."""
    model = onnx.load(toy.component_path("denoiser"))
    weight = next(t for t in model.graph.initializer if t.name == "weight")
    weight.CopyFrom(numpy_helper.from_array(np.float32(factor), "weight"))
    onnx.save(model, file)
    return file


def picture(case: Case, factor: float) -> np.ndarray:
    """What a denoiser whose noise is ``factor`` times the right one ends in: DDIM in float64, nothing of ours."""
    image, hole = case.scene
    mask = latent_mask(hole, 8)[None, None].astype(np.float64)
    original, masked = encode(image).astype(np.float64), encode(image * ~hole).astype(np.float64)
    clean = expected_latent(mask, masked, GUIDANCE)
    timesteps = [int(t) for t in DDIM(STEPS, STRENGTH).timesteps]
    alphas = [*alpha_bars()[timesteps], 1.0]
    x = math.sqrt(alphas[0]) * original + math.sqrt(1 - alphas[0]) * initial_noise(SEED, 0, original.shape)
    for now, after in zip(alphas, alphas[1:], strict=False):
        noise = factor * (x - math.sqrt(now) * clean) / math.sqrt(1 - now)
        guess = (x - math.sqrt(1 - now) * noise) / math.sqrt(now)
        x = math.sqrt(after) * guess + math.sqrt(1 - after) * noise
    return decode(x)


def test_the_references_own_denoiser_is_the_same(toy: Bundle, trials: Trials) -> None:
    figures = trials.denoiser(toy.component_path("denoiser"), "itself", silent)
    assert [f.name for f in figures] == ["scene 1", "scene 2"]
    for f in figures:
        assert (f.hole_psnr_db, f.psnr_db, f.hole_ssim, f.ssim) == (200.0, 200.0, 1.0, 1.0)
        assert f.latent_rms_drift == [0.0] * len(DDIM(STEPS, STRENGTH).timesteps)
    assert mean_hole_psnr_db(figures) == 200.0


@pytest.mark.parametrize("factor", [0.7, 1.4])
def test_figures_are_those_of_a_numpy_sampler(toy: Bundle, trials: Trials, tmp_path: Path, factor: float) -> None:
    figures = trials.denoiser(scaled(toy, tmp_path / "scaled.onnx", factor), "scaled", silent)
    for case, f in zip(CASES, figures, strict=True):
        hole = case.scene[1]
        error = (picture(case, factor).astype(np.float64) - picture(case, 1.0)) ** 2
        wanted = [10 * math.log10(4 / e) for e in (error[..., hole].mean(), error.mean())]
        assert [f.hole_psnr_db, f.psnr_db] == pytest.approx(wanted, abs=0.008)
        assert abs(wanted[0] - wanted[1]) > 0.02, "the hole is not the picture"
        assert f.hole_ssim < 1 and f.latent_rms_drift[-1] > 0


def test_a_runtime_of_another_bundle_is_measured_whole(toy: Bundle, trials: Trials, tmp_path: Path) -> None:
    """As the gate does: with the autoencoder of its own."""
    other = make_toy_bundle(tmp_path / "other")
    model = onnx.load(other / "vae_decoder.onnx")
    weight = next(t for t in model.graph.initializer if t.name == "weight")
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(0.5), "weight"))
    onnx.save(model, other / "vae_decoder.onnx")
    with create_runtime("onnxruntime", Bundle.load(other, verify=False), "cpu") as runtime:
        (first, _) = trials.runtime(runtime, "other", silent)
    reference = picture(CASES[0], 1.0)
    error = ((reference / 2 - reference)[..., CASES[0].scene[1]] ** 2).mean()
    assert first.latent_rms_drift[-1] == 0.0
    assert first.hole_psnr_db == pytest.approx(10 * math.log10(4 / error), abs=0.5)  # but for what decode clips


def test_the_mean_is_that_of_the_squared_errors() -> None:
    figures = [Figures(str(p), p, 1.0, 1.0, 1.0, []) for p in (30.0, 40.0)]
    assert mean_hole_psnr_db(figures) == round(-10 * math.log10((1e-3 + 1e-4) / 2), 2) == 32.6


def test_each_picture_is_encoded_once_and_the_reference_sampled_once(
    toy: Bundle, trials: Trials, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: Counter[str] = Counter()
    real = OrtRuntime._run

    def counting(self: OrtRuntime, component: str, feeds: dict, outputs: list) -> dict:
        calls[component] += 1
        return real(self, component, feeds, outputs)

    monkeypatch.setattr(OrtRuntime, "_run", counting)
    steps = len(DDIM(STEPS, STRENGTH).timesteps)
    for number in (1, 2):
        trials.denoiser(scaled(toy, tmp_path / f"{number}.onnx", 1 + number / 100), "scaled", silent)
        # The picture and the picture without its hole, of two cases; reference and candidates sample and decode.
        assert calls["vae_encoder"] == 4
        assert calls["denoiser"] == 2 * steps * (1 + number) and calls["vae_decoder"] == 2 * (1 + number)


def test_progress_counts_the_steps_of_all_cases(toy: Bundle, trials: Trials) -> None:
    told: list[tuple[str, int, int]] = []
    trials.denoiser(toy.component_path("denoiser"), "itself", lambda *values: told.append(values))
    steps = len(DDIM(STEPS, STRENGTH).timesteps)
    assert told[: 2 * steps] == [("itself: float32", i + 1, 2 * steps) for i in range(2 * steps)]
    assert told[2 * steps :] == [("itself", i + 1, 2 * steps) for i in range(2 * steps)]


def test_what_is_not_finite_is_named(trials: Trials, tmp_path: Path) -> None:
    damaged = make_toy_bundle(tmp_path / "damaged", nan_in="denoiser")
    with pytest.raises(BundleError, match=r"denoiser"):
        trials.denoiser(damaged / "denoiser.onnx", "damaged", silent)


def test_distilled_guidance_runs_the_conditional_branch_alone(tmp_path: Path) -> None:
    """The other branch of this toy is NaN."""
    bundle = Bundle.load(make_toy_bundle(tmp_path / "distilled", distilled_guidance=2.0))
    with Trials(bundle, CASES[:1], STEPS, None) as trials:
        (figures,) = trials.denoiser(bundle.component_path("denoiser"), "itself", silent)
    assert figures.hole_psnr_db == 200.0
