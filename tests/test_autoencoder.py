"""The autoencoder in FP16: what may be divided, that it changes nothing, and what becomes of one that overflows."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from diffusers import AutoencoderKL
from exporting import save_vae, weight_bytes
from onnx import numpy_helper

from moebius_edge.bundle.manifest import resolved_components
from moebius_edge.export.autoencoder import (
    AUTOENCODER,
    MARGIN,
    choose_divisor,
    divide,
    divisible_tensors,
    half_autoencoder,
    range_images,
    record_ranges,
)
from moebius_edge.export.onnx_file import Decoder, Encoder, check_onnx, write_onnx
from moebius_edge.export.precision import LARGEST, convert
from moebius_edge.export.specialise import QuarteredUpsample, specialise_autoencoder
from moebius_edge.metrics.fidelity import psnr_db
from moebius_edge.progress import no_progress

PUBLISHED: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "norm_num_groups": 32,
}
RESOLUTION = 64


def make_vae(folder: Path, **changes: Any) -> Any:
    return AutoencoderKL.from_pretrained(save_vae(folder, **changes), low_cpu_mem_usage=False).eval()


def write(vae: Any, folder: Path, resolution: int = RESOLUTION) -> dict[str, Path]:
    """The float32 files of both components, the upsamplers in quarters where that pays."""
    special, components = specialise_autoencoder(vae), resolved_components(resolution)
    paths = {name: folder / f"{name}.onnx" for name in AUTOENCODER}
    for module, name in zip((Encoder, Decoder), AUTOENCODER, strict=True):
        write_onnx(module(special).eval(), components[name], paths[name])
    return paths


def load(path: Path) -> onnx.ModelProto:
    return onnx.shape_inference.infer_shapes(onnx.load(path), check_type=True, data_prop=True)


def run(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> np.ndarray:
    """The output with a rounding after each operator, as optimisations would spare some."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    result: np.ndarray = session.run(None, feeds)[0]
    return result


def drawn(name: str, side: int, batch: int = 1) -> dict[str, np.ndarray]:
    (given,) = resolved_components(8 * side)[name].inputs
    shape = [batch, *map(int, given.shape[1:])]
    return {given.name: np.random.default_rng(0).standard_normal(shape, np.float32)}


def check_division(path: Path, feeds: dict[str, np.ndarray], plain: np.ndarray, divisor: int) -> None:
    """Both the output and every divided tensor are what they should be, to 1e-5 of their scale."""
    model = load(path)
    divided = divisible_tensors(model)
    before, _ = record_ranges(model, [feeds])
    divide(model, divided, divisor)
    after, _ = record_ranges(model, [feeds])
    for name, largest in before.items():
        assert after[name] == pytest.approx(largest / (divisor if name in divided else 1), rel=1e-4, abs=1e-6), name
    assert np.abs(run(model, feeds) - plain).max() <= 1e-5 * np.abs(plain).max()


def change(paths: dict[str, Path], folder: Path, change_weights: Callable[[dict[str, np.ndarray]], None]) -> None:
    """Copies of the files in ``folder`` with weights that ``change_weights`` has changed in place, by name."""
    for path in paths.values():
        model = onnx.load(path)
        weights = {t.name: numpy_helper.to_array(t).copy() for t in model.graph.initializer}
        change_weights(weights)
        del model.graph.initializer[:]
        model.graph.initializer.extend(numpy_helper.from_array(value, key) for key, value in weights.items())
        onnx.save(model, folder / path.name)


def loud_streams(weights: dict[str, np.ndarray]) -> None:
    """Both residual streams start 1e5 times as large as they do in a random network."""
    for name, value in weights.items():
        if "coder.conv_in." in name:
            value *= 1e5


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("plain")
    return write(make_vae(folder / "vae"), folder)


@pytest.fixture
def loud(plain: dict[str, Path], tmp_path: Path) -> dict[str, Path]:
    change(plain, tmp_path, loud_streams)
    return {name: tmp_path / path.name for name, path in plain.items()}


@pytest.mark.parametrize("name", AUTOENCODER)
def test_a_division_changes_nothing_but_what_it_divides(loud: dict[str, Path], name: str) -> None:
    feeds = drawn(name, RESOLUTION // 8, 2)
    check_division(loud[name], feeds, run(onnx.load(loud[name]), feeds), 64)


def test_the_residual_stream_and_every_convolution_before_a_norm_are_divided(loud: dict[str, Path]) -> None:
    model = onnx.load(loud["vae_decoder"])
    divided = divisible_tensors(model)
    norms = [node for node in model.graph.node if node.op_type == "InstanceNormalization"]
    assert len(norms) == 22 and all(node.input[0] in divided for node in norms)
    kept = [n.output[0] for n in model.graph.node if n.op_type in ("Conv", "MatMul") and n.output[0] not in divided]
    assert len(kept) == 6 and "image" in kept  # the last convolution, and q, k, v and both products of the attention


def test_nothing_is_divided_that_something_else_reads() -> None:
    """A norm alone reads a, and a in another order; b is read by a ReLU, and c by a sum that leaves the graph."""
    model = onnx.parser.parse_model("""<ir_version: 9, opset_import: ["": 20]>
        parts (float[1, 2, 4] x) => (float[1, 2, 4] y, float[1, 2, 4] z)
        { a = MatMul(x, w) a2 = Transpose <perm = [0, 1, 2]>(a) y = InstanceNormalization(a2, one, zero)
          b = MatMul(x, w) c = Add(b, b) r = Relu(b) z = Add(c, r) }""")
    for name, shape in (("w", (4, 4)), ("one", (2,)), ("zero", (2,))):
        model.graph.initializer.append(numpy_helper.from_array(np.ones(shape, np.float32), name))
    assert divisible_tensors(model) == {"a", "a2"}


def test_plain_fp16_overflows_and_the_divided_file_passes(loud: dict[str, Path]) -> None:
    feeds = drawn("vae_decoder", RESOLUTION // 8)
    expected = run(onnx.load(loud["vae_decoder"]), feeds)
    overflowing = load(loud["vae_decoder"])
    convert(overflowing)
    assert not np.isfinite(run(overflowing, feeds)).all()

    precisions, islands = half_autoencoder(loud, range_images(RESOLUTION), 40, no_progress)
    for name, path in loud.items():
        assert precisions[name]["type"] == "float16" and precisions[name]["divisor"] >= 16
        assert islands[name]["MatMul"] and islands[name]["Softmax"]  # the attention's scores, and what reads them
        check_onnx(path, resolved_components(RESOLUTION)[name])
        sizes = weight_bytes(onnx.load(path))
        assert sizes["FLOAT16"] > 10 * sizes["FLOAT"]
    assert 40 <= psnr_db(run(onnx.load(loud["vae_decoder"]), feeds), expected) < 100


def loud_values(weights: dict[str, np.ndarray]) -> None:
    weights["vae.decoder.mid_block.attentions.0.to_v.bias"] += 1e5  # read by a product, not by a norm


def unchanged(weights: dict[str, np.ndarray]) -> None:
    """Whose FP16 is some 70 dB from float32."""


@pytest.mark.parametrize(
    ("damage", "floor", "reason"),
    [
        (
            loud_values,
            40,
            r"tensor \S+ \(\w+\) reaches \S+, FP16 ends at 65504 and 8 times .* must fit",
        ),
        (unchanged, 120, r"in FP16 it is \S+ dB from float32, 120 dB is the floor"),
    ],
)
def test_a_decoder_that_no_division_helps_stays_float32_and_says_why(
    plain: dict[str, Path], tmp_path: Path, damage: Callable[..., None], floor: float, reason: str
) -> None:
    decoder = {"vae_decoder": plain["vae_decoder"]}
    change(decoder, tmp_path, damage)
    paths = {"vae_encoder": tmp_path / "encoder.onnx", "vae_decoder": tmp_path / "vae_decoder.onnx"}
    paths["vae_encoder"].write_bytes(plain["vae_encoder"].read_bytes())
    before = paths["vae_decoder"].read_bytes()
    precisions, islands = half_autoencoder(paths, range_images(RESOLUTION), floor, no_progress)
    assert precisions["vae_decoder"]["type"] == "float32" and islands["vae_decoder"] == "all"
    assert paths["vae_decoder"].read_bytes() == before
    assert re.fullmatch(reason, precisions["vae_decoder"]["reason"]), json.dumps(precisions)


def test_the_divisor_is_the_least_power_of_two_that_leaves_the_margin() -> None:
    limit = LARGEST / MARGIN
    assert [choose_divisor([0.5, r]) for r in (1.0, limit, 1.01 * limit, 2 * limit, 2.01 * limit)] == [1, 1, 2, 2, 4]
    assert choose_divisor([]) == 1


def test_ranges_are_recorded_over_pictures_where_there_are_some(tmp_path: Path) -> None:
    for shade in (0, 255):
        cv2.imwrite(str(tmp_path / f"{shade}.png"), np.full((90, 70, 3), shade, np.uint8))
    images = range_images(RESOLUTION, str(tmp_path))
    assert [(image.shape, image.min(), image.max()) for image in images] == [
        ((1, 3, 64, 64), -1, -1),
        ((1, 3, 64, 64), 1, 1),
    ]
    assert [image.shape for image in range_images(RESOLUTION)] == [(1, 3, 64, 64)] * 4


def test_wide_upsamplers_are_quartered_and_the_autoencoder_is_left_alone(tmp_path: Path) -> None:
    vae = make_vae(tmp_path / "vae", block_out_channels=(8, 128, 64, 128))
    latent = torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        expected, special = vae.decode(latent).sample, specialise_autoencoder(vae)
        assert (special.decode(latent).sample - expected).abs().max() <= 1e-5 * expected.abs().max()
    kinds = [type(module.upsamplers[0]) for module in special.decoder.up_blocks if module.upsamplers]
    assert [kind is QuarteredUpsample for kind in kinds] == [True, False, True]
    assert not any(isinstance(module, QuarteredUpsample) for module in vae.modules())


@pytest.mark.slow
def test_the_published_shape_divided_equals_pytorch(tmp_path: Path) -> None:
    """Latents of 16x16; the whole chain: upsamplers in quarters, the stream divided by 64."""
    side = 16
    vae = make_vae(tmp_path / "vae", **PUBLISHED)
    paths = write(vae, tmp_path, 8 * side)
    feeds = {name: drawn(name, side) for name in AUTOENCODER}
    with torch.no_grad():
        latent = vae.encode(torch.from_numpy(feeds["vae_encoder"]["image"])).latent_dist.mean * 0.13025
        image = vae.decode(torch.from_numpy(feeds["vae_decoder"]["latent"]) / 0.13025).sample
    for name, plain in zip(AUTOENCODER, (latent, image), strict=True):
        check_division(paths[name], feeds[name], plain.numpy(), 64)
