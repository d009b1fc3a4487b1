"""Which tensors are found, and that the graphs which return them compute what the component does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from calibrating import make_calibration_bundle
from toy import make_toy_bundle

from moebius_edge.calibration.activations import Activation, find_activations, graphs, group, load_inlined
from moebius_edge.errors import BundleError

VALUES = 2 * 4 * 8 * 8  # of the noise for two rows


def test_inputs_of_products_are_found_inside_local_functions_too(tmp_path: Path) -> None:
    model = load_inlined(make_calibration_bundle(tmp_path / "toy") / "denoiser.onnx")
    found = find_activations(model, rows=2)
    assert [a.axis for a in found] == [-1, -1, 1]
    assert found[0].name == "exact" and found[1].name.endswith("p_y") and found[2].name == "passed"
    assert [a.bytes for a in found] == [4 * VALUES] * 3


def test_names_are_the_same_each_time(tmp_path: Path) -> None:
    path = make_calibration_bundle(tmp_path / "toy") / "denoiser.onnx"
    assert find_activations(load_inlined(path), 1) == find_activations(load_inlined(path), 1)


def test_a_components_input_counts(tmp_path: Path) -> None:
    folder = make_toy_bundle(tmp_path / "toy")
    assert [a.name for a in find_activations(load_inlined(folder / "vae_decoder.onnx"), 1)] == ["latent"]


def test_a_component_without_products_is_refused(tmp_path: Path) -> None:
    model = load_inlined(make_toy_bundle(tmp_path / "toy") / "denoiser.onnx")
    with pytest.raises(BundleError, match="no convolution or matrix product to calibrate"):
        find_activations(model, 1)


def test_what_is_no_onnx_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "denoiser.onnx"
    path.write_bytes(b"no protobuf at all")
    with pytest.raises(BundleError, match=r"denoiser\.onnx is no valid ONNX file"):
        load_inlined(path)


def test_groups_keep_the_order_and_the_limit() -> None:
    sizes = [3, 4, 2, 9, 1, 1]
    activations = [Activation(str(i), None, size) for i, size in enumerate(sizes)]
    grouped = group(activations, 7)
    assert [[a.bytes for a in members] for members in grouped] == [[3, 4], [2], [9], [1, 1]]
    assert [a for members in grouped for a in members] == activations
    assert group(activations, 100) == [activations]


def test_each_graph_returns_its_group_and_the_last_the_result(tmp_path: Path) -> None:
    path = make_calibration_bundle(tmp_path / "toy") / "denoiser.onnx"
    model = load_inlined(path)
    feeds = {
        "sample": np.random.default_rng(0).standard_normal((2, 9, 8, 8)).astype(np.float32),
        "timestep": np.full(2, 500, np.float32),
        "branch": np.array([1, 0]),
    }
    (noise,) = onnxruntime.InferenceSession(str(path)).run(["noise"], feeds)
    parts = list(graphs(model, group(find_activations(model, 2), 4 * VALUES)))
    assert len(parts) == 3
    for number, (contents, names) in enumerate(parts):
        session = onnxruntime.InferenceSession(contents)
        outputs = [o.name for o in session.get_outputs()]
        assert outputs == (names if number < 2 else ["noise", *names])
        for values in session.run(None, feeds):
            np.testing.assert_allclose(values, noise, rtol=1e-6)
    assert len(parts[0][0]) < len(parts[2][0]), "a graph ends with its last tensor"
