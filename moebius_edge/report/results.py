"""``results.json``: its fields, as pydantic checks them, and reading and writing it.

Every number carries its unit in its name. A figure that is not known is null, with a ``reason`` beside it wherever it
could have been expected. Fields that are not named here are kept as they are.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ..documents import Count, Flag, Number, read_document
from ..errors import UsageError
from ..system.files import atomic_write
from ..text import json_text, printable

RESULTS_FILE = "results.json"
PICTURES_FOLDER = "pictures"
Results = dict[str, Any]
Figure = Annotated[Number, Field(ge=-1e24, le=1e24)]  # far above any machine's, so that no sum or chart overflows


class _Object(BaseModel):
    """A JSON object: all of its fields must be there, and others may be."""

    model_config = ConfigDict(extra="allow")


class Bundle(_Object):
    name: str
    path: str
    precision: str
    resolution: Count
    denoiser_sha256: str
    bytes: Count


class Runtime(_Object):
    name: str
    version: str | None
    device: str


class Settings(_Object):
    start: str
    steps: Count
    steps_executed: Count
    guidance: Figure
    guidance_interval: tuple[Figure, Figure] | None
    strength: Figure
    scheduler: str
    cache_interval: Count
    seed: Count


class Stage(_Object):
    count: Count
    first_ms: Figure
    median_ms: Figure
    p95_ms: Figure
    p99_ms: Figure
    iqr_ms: Figure
    total_ms: Figure


class Latency(_Object):
    load_ms: Figure
    warmup: Count
    runs: Count
    stages: dict[str, Stage]


class Sustained(_Object):
    minutes: Figure
    cold_median_ms: Figure
    soaked_median_ms: Figure
    by_minute_ms: list[Figure]


class Memory(_Object):
    peak_host_bytes: Count | None
    peak_device_bytes: Count | None
    reason: str | None


class Energy(_Object):
    source: str | None
    joules_per_image: Figure | None
    mean_watts: Figure | None
    power_mode: str | None
    throttled: Flag | None
    reason: str | None


class Fidelity(_Object):
    """Means over the pictures; SSIM needs one as large as its window."""

    hole_psnr_db: Figure
    psnr_db: Figure
    hole_ssim: Figure | None
    ssim: Figure | None
    images: Count


class AgainstReference(Fidelity):
    reference: str


class Accuracy(_Object):
    against_reference: AgainstReference | None
    reference_reason: str | None
    against_truth: Fidelity | None
    truth_reason: str | None


class Configuration(_Object):
    """One row; ``bundle`` and ``settings`` are null for a baseline, and the figures where the status is not ok."""

    id: str
    label: str
    machine: str
    kind: Literal["bundle", "baseline"]
    bundle: Bundle | None
    runtime: Runtime
    settings: Settings | None
    status: Literal["ok", "failed", "gated", "out of memory", "missing"]
    reason: str | None
    latency: Latency | None
    sustained: Sustained | None
    memory: Memory | None
    energy: Energy | None
    accuracy: Accuracy
    pictures: dict[str, str]

    @model_validator(mode="after")
    def _check(self) -> Configuration:
        if self.status == "ok" and (self.latency is None or "total" not in self.latency.stages):
            raise ValueError(f"configuration {self.id!r:.200} has no latency of total, and its status is ok")
        if self.status != "ok" and not self.reason:
            raise ValueError(f"configuration {self.id!r:.200} has no reason, and its status is {self.status}")
        return self


class Gpu(_Object):
    name: str


class Info(_Object):
    memory_bytes: Count | None
    gpus: list[Gpu]


class Machine(_Object):
    label: str
    info: Info


class Input(_Object):
    name: str
    sha256: str
    mask_sha256: str
    truth_sha256: str | None
    width: Count
    height: Count
    hole_share: Figure
    truth: Flag


class Conditions(_Object):
    seed: Count
    warmup: Count
    runs: Count
    reference: str | None


class Limits(_Object):
    max_latency_ms: Figure | None
    min_psnr_db: Figure | None
    max_memory_bytes: Figure | None


class ResultsDocument(_Object):
    MAX_BYTES: ClassVar[int] = 32 << 20  # of the file: with hundreds of photographs it has several MB

    schema_version: Literal[1]
    created: str
    version: str
    machines: dict[str, Machine]
    inputs: list[Input]
    conditions: Conditions
    limits: Limits
    configurations: list[Configuration]

    @model_validator(mode="after")
    def _check(self) -> ResultsDocument:
        count = Counter(row.id for row in self.configurations)
        for row in self.configurations:
            if row.machine not in self.machines:
                raise ValueError(f"machine {row.machine!r:.200} of a configuration is none of machines")
            if count[row.id] > 1:
                raise ValueError(f"the configuration {row.id!r:.200} is there twice")
        return self


def load(path: str | os.PathLike[str]) -> Results:
    """Read and check a ``results.json``, named itself or by its folder.

    Raises:
        MachineError: it is missing or cannot be read.
        UsageError: it is no JSON, of another schema version, or a field is missing or wrong; the message names it.
    """
    file = Path(path, RESULTS_FILE) if Path(path).is_dir() else Path(path)
    document = read_document(file, ResultsDocument, UsageError, "measure it again with `moebius-edge report`")
    return dict(document.model_dump(mode="json"))


def save(results: Results, folder: str | os.PathLike[str]) -> Path:
    """Write ``folder/results.json``, whole or not at all; results that ``load`` would refuse are a ``ValueError``."""
    try:
        ResultsDocument.model_validate(results)
    except ValidationError as error:
        raise ValueError(f"these are no results: {error}") from None
    path = Path(folder) / RESULTS_FILE
    with atomic_write(path) as temporary:
        temporary.write_text(json_text(results, indent=1, ensure_ascii=False), encoding="utf-8")
    return path


def shown_stem(name: str) -> str:
    """What the files of the picture ``name`` begin with in a report's folder: a name that every system can open."""
    return PurePosixPath(printable(name)).stem.replace("\\", "%")
