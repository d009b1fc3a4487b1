"""Accuracy on traces and pictures whose differences are known, and LPIPS and FID where torchmetrics is and is not."""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moebius_edge.errors import BundleError
from moebius_edge.imaging.windows import Window
from moebius_edge.pipeline.inpainter import Step
from moebius_edge.report.accuracy import PERCEPTUAL, AgainstReference, AgainstTruth, Perceptual, Trace

HOLE = np.zeros((64, 64), bool)
HOLE[20:44, 20:44] = True
WINDOW = Window(0, 0, 64, (20, 20, 44, 44))


def trace(latents: float = 0.0, made: float = 0.0, windows: int = 1) -> Trace:
    """Two steps and a picture for each window; all of it moved by so much."""
    made_, latents_ = Trace(), np.random.default_rng(0).standard_normal((1, 4, 8, 8)).astype(np.float32)
    picture = np.random.default_rng(1).random((64, 64, 3)).astype(np.float32)
    for _ in range(windows):
        for index in (1, 2):
            moved = latents_ + np.float32(latents * index)
            made_.on_step(Step(index, 2, 0, lambda moved=moved: moved))
        made_.on_window(WINDOW, picture + np.float32(made), HOLE)
    return made_


def test_what_is_equal_has_no_difference(tmp_path: Path) -> None:
    trace().save(tmp_path / "0.npz")
    against = AgainstReference("full")
    against.add(trace(), tmp_path / "0.npz")
    other = trace()
    del other.latents[0]
    with pytest.raises(BundleError, match="the reference full went through other steps: measure both again"):
        against.add(other, tmp_path / "0.npz")
    assert against.result() == {
        "reference": "full",
        **dict.fromkeys(("hole_psnr_db", "psnr_db"), 200.0),
        **dict.fromkeys(("hole_ssim", "ssim"), 1.0),
        "worst_pixel_levels": 0.0,
        "latent_rms_drift": [0.0, 0.0],
        "images": 1,
    }


def test_differences_are_those_of_the_network_itself(tmp_path: Path) -> None:
    trace(windows=2).save(tmp_path / "0.npz")
    against = AgainstReference("full")
    moved = trace(latents=0.5, made=0.01, windows=2)
    moved.outputs[1][30, 30, 2] += 0.1  # one pixel, in the hole of one window
    against.add(moved, tmp_path / "0.npz")
    result = against.result()
    assert result["latent_rms_drift"] == [0.5, 1.0]
    assert result["worst_pixel_levels"] == pytest.approx(0.11 * 255, rel=0.01)
    assert 37 < result["hole_psnr_db"] < result["psnr_db"] < 40.01, "0.01 of 1 is 40 dB, and less with the pixel"
    assert result["images"] == 1


def test_against_the_truth() -> None:
    true = np.random.default_rng(2).integers(40, 200, (64, 64, 3), np.uint8)
    changed = true.copy()
    changed[HOLE] += 10
    against = AgainstTruth()
    against.add(true, true, HOLE)
    against.add(changed, true, HOLE)
    result = against.result()
    psnr = 10 * np.log10(255**2 / 100)
    assert result["hole_psnr_db"] == pytest.approx((200 + psnr) / 2, abs=0.01)
    assert result["psnr_db"] == pytest.approx((200 + psnr - 10 * np.log10(HOLE.mean())) / 2, abs=0.01)
    assert 0.9 < result["hole_ssim"] < result["ssim"] < 1 and result["images"] == 2
    assert result["texture_ratio"] == pytest.approx(1, abs=0.2)
    assert result["lpips"] is result["fid"] is None
    assert result["lpips_reason"] == result["fid_reason"] == "torchmetrics is not installed"
    thin, against = np.zeros((64, 64), bool), AgainstTruth()
    thin[30] = True
    against.add(true, true, thin)
    assert against.result()["texture_ratio"] is None, "a thin hole has none"


class FakeMetric:
    """Answers with how often it was updated; ``broken`` raises."""

    def __init__(self, **options: Any) -> None:
        self.options, self.calls = options, 0

    def update(self, *pictures: Any, real: bool = True) -> None:
        assert pictures[0].shape == (1, 3, 64, 64)
        self.calls += 1

    def compute(self) -> float:
        return float(self.calls)


@pytest.fixture
def metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """torchmetrics and what it needs, with the weights' folder, which is empty."""
    plain, present = importlib.util.find_spec, ("torchmetrics", "torchvision", "torch_fidelity")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name in present else plain(name))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name, cls in (("fid", "FrechetInceptionDistance"), ("lpip", "LearnedPerceptualImagePatchSimilarity")):
        module = types.ModuleType(f"torchmetrics.image.{name}")
        setattr(module, cls, FakeMetric)
        monkeypatch.setitem(sys.modules, f"torchmetrics.image.{name}", module)
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def test_weights_are_looked_for_and_never_fetched(metrics: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measured() -> dict[str, Any]:
        image, both = np.zeros((64, 64, 3), np.uint8), Perceptual()
        both.add(image, image)
        both.add(image, image)
        return both.result()

    absent = "its weights {} are not in " + str(metrics)
    assert measured() == {
        **{"lpips": None, "lpips_reason": absent.format("alexnet-owt-7be5be79.pth")},
        **{"fid": None, "fid_reason": absent.format("weights-inception-2015-12-05-6726825d.pth")},
    }
    for _, weights in PERCEPTUAL.values():
        (metrics / weights).touch()
    assert measured() == {"lpips": 2.0, "lpips_reason": None, "fid": 4.0, "fid_reason": None}

    def refuse(self: FakeMetric) -> float:
        raise RuntimeError("More than one sample\nis required")

    monkeypatch.setattr(FakeMetric, "compute", refuse)
    assert measured()["fid_reason"] == "torchmetrics failed: More than one sample is required"
