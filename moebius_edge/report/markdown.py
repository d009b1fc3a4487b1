"""``report.md``: the recommendation and the table of all configurations, for a terminal, a repository or an issue."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from ..system.files import atomic_write
from .figures import Results, clean, counted, full_label, is_ok, row_numbers
from .recommend import basis, ranking_note, recommend
from .tables import COMPARISON, absences, in_order, table

MARKDOWN_FILE = "report.md"
TITLE = "Accuracy against latency, memory and energy"


def write(results: Results, folder: Path) -> Path:
    """Write ``folder/report.md``."""
    path = Path(folder) / MARKDOWN_FILE
    with atomic_write(path) as temporary:
        temporary.write_text(render(results), encoding="utf-8", newline="\n")
    return path


def render(results: Results) -> str:
    """The report as GitHub-flavoured Markdown; what comes from the document is escaped."""
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
    lines = [[str(numbers[c["id"]]), labels[i], *(f.cells[i].text for f in columns)] for i, c in enumerate(rows)]
    numeric = [0, *(i for i, filled in enumerate(columns, start=2) if filled.is_numeric)]
    return _rows(("No.", "Configuration", *(filled.column.heading for filled in columns)), lines, numeric)


def _rows(headings: Sequence[str], rows: Sequence[Sequence[str]], numeric: Sequence[int] = ()) -> str:
    ruler = ["---:" if i in numeric else "---" for i in range(len(headings))]
    lines = [headings, ruler, *([_escaped(text) for text in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _escaped(text: str) -> str:
    """Text as Markdown that shows just that; an underscore within a word means nothing and stays."""
    text = re.sub(r"([\\`*\[\]|~])|(?<!\w)_|_(?!\w)", lambda match: f"\\{match[0]}", text)
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
