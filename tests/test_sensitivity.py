"""The denoiser in parts against the denoiser in one piece, in float32 and with a block in INT8."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest

from moebius_edge.bundle.bundle import Bundle
from moebius_edge.calibration.blocks import Recipe, inlined
from moebius_edge.calibration.quantise import Quantiser
from moebius_edge.calibration.record import RecordingRuntime, activation_axes
from moebius_edge.calibration.sensitivity import PARTS, PartedDenoiser
from moebius_edge.calibration.statistics import Statistics, TensorStatistics
from moebius_edge.runtimes.base import drawn_feeds

FIRST, LAST = "down_blocks.0.attentions.0.ff", "conv_out"


def noise_of(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> np.ndarray:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    noise: np.ndarray = session.run(["noise"], feeds)[0]
    return noise


@pytest.fixture(scope="module")
def tiny() -> SimpleNamespace:
    """The bundled model with the ranges of one call."""
    bundle = Bundle.load("tiny", verify=False)
    component = bundle.components["denoiser"]
    feeds = drawn_feeds(component, 2)
    model = inlined(onnx.load(bundle.component_path("denoiser")))
    tensors = {name: TensorStatistics(axis) for name, axis in activation_axes(model).items()}
    with RecordingRuntime(component, model, tensors) as recording:
        recording.run("denoiser", feeds)
    quantiser = Quantiser(bundle.component_path("denoiser"), Statistics({}, tensors), "mse")
    return SimpleNamespace(quantiser=quantiser, feeds=feeds, parted=PartedDenoiser(quantiser, feeds))


def test_in_float32_it_is_the_whole_denoiser(tiny: SimpleNamespace) -> None:
    whole = noise_of(tiny.quantiser.model, tiny.feeds)
    assert np.abs(tiny.parted.noise - whole).max() <= 1e-5 * np.abs(whole).max()


@pytest.mark.parametrize(("block", "smoothed"), [(FIRST, False), (FIRST, True), (LAST, False)])
def test_a_trial_is_the_whole_denoiser_with_that_block_quantised(
    tiny: SimpleNamespace, block: str, smoothed: bool
) -> None:
    """Alone among float32 the block's integers are the same, but where a value lies half way between two of them."""
    recipe = Recipe({block: True}, (block,) if smoothed else ())
    whole = noise_of(tiny.quantiser.quantise(recipe)[0], tiny.feeds)
    trial, before = tiny.parted.noise_with(block, smoothed), tiny.parted.noise
    assert np.abs(trial - whole).max() < 0.02 * np.abs(whole - before).max() > 0
    assert np.array_equal(before, tiny.parted.noise), "the float32 tensors are as they were"


def test_smoothing_makes_a_difference(tiny: SimpleNamespace) -> None:
    plain, smoothed = (tiny.parted.noise_with(FIRST, kind) for kind in (False, True))
    assert not np.array_equal(plain, smoothed)


def test_the_later_a_block_the_less_is_computed(tiny: SimpleNamespace) -> None:
    assert (tiny.parted.share(FIRST), tiny.parted.share(LAST)) == (1, 1 / PARTS)
    shares = [tiny.parted.share(block.name) for block in tiny.quantiser.candidates]
    assert sum(shares) / len(shares) < 0.65
