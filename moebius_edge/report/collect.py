"""A whole report's measurements: one configuration after the other, each kept as soon as it is finished.

What is kept is found again by everything its figures depend on, so that an interrupted report goes on where it was,
and a changed bundle, picture or setting is measured anew. What failed is always tried again.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from .. import __version__
from ..errors import UsageError
from ..system.files import sha256_file
from ..system.machine import machine_info, package_version
from .configurations import Configuration
from .inputs import Input, describe_inputs
from .instruments import no_peaks
from .kept import Kept, digest
from .measuring import Progress, trace_name
from .results import PICTURES_FOLDER, RESULTS_FILE, Results, load
from .rows import machine_label, row
from .schema import SCHEMA_VERSION
from .worker import Outcome, supervise

_INPUTS = "inputs"  # their name among what is kept; a configuration's has more parts
_NO_REFERENCE = "no float32 bundle of its resolution was measured with these settings"
_PACKAGES = ("onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx-cu13", "opencv-python-headless", "torch")


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


def collect(plan: Plan, folder: Path, on_progress: Callable[[str], Progress]) -> Results:
    """Measure what is not kept in ``folder`` yet, and return the results document; it is not written.

    ``on_progress`` gives the progress function of one configuration, by a label. Interrupted, all that was finished
    is kept. ``kept.claim`` comes first.

    Raises:
        UsageError: an input cannot be used, or ``folder`` holds a report on others. MachineError: a file is missing.
    """
    kept = Kept(folder)
    inputs = _inputs(plan.inputs, folder, kept)
    info = machine_info()
    identity = re.sub(r"[^a-z0-9]+", "-", machine_label(info).lower()).strip("-")
    here = {"machine": info, "version": __version__, "packages": [package_version(name) for name in _PACKAGES]}
    outcomes = _outcomes(plan, folder, kept, {**here, "inputs": inputs}, on_progress)
    peaks = _peaks(plan, outcomes, kept, here, on_progress)
    references = [c.id for c in plan.configurations if c.reference == c.id]
    rows = [row(c, identity, outcomes[c.id], peaks.get(_place(c, outcomes[c.id]))) for c in plan.configurations]
    return {
        "schema_version": SCHEMA_VERSION,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "version": __version__,
        "machines": {identity: {"label": machine_label(info), "info": info, "peaks": next(iter(peaks.values()), None)}},
        "inputs": inputs,
        "conditions": {
            "seed": plan.seed,
            "warmup": plan.warmup,
            "runs": plan.runs,
            "reference": references[0] if references else None,
        },
        "limits": {"max_latency_ms": None, "min_psnr_db": None, "max_memory_bytes": None, **plan.limits},
        "configurations": rows,
    }


def _outcomes(
    plan: Plan, folder: Path, kept: Kept, conditions: Mapping[str, Any], on_progress: Callable[[str], Progress]
) -> dict[str, Outcome]:
    """By configuration: what is kept, and the rest measured."""
    by_id = {c.id: c for c in plan.configurations}
    passes = {"runs": plan.runs, "warmup": plan.warmup, "sustained": plan.sustained_minutes}
    keys = {c.id: _key(c, by_id, {**conditions, **passes}) for c in plan.configurations}
    outcomes = {c.id: found for c in plan.configurations if (found := _found(kept, c.id, keys[c.id], folder))}
    dependents = [c for c in plan.configurations if c.reference not in (None, c.id) and c.problem is None]
    wanted = {c.reference for c in dependents if c.id not in outcomes}
    order = sorted(plan.configurations, key=lambda c: c.reference != c.id)  # references first, else as given
    for number, configuration in enumerate(order, start=1):
        name = configuration.id
        traced = all((kept.traces(name) / trace_name(n)).is_file() for n in range(len(plan.inputs)))
        if name in outcomes and (traced or name not in wanted):
            continue
        progress = on_progress(f"[{number}/{len(order)}] {name}")
        outcomes[name] = _measured(configuration, plan, folder, kept, outcomes, progress)
        lacking = configuration.reference is not None and outcomes[name].get("reference_reason")
        if outcomes[name]["status"] == "ok" and not lacking:  # else it is measured again once its reference works
            kept.put(name, keys[name], outcomes[name])
    if all(outcomes[c.id]["status"] == "ok" for c in dependents):
        kept.drop_traces()
    return outcomes


def _place(configuration: Configuration, outcome: Outcome) -> tuple[str, str, str]:
    """What a peak belongs to: runtime, device and precision; empty where there is none."""
    if configuration.kind != "bundle" or outcome["status"] != "ok" or configuration.bundle is None:
        return "", "", ""
    return outcome["runtime"]["name"], outcome["runtime"]["device"], configuration.bundle["precision"]


def _peaks(
    plan: Plan,
    outcomes: Mapping[str, Outcome],
    kept: Kept,
    conditions: Mapping[str, Any],
    on_progress: Callable[[str], Progress],
) -> dict[tuple[str, str, str], dict[str, Any]]:
    """The machine's peak for every runtime, device and precision that was measured, each in a process of its own."""
    found: dict[tuple[str, str, str], dict[str, Any]] = {}
    for configuration in plan.configurations:
        outcome = outcomes[configuration.id]
        place = _place(configuration, outcome)
        if place in found or not any(place):
            continue
        spec = {"runtime": outcome["runtime"], "precision": place[2]}
        name, key = f"peak_{'-'.join(place)}", digest([conditions, spec])
        figures = kept.get(name, key)
        if figures is None:
            measured = supervise(spec, on_progress(f"peak of {place[0]} on {place[1]} in {place[2]}"))
            figures = measured.get("peaks") or no_peaks(measured["reason"])
            if measured["status"] == "ok":
                kept.put(name, key, figures)
        found[place] = figures
    return found


def _found(kept: Kept, name: str, key: str, folder: Path) -> Outcome | None:
    """A kept outcome whose pictures are still there."""
    outcome: Outcome | None = kept.get(name, key)
    whole = outcome is not None and all((folder / path).is_file() for path in outcome["pictures"].values())
    return outcome if whole else None


def _inputs(inputs: Sequence[Input], folder: Path, kept: Kept) -> list[dict[str, Any]]:
    """The inputs' rows; another report's inputs are refused, for its results would be lost."""
    files = [[p and (p.name, sha256_file(p)) for p in (i.image, i.mask, i.truth)] for i in inputs]
    key = digest(files)
    rows: list[dict[str, Any]] | None = kept.get(_INPUTS, key)
    if rows is None or not (folder / PICTURES_FOLDER / "inputs").is_dir():
        if rows is None and (folder / RESULTS_FILE).exists():
            before = ", ".join([entry["name"] for entry in load(folder)["inputs"]][:3])
            raise UsageError(
                f"{folder} holds a report on other pictures ({before}): name another folder, or add --force"
            )
        rows = describe_inputs(inputs, folder)
        kept.put(_INPUTS, key, rows)
    return rows


def _measured(
    configuration: Configuration,
    plan: Plan,
    folder: Path,
    kept: Kept,
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
    # The reference is compared with itself as well, which shows that the comparing adds nothing of its own.
    own = reference == configuration.id
    spec = {
        "configuration": {
            key: getattr(configuration, key) for key in ("id", "kind", "source", "runtime", "settings", "bundle")
        },
        "inputs": [i.to_json() for i in plan.inputs],
        "runs": plan.runs,
        "warmup": plan.warmup,
        "sustained_minutes": plan.sustained_minutes,
        "folder": os.fspath(folder),
        "record": os.fspath(kept.traces(configuration.id)) if own else None,
        "reference": None
        if reason or reference is None
        else {"id": reference, "folder": os.fspath(kept.traces(reference))},
    }
    outcome = supervise(spec, progress)
    return {**outcome, "reference_reason": reason}


def _key(configuration: Configuration, by_id: Mapping[str, Configuration], conditions: Mapping[str, Any]) -> str:
    """Of everything the figures depend on, and no path: a bundle that was moved is the same."""
    reference = configuration.reference

    def facts(c: Configuration) -> dict[str, Any]:
        return {key: getattr(c, key) for key in ("id", "kind", "runtime", "settings", "depends")}

    against = None if reference is None else facts(by_id[reference])
    return digest({**facts(configuration), "reference": against, "conditions": conditions})
