"""Recordings of a toy whose activations are its noise, against the noise of the plain pipeline."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from toy import describe_again, make_toy_bundle

from moebius_edge.bundle.bundle import ASSETS, Bundle
from moebius_edge.calibration.blocks import Recipe, blocks, inlined
from moebius_edge.calibration.evaluate import CombinedRuntime, ort_runtime
from moebius_edge.calibration.quantise import quantise
from moebius_edge.calibration.record import activation_axes, record
from moebius_edge.calibration.statistics import Statistics
from moebius_edge.data.calibration_pictures import picture_and_hole
from moebius_edge.data.pictures import Pictures
from moebius_edge.data.sources import open_pictures
from moebius_edge.errors import BundleError
from moebius_edge.export.precision import read_model
from moebius_edge.pipeline.inpainter import Inpainter
from moebius_edge.progress import no_progress
from moebius_edge.runtimes.base import Arrays
from moebius_edge.system.fingerprint import ResultCache

SETTINGS: dict[str, Any] = {"steps": 5, "guidance": None, "seed": 7}  # 4 calls at strength 0.99
RESOLUTION = 64


PASS = """<domain: "moebius", opset_import: ["": 20]> Pass (p_x, p_w) => (p_z)
{ p_y = MatMul(p_x, p_w) p_constant = Mul(p_w, p_w) p_z = MatMul(p_y, p_constant) }"""


def make_calibration_bundle(folder: Path, scale: float = 1.0, distilled_guidance: float | None = None) -> Path:
    """A toy with something to calibrate: its denoiser's result goes through products that change nothing.

    ``exact`` -> a local function of two matrix products with the identity -> ``passed`` -> a 1x1 convolution with the
    identity -> ``noise``. So every recorded tensor but those of the function's inside is the noise itself. ``scale`` is
    that of the first products' weights: infinity for damaged ones.
    """
    path = make_toy_bundle(folder, RESOLUTION, distilled_guidance=distilled_guidance) / "denoiser.onnx"
    model = onnx.load(path)
    del model.graph.node[-1]  # exact -> noise
    nodes = "passed = moebius.Pass(exact, eye)", "noise = Conv(passed, kernel)"
    model.graph.node.extend(map(onnx.parser.parse_node, nodes))
    weights = {"eye": np.diag(np.full(RESOLUTION // 8, scale)), "kernel": np.eye(4)[..., None, None]}
    model.graph.initializer.extend(numpy_helper.from_array(w.astype(np.float32), n) for n, w in weights.items())
    model.functions.append(onnx.parser.parse_function(PASS))
    model.opset_import.append(onnx.helper.make_opsetid("moebius", 1))
    onnx.save(model, path)
    return describe_again(folder)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return Bundle.load(make_calibration_bundle(tmp_path_factory.mktemp("bundle") / "toy"))


@pytest.fixture
def pictures(tmp_path: Path) -> Pictures:
    """Four pictures of random blocks."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(4):
        pixels = np.random.default_rng(i).integers(0, 256, (8, 8, 3), np.uint8)
        cv2.imwrite(str(folder / f"{i}.png"), pixels.repeat(10, 0).repeat(10, 1))
    return open_pictures(folder)


def recorded(bundle: Bundle, pictures: Pictures, folder: Path, **changes: Any) -> Statistics:
    progress = changes.pop("progress", no_progress)
    return record(bundle, pictures, ResultCache(folder), progress, **{**SETTINGS, **changes})


class Listening(CombinedRuntime):
    """The plain runtime, its denoiser's noise kept."""

    def __init__(self, bundle: Bundle) -> None:
        autoencoder = ort_runtime(bundle, "vae_encoder", "vae_decoder")
        super().__init__(ort_runtime(bundle, "denoiser"), autoencoder, {})
        self.noise: list[np.ndarray] = []

    def _run(self, component: str, feeds: Arrays, outputs: Sequence[str]) -> Arrays:
        results = super()._run(component, feeds, outputs)
        if component == "denoiser":
            self.noise.append(results["noise"].copy())
        return results


def noise_of_the_pipeline(bundle: Bundle, pictures: Pictures) -> np.ndarray:
    runtime = Listening(bundle)
    with Inpainter(bundle, runtime) as inpainter:
        for i in range(len(pictures)):
            picture, hole = picture_and_hole(pictures, i, RESOLUTION, seed=7)
            inpainter.inpaint(picture, hole, steps=5, seed=7 + i)
    return np.stack(runtime.noise)


def test_statistics_are_those_of_every_call_of_the_pipeline(bundle: Bundle, pictures: Pictures, tmp_path: Path) -> None:
    statistics = recorded(bundle, pictures, tmp_path / "new" / "folder")
    noise = noise_of_the_pipeline(bundle, pictures)
    assert noise.shape == (16, 2, 4, 8, 8)  # calls, branches
    assert list(statistics.tensors)[0] == "exact" and len(statistics.tensors) == 3
    for name, tensor in statistics.tensors.items():
        axes = (0, 1, 3, 4) if name == "passed" else (0, 1, 2, 3)
        np.testing.assert_allclose(tensor.channels, np.abs(noise).max(axis=axes), rtol=1e-5)
        histogram = tensor.histogram
        assert histogram.counts.sum() + histogram.zeros == noise.size
        expected, _ = np.histogram(np.abs(noise[noise != 0]), histogram.counts.size, (0, histogram.limit))
        assert np.abs(np.cumsum(histogram.counts - expected)).max() <= 3, "by rounding, into a neighbouring bin"


def same(a: Statistics, b: Statistics) -> bool:
    return {n: t.to_dict() for n, t in a.tensors.items()} == {n: t.to_dict() for n, t in b.tensors.items()}


def test_an_interrupted_recording_goes_on_to_the_same_numbers(
    bundle: Bundle, pictures: Pictures, tmp_path: Path
) -> None:
    progress: list[tuple[str, int, int]] = []
    whole = recorded(bundle, pictures, tmp_path / "whole", progress=lambda *update: progress.append(update))
    assert [done for _, done, _ in progress] == list(range(1, 17)) and {total for *_, total in progress} == {16}
    assert progress[0][0] == "record 0.png, 1 of 4" and progress[-1][0] == "record 3.png, 4 of 4"

    def interrupt(what: str, done: int, total: int) -> None:
        if done == 10:  # in the third picture
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recorded(bundle, pictures, tmp_path / "interrupted", progress=interrupt)
    later: list[int] = []
    folder = tmp_path / "interrupted"
    resumed = recorded(bundle, pictures, folder, progress=lambda what, done, total: later.append(done))
    assert same(whole, resumed) and later == list(range(9, 17))
    again = recorded(bundle, pictures, folder, progress=interrupt)
    assert same(again, whole), "a complete recording is only read"


def test_another_setting_is_another_recording(bundle: Bundle, pictures: Pictures, tmp_path: Path) -> None:
    last = recorded(bundle, pictures, tmp_path)
    for change in ({"seed": 8}, {"steps": 6}, {"guidance": 1.0}):
        other = recorded(bundle, pictures, tmp_path, **change)
        assert not same(last, other)
        last = other


def test_distilled_guidance_has_the_conditional_branch_alone(pictures: Pictures, tmp_path: Path) -> None:
    """The other branch is NaN, which would be refused."""
    bundle = Bundle.load(make_calibration_bundle(tmp_path / "toy", distilled_guidance=2.0))
    statistics = recorded(bundle, pictures, tmp_path / "record")
    histogram = statistics.tensors["exact"].histogram
    assert histogram.counts.sum() + histogram.zeros == 4 * 4 * 4 * 8 * 8


def test_an_activation_that_is_not_finite_is_named_and_nothing_saved(pictures: Pictures, tmp_path: Path) -> None:
    bundle = Bundle.load(make_calibration_bundle(tmp_path / "toy", scale=np.inf))
    with pytest.raises(BundleError, match=r"activation \S*p_y of the denoiser is not finite"):
        recorded(bundle, pictures, tmp_path / "record")
    assert list((tmp_path / "record").iterdir()) == []


def test_inputs_of_products_are_found_inside_local_functions_too(tmp_path: Path) -> None:
    folder = make_calibration_bundle(tmp_path / "toy")
    axes = activation_axes(inlined(onnx.load(folder / "denoiser.onnx")))
    (first, inner, last) = axes
    assert (first, last) == ("exact", "passed") and inner.endswith("p_y") and list(axes.values()) == [-1, -1, 1]
    decoder = onnx.load(make_toy_bundle(tmp_path / "plain") / "vae_decoder.onnx")
    assert list(activation_axes(decoder)) == ["latent"], "an input of the component counts"


def test_every_scale_that_is_needed_has_been_recorded() -> None:
    model = read_model(ASSETS / "tiny" / "denoiser.onnx")
    scales: dict[str, float] = defaultdict(lambda: 0.05)
    quantise(model, Recipe({block.name: True for block in blocks(model)}), scales)
    assert scales and scales.keys() <= activation_axes(inlined(model)).keys()
