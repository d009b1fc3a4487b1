"""What each configuration's accuracy is measured against."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from ..bundle.bundle import Bundle
from .configurations import FLOAT32, TORCH, Configuration


def with_references(rows: Sequence[Configuration], reference: Bundle | str | None) -> list[Configuration]:
    """``rows`` with what each one's accuracy is measured against.

    That is the first row of the reference with the same settings and resolution, on the CPU if it is there, where
    float32 means just that. Reuse of deep features approximates the computation, as a lower precision does: so the
    reference is one that reuses nothing, or reuses as much as the row where no such one is measured. ``reference`` is a
    bundle, ``torch``, or None: then it is the float32 bundle made from the same checkpoint, else the first float32
    bundle.
    """
    ordered = sorted(rows, key=lambda r: (_cache_interval(r) != 1, r.runtime["device"] != "cpu"))

    def candidates(row: Configuration) -> Iterator[Configuration]:
        if reference == TORCH:
            yield from (r for r in ordered if r.kind == TORCH)
        elif isinstance(reference, Bundle):
            yield from (r for r in ordered if r.kind == "bundle" and r.source["bundle"] == str(reference.path))
        else:
            full = [r for r in ordered if r.kind == "bundle" and r.bundle and r.bundle["precision"] == FLOAT32]
            yield from (r for r in full if r.source["origin"] == row.source["origin"])
            yield from full

    def alike(a: Configuration, b: Configuration) -> bool:
        assert a.bundle and b.bundle and a.settings and b.settings
        keys = ("start", "steps", "guidance", "guidance_interval", "strength", "scheduler", "seed")
        same = all(a.settings.get(key) == b.settings.get(key) for key in keys)
        same = same and _cache_interval(b) in (1, _cache_interval(a))
        return same and a.bundle["resolution"] == b.bundle["resolution"] and b.problem is None

    made = []
    for row in rows:
        found = None if row.settings is None else next((c for c in candidates(row) if alike(row, c)), None)
        made.append(replace(row, reference=found.id if found else None))
    return made


def _cache_interval(row: Configuration) -> int:
    found: int = row.settings["cache_interval"] if row.settings else 1
    return found
