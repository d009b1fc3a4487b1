"""Baselines by name and by TOML: toy ONNX models that say what they were given, and descriptions that are wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx.parser
import pytest
import tomli_w

from moebius_edge.errors import BundleError, MachineError, UsageError
from moebius_edge.report.baselines import OnnxBaseline, read_description


def make_model(
    path: Path,
    *,
    kind: str = "float",
    size: int | None = None,
    last: bool = False,
    black: float = 0.0,
    white: float = 1.0,
    known: float = 0.0,
    hole: float = 1.0,
    scale: float = 1.0,
) -> None:
    """A model that returns the image with a quarter of the way from black to white where ``mask`` is ``hole``.

    ``last`` puts the channels last. What it returns is ``scale`` times as large.
    """
    sides = "h, w" if size is None else f"{size}, {size}"
    three, one = (f"[n, {sides}, {c}]" if last else f"[n, {c}, {sides}]" for c in (3, 1))
    model = onnx.parser.parse_model(f"""
        <ir_version: 10, opset_import: ["" : 20]>
        toy ({kind}{three} photo, {kind}{one} hole) => (float{three} filled)
        <float known = {{{known}}}, float span = {{{hole - known}}}, float scale = {{{scale}}},
         float fill = {{{black + (white - black) / 4}}}> {{
            image = Cast <to = 1> (photo)
            raw = Cast <to = 1> (hole)
            above = Sub (raw, known)
            inside = Div (above, span)
            change = Sub (fill, image)
            part = Mul (inside, change)
            sum = Add (image, part)
            filled = Mul (sum, scale)
        }}""")
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)


def describe(folder: Path, **values: Any) -> Path:
    names = {"model": "toy.onnx", "image": "photo", "mask": "hole", "output": "filled"}
    path = folder / "toy.toml"
    path.write_text(tomli_w.dumps({**names, **values}), encoding="utf-8")
    return path


@pytest.fixture
def photo() -> tuple[np.ndarray, np.ndarray]:
    """Uneven sides, and a hole of 20 by 20."""
    image = np.random.default_rng(0).integers(0, 256, (90, 75, 3), np.uint8)
    mask = np.zeros((90, 75), bool)
    mask[30:50, 25:45] = True
    return image, mask


@pytest.mark.parametrize(
    ("model", "description"),
    [
        ({}, {}),
        ({}, {"multiple": 8}),
        ({"hole": 0.0, "known": 1.0}, {"mask_range": [1, 0]}),
        ({"black": -1.0}, {"image_range": [-1, 1], "output_range": [-1, 1]}),
        ({"scale": 255.0}, {"output_range": [0, 255]}),
        ({"last": True}, {"layout": "nhwc"}),
        (
            {"kind": "uint8", "white": 255.0, "hole": 0.0, "known": 255.0},
            {"image_range": [0, 255], "mask_range": [255, 0], "output_range": [0, 255]},
        ),
    ],
)
def test_a_model_of_any_size(
    tmp_path: Path, photo: tuple[np.ndarray, np.ndarray], model: dict[str, Any], description: dict[str, Any]
) -> None:
    make_model(tmp_path / "toy.onnx", **model)
    image, mask = photo
    baseline = OnnxBaseline(read_description(describe(tmp_path, **description)))
    result = baseline.fill(image, mask)
    assert result.dtype == np.uint8 and (np.abs(result[mask].astype(int) - 64) <= 1).all()
    np.testing.assert_array_equal(result[~mask], image[~mask])
    assert baseline.info["name"] == "onnxruntime" and baseline.info["device"] == "cpu"


def test_a_model_of_one_size_sees_crops(tmp_path: Path) -> None:
    make_model(tmp_path / "toy.onnx", size=64)
    image = np.random.default_rng(0).integers(0, 256, (200, 300, 3), np.uint8)
    mask = np.zeros((200, 300), bool)
    mask[20:40, 20:40] = mask[150:180, 240:270] = True
    result = OnnxBaseline(read_description(describe(tmp_path, size=64))).fill(image, mask)
    assert (np.abs(result[mask].astype(int) - 64) <= 1).all()
    changed = (result != image).any(2)
    assert changed[:60, :60].any() and changed[140:190, 230:280].any() and not changed[70:130].any()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"modell": "x"}, "modell is 'x': Extra inputs are not permitted"),
        ({"model": 3}, "model is 3: "),
        ({"size": -1}, "size is -1: "),
        ({"multiple": 0}, "multiple is 0: "),
        ({"layout": "hwc"}, "layout is 'hwc': Input should be 'nchw' or 'nhwc'"),
        ({"mask_range": [1, 1]}, "give two different numbers, such as [0, 1]"),
        ({"image_range": "[0, 1]"}, "image_range is '[0, 1]': "),
        ({"name": 3}, "name is 3: "),
    ],
)
def test_descriptions_that_are_wrong(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    make_model(tmp_path / "toy.onnx")
    with pytest.raises(UsageError) as caught:
        read_description(describe(tmp_path, **values))
    assert message in str(caught.value) and "the keys are model, name, size" in str(caught.value)


def test_models_that_are_not_as_described(tmp_path: Path, photo: tuple[np.ndarray, np.ndarray]) -> None:
    with pytest.raises(MachineError, match=r"toy.toml names the model .*toy.onnx, which is missing"):
        read_description(describe(tmp_path))
    (tmp_path / "toy.onnx").write_text("none")
    with pytest.raises(BundleError, match=r"cannot load .*toy.onnx"):
        OnnxBaseline(read_description(describe(tmp_path)))
    make_model(tmp_path / "toy.onnx", size=64)
    with pytest.raises(BundleError, match=r"has the inputs photo, hole and outputs filled: name them"):
        OnnxBaseline(read_description(describe(tmp_path, image="image")))
    with pytest.raises(UsageError, match="a baseline has no device 'tpu'"):
        OnnxBaseline(read_description(describe(tmp_path, device="tpu")))
    with pytest.raises(MachineError, match="has no CUDAExecutionProvider"):
        OnnxBaseline(read_description(describe(tmp_path, device="cuda")))
    with pytest.raises(BundleError, match=r"toy.onnx failed: .*: describe it as it is"):
        OnnxBaseline(read_description(describe(tmp_path))).fill(*photo)
    make_model(tmp_path / "toy.onnx", scale=1e38, white=1e38)
    with pytest.raises(BundleError, match="Toy returned an infinite value"):
        OnnxBaseline(read_description(describe(tmp_path, name="Toy"))).fill(*photo)
