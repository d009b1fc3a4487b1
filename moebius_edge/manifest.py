"""``bundle.json``: what stands in it, and the check that every field is what this program computes with.

Pure data: this module reads the one JSON file and neither the ONNX files beside it nor their hashes.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from .errors import BundleError, MachineError
from .files import safe_join
from .guidance import is_distillable
from .spec import (
    BETA_END,
    BETA_START,
    DEEP_SCHEMA_VERSION,
    DISTILLED_SCHEMA_VERSION,
    LATENT_DOWNSCALE,
    NOISE_OFFSET,
    NUM_TRAIN_TIMESTEPS,
    SCHEMA_VERSION,
    Component,
    Tensor,
    components,
)

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

_KINDS: dict[str, Any] = {
    **{"a text": str, "a whole number": int, "a number": (int, float)},
    **{"an object": dict, "a list": list},
}
_FIELDS = {
    "schema_version": "a whole number",
    "name": "a text",
    "description": "a text",
    "licence": "a text",
    "precision": "a text",
    "resolution": "a whole number",
    "latent_size": "a whole number",
    "scaling_factor": "a number",
    "defaults": "an object",
    "scheduler": "an object",
    "model": "an object",
    "components": "an object",
    "gate": "an object",
    "source": "an object",
    "tools": "an object",
    "files": "an object",
}

# Of ``int8``, which bundles of that precision have: what is computed with or shown.
_INT8_FIELDS = {
    "target": "a text",
    "rest": "a text",
    "ranges": "a text",
    "quantised_products": "a whole number",
    "products": "a whole number",
    "share_of_multiplications": "a number",
    "nodes": "a list",
}


def read_manifest(path: Path, remedy: str) -> dict[str, Any]:
    """The checked contents of a ``bundle.json``. ``remedy`` ends each message: how to get a good one.

    Raises:
        BundleError: no JSON, an unknown schema, a field missing or of the wrong kind or value.
        MachineError: the file cannot be read.
    """
    try:
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise MachineError(f"cannot read {path}: {error.strerror}: check it with `ls -l {path}`") from error
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path} is not valid JSON ({error}): {remedy}") from error
    try:
        _check(data, path.parent)
    except _Problem as problem:
        raise BundleError(f"{path}: {problem}: {problem.remedy or remedy}") from None
    return data


def schema_version(distilled_guidance: float | None, deep_channels: int | None = None) -> int:
    """The schema of a bundle: the lowest that says all of it, so that older programs read what they can run."""
    if deep_channels is not None:
        return DEEP_SCHEMA_VERSION
    return SCHEMA_VERSION if distilled_guidance is None else DISTILLED_SCHEMA_VERSION


def resolved_components(resolution: int, deep_channels: int | None = None) -> dict[str, Component]:
    """``spec.components`` with all sizes but the batch filled in."""
    return {
        name: Component(
            name,
            tuple(t.resolved(resolution) for t in component.inputs),
            tuple(t.resolved(resolution) for t in component.outputs),
        )
        for name, component in components(deep_channels).items()
    }


def component_table(component: Component) -> dict[str, Any]:
    """A component as it stands in ``bundle.json``: file, then name, type and shape of each tensor."""

    def row(tensor: Tensor) -> dict[str, Any]:
        return {"name": tensor.name, "dtype": tensor.dtype, "shape": list(tensor.shape)}

    return {
        "file": component.file,
        "inputs": [row(t) for t in component.inputs],
        "outputs": [row(t) for t in component.outputs],
    }


class _Problem(Exception):
    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(message)
        self.remedy = remedy


def _check(data: Any, folder: Path) -> None:
    if not isinstance(data, dict):
        raise _Problem("should hold a JSON object")
    _check_kind(data, "schema_version", "a whole number")  # first: another schema may have other fields
    version = data["schema_version"]
    if not SCHEMA_VERSION <= version <= DEEP_SCHEMA_VERSION:
        raise _Problem(
            f"schema version {version} is unknown, this program reads {SCHEMA_VERSION} to {DEEP_SCHEMA_VERSION}",
            "run `pip install --upgrade moebius-edge`" if version > DEEP_SCHEMA_VERSION else "",
        )
    for key, kind in _FIELDS.items():
        _check_kind(data, key, kind)
    resolution, latent, factor = data["resolution"], data["latent_size"], data["scaling_factor"]
    if resolution <= 0 or resolution % LATENT_DOWNSCALE:
        raise _Problem(f"'resolution' {resolution} is not a positive multiple of {LATENT_DOWNSCALE}")
    if latent * LATENT_DOWNSCALE != resolution:
        raise _Problem(f"'latent_size' {latent} does not fit 'resolution' {resolution}")
    if not (math.isfinite(factor) and factor > 0):
        raise _Problem(f"'scaling_factor' should be positive and is {factor}")
    for key, expected in SCHEDULER.items():
        if (found := data["scheduler"].get(key)) != expected:
            raise _Problem(f"scheduler '{key}' is {found!r}, this program computes with {expected!r}")
    for key in ("steps", "guidance", "start"):
        if key not in data["defaults"]:
            raise _Problem(f"'defaults' lacks '{key}'")
    deep = data.get("deep_channels")
    _check_version(version, data.get("distilled_guidance"), deep)
    _check_guidance(data.get("distilled_guidance"), data["defaults"]["guidance"])
    _check_int8(data.get("int8"), data["precision"])
    expected = resolved_components(resolution, deep)
    _check_files(data["files"], folder, expected)
    _check_components(data["components"], expected)


def _check_kind(data: dict[str, Any], key: str, kind: str, within: str = "") -> None:
    value = data.get(key)
    if not isinstance(value, _KINDS[kind]) or isinstance(value, bool):  # True would pass for a number
        found = f"{value!r:.60}" if key in data else "missing"
        raise _Problem(f"'{within}{key}' should be {kind} and is {found}")


def _check_version(version: int, distilled: Any, deep: Any) -> None:
    if deep is not None and (type(deep) is not int or deep < 1):
        raise _Problem(f"'deep_channels' should be a whole number of 1 or more and is {deep!r:.60}")
    if version != schema_version(distilled, deep):
        given = f"'distilled_guidance' {distilled!r:.60} and 'deep_channels' {deep}"
        raise _Problem(f"schema version {version} does not go with {given}")


def _check_guidance(distilled: Any, default: Any) -> None:
    if distilled is None:
        return
    if not is_distillable(distilled):
        raise _Problem(f"'distilled_guidance' should be a number of more than 1 and is {distilled!r:.60}")
    if default != distilled:
        raise _Problem(f"'defaults' has the guidance {default!r:.60}, and {distilled} is distilled")


def _check_int8(int8: Any, precision: str) -> None:
    if int8 is None:
        return
    if precision != "int8":
        raise _Problem(f"'int8' does not go with the precision {precision!r:.60}")
    if not isinstance(int8, dict):
        raise _Problem(f"'int8' should be an object and is {int8!r:.60}")
    for key, kind in _INT8_FIELDS.items():
        _check_kind(int8, key, kind, "int8.")
    if "shallow_nodes" in int8:
        _check_kind(int8, "shallow_nodes", "a list", "int8.")
    for key in ("nodes", "shallow_nodes"):
        if wrong := [node for node in int8.get(key, []) if not isinstance(node, str)]:
            raise _Problem(f"'int8.{key}' should hold names of nodes and has {wrong[0]!r:.60}")


def _check_files(files: dict[str, Any], folder: Path, expected: dict[str, Component]) -> None:
    for name, record in files.items():
        safe_join(folder, name)
        good = isinstance(record, dict) and isinstance(record.get("sha256"), str)
        if not good or type(record.get("bytes")) is not int:
            raise _Problem(f"the record of file '{name}' should hold 'sha256' and 'bytes'")
    for component in expected.values():
        if component.file not in files:
            raise _Problem(f"'files' lacks '{component.file}'")


def _check_components(tables: dict[str, Any], expected: dict[str, Component]) -> None:
    """The table must be the one of ``spec``: the pipeline feeds exactly those tensors."""
    for name, component in expected.items():
        wanted = component_table(component)
        if tables.get(name) != wanted:
            raise _Problem(f"component '{name}' {_difference(tables.get(name), wanted)}")
    if extra := sorted(set(tables) - set(expected)):
        raise _Problem(f"unknown component '{extra[0]}'")


def _difference(found: Any, wanted: dict[str, Any]) -> str:
    """The first place where a component's table differs, in words."""
    if not isinstance(found, dict):
        return "is missing"
    key = next((k for k in wanted if found.get(k) != wanted[k]), None)
    if key is None:
        return f"has unknown entries {sorted(set(found) - set(wanted))}"
    got, want = found.get(key), wanted[key]
    if isinstance(got, list) and isinstance(want, list) and len(got) == len(want):
        got, want = next((g, w) for g, w in zip(got, want, strict=True) if g != w)
    return f"has {key} {json.dumps(got):.200}, this program needs {json.dumps(want)}"
