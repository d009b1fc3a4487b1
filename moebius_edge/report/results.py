"""``results.json``: read, written, and put together from several machines. What stands in it is ``schema``'s."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import MachineError, UsageError
from ..system.files import atomic_write, safe_join
from ..text import json_text, printable
from .schema import SchemaProblem, check

RESULTS_FILE = "results.json"
PICTURES_FOLDER = "pictures"
Results = dict[str, Any]


def load(path: str | os.PathLike[str]) -> Results:
    """Read and check a ``results.json``, named itself or by its folder.

    Raises:
        MachineError: it is missing or cannot be read.
        UsageError: it is no JSON, of another schema version, or a field is missing or wrong; the message names it.
    """
    file = Path(path)
    file = file / RESULTS_FILE if file.is_dir() else file
    try:
        document: Results = json.loads(file.read_text(encoding="utf-8"))
        check(document)
    except FileNotFoundError:
        raise MachineError(f"there is no {file}: name a results.json that `moebius-edge report` wrote") from None
    except OSError as error:
        raise MachineError(f"cannot read {file}: {error.strerror}: check it with `ls -l {file}`") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{file} is not valid JSON ({error}): make it again with `moebius-edge report`") from error
    except SchemaProblem as problem:
        raise UsageError(f"{file}: {problem}: make it again with `moebius-edge report`") from None
    return document


def save(results: Results, folder: str | os.PathLike[str]) -> Path:
    """Write ``folder/results.json``, whole or not at all; a document that ``load`` would refuse is a ``ValueError``."""
    try:
        check(results)
    except SchemaProblem as problem:
        raise ValueError(f"these are no results: {problem}") from None
    path = Path(folder) / RESULTS_FILE
    text = json_text(results, indent=1, ensure_ascii=False)
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def merge(documents: Sequence[tuple[str, Results]]) -> Results:
    """One document of several, each with the name that messages call it by; the first's limits hold.

    A machine that two of them share is one machine; another one of the same id gets a new id, and so does a
    configuration that two machines have. Pictures keep their paths: see ``copy_pictures``.

    Raises:
        UsageError: inputs or conditions differ, or both hold one configuration of one machine.
    """
    (first_name, first), *others = documents
    merged = copy.deepcopy(first)
    for name, document in others:
        _check_alike(first_name, first, name, document)
        _add(merged, copy.deepcopy(document), name)
    merged["created"] = max(document["created"] for _, document in documents)
    return merged


def shown_stem(name: str) -> str:
    """What the files of the picture ``name`` begin with in a report's folder: a name that every system can open."""
    return PurePosixPath(printable(name)).stem.replace("\\", "%")


def copy_pictures(results: Results, sources: Sequence[tuple[Path, Results]], folder: Path) -> list[str]:
    """Copy the pictures of merged ``sources`` (their folders) to ``folder``; return the names of those not found.

    ``results`` is what ``merge`` made of them. A configuration with a new id gets its pictures under it; those that
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
                    found = safe_join(source, path)
                    (folder / target).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(found, folder / target)
                    row["pictures"][image] = target
                except FileNotFoundError:
                    missing.append(path)
                    del row["pictures"][image]
    return missing


def _add(merged: Results, document: Results, name: str) -> None:
    """Take over the machines and configurations of ``document``."""
    renamed: dict[str, str] = {}
    for identity, machine in document["machines"].items():
        new, number = identity, 2
        while new in merged["machines"] and merged["machines"][new]["info"] != machine["info"]:
            new, number = f"{identity}-{number}", number + 1
        renamed[identity] = new
        merged["machines"].setdefault(new, machine)
    taken = {row["id"]: row["machine"] for row in merged["configurations"]}
    ids: dict[str, str] = {}
    for row in document["configurations"]:
        row["machine"] = renamed[row["machine"]]
        if taken.get(row["id"]) == row["machine"]:
            raise UsageError(
                f"{name} holds {row['id']} of machine {row['machine']}, and so does one before it: "
                "merge each measurement once"
            )
        ids[row["id"]] = f"{row['id']}_{row['machine']}" if row["id"] in taken else row["id"]
    for row in document["configurations"]:
        row["id"] = ids[row["id"]]
        if (against := row["accuracy"]["against_reference"]) is not None:
            against["reference"] = ids.get(against["reference"], against["reference"])
    merged["configurations"] += document["configurations"]
    if merged["conditions"]["reference"] is None and (reference := document["conditions"]["reference"]) is not None:
        merged["conditions"]["reference"] = ids.get(reference, reference)


def _check_alike(first_name: str, first: Results, name: str, document: Results) -> None:
    """Raise ``UsageError`` naming the first thing that makes two documents incomparable."""
    for key in ("seed", "warmup", "runs"):
        a, b = first["conditions"][key], document["conditions"][key]
        if a != b:
            raise UsageError(f"{first_name} has {key} {a} and {name} has {b}: merge reports made under one condition")
    a, b = ([entry["name"] for entry in d["inputs"]] for d in (first, document))
    if a != b:
        only = sorted(set(a) ^ set(b)) or ["another order"]
        raise UsageError(f"{first_name} and {name} have different images ({only[0]}): merge reports on the same images")
    for one, other in zip(first["inputs"], document["inputs"], strict=True):
        for key, what in (("sha256", ""), ("mask_sha256", "the mask of "), ("truth_sha256", "the truth of ")):
            if one[key] != other[key]:
                raise UsageError(f"{what}{one['name']} differs between {first_name} and {name}: merge the same images")
    a, b = (_reference(d) for d in (first, document))
    if a and b and a != b:
        raise UsageError(
            f"the reference of {first_name} is denoiser {a[:12]} and that of {name} {b[:12]}: measure against one"
        )


def _reference(results: Results) -> str:
    """The SHA-256 of the reference's denoiser, or nothing."""
    wanted = results["conditions"]["reference"]
    row = next((r for r in results["configurations"] if r["id"] == wanted), None)
    return row["bundle"]["denoiser_sha256"] if row and row["bundle"] else ""
