"""Baselines by name and by TOML: toy ONNX models that say what they were given, and descriptions that are wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from moebius_edge.errors import BundleError, MachineError, UsageError
from moebius_edge.report.baselines import OnnxBaseline, read_description


def make_model(
    path: Path,
    *,
    kind: int = TensorProto.FLOAT,
    size: int | None = None,
    last: bool = False,
    black: float = 0.0,
    white: float = 1.0,
    known: float = 0.0,
    hole: float = 1.0,
    scale: float = 1.0,
) -> Path:
    """A model that returns the image with a quarter of the way from black to white where ``mask`` is ``hole``.

    ``last`` puts the channels last. What it returns is ``scale`` times as large.
    """
    sides = ["h", "w"] if size is None else [size, size]

    def tensor(name: str, element: int, channels: int) -> onnx.ValueInfoProto:
        shape = ["n", *sides, channels] if last else ["n", channels, *sides]
        return helper.make_tensor_value_info(name, element, shape)

    image, mask = tensor("photo", kind, 3), tensor("hole", kind, 1)
    output = tensor("filled", TensorProto.FLOAT, 3)
    constants = {
        "known": np.float32(known),
        "span": np.float32(hole - known),
        "fill": np.float32(black + (white - black) / 4),
        "scale": np.float32(scale),
    }
    op = helper.make_node
    nodes = [
        op("Cast", ["photo"], ["image"], to=TensorProto.FLOAT),
        op("Cast", ["hole"], ["raw"], to=TensorProto.FLOAT),
        op("Sub", ["raw", "known"], ["above"]),
        op("Div", ["above", "span"], ["inside"]),
        op("Sub", ["fill", "image"], ["change"]),
        op("Mul", ["inside", "change"], ["part"]),
        op("Add", ["image", "part"], ["sum"]),
        op("Mul", ["sum", "scale"], ["filled"]),
    ]
    initializers = [numpy_helper.from_array(np.asarray(value), key) for key, value in constants.items()]
    graph = helper.make_graph(nodes, "toy", [image, mask], [output], initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)
    return path


def describe(folder: Path, **values: Any) -> Path:
    names = {"model": "toy.onnx", "image": "photo", "mask": "hole", "output": "filled"}
    path = folder / "toy.toml"
    path.write_text("".join(f"{key} = {_toml(value)}\n" for key, value in {**names, **values}.items()))
    return path


def _toml(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value)


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
            {"kind": TensorProto.UINT8, "white": 255.0, "hole": 0.0, "known": 255.0},
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


def test_a_nan_is_no_fill(tmp_path: Path, photo: tuple[np.ndarray, np.ndarray]) -> None:
    make_model(tmp_path / "toy.onnx", scale=float("nan"))
    with pytest.raises(BundleError, match="Toy returned NaN"):
        OnnxBaseline(read_description(describe(tmp_path, name="Toy"))).fill(*photo)
