"""What is recorded is what is quantised: every tensor that needs a scale was looked at, under the same name."""

from __future__ import annotations

import onnx
import pytest

from moebius_edge.bundle.bundle import ASSETS
from moebius_edge.calibration.activations import find_activations, load_inlined
from moebius_edge.calibration.blocks import blocks
from moebius_edge.calibration.quantise import activations
from moebius_edge.calibration.recipe import Recipe


@pytest.mark.parametrize("target", ["tensorrt", "cpu"])
def test_every_scale_that_is_needed_has_been_recorded(target: str) -> None:
    path = ASSETS / "tiny" / "denoiser.onnx"
    model = onnx.load(str(path))
    everything = Recipe({block.name: True for block in blocks(model)})
    recorded = {a.name for a in find_activations(load_inlined(path), rows=2, target=target)}
    needed = set(activations(model, everything, target))
    assert needed and needed <= recorded
