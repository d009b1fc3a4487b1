"""A whole report's measurements: one configuration after the other, each in a process of its own.

Every outcome is stored as soon as it is there, with everything its figures depend on, so that an interrupted report
goes on where it was, and a changed bundle, picture or setting is measured anew. What failed is always tried again.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from .. import __version__
from ..errors import MachineError, MoebiusError, OutOfMemory, UsageError
from ..progress import Progress
from ..system.files import sha256_file
from ..system.fingerprint import ResultCache
from ..system.machine import machine_info, package_version
from ..system.subprocess_job import ProcessFailed, run_job
from ..text import counted
from .grid import Configuration
from .inputs import Input, describe_inputs
from .measure import trace_name
from .results import PICTURES_FOLDER, RESULTS_FILE, Results, load

CACHE_FOLDER = "measured"
_WRITTEN = (RESULTS_FILE, "report.html", "report.md")
_INPUTS = "inputs"  # their name in the cache; a configuration's has more parts
_NO_REFERENCE = "no float32 bundle of its resolution was measured with these settings"
_PACKAGES = ("onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt", "tensorrt-rtx-cu13", "opencv-python-headless")
_WORKER = (sys.executable, "-m", "moebius_edge.report.measure")
_STATUSES = (  # of an error, by the first class that it is of
    (OutOfMemory, "out of memory"),
    (ProcessFailed, "failed"),  # a crash, a bug, or a library's error
    (MachineError, "missing"),
    (MoebiusError, "gated"),  # a damaged bundle, an engine that does not fit, a NaN
)
Outcome = dict[str, Any]  # "status" and "reason"; the measured figures where the status is ok


@dataclass(frozen=True)
class Plan:
    """What a report measures, and how. ``limits`` as in ``results.json``."""

    configurations: Sequence[Configuration]
    inputs: Sequence[Input]
    seed: int = 0
    runs: int = 5
    warmup: int = 1
    sustained_minutes: float = 0.0
    limits: Mapping[str, Any] = field(default_factory=dict)


def check_output_dir(folder: Path, force: bool = False) -> None:
    """Refuse a folder with other contents than a report's; with ``force`` remove what a report has left in it.

    Raises:
        UsageError: it is a file, or holds something else.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"output {folder} is a file: name a folder")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not any((folder / name).exists() for name in (RESULTS_FILE, CACHE_FOLDER)):
        raise UsageError(f"output folder {folder} holds something else than a report: name another")
    if force:
        for name in (CACHE_FOLDER, PICTURES_FOLDER):
            shutil.rmtree(folder / name, ignore_errors=True)
        for name in _WRITTEN:
            (folder / name).unlink(missing_ok=True)


def collect(plan: Plan, folder: Path, on_progress: Callable[[str], Progress]) -> Results:
    """Measure what is not in the cache of ``folder`` yet, and return the results document; it is not written.

    ``on_progress`` gives the progress function of one configuration, by a label. ``check_output_dir`` comes first.

    Raises:
        UsageError: an input cannot be used, or ``folder`` holds a report on others. MachineError: a file is missing.
    """
    cache = ResultCache(folder / CACHE_FOLDER)
    inputs = _inputs(plan.inputs, folder, cache)
    info = machine_info()
    label = _machine_label(info)
    identity = re.sub(r"[^a-z0-9]+", "-", label.lower()).strip("-")
    here = {"machine": info, "version": __version__, "packages": [package_version(name) for name in _PACKAGES]}
    outcomes = _outcomes(plan, folder, cache, {**here, "inputs": inputs}, on_progress)
    reference = next((c.id for c in plan.configurations if c.reference == c.id), None)
    return {
        "schema_version": 1,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "version": __version__,
        "machines": {identity: {"label": label, "info": info}},
        "inputs": inputs,
        "conditions": {"seed": plan.seed, "warmup": plan.warmup, "runs": plan.runs, "reference": reference},
        "limits": {"max_latency_ms": None, "min_psnr_db": None, "max_memory_bytes": None, **plan.limits},
        "configurations": [_row(c, identity, outcomes[c.id]) for c in plan.configurations],
    }


def _inputs(inputs: Sequence[Input], folder: Path, cache: ResultCache) -> list[dict[str, Any]]:
    """The inputs' rows; another report's inputs are refused, for its results would be lost."""
    facts = [[p and (p.name, sha256_file(p)) for p in (i.image, i.mask, i.truth)] for i in inputs]
    rows: list[dict[str, Any]] | None = cache.get(_INPUTS, facts)
    if rows is None and (folder / RESULTS_FILE).exists():
        before = ", ".join([entry["name"] for entry in load(folder)["inputs"]][:3])
        raise UsageError(f"{folder} holds a report on other pictures ({before}): name another folder, or add --force")
    if rows is None or not (folder / PICTURES_FOLDER / "inputs").is_dir():
        rows = describe_inputs(inputs, folder)
        cache.put(_INPUTS, facts, rows)
    return rows


def _outcomes(
    plan: Plan, folder: Path, cache: ResultCache, here: Mapping[str, Any], on_progress: Callable[[str], Progress]
) -> dict[str, Outcome]:
    """By configuration: what the cache has, and the rest measured, references first."""
    # Everything that the figures depend on, and no path: a bundle that was moved is the same.
    here = {**here, "runs": plan.runs, "warmup": plan.warmup, "sustained": plan.sustained_minutes}
    own = {c.id: [c.id, c.runtime, c.settings, c.files] for c in plan.configurations}
    facts = {c.id: [own[c.id], own.get(c.reference or ""), here] for c in plan.configurations}
    outcomes: dict[str, Outcome] = {}
    for name in facts:
        outcome = cache.get(name, facts[name])
        if outcome is not None and all((folder / path).is_file() for path in outcome["pictures"].values()):
            outcomes[name] = outcome
    dependents = [c for c in plan.configurations if c.reference not in (None, c.id) and c.problem is None]
    needed = {c.reference for c in dependents if c.id not in outcomes}
    order = sorted(plan.configurations, key=lambda c: c.reference != c.id)
    for number, configuration in enumerate(order, start=1):
        name = configuration.id
        traced = all((_traces(cache, name) / trace_name(n)).is_file() for n in range(len(plan.inputs)))
        if name in outcomes and (traced or name not in needed):
            continue
        progress = on_progress(f"[{number}/{len(order)}] {name}")
        outcome = outcomes[name] = _measured(configuration, plan, folder, cache, outcomes, progress)
        # One whose reference failed is measured again once its reference works.
        if outcome["status"] == "ok" and not (configuration.reference and outcome["reference_reason"]):
            cache.put(name, facts[name], outcome)
    if all(outcomes[c.id]["status"] == "ok" for c in dependents):
        for path in cache.folder.glob("*.traces"):  # they are large, and everything was compared with them
            shutil.rmtree(path, ignore_errors=True)
    return outcomes


def _measured(
    configuration: Configuration,
    plan: Plan,
    folder: Path,
    cache: ResultCache,
    outcomes: Mapping[str, Outcome],
    progress: Progress,
) -> Outcome:
    """One configuration, measured; without a reference where that has failed."""
    if configuration.problem is not None:
        return {"status": configuration.problem[0], "reason": configuration.problem[1]}
    reference, reason = configuration.reference, None
    if reference is None:
        reason = "a baseline has no reference" if configuration.settings is None else _NO_REFERENCE
    elif reference != configuration.id and outcomes[reference]["status"] != "ok":
        reason = f"its reference {reference} was not measured: {outcomes[reference]['reason']}"
        reference = None
    # The reference is compared with itself as well, which shows that the comparing adds nothing of its own.
    traces = None if reference is None else os.fspath(_traces(cache, reference))
    spec = {
        "configuration": asdict(configuration),
        "inputs": [[path and os.fspath(path) for path in source] for source in plan.inputs],
        **{key: getattr(plan, key) for key in ("runs", "warmup", "sustained_minutes")},
        "folder": os.fspath(folder),
        "record": traces if reference == configuration.id else None,
        "reference": traces and {"id": reference, "folder": traces},
    }
    return {**supervise(spec, progress), "reference_reason": reason}


def _traces(cache: ResultCache, name: str) -> Path:
    """The folder of a reference's traces, one file a picture."""
    return cache.folder / f"{name}.traces"


def supervise(spec: Mapping[str, Any], progress: Progress, command: Sequence[str] = _WORKER) -> Outcome:
    """Have ``spec`` measured in a process of its own, and return its figures, or its status and why there are none.

    The process's peak memory is thus its own, and whatever becomes of it is only a row. Interrupted, it ends first.
    """
    try:
        return {**run_job(command, dict(spec), "the process", progress), "status": "ok", "reason": None}
    except MoebiusError as error:  # this row is lost, the others are not
        status = next(status for kind, status in _STATUSES if isinstance(error, kind))
        return {"status": status, "reason": " ".join(str(error).split())[:500]}


def _row(c: Configuration, machine: str, outcome: Outcome) -> dict[str, Any]:
    """An outcome as one of ``configurations``."""
    unmeasured = None if outcome["status"] == "ok" else "it was not measured"
    accuracy = outcome.get("accuracy") or {"against_reference": None, "against_truth": None}
    return {
        **{key: getattr(c, key) for key in ("id", "label", "kind", "settings")},
        "machine": machine,
        "bundle": c.bundle,
        "runtime": outcome.get("runtime") or c.runtime,
        "status": outcome["status"],
        "reason": outcome["reason"],
        **{key: outcome.get(key) for key in ("latency", "sustained", "memory", "energy")},
        "accuracy": {
            **accuracy,
            "reference_reason": None if accuracy["against_reference"] else unmeasured or outcome["reference_reason"],
            "truth_reason": None if accuracy["against_truth"] else unmeasured or "no true pictures were given: --truth",
        },
        "pictures": outcome.get("pictures", {}),
    }


def _machine_label(info: Mapping[str, Any]) -> str:
    """The board's or the processor's name, the cores, and the GPU, of ``machine_info``."""
    name = info["board"] or info["cpu"]["model"] or info["architecture"]
    cores, gpus = counted(info["cpu"]["cores_available"], "core"), [gpu["name"] for gpu in info["gpus"]]
    return ", ".join([" ".join(str(name).split()), cores, *gpus])
