"""``results.json``: its fields, as pydantic checks them; reading, writing, and merging those of several machines.

Every number carries its unit in its name. A figure that is not known is null, with a ``reason`` beside it wherever it
could have been expected. Fields that are not named here are kept as they are.
"""

from __future__ import annotations

import copy
import os
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from types import GenericAlias
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, model_validator

from ..documents import Count, Flag, JsonObject, Number, read_document
from ..errors import UsageError
from ..system.files import atomic_write, safe_join
from ..system.fingerprint import first_difference
from ..text import json_text, printable

RESULTS_FILE = "results.json"
PICTURES_FOLDER = "pictures"
SCHEMA_VERSION = 1
Results = dict[str, Any]
Figure: Any = Annotated[Number, Field(ge=-1e24, le=1e24)]  # far above any machine's, so that no sum or chart overflows


class _Fields(BaseModel):
    model_config = ConfigDict(extra="allow")


def _object(title: str, fields: Mapping[Any, str], check: Callable[[Any], Any] | None = None, **more: Any) -> Any:
    """The type of a JSON object with the fields named for each type in ``fields``, and those of ``more``.

    All must be there, and others may be. ``check`` raises ``ValueError`` where they do not agree with each other.
    """
    types: Any = {name: (kind, ...) for kind, names in fields.items() for name in names.split()}
    types |= {name: (kind, ...) for name, kind in more.items()}
    validators: Any = {} if check is None else {"check": model_validator(mode="after")(check)}
    return create_model(title, __base__=_Fields, __validators__=validators, **types)


def _each(kind: Any, by_name: bool = False) -> Any:
    """A list of ``kind``, or an object of it by names."""
    return GenericAlias(dict, (str, kind)) if by_name else GenericAlias(list, (kind,))


def _check_configuration(row: Any) -> Any:
    if row.status == "ok" and (row.latency is None or "total" not in row.latency.stages):
        raise ValueError(f"configuration {row.id!r:.200} has no latency of total, and its status is ok")
    if row.status != "ok" and not row.reason:
        raise ValueError(f"configuration {row.id!r:.200} has no reason, and its status is {row.status}")
    return row


def _check_document(document: Any) -> Any:
    count = Counter(row.id for row in document.configurations)
    for row in document.configurations:
        if row.machine not in document.machines:
            raise ValueError(f"machine {row.machine!r:.200} of a configuration is none of machines")
        if count[row.id] > 1:
            raise ValueError(f"the configuration {row.id!r:.200} is there twice")
    return document


_BUNDLE = _object(
    "Bundle", {str: "name path precision denoiser_sha256", Count: "resolution bytes", Count | None: "engine_bytes"}
)
_SETTINGS = _object(
    "Settings",
    {str: "start scheduler", Count: "steps steps_executed cache_interval seed", Figure: "guidance strength"},
    guidance_interval=tuple[Figure, Figure] | None,
)
_STAGE = _object("Stage", {Count: "count", Figure: "first_ms median_ms p95_ms p99_ms iqr_ms"})
_LATENCY = _object(
    "Latency", {Figure: "load_ms images_per_second", Count: "warmup runs"}, stages=_each(_STAGE, by_name=True)
)
_SUSTAINED = _object("Sustained", {Figure: "minutes cold_median_ms soaked_median_ms"}, by_minute_ms=_each(Figure))
_MEMORY = _object("Memory", {Count | None: "peak_host_bytes peak_device_bytes", str | None: "reason"})
_WORK = _object(
    "Work",
    {Figure | None: "multiplications_per_step share_of_peak", str | None: "reason"},
    by_class=_each(_object("Multiplications", {Figure: "multiplications"}), by_name=True),
)
_ENERGY = _object(
    "Energy",
    {Figure | None: "joules_per_image mean_watts", str | None: "source power_mode reason", Flag | None: "throttled"},
    clocks=JsonObject | None,
)
# SSIM needs a picture as large as its window, and a texture ratio a hole with an inside.
_FIDELITY = {Figure: "hole_psnr_db psnr_db", Figure | None: "hole_ssim ssim", Count: "images"}
_ACCURACY = _object(
    "Accuracy",
    {str | None: "reference_reason truth_reason"},
    against_reference=_object(
        "AgainstReference", _FIDELITY, reference=str, worst_pixel_levels=Figure, latent_rms_drift=_each(Figure)
    )
    | None,
    against_truth=_object(
        "AgainstTruth",
        _FIDELITY | {Figure | None: "hole_ssim ssim texture_ratio lpips fid", str | None: "lpips_reason fid_reason"},
    )
    | None,
)
_CONFIGURATION = _object(
    "Configuration",
    {str: "id label machine", str | None: "reason"},
    _check_configuration,
    kind=Literal["bundle", "baseline", "torch"],
    status=Literal["ok", "failed", "gated", "out of memory", "missing"],
    bundle=_BUNDLE | None,
    runtime=_object("Runtime", {str: "name device", str | None: "version"}),
    settings=_SETTINGS | None,
    latency=_LATENCY | None,
    sustained=_SUSTAINED | None,
    memory=_MEMORY | None,
    work=_WORK | None,
    energy=_ENERGY | None,
    accuracy=_ACCURACY,
    pictures=dict[str, str],
)
_MACHINE = _object(
    "Machine",
    {str: "label"},
    info=_object("Info", {Count | None: "memory_bytes"}, gpus=_each(_object("Gpu", {str: "name"}))),
    peaks=_object("Peaks", {Figure | None: "multiplications_per_second", str | None: "runtime precision"}) | None,
)
_INPUT = _object(
    "Input",
    {str: "name sha256 mask_sha256", str | None: "truth_sha256", Count: "width height"},
    hole_share=Figure,
    truth=Flag,
)
ResultsDocument = _object(
    "results.json",
    {str: "created version"},
    _check_document,
    schema_version=Literal[SCHEMA_VERSION],
    machines=_each(_MACHINE, by_name=True),
    inputs=_each(_INPUT),
    conditions=_object("Conditions", {Count: "seed warmup runs", str | None: "reference"}),
    limits=_object("Limits", {Figure | None: "max_latency_ms min_psnr_db max_memory_bytes"}),
    configurations=_each(_CONFIGURATION),
)
ResultsDocument.MAX_BYTES = 32 << 20  # of the file: with hundreds of photographs it has several MB


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


def merge(documents: Sequence[tuple[str, Results]]) -> Results:
    """One document of several, each with the name that messages call it by; the limits are the first one's.

    A machine that two of them share is one machine. Another machine of the same id gets a new id, and so does a
    configuration that two machines have. Pictures keep their paths: see ``copy_pictures``.

    Raises:
        UsageError: inputs or conditions differ, or both hold one configuration of one machine.
    """
    (first_name, first), *others = documents
    merged = copy.deepcopy(first)
    for name, document in others:
        there, here = _measured_under(first), _measured_under(document)
        if not (there["reference"] and here["reference"]):
            del there["reference"], here["reference"]
        if there != here:
            problem = f"{first_name} and {name} cannot be compared: {first_difference(there, here)}"
            raise UsageError(problem, "merge reports on the same images, masks, truths, seed, runs and reference")
        _add(merged, copy.deepcopy(document), name)
    merged["created"] = max(document["created"] for _, document in documents)
    return merged


def _measured_under(results: Results) -> dict[str, Any]:
    """What must be equal in two documents whose figures are compared."""
    conditions = results["conditions"]
    reference = next((row for row in results["configurations"] if row["id"] == conditions["reference"]), None)
    hashes = ("sha256", "mask_sha256", "truth_sha256")
    return {
        **{key: conditions[key] for key in ("seed", "warmup", "runs")},
        "inputs": {entry["name"]: {key: entry[key] for key in hashes} for entry in results["inputs"]},
        "reference": reference and reference["bundle"] and {"denoiser": reference["bundle"]["denoiser_sha256"]},
    }


def _add(merged: Results, document: Results, name: str) -> None:
    """Take over the machines and configurations of ``document`` into ``merged``."""
    machines: dict[str, str] = {}  # old id -> new id
    for identity, machine in document["machines"].items():
        new, number = identity, 2
        while new in merged["machines"] and merged["machines"][new]["info"] != machine["info"]:
            new, number = f"{identity}-{number}", number + 1
        machines[identity] = new
        merged["machines"].setdefault(new, machine)
    taken = {row["id"]: row["machine"] for row in merged["configurations"]}
    ids: dict[str | None, str] = {}
    for row in document["configurations"]:
        row["machine"] = machines[row["machine"]]
        if taken.get(row["id"]) == row["machine"]:
            problem = f"{name} holds {row['id']} of machine {row['machine']}, and so does one before it"
            raise UsageError(problem, "merge each measurement once")
        ids[row["id"]] = f"{row['id']}_{row['machine']}" if row["id"] in taken else row["id"]
    for row in document["configurations"]:
        row["id"] = ids[row["id"]]
        if (against := row["accuracy"]["against_reference"]) is not None:
            against["reference"] = ids.get(against["reference"], against["reference"])
    merged["configurations"] += document["configurations"]
    reference = document["conditions"]["reference"]
    merged["conditions"]["reference"] = merged["conditions"]["reference"] or ids.get(reference, reference)


def shown_stem(name: str) -> str:
    """What the files of the picture ``name`` begin with in a report's folder: a name that every system can open."""
    return PurePosixPath(printable(name)).stem.replace("\\", "%")


def copy_pictures(results: Results, sources: Sequence[tuple[Path, Results]], folder: Path) -> list[str]:
    """Copy the pictures of merged ``sources`` (their folders) to ``folder``; return the names of those not found.

    ``results`` is what ``merge`` made of them. A configuration with a new id gets its pictures under it; pictures that
    are missing are left out of ``results``.
    """
    missing: list[str] = []
    for source, _ in sources:
        for kind in ("inputs", "truth"):
            shared = source / PICTURES_FOLDER / kind
            if shared.is_dir():
                shutil.copytree(shared, folder / PICTURES_FOLDER / kind, dirs_exist_ok=True)
    old_rows = [(source, old) for source, document in sources for old in document["configurations"]]
    for row, (source, old) in zip(results["configurations"], old_rows, strict=True):
        for image, path in old["pictures"].items():
            row["pictures"][image] = f"{PICTURES_FOLDER}/{row['id']}/{Path(path).name}"
            try:
                picture = safe_join(source, path)
                (folder / row["pictures"][image]).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(picture, folder / row["pictures"][image])
            except FileNotFoundError:
                missing.append(path)
                del row["pictures"][image]
    return missing
