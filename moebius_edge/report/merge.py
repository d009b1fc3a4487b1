"""The reports of several machines put together, or of one alone, which makes its page where Jinja2 is installed."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..system.files import safe_join
from ..system.fingerprint import first_difference
from .results import PICTURES_FOLDER, Results


def merge(sources: Sequence[tuple[Path, Results]]) -> Results:
    """One document of several, each with its folder; the limits are the first one's.

    A machine that two of them share is one machine. Another machine of the same id gets a new id, and so does a
    configuration that two machines have. Pictures keep their paths: see ``copy_pictures``.

    Raises:
        UsageError: inputs or conditions differ, or two documents hold one configuration of one machine.
    """
    (first_folder, first), *_ = sources
    merged = {**copy.deepcopy(first), "machines": {}, "configurations": []}
    for folder, document in sources:
        there, here = _conditions(first), _conditions(document)
        if not (there["reference"] and here["reference"]):
            del there["reference"], here["reference"]
        if there != here:
            problem = f"{first_folder} and {folder} cannot be compared: {first_difference(there, here)}"
            raise UsageError(problem, "merge reports on the same images, masks, truths, seed, runs and reference")
        _add(merged, copy.deepcopy(document), folder)
    merged["created"] = max(document["created"] for _, document in sources)
    return merged


def _conditions(results: Results) -> dict[str, Any]:
    """What must be equal in two documents whose figures are compared."""
    conditions = results["conditions"]
    reference = next((row for row in results["configurations"] if row["id"] == conditions["reference"]), None)
    hashes = ("sha256", "mask_sha256", "truth_sha256")
    return {
        **{key: conditions[key] for key in ("seed", "warmup", "runs")},
        "inputs": {entry["name"]: {key: entry[key] for key in hashes} for entry in results["inputs"]},
        "reference": reference and reference["bundle"] and {"denoiser": reference["bundle"]["denoiser_sha256"]},
    }


def _add(merged: Results, document: Results, folder: Path) -> None:
    """Take over the machines and configurations of ``document`` into ``merged``."""
    machines: dict[str, str] = {}  # old id -> new id
    for identity, machine in document["machines"].items():
        new, number = identity, 2
        while new in merged["machines"] and merged["machines"][new]["info"] != machine["info"]:
            new, number = f"{identity}-{number}", number + 1
        machines[identity] = new
        merged["machines"].setdefault(new, machine)
    taken = {row["id"]: row["machine"] for row in merged["configurations"]}
    ids: dict[str, str] = {}
    for row in document["configurations"]:
        row["machine"] = machines[row["machine"]]
        if taken.get(row["id"]) == row["machine"]:
            problem = f"{folder} holds {row['id']} of machine {row['machine']}, and so does one before it"
            raise UsageError(problem, "merge each measurement once")
        ids[row["id"]] = f"{row['id']}_{row['machine']}" if row["id"] in taken else row["id"]
    for row in document["configurations"]:
        row["id"] = ids[row["id"]]
        if against := row["accuracy"]["against_reference"]:
            against["reference"] = ids.get(against["reference"], against["reference"])
    merged["configurations"] += document["configurations"]
    if merged["conditions"]["reference"] is None:
        merged["conditions"]["reference"] = ids.get(document["conditions"]["reference"])


def copy_pictures(merged: Results, sources: Sequence[tuple[Path, Results]], folder: Path) -> int:
    """Copy the pictures of ``sources`` into ``folder``, those of a configuration under the id that ``merged`` has.

    Pictures that are missing are left out of ``merged``. Returns how many these are.
    """
    missing = 0
    for source, _ in sources:
        for kind in ("inputs", "truth"):
            if (shared := source / PICTURES_FOLDER / kind).is_dir():
                shutil.copytree(shared, folder / PICTURES_FOLDER / kind, dirs_exist_ok=True)
    old_rows = [(source, old) for source, document in sources for old in document["configurations"]]
    for row, (source, old) in zip(merged["configurations"], old_rows, strict=True):
        for image, path in old["pictures"].items():
            row["pictures"][image] = f"{PICTURES_FOLDER}/{row['id']}/{Path(path).name}"
            target = safe_join(folder, row["pictures"][image])
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(safe_join(source, path), target)
            except FileNotFoundError:
                missing += 1
                del row["pictures"][image]
    return missing
