"""Tables of configurations, which ``report.md`` and the page share; and ``report.md`` itself."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..metrics.fidelity import PSNR_CAP_DB
from ..text import counted
from . import figures
from .figures import Configuration, Results, at, clean, drift, full_label, is_ok, latency_ms, row_numbers
from .recommend import basis, ranking_note, recommend, standings

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

    @property
    def heading(self) -> str:
        return f"{self.title} ({self.unit})" if self.unit else self.title


SETTINGS = (  # what a figure depends on, in every table
    Column("Start", "settings.start"),
    Column("Steps", "settings.steps_executed", "executed", 0),
    Column("Guidance", "settings.guidance", digits=1),
    Column("Scheduler", "settings.scheduler"),
    Column("Cache interval", "settings.cache_interval", digits=0),
    Column("Seed", "settings.seed", digits=0),
)
COMPARISON = (
    Column("Standing", "derived.standing"),
    *SETTINGS,
    Column("Hole PSNR to truth", "accuracy.against_truth.hole_psnr_db", "dB", 1),
    Column("Hole PSNR to reference", "accuracy.against_reference.hole_psnr_db", "dB", 1),
    Column("Hole SSIM to truth", "accuracy.against_truth.hole_ssim", digits=3),
    Column("LPIPS", "accuracy.against_truth.lpips", digits=3),
    Column("FID", "accuracy.against_truth.fid", digits=1),
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
    ("arithmetic or share of peak", "work.reason"),
    ("LPIPS", "accuracy.against_truth.lpips_reason"),
    ("FID", "accuracy.against_truth.fid_reason"),
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
            steps, cold, soaked = drift(c), *(at(c, f"sustained.{name}_median_ms") for name in ("cold", "soaked"))
            derived = {
                "group": number,
                "standing": standing.get(c["id"]) or ("not ranked" if is_ok(c) else c["status"]),
                "latency_ms": latency_ms(c),
                "memory_bytes": figures.memory_bytes(c),
                "stage_ms": figures.stage_ms(c),
                "drift": {"first": steps[0], "largest": max(steps), "last": steps[-1]} if steps else None,
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
    if unit == "dB" and value >= PSNR_CAP_DB:
        return "equal"
    if isinstance(value, int) and digits == 0:
        return str(value)  # a seed has more digits than a float
    return f"{value:.1e}" if unit == "RMS" else f"{value:.{digits}f}"


def absences(results: Results, numbers: Mapping[str, int]) -> list[tuple[str, str, str]]:
    """What is absent, why, and in which rows; rows that say the same are one entry."""
    rows: dict[tuple[str, str], list[str]] = {}
    for configuration in filter(is_ok, results["configurations"]):  # the others have one reason for everything
        for what, path in _REASONS:
            if reason := at(configuration, path):
                rows.setdefault((what, reason), []).append(str(numbers[configuration["id"]]))
    return [(what, reason, ", ".join(places)) for (what, reason), places in rows.items()]


def render_markdown(results: Results) -> str:
    """The report as GitHub-specific Markdown; what comes from the document is escaped."""
    results = clean(results)
    parts = [f"# {TITLE}", f"{_escaped(summary(results))}. Charts, pictures and all tables are in report.html."]
    parts += ["## Recommendation", _escaped(basis(results)), ranking_note(results)]
    for each in recommend(results):
        first, *rest = each.sentences
        parts.append(f"### {_escaped(each.title)}")
        parts.append(f"**{_escaped(first)}** {_escaped(' '.join(rest))}".strip())
        if each.others:
            parts.append(_rows(("Configuration", "Why not"), [[c["label"], reason] for c, reason in each.others]))
    parts += ["## All configurations", _comparison(results)]
    if absent := absences(results, row_numbers(results)):
        parts += ["### What is absent, and why", _rows(("Figure", "Reason", "In No."), absent)]
    parts += ["## Conditions", _escaped(conditions(results))]
    return "\n\n".join(filter(None, parts)) + "\n"


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


def _comparison(results: Results) -> str:
    rows, numbers = in_order(results), row_numbers(results)
    columns = table(COMPARISON, rows)
    labels = [full_label(results, c) + ("" if is_ok(c) else f": {c['reason']}") for c in rows]
    lines = [
        [str(numbers[c["id"]]), labels[i], *(shown[i].text for _, shown, _ in columns)] for i, c in enumerate(rows)
    ]
    numeric = [0, *(i for i, (_, _, is_numeric) in enumerate(columns, start=2) if is_numeric)]
    return _rows(("No.", "Configuration", *(column.heading for column, _, _ in columns)), lines, numeric)


def _rows(headings: Sequence[str], rows: Sequence[Sequence[str]], numeric: Sequence[int] = ()) -> str:
    ruler = ["---:" if i in numeric else "---" for i in range(len(headings))]
    lines = [headings, ruler, *([_escaped(text) for text in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _escaped(text: str) -> str:
    """Text as Markdown that shows just that; an underscore within a word means nothing and stays."""
    text = re.sub(r"([\\`*\[\]|~])|(?<!\w)_|_(?!\w)", lambda match: f"\\{match[0]}", text)
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
