"""What a network has to beat: OpenCV's classical inpainting, and any ONNX model that takes an image and its mask.

An ONNX model, such as an export of LaMa or MI-GAN, is described by a few lines of TOML: see docs/report.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np

from ..errors import BundleError, MachineError, UsageError
from ..imaging.classical import navier_stokes, telea
from ..imaging.masks import Mask
from ..imaging.stitching import Filling
from ..runtimes.base import check_finite
from ..system.files import utf8_path
from ..system.machine import available_cores
from ..toml import read_toml

CLASSICAL: dict[str, tuple[str, Callable[[np.ndarray, Mask], np.ndarray]]] = {
    "telea": ("Telea, OpenCV", telea),
    "navier-stokes": ("Navier-Stokes, OpenCV", navier_stokes),
}
_LAYOUTS = ("nchw", "nhwc")


class Baseline(Protocol):
    """``info`` has the name, version and device of what executes."""

    info: dict[str, Any]

    def fill(self, image: np.ndarray, mask: Mask) -> np.ndarray:
        """``image`` uint8 RGB (H, W, 3) with ``mask`` (H, W, True where to fill) filled; a new array."""
        ...


class Classical:
    """One of ``CLASSICAL`` by name."""

    def __init__(self, name: str) -> None:
        self._fill = CLASSICAL[name][1]
        self.info: dict[str, Any] = {"name": "opencv", "version": cv2.__version__, "device": "cpu"}

    def fill(self, image: np.ndarray, mask: Mask) -> np.ndarray:
        return self._fill(image, mask)


@dataclass(frozen=True)
class OnnxDescription:
    """The TOML file of an ONNX model: its fields are the file's keys. The model's path is the file's neighbour.

    ``size`` is the only resolution the model takes, 0 for any; then each side is a multiple of ``multiple``.
    The ranges are the values of black and white, ``mask_range`` those outside and inside the hole.
    """

    model: Path
    name: str = ""
    size: int = 0
    multiple: int = 1
    layout: str = "nchw"
    image: str = "image"
    mask: str = "mask"
    output: str = "output"
    image_range: tuple[float, float] = (0.0, 1.0)
    mask_range: tuple[float, float] = (0.0, 1.0)
    output_range: tuple[float, float] = (0.0, 1.0)
    device: str = "cpu"

    @property
    def title(self) -> str:
        return self.name or self.model.stem


def read_description(path: Path) -> OnnxDescription:
    """Read and check a baseline's TOML file.

    Raises:
        MachineError: the file or the model it names is missing.
        UsageError: it is no TOML, or a key is unknown or has an unusable value.
    """
    values = read_toml(path)
    known = OnnxDescription.__dataclass_fields__
    if unknown := sorted(set(values) - set(known)):
        raise UsageError(f"{path} has the unknown key {unknown[0]!r}: use {', '.join(known)}")
    if not isinstance(values.get("model"), str):
        raise UsageError(f'{path} names no model: add model = "FILE.onnx"')
    values["model"] = path.parent / values["model"]
    for key in ("image_range", "mask_range", "output_range"):
        if key in values:
            values[key] = _range(path, key, values[key])
    for key in ("size", "multiple"):
        value = values.get(key, 1)
        if type(value) is not int or value < (0 if key == "size" else 1):
            raise UsageError(f"{path} has {key} {value!r}: give a whole number of pixels")
    for key in ("name", "layout", "image", "mask", "output", "device"):
        if not isinstance(values.get(key, ""), str):
            raise UsageError(f"{path} has {key} {values[key]!r}: give a text")
    if values.get("layout", "nchw") not in _LAYOUTS:
        raise UsageError(f"{path} has layout {values['layout']!r}: use one of {', '.join(_LAYOUTS)}")
    if not values["model"].is_file():
        raise MachineError(f"{path} names the model {values['model']}, which is missing: check its path")
    return OnnxDescription(**values)


class OnnxBaseline:
    """An ONNX model on ONNX Runtime.

    One of a fixed size sees the same square crops as a bundle's network of that resolution would, and its fills are
    stitched in alike; one of any size sees the whole picture, reflected up to the multiple it needs.

    Raises:
        MachineError: ONNX Runtime, or its provider for the device, is missing.
        BundleError: the model cannot be loaded, or has not the inputs and the output described.
    """

    def __init__(self, description: OnnxDescription) -> None:
        from ..runtimes.providers import PROVIDERS, absence, first_line, import_onnxruntime, quiet_options

        ort, device = import_onnxruntime(), description.device
        if device not in PROVIDERS:
            raise UsageError(f"a baseline has no device {device!r}: choose one of {', '.join(PROVIDERS)}")
        if lack := absence(ort, device):
            raise MachineError(lack)
        options = quiet_options(ort, available_cores())  # as many threads as a bundle gets
        try:
            with utf8_path(description.model) as name:
                session = ort.InferenceSession(
                    name, options, providers=list(PROVIDERS[device].chain), enable_fallback=0
                )
        except MachineError:
            raise
        except Exception as error:  # onnxruntime raises a class of its own for every cause
            raise BundleError(f"cannot load {description.model}: {first_line(error)}: copy it again") from error
        inputs = {node.name: node for node in session.get_inputs()}
        outputs = [node.name for node in session.get_outputs()]
        if set(inputs) != {description.image, description.mask} or description.output not in outputs:
            raise BundleError(
                f"{description.model} has the inputs {', '.join(inputs)} and outputs {', '.join(outputs)}: describe "
                f"them, it is said to have {description.image}, {description.mask} and {description.output}"
            )
        self._session, self._description, self._problem = session, description, first_line
        self._types = {name: _dtype(node.type) for name, node in inputs.items()}
        self.info: dict[str, Any] = {"name": "onnxruntime", "version": ort.__version__, "device": device}

    def fill(self, image: np.ndarray, mask: Mask) -> np.ndarray:
        size = self._description.size
        if size == 0:
            return np.where(mask[..., None], self._whole(image, mask), image)
        filling = Filling(image, mask, size)
        for window in filling.windows:
            filling.paste(window, self._run(*filling.view(window)))
        return filling.canvas

    def _whole(self, image: np.ndarray, mask: Mask) -> np.ndarray:
        height, width = mask.shape
        below, beside = (-side % self._description.multiple for side in (height, width))
        padded = np.pad(image, ((0, below), (0, beside), (0, 0)), mode="symmetric")
        hole = np.pad(mask, ((0, below), (0, beside)), mode="symmetric")
        made = self._run(padded.astype(np.float32) / np.float32(255), hole)[:height, :width]
        return np.rint(made.clip(0, 1) * 255).astype(np.uint8)

    def _run(self, image: np.ndarray, hole: Mask) -> np.ndarray:
        """RGB (H, W, 3) in [0, 1] and its hole -> what the model makes of it, the same."""
        d = self._description
        feeds = {
            d.image: self._arranged(_spread(image, d.image_range), d.image),
            d.mask: self._arranged(_spread(hole[..., None].astype(np.float32), d.mask_range), d.mask),
        }
        try:
            (made,) = self._session.run([d.output], feeds)
        except Exception as error:
            raise BundleError(f"{d.model} failed: {self._problem(error)}: describe it as it is") from error
        check_finite(made, d.title)
        picture = made[0] if d.layout == "nhwc" else made[0].transpose(1, 2, 0)
        if picture.shape != image.shape:
            raise BundleError(f"{d.model} returned {made.shape} for {image.shape}: describe another layout or size")
        low, high = d.output_range
        return (picture.astype(np.float32) - np.float32(low)) / np.float32(high - low)

    def _arranged(self, values: np.ndarray, name: str) -> np.ndarray:
        """(H, W, C) as the input ``name`` wants it."""
        wanted = self._types[name]
        ordered = values if self._description.layout == "nhwc" else values.transpose(2, 0, 1)
        rounded = np.rint(ordered) if np.issubdtype(wanted, np.integer) else ordered
        return np.ascontiguousarray(rounded[None].astype(wanted))


def _spread(values: np.ndarray, span: tuple[float, float]) -> np.ndarray:
    low, high = np.float32(span[0]), np.float32(span[1])
    return low + values * (high - low)


def _dtype(name: str) -> np.dtype[Any]:
    """Of ONNX Runtime's ``tensor(float)``."""
    inner = name.removeprefix("tensor(").removesuffix(")")
    return np.dtype({"float": "float32", "double": "float64"}.get(inner, inner))


def _range(path: Path, key: str, value: Any) -> tuple[float, float]:
    good = isinstance(value, list) and len(value) == 2
    if not good or any(type(v) not in (int, float) or not math.isfinite(v) for v in value) or value[0] == value[1]:
        raise UsageError(f"{path} has {key} {value!r}: give two different numbers, such as [0, 1]")
    return float(value[0]), float(value[1])


def open_baseline(source: Mapping[str, Any]) -> Baseline:
    """A baseline from ``{"method": name}`` or ``{"description": path}``; raises as the two classes."""
    if "method" in source:
        return Classical(source["method"])
    return OnnxBaseline(read_description(Path(source["description"])))
