"""``results.json``: its fields, as pydantic checks them; reading, writing, and merging those of several machines.

Every number carries its unit in its name. A figure that is not known is null, with a ``reason`` beside it wherever it
could have been expected. Fields that are not named here are kept as they are.
"""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, model_validator

from ..documents import Count, Flag, JsonObject, Number, first_problem, read_document
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


def _object(title: str, check: Callable[[Any], Any] | None = None, /, **types: Any) -> Any:
    """The type of a JSON object: it must have these fields and pass ``check``, and may have others."""
    fields: dict[str, Any] = {name: (kind, ...) for name, kind in types.items()}
    validators = {} if check is None else {"check": model_validator(mode="after")(check)}
    return create_model(title, __base__=_Fields, __validators__=validators, **fields)


def _figures(*names: str) -> dict[str, Any]:
    return dict.fromkeys(names, Figure)


_Stage = _object("Stage", count=Count, **_figures("first_ms", "median_ms", "p95_ms", "p99_ms", "iqr_ms"))
_Latency = _object(
    "Latency", **_figures("load_ms", "images_per_second"), warmup=Count, runs=Count, stages=dict[str, _Stage]
)
_Sustained = _object(
    "Sustained", **_figures("minutes", "cold_median_ms", "soaked_median_ms"), by_minute_ms=list[Figure]
)
_Memory = _object("Memory", peak_host_bytes=Count | None, peak_device_bytes=Count | None, reason=str | None)
_Work = _object(
    "Work",
    multiplications_per_step=Figure | None,
    by_class=dict[str, _object("Multiplications", multiplications=Figure)],
    share_of_peak=Figure | None,
    reason=str | None,
)
_Energy = _object(
    "Energy",
    source=str | None,
    joules_per_image=Figure | None,
    mean_watts=Figure | None,
    power_mode=str | None,
    clocks=JsonObject | None,
    throttled=Flag | None,
    reason=str | None,
)
# SSIM needs a picture as large as its window, and a texture ratio a hole with an inside.
_FIDELITY = {**_figures("hole_psnr_db", "psnr_db"), **dict.fromkeys(("hole_ssim", "ssim"), Figure | None)}
_AgainstReference = _object(
    "AgainstReference",
    **_FIDELITY,
    images=Count,
    reference=str,
    worst_pixel_levels=Figure,
    latent_rms_drift=list[Figure],
)
_AgainstTruth = _object(
    "AgainstTruth",
    **_FIDELITY,
    images=Count,
    **dict.fromkeys(("texture_ratio", "lpips", "fid"), Figure | None),
    **dict.fromkeys(("lpips_reason", "fid_reason"), str | None),
)
_Bundle = _object(
    "Bundle",
    **dict.fromkeys(("name", "path", "precision", "denoiser_sha256"), str),
    **dict.fromkeys(("resolution", "bytes"), Count),
    engine_bytes=Count | None,
)
_Settings = _object(
    "Settings",
    **dict.fromkeys(("start", "scheduler"), str),
    **dict.fromkeys(("steps", "steps_executed", "cache_interval", "seed"), Count),
    **_figures("guidance", "strength"),
    guidance_interval=tuple[Figure, Figure] | None,
)
_Accuracy = _object(
    "Accuracy",
    against_reference=_AgainstReference | None,
    against_truth=_AgainstTruth | None,
    reference_reason=str | None,
    truth_reason=str | None,
)


def _check_row(row: Any) -> Any:
    if row.status == "ok" and (row.latency is None or "total" not in row.latency.stages):
        raise ValueError(f"configuration {row.id!r:.200} has no latency of total, and its status is ok")
    if row.status != "ok" and not row.reason:
        raise ValueError(f"configuration {row.id!r:.200} has no reason, and its status is {row.status}")
    return row


_Configuration = _object(
    "Configuration",
    _check_row,
    **dict.fromkeys(("id", "label", "machine"), str),
    kind=Literal["bundle", "baseline", "torch"],
    bundle=_Bundle | None,
    runtime=_object("Runtime", name=str, version=str | None, device=str),
    settings=_Settings | None,
    status=Literal["ok", "failed", "gated", "out of memory", "missing"],
    reason=str | None,
    latency=_Latency | None,
    sustained=_Sustained | None,
    memory=_Memory | None,
    work=_Work | None,
    energy=_Energy | None,
    accuracy=_Accuracy,
    pictures=dict[str, str],
)
_Peaks = _object("Peaks", multiplications_per_second=Figure | None, runtime=str | None, precision=str | None)
_Input = _object(
    "Input",
    **dict.fromkeys(("name", "sha256", "mask_sha256"), str),
    truth_sha256=str | None,
    **dict.fromkeys(("width", "height"), Count),
    hole_share=Figure,
    truth=Flag,
)


def _check_document(document: Any) -> Any:
    seen = set()
    for row in document.configurations:
        if row.machine not in document.machines:
            raise ValueError(f"machine {row.machine!r:.200} of a configuration is none of machines")
        if row.id in seen:
            raise ValueError(f"the configuration {row.id!r:.200} is there twice")
        seen.add(row.id)
    return document


ResultsDocument = _object(
    "results.json",
    _check_document,
    schema_version=Literal[SCHEMA_VERSION],
    created=str,
    version=str,
    machines=dict[str, _object("Machine", label=str, info=JsonObject, peaks=_Peaks | None)],
    inputs=list[_Input],
    conditions=_object("Conditions", **dict.fromkeys(("seed", "warmup", "runs"), Count), reference=str | None),
    limits=_object("Limits", **dict.fromkeys(("max_latency_ms", "min_psnr_db", "max_memory_bytes"), Figure | None)),
    configurations=list[_Configuration],
)


def load(path: str | os.PathLike[str]) -> Results:
    """Read and check a ``results.json``, named itself or by its folder.

    Raises:
        MachineError: it is missing or cannot be read.
        UsageError: it is no JSON, of another schema version, or a field is missing or wrong; the message names it.
    """
    file = Path(path)
    file = file / RESULTS_FILE if file.is_dir() else file
    remedy = "measure it again with `moebius-edge report`"
    results: Results = read_document(file, ResultsDocument, UsageError, remedy).model_dump(mode="json")
    return results


def save(results: Results, folder: str | os.PathLike[str]) -> Path:
    """Write ``folder/results.json``, whole or not at all; results that ``load`` would refuse are a ``ValueError``."""
    try:
        ResultsDocument.model_validate(results)
    except ValidationError as error:
        raise ValueError(f"these are no results: {first_problem(error)[1]}") from None
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
            raise UsageError(
                f"{first_name} and {name} cannot be compared: {first_difference(there, here)}",
                "merge reports on the same images, masks, truths, seed, runs and reference",
            )
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
    new_machines: dict[str, str] = {}
    for identity, machine in document["machines"].items():
        new, number = identity, 2
        while new in merged["machines"] and merged["machines"][new]["info"] != machine["info"]:
            new, number = f"{identity}-{number}", number + 1
        new_machines[identity] = new
        merged["machines"].setdefault(new, machine)
    taken = {row["id"]: row["machine"] for row in merged["configurations"]}
    new_ids: dict[str, str] = {}
    for row in document["configurations"]:
        row["machine"] = new_machines[row["machine"]]
        if taken.get(row["id"]) == row["machine"]:
            raise UsageError(
                f"{name} holds {row['id']} of machine {row['machine']}, and so does one before it",
                "merge each measurement once",
            )
        new_ids[row["id"]] = f"{row['id']}_{row['machine']}" if row["id"] in taken else row["id"]
    for row in document["configurations"]:
        row["id"] = new_ids[row["id"]]
        if (against := row["accuracy"]["against_reference"]) is not None:
            against["reference"] = new_ids.get(against["reference"], against["reference"])
    merged["configurations"] += document["configurations"]
    reference = document["conditions"]["reference"]
    if merged["conditions"]["reference"] is None and reference is not None:
        merged["conditions"]["reference"] = new_ids.get(reference, reference)


def shown_stem(name: str) -> str:
    """What the files of the picture ``name`` begin with in a report's folder: a name that every system can open."""
    return PurePosixPath(printable(name)).stem.replace("\\", "%")


def copy_pictures(results: Results, sources: Sequence[tuple[Path, Results]], folder: Path) -> list[str]:
    """Copy the pictures of merged ``sources`` (their folders) to ``folder``; return the names of those not found.

    ``results`` is what ``merge`` made of them. A configuration with a new id gets its pictures under it; pictures that
    are missing are left out of ``results``.
    """
    missing: list[str] = []
    rows = iter(results["configurations"])
    for source, document in sources:
        for kind in ("inputs", "truth"):
            shared = source / PICTURES_FOLDER / kind
            if shared.is_dir():
                shutil.copytree(shared, folder / PICTURES_FOLDER / kind, dirs_exist_ok=True)
        for old in document["configurations"]:
            row = next(rows)
            for image, path in old["pictures"].items():
                target = f"{PICTURES_FOLDER}/{row['id']}/{Path(path).name}"
                try:
                    picture = safe_join(source, path)
                    (folder / target).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(picture, folder / target)
                    row["pictures"][image] = target
                except FileNotFoundError:
                    missing.append(path)
                    del row["pictures"][image]
    return missing
