"""``bundle.json``: its fields with their types and bounds, and the rules that hold between them.

This module reads neither the ONNX files beside it nor their hashes.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, Field, JsonValue
from typing_extensions import NotRequired, TypedDict

from ..documents import Count, FileName, Flag, JsonObject, Number, Positive, Sha256, Text
from ..sampling.guidance import MAX_GUIDANCE
from ..spec import (
    BETA_END,
    BETA_START,
    LATENT_CHANNELS,
    LATENT_DOWNSCALE,
    MAX_LATENT_CHANNELS,
    NOISE_OFFSET,
    NUM_TRAIN_TIMESTEPS,
    Component,
    Tensor,
    components,
)
from ..system.fingerprint import first_difference

SCHEMA_VERSION: Final = 3
# Far above the published 512, and low enough that the pictures of one call take no gigabytes.
MAX_RESOLUTION = 2048
MAX_DEEP_CHANNELS = 8192
MAX_FILE_BYTES = 8 << 30

# What the samplers compute with. Recorded in each bundle, and compared on loading: a model trained with other
# values would run without an error and give wrong pictures.
SCHEDULER: dict[str, Any] = {
    "prediction": "epsilon",
    "num_train_timesteps": NUM_TRAIN_TIMESTEPS,
    "beta_schedule": "scaled_linear",
    "beta_start": BETA_START,
    "beta_end": BETA_END,
    "spacing": "leading",
    "final_alpha_bar": 1.0,
    "noise_offset": NOISE_OFFSET,
}


def _check_scheduler(scheduler: dict[str, Any]) -> dict[str, Any]:
    if scheduler != SCHEDULER:
        raise ValueError(first_difference(scheduler, SCHEDULER, "scheduler"))
    return scheduler


NodeNames = Annotated[list[Text], Field(max_length=20_000)]


class FileRecord(TypedDict):
    """Size and hash of one file."""

    sha256: Sha256
    bytes: Annotated[int, Field(strict=True, ge=0, le=MAX_FILE_BYTES)]


class Defaults(TypedDict):
    """Settings of a run that names none. ``strength`` and ``match_depth`` are there where they are not 0.99 and 0."""

    steps: Annotated[int, Field(strict=True, ge=1, le=NUM_TRAIN_TIMESTEPS)]
    guidance: Annotated[Number, Field(ge=0, le=MAX_GUIDANCE)]
    start: Literal["image", "prefill", "noise"]
    strength: NotRequired[Annotated[Number, Field(gt=0, le=1)]]
    match_depth: NotRequired[Annotated[Number, Field(ge=0)]]


class SourceFile(TypedDict):
    """A file that the bundle was made from."""

    file: Text
    sha256: Sha256


class Block(TypedDict):
    """One block of an INT8 denoiser: what its quantisation alone costs, and whether it was quantised."""

    name: Text
    share: Number  # of the multiply-adds
    quantised: Flag
    psnr_db: NotRequired[Number | None]
    smoothed_psnr_db: NotRequired[Number]
    smoothed: NotRequired[Flag]


class Int8(TypedDict):
    """How a bundle was quantised, see docs/int8.md."""

    rest: Text  # what is computed in floating point, in which type
    ranges: Text
    quantised_products: Count
    products: Count
    share_of_multiplications: Number
    nodes: NodeNames
    shallow_nodes: NotRequired[NodeNames]
    calibration: NotRequired[JsonObject]
    blocks: NotRequired[Annotated[list[Block], Field(max_length=5000)]]
    cases: NotRequired[list[JsonObject]]
    speed: NotRequired[JsonObject]


class ComponentPrecision(TypedDict):
    """What the file of one component computes in.

    Tensors that group norms alone read are divided by ``divisor``, see docs/rewrites.md. ``reason`` says why an
    autoencoder's file is float32 in a bundle of lower precision. ``weights`` is there where they are stored in another
    type than ``type``.
    """

    type: Literal["float32", "float16", "int8"]
    divisor: NotRequired[Annotated[int, Field(strict=True, ge=1, le=1 << 30)]]
    reason: NotRequired[Text]
    weights: NotRequired[Literal["float16"]]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What ``bundle.json`` and a loaded ``Bundle`` have in common."""

    name: Annotated[Text, Field(max_length=200)]
    description: Text
    licence: Text
    precision: Literal["float32", "float16", "int8"]
    # What stayed float32 in files of lower precision: component -> operator type -> node names, or "all".
    float32_islands: dict[Text, Literal["all"] | dict[Text, NodeNames]] = field(default_factory=dict)
    # Of a bundle of lower precision, by component; in a float32 bundle there is nothing to say.
    precisions: dict[Text, ComponentPrecision] = field(default_factory=dict)
    # The guidance that the conditional branch predicts by itself; see ``guidance``.
    distilled_guidance: Annotated[Number, Field(gt=1, le=MAX_GUIDANCE)] | None = None
    # Channels of the feature that calls may reuse, see ``deep_cache``. Without it they cannot.
    deep_channels: Annotated[int, Field(strict=True, ge=1, le=MAX_DEEP_CHANNELS)] | None = None
    int8: Int8 | None = None
    latent_channels: Annotated[int, Field(strict=True, ge=1, le=MAX_LATENT_CHANNELS)] = LATENT_CHANNELS
    resolution: Annotated[int, Field(strict=True, ge=8, le=MAX_RESOLUTION, multiple_of=LATENT_DOWNSCALE)]  # pixels
    latent_size: Positive  # latent positions, each way
    scaling_factor: Annotated[Number, Field(gt=0, le=1000)]
    defaults: Defaults
    scheduler: Annotated[JsonObject, Field(json_schema_extra={"const": SCHEDULER}), AfterValidator(_check_scheduler)]
    model: JsonObject
    gate: JsonObject  # what the export measured
    source: dict[Text, SourceFile]
    tools: dict[Text, JsonValue]  # versions
    files: Annotated[dict[FileName, FileRecord], Field(max_length=1000)]


@dataclass(frozen=True)
class ComponentTable:
    """A component as it is recorded in ``bundle.json``."""

    file: FileName
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


@dataclass(frozen=True, kw_only=True)
class BundleDocument(Manifest):
    """All of ``bundle.json``."""

    schema_version: Literal[3]
    components: dict[Text, ComponentTable]

    def __post_init__(self) -> None:
        """Raise ``ValueError`` where two fields contradict each other."""
        latent_size = self.resolution // LATENT_DOWNSCALE
        if self.latent_size != latent_size:
            raise ValueError(f"latent_size is {self.latent_size}, expected {latent_size}, an eighth of the resolution")
        steps, strength = self.defaults["steps"], self.defaults.get("strength", 1.0)
        if int(steps * strength) == 0:
            raise ValueError(f"defaults.strength is {strength}, expected more: of {steps} steps it leaves none")
        guidance, distilled = self.defaults["guidance"], self.distilled_guidance
        if distilled not in (None, guidance):
            raise ValueError(f"defaults.guidance is {guidance}, expected {distilled}, which is distilled")
        if self.int8 is not None and self.precision != "int8":
            raise ValueError(f"precision is {self.precision!r}, expected 'int8' with the field int8")
        expected = component_tables(resolved_components(self.resolution, self.deep_channels, self.latent_channels))
        if missing := [table["file"] for table in expected.values() if table["file"] not in self.files]:
            raise ValueError(f"files lacks {missing[0]!r}")
        recorded = {name: asdict(table) for name, table in self.components.items()}
        if recorded != expected:  # the pipeline feeds exactly those tensors
            raise ValueError(first_difference(recorded, expected, "components"))


def resolved_components(
    resolution: int, deep_channels: int | None = None, latent_channels: int = LATENT_CHANNELS
) -> dict[str, Component]:
    """``spec.components`` with all sizes but the batch filled in."""
    return {
        name: Component(
            name,
            tuple(t.resolved(resolution, latent_channels) for t in component.inputs),
            tuple(t.resolved(resolution, latent_channels) for t in component.outputs),
        )
        for name, component in components(deep_channels).items()
    }


def component_tables(components: dict[str, Component]) -> dict[str, Any]:
    """Components as they are recorded in ``bundle.json``."""
    return {name: asdict(ComponentTable(c.file, c.inputs, c.outputs)) for name, c in components.items()}
