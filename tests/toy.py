"""A bundle of three small graphs that obey the contract and whose result is known in closed form.

The autoencoder keeps the mean colour of every 8x8 block. The denoiser predicts the noise that makes its
guess of the clean latent exact, ε = (x_t - √ᾱ_t x̂) / √(1 - ᾱ_t), with x̂ the masked latent whose hole holds
the mean of what lies outside. So a sampler that is right ends in ``expected_latent``, from any noise, at any
number of steps; one that is wrong does not. Everything here needs numpy and onnx only.
"""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from moebius_edge.bundle.bundle import write_bundle
from moebius_edge.export.shallow import write_shallow
from moebius_edge.spec import BETA_END, BETA_START, LATENT_DOWNSCALE, NUM_TRAIN_TIMESTEPS, Component, components
from moebius_edge.system.files import sha256_file

TO_LATENT = np.array([[1, 1, 1], [1, -1, 0], [1, 1, -2], [0.5, 0, 0.5]], np.float32)  # (4 latent, 3 RGB)
TO_IMAGE = np.linalg.pinv(TO_LATENT).astype(np.float32)
UNCONDITIONAL = 0.9  # the unconditional branch guesses x̂ times this
DEEP_CHANNELS = 4  # of the deep feature, where there is one
_EPSILON = 1e-3  # keeps the mean of an empty surrounding finite


def make_toy_bundle(
    folder: Path,
    resolution: int = 64,
    *,
    name: str = "toy",
    nan_in: str | None = None,
    distilled_guidance: float | None = None,
    deep: bool = False,
) -> Path:
    """Write a toy bundle to ``folder`` and return it. ``nan_in`` names a component whose weights are NaN.

    With ``distilled_guidance`` the conditional branch is guided already, and the unconditional one returns NaN. With
    ``deep`` the guess, plus a thousandth of the timestep, is a deep feature, from which the shallow part takes its own
    timestep's share: one that is d timesteps older makes the guess too large by d / 1000.
    """
    folder.mkdir(parents=True, exist_ok=True)
    denoiser = partial(_denoiser, distilled_guidance=distilled_guidance, deep=deep)
    contract = components(DEEP_CHANNELS if deep else None)
    graphs = {"vae_encoder": _encoder, "denoiser": denoiser, "vae_decoder": _decoder}
    for component, build in graphs.items():
        weight = np.float32(np.nan) if component == nan_in else np.float32(1)
        onnx.save(build(contract[component], resolution, weight), os.fspath(folder / f"{component}.onnx"))
    if deep:
        write_shallow(folder / "denoiser.onnx", folder / "denoiser_shallow.onnx")
    write_bundle(
        folder,
        name=name,
        description="three toy graphs for tests",
        licence="Apache-2.0",
        model={"kind": "toy"},
        resolution=resolution,
        scaling_factor=1.0,
        precision="float32",
        source={"checkpoint": {"file": "toy", "sha256": "0" * 64}},
        gate={"psnr_db": 99.0},
        tools={"onnx": onnx.__version__},
        defaults={"steps": 20, "guidance": distilled_guidance or 2.0, "start": "image"},
        distilled_guidance=distilled_guidance,
        deep_channels=DEEP_CHANNELS if deep else None,
    )
    return folder


INT8 = {
    "rest": "float16",
    "quantised_products": 3,
    "products": 5,
    "share_of_multiplications": 0.75,
    "ranges": "mse",
    "calibration": {"pictures": "5:00", "steps": 20, "seed": 0},
    "nodes": ["a/1", "a/2", "b/1"],
    "blocks": [
        {"name": "a", "psnr_db": 45.04, "share": 0.5, "quantised": True},
        {"name": "b", "psnr_db": 33.5, "share": 0.25, "smoothed_psnr_db": 41.0, "quantised": True, "smoothed": True},
        {"name": "c", "psnr_db": None, "share": 0.25, "quantised": False},
    ],
    "cases": [{"name": "china", "hole_psnr_db": 34.5}],
    "speed": {"other": "float32", "device": "cpu", "runtime": "onnxruntime 1.23.0", "threads": 2, "int8_ms": 20.0,
              "other_ms": 15.0, "speedup": 0.75, "rows": 2},
}  # fmt: skip


def call_int8(folder: Path, **changes: object) -> Path:
    """Let a toy's ``bundle.json`` say that it is INT8, as ``INT8`` with ``changes`` does; its files stay."""
    path = folder / "bundle.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "precision": "int8", "int8": {**INT8, **changes}}))
    return folder


def describe_again(folder: Path) -> Path:
    """Let ``bundle.json`` have the sizes and hashes of the files as they are now, as a hostile author would."""
    path = folder / "bundle.json"
    content = json.loads(path.read_text())
    for name in content["files"]:
        content["files"][name] = {"sha256": sha256_file(folder / name), "bytes": (folder / name).stat().st_size}
    path.write_text(json.dumps(content))
    return folder


def flip_byte(path: Path, offset: int | None = None) -> None:
    """Invert one byte of a file, by default the one in the middle."""
    data = bytearray(path.read_bytes())
    at = len(data) // 2 if offset is None else offset
    data[at] ^= 0xFF
    path.write_bytes(data)


def encode(image: np.ndarray) -> np.ndarray:
    """What the encoder graph computes: (N, 3, H, W) in [-1, 1] -> (N, 4, h, w)."""
    n, c, height, width = image.shape
    s = LATENT_DOWNSCALE
    blocks = image.reshape(n, c, height // s, s, width // s, s).mean(axis=(3, 5))
    return np.einsum("lc,nchw->nlhw", TO_LATENT, blocks).astype(np.float32)


def decode(latent: np.ndarray) -> np.ndarray:
    """What the decoder graph computes: (N, 4, h, w) -> (N, 3, H, W) clipped to [-1, 1]."""
    image = np.einsum("cl,nlhw->nchw", TO_IMAGE, latent)
    return np.clip(image.repeat(LATENT_DOWNSCALE, 2).repeat(LATENT_DOWNSCALE, 3), -1, 1).astype(np.float32)


def expected_latent(mask: np.ndarray, masked: np.ndarray, guidance: float) -> np.ndarray:
    """Where any correct sampler ends: guidance acts on x̂ as it does on the noise.

    ``mask`` (N, 1, h, w) is 1 in the hole, ``masked`` (N, 4, h, w) the masked image's latent. Guidance 1
    means the conditional branch alone.
    """
    mean = masked.mean(axis=(2, 3), keepdims=True) / ((1 - mask).mean(axis=(2, 3), keepdims=True) + _EPSILON)
    conditional = masked + mask * mean
    return (UNCONDITIONAL + guidance * (1 - UNCONDITIONAL)) * conditional


def alpha_bars() -> np.ndarray:
    """ᾱ for every training timestep, float64."""
    betas = np.linspace(BETA_START**0.5, BETA_END**0.5, NUM_TRAIN_TIMESTEPS, dtype=np.float64) ** 2
    return np.cumprod(1 - betas)


def _encoder(component: Component, resolution: int, weight: np.float32) -> onnx.ModelProto:
    s = LATENT_DOWNSCALE
    nodes = [
        helper.make_node("AveragePool", ["image"], ["blocks"], kernel_shape=[s, s], strides=[s, s]),
        helper.make_node("Conv", ["blocks", "weight"], ["latent"]),
    ]
    return _model(component, resolution, nodes, {"weight": TO_LATENT[:, :, None, None] * weight})


def _decoder(component: Component, resolution: int, weight: np.float32) -> onnx.ModelProto:
    nearest = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    nodes = [
        helper.make_node("Conv", ["latent", "weight"], ["small"]),
        helper.make_node("Resize", ["small", "", "scales"], ["large"], **nearest),
        helper.make_node("Clip", ["large", "low", "high"], ["image"]),
    ]
    constants = {
        "weight": TO_IMAGE[:, :, None, None] * weight,
        "scales": np.array([1, 1, LATENT_DOWNSCALE, LATENT_DOWNSCALE], np.float32),
        "low": np.float32(-1),
        "high": np.float32(1),
    }
    return _model(component, resolution, nodes, constants)


def _denoiser(
    component: Component, resolution: int, weight: np.float32, distilled_guidance: float | None, deep: bool
) -> onnx.ModelProto:
    alpha = alpha_bars()
    scales = [1, UNCONDITIONAL]
    if distilled_guidance is not None:
        scales = [UNCONDITIONAL + distilled_guidance * (1 - UNCONDITIONAL), np.nan]
    op = helper.make_node
    nodes = [
        op("Split", ["sample", "parts"], ["latent", "mask", "masked"], axis=1),
        # x̂: the surroundings' mean in the hole
        op("GlobalAveragePool", ["masked"], ["sum"]),
        op("Sub", ["one", "mask"], ["outside"]),
        op("GlobalAveragePool", ["outside"], ["share"]),
        op("Add", ["share", "epsilon"], ["safe_share"]),
        op("Div", ["sum", "safe_share"], ["mean"]),
        op("Mul", ["mask", "mean"], ["fill"]),
        op("Add", ["masked", "fill"], ["conditional"]),
        # the branch scales it
        op("Gather", ["branch_scales", "branch"], ["scale"]),
        op("Unsqueeze", ["scale", "axes"], ["scale4"]),
        op("Mul", ["conditional", "scale4"], ["guess" if deep else "clean"]),
        # ε = x_t / √(1-ᾱ) - x̂ √ᾱ / √(1-ᾱ)
        op("Cast", ["timestep"], ["index"], to=TensorProto.INT64),
        op("Gather", ["over_noise", "index"], ["a"]),
        op("Unsqueeze", ["a", "axes"], ["a4"]),
        op("Gather", ["signal_over_noise", "index"], ["b"]),
        op("Unsqueeze", ["b", "axes"], ["b4"]),
        op("Mul", ["latent", "a4"], ["x"]),
        op("Mul", ["clean", "b4"], ["y"]),
        op("Sub", ["x", "y"], ["exact"]),
        op("Mul", ["exact", "weight"], ["noise"]),
    ]
    if deep:
        at = next(i for i, node in enumerate(nodes) if node.output[0] == "guess") + 1
        nodes[at:at] = [
            op("Mul", ["timestep", "thousandth"], ["age"]),
            op("Unsqueeze", ["age", "axes"], ["age4"]),
            op("Add", ["guess", "age4"], ["deep"]),
            op("Sub", ["deep", "age4"], ["clean"]),
        ]
    constants = {
        "thousandth": np.float32(1e-3),
        "parts": np.array([4, 1, 4], np.int64),
        "one": np.float32(1),
        "epsilon": np.float32(_EPSILON),
        "branch_scales": np.array(scales, np.float32),
        "axes": np.array([1, 2, 3], np.int64),
        "over_noise": (1 / np.sqrt(1 - alpha)).astype(np.float32),
        "signal_over_noise": np.sqrt(alpha / (1 - alpha)).astype(np.float32),
        "weight": weight,
    }
    return _model(component, resolution, nodes, constants)


def _model(
    component: Component, resolution: int, nodes: list[onnx.NodeProto], constants: dict[str, np.ndarray]
) -> onnx.ModelProto:
    """Close the graph with the tensors the contract names, and check it."""

    initializers = [numpy_helper.from_array(np.asarray(value), key) for key, value in constants.items()]
    inputs, outputs = (
        [
            helper.make_tensor_value_info(t.name, helper.np_dtype_to_tensor_dtype(np.dtype(t.dtype)), t.shape)
            for t in (tensor.resolved(resolution) for tensor in tensors)
        ]
        for tensors in (component.inputs, component.outputs)
    )
    graph = helper.make_graph(nodes, component.name, inputs, outputs, initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model
