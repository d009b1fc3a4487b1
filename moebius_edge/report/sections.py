"""The sections of the page in the order in which people act on them, each as HTML with everything in it escaped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path

from . import table
from .budget import Budget
from .conditions import conditions_line, input_rows, machine_rows
from .figures import (
    AGAINST,
    Configuration,
    Group,
    Results,
    against_of,
    clean,
    counted,
    group_title,
    groups,
    is_ok,
    label,
    latency_ms,
    machine_label,
    words,
)
from .gallery import gallery
from .markup import html_table, simple_table
from .plots import drift_plots, frontier_plots, resource_plots, stage_plots
from .recommend import Recommendation, ranking_notes, recommend, standings


@dataclass(frozen=True)
class Section:
    name: str
    title: str
    content: str


def all_of(results: Results, folder: Path) -> list[Section]:
    """Every section that has something to show."""
    numbers = row_numbers(results)
    made = [
        Section("recommendation", "Recommendation", _recommendation(results)),
        Section("frontier", "Accuracy against latency", frontier_plots(results, numbers)),
        Section("configurations", "All configurations", _comparison(results, numbers)),
        Section("drift", "Drift of the latent", drift_plots(results, numbers)),
        Section("stages", "Where the time goes", stage_plots(results, numbers)),
        Section("resources", "Memory, energy and arithmetic", resource_plots(results, numbers)),
        Section("pictures", "Pictures", gallery(results, folder, numbers)),
        Section("conditions", "Conditions", _conditions(results)),
    ]
    return [section for section in made if section.content]


def row_numbers(results: Results) -> dict[str, int]:
    """The number by which tables and charts call a configuration, by id."""
    return {c["id"]: n for n, c in enumerate(results["configurations"], start=1)}


def in_order(results: Results) -> list[tuple[Group, Configuration]]:
    """Group by group, the fastest first, what has no figures last."""
    found = []
    for group, members in groups(results, against_of(results)).items():
        order = sorted(members, key=lambda c: (not is_ok(c), latency_ms(c) or 0.0))
        found += [(group, c) for c in order]
    return found


def summary(results: Results) -> str:
    configurations = results["configurations"]
    failed = sum(not is_ok(c) for c in configurations)
    parts = [
        counted(len(configurations), "configuration") + (f" ({failed} without figures)" if failed else ""),
        counted(len(results["inputs"]), "input"),
        " and ".join(machine_label(results, m) for m in results["machines"]),
        f"moebius-edge {clean(results['version'])}",
        created(results),
    ]
    return "; ".join(parts)


def created(results: Results) -> str:
    """Such as 2026-01-31 12:00 UTC."""
    text = clean(results["created"])
    return f"{text[:16].replace('T', ' ')} UTC" if text.endswith("+00:00") else text


def _recommendation(results: Results) -> str:
    budget, against = Budget.of(results), against_of(results)
    basis = f"PSNR of the hole against the {AGAINST[against]}" if against else "not measured"
    parts = [f"<p>Budget: {escape(budget.text())}. Accuracy: {basis}.</p>"]
    parts += [f'<p class="note">{escape(note)}</p>' for note in ranking_notes(results)]
    for found in recommend(results, budget):
        parts.append(f"<h3>{escape(group_title(results, found.group))}</h3>")
        parts.append(f'<div class="choice{"" if found.chosen else " none"}">{_choice(found)}</div>')
        parts.append(_others(found))
    return "\n".join(parts)


def _choice(found: Recommendation) -> str:
    first, *rest = found.sentences
    strong = f"<strong>{escape(first)}</strong>"
    return f"<p>{strong}</p><p>{escape(' '.join(rest))}</p>" if rest else f"<p>{strong}</p>"


def _others(found: Recommendation) -> str:
    if not found.others:
        return ""
    rows = [(label(c), reason) for c, reason in found.others]
    shown = simple_table(("Configuration", "Why not"), rows)
    return f"<details><summary>Why not the other {len(rows)}</summary>{shown}</details>"


def _comparison(results: Results, numbers: Mapping[str, int]) -> str:
    ordered = in_order(results)
    shown = [c for _, c in ordered]
    standing = standings(results)
    found = list(dict.fromkeys(group for group, _ in ordered))
    places = [found.index(group) for group, _ in ordered]
    statuses = sorted({words(c, "status") or "" for c in shown})
    options = "".join(f'<option value="{escape(s)}">{escape(s)}</option>' for s in statuses)
    controls = (
        '<div class="controls" hidden>'
        '<label>Filter <input type="search" id="filter-text" placeholder="words of a row"></label>'
        f'<label>Status <select id="filter-status"><option value="">any</option>{options}</select></label>'
    )
    if len(found) > 1:
        options = "".join(
            f'<option value="{i}">{escape(group_title(results, g))}</option>' for i, g in enumerate(found)
        )
        controls += f'<label>Group <select id="filter-group"><option value="">any</option>{options}</select></label>'
    controls += (
        '<span id="filter-shown" role="status"></span>'
        '<button type="button" class="plain" id="filter-save">Save results.json</button></div>'
    )
    attributes = [
        f'data-status="{escape(words(c, "status") or "")}" data-group="{place}"'
        f' class="{"" if is_ok(c) else "bad"}{"recommended" if standing.get(c["id"]) == "recommended" else ""}"'
        for c, place in zip(shown, places, strict=True)
    ]
    columns = table.used(table.comparison_columns(standing), shown)
    return controls + html_table(columns, shown, numbers, results, attributes, "comparison")


def _conditions(results: Results) -> str:
    machines = simple_table(*machine_rows(results))
    return (
        f"<p>{escape(conditions_line(results))}</p><h3>Machines</h3>{machines}"
        f"<h3>Inputs</h3>{simple_table(*input_rows(results))}"
    )
