"""What a network has to beat: OpenCV's classical inpainting, any ONNX model that takes an image and its mask, PyTorch.

An ONNX model, such as an export of LaMa or MI-GAN, is described by a few lines of TOML: see docs/report.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from ..bundle.bundle import ASSETS, Bundle
from ..documents import Count, Number, Positive
from ..errors import BundleError, MachineError, UsageError
from ..imaging.classical import navier_stokes, telea
from ..imaging.masks import Mask
from ..imaging.stitching import Filling
from ..runtimes.base import check_finite
from ..runtimes.providers import PROVIDERS, absence, first_line, import_onnxruntime, quiet_options
from ..system.files import sha256_file, utf8_path
from ..system.machine import available_cores
from ..toml import read_toml
from .grid import FLOAT32, TORCH, Choices, Configuration, configuration, slug

CLASSICAL: dict[str, tuple[str, Callable[[np.ndarray, Mask], np.ndarray]]] = {
    "telea": ("Telea, OpenCV", telea),
    "navier-stokes": ("Navier-Stokes, OpenCV", navier_stokes),
}


def _two_values(span: tuple[float, float]) -> tuple[float, float]:
    if span[0] == span[1]:
        raise ValueError("give two different numbers, such as [0, 1]")
    return span


_Range = Annotated[tuple[Number, Number], AfterValidator(_two_values)]


class OnnxDescription(BaseModel):
    """The TOML file of an ONNX model: its fields are the file's keys. The model's path is relative to the file.

    ``size`` is the only resolution the model takes, 0 for any; then each side is a multiple of ``multiple``.
    The ranges are the values of black and white, ``mask_range`` those outside and inside the hole.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    model: Path
    name: str = ""
    size: Count = 0
    multiple: Positive = 1
    layout: Literal["nchw", "nhwc"] = "nchw"
    image: str = "image"
    mask: str = "mask"
    output: str = "output"
    image_range: _Range = (0.0, 1.0)
    mask_range: _Range = (0.0, 1.0)
    output_range: _Range = (0.0, 1.0)
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
    try:
        description = OnnxDescription.model_validate(read_toml(path))
    except ValidationError as error:
        problem, keys = error.errors()[0], ", ".join(OnnxDescription.model_fields)
        key = ".".join(map(str, problem["loc"]))
        raise UsageError(
            f"{path}: {key} is {problem['input']!r:.60}: {problem['msg']}", f"the keys are {keys}"
        ) from None
    description = description.model_copy(update={"model": path.parent / description.model})
    if not description.model.is_file():
        raise MachineError(f"{path} names the model {description.model}, which is missing: check its path")
    return description


class OnnxBaseline:
    """An ONNX model on ONNX Runtime.

    One of a fixed size sees the same square crops as a bundle's network of that resolution would, and its fills are
    stitched in alike; one of any size sees the whole picture, reflected up to the multiple it needs.

    Raises:
        MachineError: ONNX Runtime, or its provider for the device, is missing.
        BundleError: the model cannot be loaded, or has not the inputs and the output described.
    """

    def __init__(self, description: OnnxDescription) -> None:
        ort, device, model = import_onnxruntime(), description.device, description.model
        if device not in PROVIDERS:
            raise UsageError(f"a baseline has no device {device!r}: choose one of {', '.join(PROVIDERS)}")
        if problem := absence(ort, device):
            raise MachineError(problem)
        options = quiet_options(ort, available_cores())  # as many threads as a bundle gets
        chain = list(PROVIDERS[device])
        with utf8_path(model) as name:
            try:
                session = ort.InferenceSession(name, options, providers=chain, enable_fallback=0)
            except Exception as error:  # onnxruntime raises a class of its own for every cause
                raise BundleError(f"cannot load {model}: {first_line(error)}: copy it again") from error
        inputs = {node.name: node for node in session.get_inputs()}
        outputs = [node.name for node in session.get_outputs()]
        if set(inputs) != {description.image, description.mask} or description.output not in outputs:
            raise BundleError(
                f"{model} has the inputs {', '.join(inputs)} and outputs {', '.join(outputs)}: name "
                f"them in its TOML file, which says {description.image}, {description.mask} and {description.output}"
            )
        self._session, self._description = session, description
        names = {name: node.type.removeprefix("tensor(").removesuffix(")") for name, node in inputs.items()}
        self._types = {name: np.dtype({"float": "float32"}.get(kind, kind)) for name, kind in names.items()}
        self.info: dict[str, Any] = {"name": "onnxruntime", "version": ort.__version__, "device": device}

    def fill(self, image: np.ndarray, mask: Mask) -> np.ndarray:
        """``image`` uint8 RGB (H, W, 3) with ``mask`` (H, W, True where to fill) filled; a new array."""
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
        output = self._run(padded.astype(np.float32) / np.float32(255), hole)[:height, :width]
        return np.rint(output.clip(0, 1) * 255).astype(np.uint8)

    def _run(self, image: np.ndarray, hole: Mask) -> np.ndarray:
        """RGB (H, W, 3) in [0, 1] and its hole -> the model's output, the same."""
        d = self._description
        feeds = {
            d.image: self._arranged(image, d.image_range, d.image),
            d.mask: self._arranged(hole[..., None].astype(np.float32), d.mask_range, d.mask),
        }
        try:
            (output,) = self._session.run([d.output], feeds)
        except Exception as error:
            raise BundleError(f"{d.model} failed: {first_line(error)}: describe it as it is") from error
        check_finite(output, d.title)
        picture = output[0] if d.layout == "nhwc" else output[0].transpose(1, 2, 0)
        if picture.shape != image.shape:
            raise BundleError(f"{d.model} returned {output.shape} for {image.shape}: describe another layout or size")
        low, high = d.output_range
        return (picture.astype(np.float32) - np.float32(low)) / np.float32(high - low)

    def _arranged(self, values: np.ndarray, span: tuple[float, float], name: str) -> np.ndarray:
        """(H, W, C) in [0, 1] in the range, layout and type of the input ``name``."""
        low, high = np.float32(span[0]), np.float32(span[1])
        ordered = low + values * (high - low)
        ordered = ordered if self._description.layout == "nhwc" else ordered.transpose(2, 0, 1)
        dtype = self._types[name]
        rounded = np.rint(ordered) if np.issubdtype(dtype, np.integer) else ordered
        return np.ascontiguousarray(rounded[None].astype(dtype))


def baseline_rows(names: Sequence[str], bundles: Sequence[Bundle], choices: Choices) -> list[Configuration]:
    """The rows of ``--baseline``: a classical method, ``torch``, or a TOML file of an ONNX model or of a checkpoint.

    Raises:
        UsageError: a name that is none of them, or a file that describes neither. MachineError: a file is missing.
    """
    rows: list[Configuration] = []
    for name in names:
        if name in CLASSICAL:
            runtime = {"name": "opencv", "version": None, "device": "cpu"}
            rows.append(Configuration(name, CLASSICAL[name][0], "baseline", {"method": name}, runtime))
        elif name == TORCH:
            rows += _torch_rows(bundles, choices, "--baseline torch", {})
        elif name.endswith(".toml"):
            values = read_toml(Path(name))
            rows += _torch_rows(bundles, choices, name, values) if "checkpoint" in values else [_described(Path(name))]
        else:
            known = ", ".join((*CLASSICAL, TORCH))
            raise UsageError(f"unknown baseline {name!r}: choose one of {known}, or name a .toml file")
    return rows


def _described(path: Path) -> Configuration:
    description = read_description(path)
    runtime = {"name": "onnxruntime", "version": None, "device": description.device}
    hashes = {"model": sha256_file(description.model), "description": sha256_file(path)}
    source, title = {"description": str(path.resolve())}, description.title
    return Configuration(slug(title), title, "baseline", source, runtime, depends=hashes)


def _torch_rows(
    bundles: Sequence[Bundle], choices: Choices, title: str, files: Mapping[str, Any]
) -> list[Configuration]:
    """PyTorch on the checkpoint that a bundle was made from, with the bundle's settings, once for each checkpoint.

    ``files`` is what the TOML file ``title`` says; where it is empty, a bundle that comes with the package has its own.
    """
    if files and set(files) != {"checkpoint", "vae"}:
        raise UsageError(f"{title} should hold checkpoint and vae, the files of a PyTorch model, and no more")
    rows: dict[str, Configuration] = {}
    for bundle in sorted(bundles, key=lambda b: b.precision != FLOAT32):  # of one checkpoint's, the float32 bundle
        folder = bundle.path / "checkpoint"
        paths = {key: Path(title).parent / value for key, value in files.items()}
        if not paths and ASSETS in folder.parents:
            paths = {"checkpoint": folder / "student.safetensors", "vae": folder / "vae"}
        recorded = bundle.source["checkpoint"]["sha256"] if "checkpoint" in bundle.source else None
        if not paths or not paths["checkpoint"].is_file() or sha256_file(paths["checkpoint"]) != recorded:
            continue
        for settings in choices.settings(bundle):
            row = configuration(bundle, f"{TORCH}-{bundle.name}", TORCH, "cpu", settings, kind=TORCH)
            source = {**row.source, **{key: str(path) for key, path in paths.items()}}
            rows.setdefault(row.id, replace(row, label=row.label.replace(f"{TORCH}-", "", 1), source=source))
    if not rows:
        raise UsageError(
            f"{title}: no bundle here was made from that checkpoint: name the checkpoint and its vae in a .toml file"
        )
    return list(rows.values())
