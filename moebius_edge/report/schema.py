"""What stands in a ``results.json``, as one table, and the check that a document is that.

Every number carries its unit in its key. A figure that is not known is null, with a ``reason`` beside it wherever
it could have been expected. Keys that the table does not name are kept and not looked at.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

SCHEMA_VERSION = 1
STATUSES = ("ok", "failed", "gated", "out of memory", "missing")
KINDS = ("bundle", "baseline", "torch")


@dataclass(frozen=True)
class _Around:
    inner: Any


class Maybe(_Around):
    """What may be null."""


class Each(_Around):
    """A list."""


class Named(_Around):
    """An object whose keys are names."""


class Later(_Around):
    """A key that documents written before it was there may lack."""


_LEAVES: dict[str, Callable[[Any], bool]] = {
    "a text": lambda v: isinstance(v, str),
    "a whole number of 0 or more": lambda v: type(v) is int and v >= 0,
    "a number": lambda v: type(v) in (int, float) and math.isfinite(v),
    "true or false": lambda v: isinstance(v, bool),
    "an object": lambda v: isinstance(v, dict),
    f"one of {', '.join(STATUSES)}": lambda v: v in STATUSES,
    f"one of {', '.join(KINDS)}": lambda v: v in KINDS,
}
TEXT, COUNT, NUMBER, FLAG, OBJECT, STATUS, KIND = _LEAVES

_STAGE = {"count": COUNT} | dict.fromkeys(("first_ms", "median_ms", "p95_ms", "p99_ms", "iqr_ms"), NUMBER)
# SSIM needs a picture as large as its window, and a texture a hole with an inside.
_FIDELITY = (
    dict.fromkeys(("hole_psnr_db", "psnr_db"), NUMBER)
    | dict.fromkeys(("hole_ssim", "ssim"), Maybe(NUMBER))
    | {"images": COUNT}
)

_CONFIGURATION = {
    "id": TEXT,
    "label": TEXT,
    "machine": TEXT,
    "kind": KIND,
    "bundle": Maybe(
        {
            "name": TEXT,
            "path": TEXT,
            "precision": TEXT,
            "resolution": COUNT,
            "denoiser_sha256": TEXT,
            "bytes": COUNT,
            "engine_bytes": Maybe(COUNT),
        }
    ),
    "runtime": {"name": TEXT, "version": Maybe(TEXT), "device": TEXT},
    "settings": Maybe(
        {
            "start": TEXT,
            "steps": COUNT,
            "steps_executed": COUNT,
            "guidance": NUMBER,
            "strength": NUMBER,
            "scheduler": TEXT,
            "cache_interval": Later(COUNT),  # read as 1, nothing is reused
            "seed": COUNT,
        }
    ),
    "status": STATUS,
    "reason": Maybe(TEXT),
    "latency": Maybe(
        {"load_ms": NUMBER, "warmup": COUNT, "runs": COUNT, "images_per_second": NUMBER, "stages": Named(_STAGE)}
    ),
    "sustained": Maybe(
        {"minutes": NUMBER, "cold_median_ms": NUMBER, "soaked_median_ms": NUMBER, "by_minute_ms": Each(NUMBER)}
    ),
    "memory": Maybe({"peak_host_bytes": Maybe(COUNT), "peak_device_bytes": Maybe(COUNT), "reason": Maybe(TEXT)}),
    "work": Maybe(
        {
            "multiplications_per_step": Maybe(NUMBER),
            "bytes_per_step": Maybe(NUMBER),
            "by_class": Named({"multiplications": NUMBER, "bytes": NUMBER}),
            "share_of_peak": Maybe(NUMBER),
            "reason": Maybe(TEXT),
        }
    ),
    "energy": Maybe(
        {
            "source": Maybe(TEXT),
            "joules_per_image": Maybe(NUMBER),
            "mean_watts": Maybe(NUMBER),
            "power_mode": Maybe(TEXT),
            "clocks": Maybe(OBJECT),
            "throttled": Maybe(FLAG),
            "reason": Maybe(TEXT),
        }
    ),
    "accuracy": {
        "against_reference": Maybe(
            {
                **_FIDELITY,
                "reference": TEXT,
                "worst_pixel_levels": NUMBER,
                "latent_rms_drift": Maybe(Each(NUMBER)),
            }
        ),
        "against_truth": Maybe(
            {
                **_FIDELITY,
                "texture_ratio": Maybe(NUMBER),
                "lpips": Maybe(NUMBER),
                "lpips_reason": Maybe(TEXT),
                "fid": Maybe(NUMBER),
                "fid_reason": Maybe(TEXT),
            }
        ),
        "reference_reason": Maybe(TEXT),
        "truth_reason": Maybe(TEXT),
    },
    "pictures": Named(TEXT),
}

SCHEMA: dict[str, Any] = {
    "schema_version": COUNT,
    "created": TEXT,
    "version": TEXT,
    "machines": Named(
        {
            "label": TEXT,
            "info": OBJECT,
            "peaks": Maybe(
                {
                    "multiplications_per_second": Maybe(NUMBER),
                    "bytes_per_second": Maybe(NUMBER),
                    "runtime": Maybe(TEXT),
                    "precision": Maybe(TEXT),
                }
            ),
        }
    ),
    "inputs": Each(
        {
            "name": TEXT,
            "sha256": TEXT,
            "mask_sha256": TEXT,
            "truth_sha256": Maybe(TEXT),
            "width": COUNT,
            "height": COUNT,
            "hole_share": NUMBER,
            "truth": FLAG,
        }
    ),
    "conditions": {"seed": COUNT, "warmup": COUNT, "runs": COUNT, "reference": Maybe(TEXT)},
    "limits": {"max_latency_ms": Maybe(NUMBER), "min_psnr_db": Maybe(NUMBER), "max_memory_bytes": Maybe(NUMBER)},
    "configurations": Each(_CONFIGURATION),
}


class SchemaProblem(Exception):
    """Where a document departs from the schema, and how."""


def check(document: Any) -> None:
    """Raise ``SchemaProblem``, naming the place, unless ``document`` is a results document of this schema."""
    if not isinstance(document, dict):
        raise SchemaProblem("should hold a JSON object")
    version = document.get("schema_version")
    if version != SCHEMA_VERSION:
        raise SchemaProblem(f"schema version {version!r:.20} is unknown, this program reads {SCHEMA_VERSION}")
    _check(document, SCHEMA, "")
    machines, seen = document["machines"], set()
    for number, row in enumerate(document["configurations"]):
        where = f"configurations[{number}]"
        if row["machine"] not in machines:
            raise SchemaProblem(f"'{where}.machine' {row['machine']!r} is none of 'machines'")
        if row["id"] in seen:
            raise SchemaProblem(f"'{where}.id' {row['id']!r} is there twice")
        seen.add(row["id"])
        if row["status"] == "ok" and row["latency"] is None:
            raise SchemaProblem(f"'{where}.latency' is missing, and its status is ok")
        if row["status"] != "ok" and not row["reason"]:
            raise SchemaProblem(f"'{where}.reason' should say why its status is {row['status']}")


def _check(value: Any, kind: Any, where: str) -> None:
    if isinstance(kind, Maybe):
        if value is not None:
            _check(value, kind.inner, where)
    elif isinstance(kind, str):
        if not _LEAVES[kind](value):
            raise SchemaProblem(f"'{where}' should be {kind} and is {value!r:.60}")
    elif isinstance(kind, Each):
        if not isinstance(value, list):
            raise SchemaProblem(f"'{where}' should be a list and is {value!r:.60}")
        for number, entry in enumerate(value):
            _check(entry, kind.inner, f"{where}[{number}]")
    else:
        if not isinstance(value, dict):
            raise SchemaProblem(f"'{where}' should be an object and is {value!r:.60}")
        fields = dict.fromkeys(value, kind.inner) if isinstance(kind, Named) else kind
        for name, inner in fields.items():
            place = f"{where}.{name}" if where else name
            if name in value:
                _check(value[name], inner.inner if isinstance(inner, Later) else inner, place)
            elif not isinstance(inner, Later):
                raise SchemaProblem(f"'{place}' is missing")
