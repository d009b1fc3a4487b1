"""Accuracy on traces and pictures whose differences are known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from moebius_edge.errors import BundleError
from moebius_edge.imaging.windows import Window
from moebius_edge.report.accuracy import Fidelity, Trace

HOLE = np.zeros((64, 64), bool)
HOLE[20:44, 20:44] = True
WINDOW = Window(0, 0, 64, (20, 20, 44, 44))


def trace(moved: float = 0.0, windows: int = 1) -> Trace:
    """A picture for each window, moved by so much."""
    result, picture = Trace(), np.random.default_rng(1).random((64, 64, 3)).astype(np.float32)
    for _ in range(windows):
        result.on_window(WINDOW, picture + np.float32(moved), HOLE)
    return result


def test_what_is_equal_has_no_difference(tmp_path: Path) -> None:
    trace().save(tmp_path / "0.npy")
    against = Fidelity()
    against.add_reference(trace(), tmp_path / "0.npy")
    with pytest.raises(BundleError, match=r"0.npy has other windows: measure both again"):
        against.add_reference(trace(windows=2), tmp_path / "0.npy")
    assert against.result() == {
        **dict.fromkeys(("hole_psnr_db", "psnr_db"), 200.0),
        **dict.fromkeys(("hole_ssim", "ssim"), 1.0),
        "images": 1,
    }


def test_differences_are_those_of_the_network_itself(tmp_path: Path) -> None:
    trace(windows=2).save(tmp_path / "0.npy")
    against, moved = Fidelity(), trace(0.01, windows=2)
    moved.outputs[1][30, 30, 2] += 0.1  # one pixel, in the hole of one window
    against.add_reference(moved, tmp_path / "0.npy")
    result = against.result()
    assert 37 < result["hole_psnr_db"] < result["psnr_db"] < 40.01, "0.01 of 1 is 40 dB, and less with the pixel"
    assert result["images"] == 1


def test_against_the_truth() -> None:
    true = np.random.default_rng(2).integers(40, 200, (64, 64, 3), np.uint8)
    changed = true.copy()
    changed[HOLE] += 10
    against = Fidelity()
    against.add_truth(true, true, HOLE)
    against.add_truth(changed, true, HOLE)
    result = against.result()
    psnr = 10 * np.log10(255**2 / 100)
    assert result["hole_psnr_db"] == pytest.approx((200 + psnr) / 2, abs=0.01)
    assert result["psnr_db"] == pytest.approx((200 + psnr - 10 * np.log10(HOLE.mean())) / 2, abs=0.01)
    assert 0.9 < result["hole_ssim"] < result["ssim"] < 1 and result["images"] == 2
