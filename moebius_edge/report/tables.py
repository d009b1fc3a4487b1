"""Tables of configurations as the page and ``report.md`` show them, and what they say of a whole report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..metrics.fidelity import PSNR_CAP_DB
from ..text import counted
from . import figures
from .figures import Configuration, Results, at, is_ok, latency_ms
from .recommend import recommend, standings

MARKDOWN_FILE = "report.md"
TITLE = "Accuracy against latency, memory and energy"
ABSENT = "\N{EN DASH}"


class Column(NamedTuple):
    """The figure at ``path`` in a configuration, times ``scale``.

    ``digits`` stand after the point; without them the column's smallest figure gets three significant ones.
    """

    title: str
    path: str
    unit: str = ""
    digits: int | None = None
    scale: float = 1.0


SETTINGS = (  # what a figure depends on, in every table
    Column("Start", "settings.start"),
    Column("Steps", "settings.steps_executed", "executed", 0),
    Column("Guidance", "settings.guidance", digits=1),
    Column("Scheduler", "settings.scheduler"),
    Column("Cache interval", "settings.cache_interval", digits=0),
)
COMPARISON = (
    Column("Standing", "derived.standing"),
    *SETTINGS,
    Column("Hole PSNR to truth", "accuracy.against_truth.hole_psnr_db", "dB", 1),
    Column("Hole PSNR to reference", "accuracy.against_reference.hole_psnr_db", "dB", 1),
    Column("Hole SSIM to truth", "accuracy.against_truth.hole_ssim", digits=3),
    Column("Median", "derived.latency_ms", "ms"),
    Column("p95", "latency.stages.total.p95_ms", "ms"),
    Column("Peak memory", "derived.memory_bytes", "MB", 0, 1e-6),
    Column("Energy", "energy.joules_per_image", "J/image"),
)
_REASONS = (
    ("difference to the reference", "accuracy.reference_reason"),
    ("difference to the truth", "accuracy.truth_reason"),
    ("device memory", "memory.reason"),
    ("energy", "energy.reason"),
)


class Cell(NamedTuple):
    """What is shown, and the value that the row sorts by (None sorts last)."""

    text: str
    value: float | str | None


def in_order(results: Results) -> list[Configuration]:
    """Group by group, the fastest first, what has no figures last; ``derived`` has figures made from others."""
    standing = standings(results)
    rows = []
    for number, members in enumerate(figures.groups(results, figures.against_of(results)).values()):
        for c in sorted(members, key=lambda c: (not is_ok(c), latency_ms(c) or 0.0)):
            cold, soaked = (at(c, f"sustained.{name}_median_ms") for name in ("cold", "soaked"))
            derived = {
                "group": number,
                "standing": standing.get(c["id"]) or ("not ranked" if is_ok(c) else c["status"]),
                "latency_ms": latency_ms(c),
                "memory_bytes": figures.memory_bytes(c),
                "stage_ms": figures.stage_ms(c),
                "soaked_change": 100 * (soaked / cold - 1) if cold and soaked is not None else None,
                "throttled": {True: "yes", False: "no"}.get(at(c, "energy.throttled")),
            }
            rows.append({**c, "derived": derived})
    return rows


def table(columns: Sequence[Column], rows: Sequence[Configuration]) -> list[tuple[Column, list[Cell], bool]]:
    """The columns in which any of the rows has a value, each with its cells and whether they are numbers."""
    filled = []
    for column in columns:
        shown = cells(column, rows)
        if values := [cell.value for cell in shown if cell.value is not None]:
            filled.append((column, shown, not isinstance(values[0], str)))
    return filled


def cells(column: Column, rows: Sequence[Configuration]) -> list[Cell]:
    """One column's cells; its figures have the same number of digits after the point."""
    values = [at(row, column.path) for row in rows]
    if column.scale != 1:
        values = [None if value is None else value * column.scale for value in values]
    digits = column.digits
    if digits is None:
        digits = needed_digits([v for v in values if isinstance(v, (int, float))])
    return [Cell(_shown(value, digits, column.unit), value) for value in values]


def needed_digits(values: Sequence[float]) -> int:
    """Digits after the point that leave the smallest of the values three significant ones; at most 3."""
    smallest = min((abs(v) for v in values if v), default=1000.0)
    return max(0, min(3, 2 - math.floor(math.log10(smallest))))


def _shown(value: Any, digits: int, unit: str) -> str:
    if value is None:
        return ABSENT
    if isinstance(value, str):
        return value
    return "equal" if unit == "dB" and value >= PSNR_CAP_DB else f"{value:.{digits}f}"


def absences(results: Results, numbers: Mapping[str, int]) -> list[tuple[str, str, str]]:
    """What is absent, why, and in which rows; rows that say the same are one entry."""
    rows: dict[tuple[str, str], list[str]] = {}
    for configuration in filter(is_ok, results["configurations"]):  # the others have one reason for everything
        for what, path in _REASONS:
            if reason := at(configuration, path):
                rows.setdefault((what, reason), []).append(str(numbers[configuration["id"]]))
    return [(what, reason, ", ".join(places)) for (what, reason), places in rows.items()]


def summary(results: Results) -> str:
    rows = results["configurations"]
    failed = sum(not is_ok(c) for c in rows)
    created = results["created"]
    if created.endswith("+00:00"):
        created = f"{created[:16].replace('T', ' ')} UTC"
    parts = [
        counted(len(rows), "configuration") + (f" ({failed} without figures)" if failed else ""),
        counted(len(results["inputs"]), "input"),
        " and ".join(machine["label"] for machine in results["machines"].values()),
        f"moebius-edge {results['version']}",
        created,
    ]
    return "; ".join(parts)


def conditions(results: Results) -> str:
    c = results["conditions"]
    reference = next((row["label"] for row in results["configurations"] if row["id"] == c["reference"]), None)
    runs = f"{counted(c['warmup'], 'warm-up run')} and {counted(c['runs'], 'measured run')} an input"
    return f"Seed {c['seed']}; {runs}; " + (f"reference: {reference}." if reference else "no float32 reference.")


def markdown(results: Results) -> str:
    """``report.md``: the recommendations and the comparison, to be pasted where Markdown is shown."""
    results = figures.clean(results)
    rows = in_order(results)
    lines = [f"# {TITLE}", "", summary(results) + ".", "", conditions(results), ""]
    for each in recommend(results):
        lines += [f"**{each.title}**: " + " ".join(each.sentences), ""]
    columns = [["Configuration", *(figures.full_label(results, c) for c in rows)]]
    for column, shown, _ in table(COMPARISON, rows):
        title = f"{column.title} ({column.unit})" if column.unit else column.title
        columns.append([title, *(cell.text for cell in shown)])
    head, *body = (" | ".join(text.replace("|", "\\|") for text in line) for line in zip(*columns, strict=True))
    lines += [f"| {line} |" for line in (head, " | ".join("---" for _ in columns), *body)]
    return "\n".join(lines) + "\n"
