"""``report.md``: the recommendation and the tables, for a terminal, a repository or an issue."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..system.files import atomic_write
from . import table
from .budget import Budget
from .conditions import conditions_line, input_rows, machine_rows
from .figures import (
    AGAINST,
    Configuration,
    Results,
    against_of,
    clean,
    drift,
    full_label,
    group_title,
    groups,
    label,
    stage_ms,
)
from .recommend import ranking_notes, recommend, standings
from .sections import in_order, row_numbers, summary

MARKDOWN_FILE = "report.md"


def write(results: Results, folder: Path) -> Path:
    """Write ``folder/report.md``."""
    path = Path(folder) / MARKDOWN_FILE
    with atomic_write(path) as temporary:
        temporary.write_text(render(results), encoding="utf-8", newline="\n")
    return path


def render(results: Results) -> str:
    """The report as GitHub-flavoured Markdown; what comes from the document is escaped."""
    numbers, shown = row_numbers(results), [c for _, c in in_order(results)]
    parts = [
        "# Accuracy against latency, memory and energy",
        f"{_escaped(summary(results))}. Charts and pictures are in report.html.",
        *_recommendation(results),
        "## All configurations",
        _table(results, numbers, table.comparison_columns(standings(results)), shown),
        *_failures(results, numbers),
        *_drift(results, numbers, shown),
        "## Where the time goes",
        "Milliseconds of one picture: each stage's median times its calls a picture; where calls of the denoiser "
        "differ (guidance on an interval, reuse), what the other stages leave of the total.",
        *_stages(results, numbers),
        "## Memory, energy and arithmetic",
        _table(results, numbers, table.resource_columns(), [c for c in shown if c["status"] == "ok"]),
        *_sustained(results, numbers),
        *_absent(results, numbers),
        "## Conditions",
        _escaped(conditions_line(results)),
        _rows(*machine_rows(results)),
        _rows(*input_rows(results)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _recommendation(results: Results) -> list[str]:
    budget, against = Budget.of(results), against_of(results)
    basis = f"PSNR of the hole against the {AGAINST[against]}" if against else "not measured"
    parts = ["## Recommendation", f"Budget: {budget.text()}. Accuracy: {basis}.", *ranking_notes(results)]
    for found in recommend(results, budget):
        first, *rest = found.sentences
        parts.append(f"### {_escaped(group_title(results, found.group))}")
        parts.append(f"**{_escaped(first)}** {_escaped(' '.join(rest))}".strip())
        if found.others:
            parts.append(_rows(("Configuration", "Why not"), [[label(c), reason] for c, reason in found.others]))
    return parts


def _failures(results: Results, numbers: Mapping[str, int]) -> list[str]:
    failed = [(c, reason) for c in results["configurations"] if (reason := table.failure(c))]
    if not failed:
        return []
    rows = [[str(numbers[c["id"]]), full_label(results, c), clean(c["status"]), reason] for c, reason in failed]
    return ["### Without figures", _rows(("No.", "Configuration", "Status", "Reason"), rows, (0,))]


def _drift(results: Results, numbers: Mapping[str, int], shown: Sequence[Configuration]) -> list[str]:
    known = [c for c in shown if drift(c)]
    if not any(any(drift(c)) for c in known):
        return []
    intro = (
        "RMS difference of the latent to that of the float32 reference, on the same noise and with the same settings, "
        "but without reuse of deep features where that was measured."
    )
    return ["## Drift of the latent", intro, _table(results, numbers, table.drift_columns(), known)]


def _stages(results: Results, numbers: Mapping[str, int]) -> list[str]:
    parts = []
    for group, members in groups(results, None).items():
        shown = [c for c in members if stage_ms(c)]
        names = list(dict.fromkeys(name for c in shown for name in stage_ms(c)))
        if shown:
            parts.append(f"### {_escaped(group_title(results, group))}")
            parts.append(_table(results, numbers, table.stage_columns(names, stage_ms), shown))
    return parts


def _sustained(results: Results, numbers: Mapping[str, int]) -> list[str]:
    shown = [c for c in results["configurations"] if c["sustained"]]
    return ["### Under sustained load", _table(results, numbers, table.sustained_columns(), shown)] if shown else []


def _absent(results: Results, numbers: Mapping[str, int]) -> list[str]:
    rows = table.absences(results, numbers)
    return ["### What is absent, and why", _rows(("Figure", "Reason", "In No."), rows)] if rows else []


def _table(
    results: Results, numbers: Mapping[str, int], columns: Sequence[table.Column], shown: Sequence[Configuration]
) -> str:
    used = table.used(columns, shown)
    cells = [[cell.text for cell in table.cells(column, shown)] for column in used]
    rows = [
        [str(numbers[c["id"]]), full_label(results, c), *(column[i] for column in cells)] for i, c in enumerate(shown)
    ]
    numeric = [0, *(i for i, column in enumerate(used, start=2) if column.numeric)]
    return _rows(("No.", "Configuration", *(column.heading for column in used)), rows, numeric)


def _rows(headings: Sequence[str], rows: Sequence[Sequence[str]], numeric: Sequence[int] = ()) -> str:
    lines = [
        f"| {' | '.join(map(_escaped, headings))} |",
        f"|{'|'.join(' ---: ' if i in numeric else ' --- ' for i in range(len(headings)))}|",
        *(f"| {' | '.join(map(_escaped, row))} |" for row in rows),
    ]
    return "\n".join(lines)


def _escaped(text: str) -> str:
    """Text as Markdown that shows just that; an underscore within a word means nothing and stays."""
    text = re.sub(r"([\\`*\[\]|~])|(?<!\w)_|_(?!\w)", lambda match: f"\\{match[0]}", text)
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
