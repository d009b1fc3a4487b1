"""``report.html``: one file that needs no network and no server, made from the results document alone.

Everything in the document is hostile until escaped: Jinja2 escapes names and reasons, the JSON cannot close its
element, and the Content-Security-Policy lets in this page's own script and style, by hash, and nothing else.
It takes the packages of the extra ``report``, which a device need not have.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..system.files import atomic_write
from . import charts, figures, markdown, recommend, tables, thumbnails
from .figures import AGAINST, Configuration, Group, Results, at, drift, latency_ms

PAGE_FILE = "report.html"
_PARTS = Path(__file__).parent / "page"


def write_report(results: Results, folder: Path) -> tuple[list[Path], str]:
    """Write ``report.md`` and ``report.html``; without the page's packages the latter is left out.

    Returns what was written, and how the page is made elsewhere, empty where it was made.
    """
    written = [markdown.write(results, folder)]
    absent = [name for name in ("jinja2", "matplotlib") if importlib.util.find_spec(name) is None]
    if not absent:
        return [*written, write(results, folder)], ""
    return written, (
        f"no report.html, for {absent[0]} is not installed: on a workstation run `pip install 'moebius-edge[report]'` "
        f"and, with a copy of {folder}, `moebius-edge report merge {folder} --output DIR`"
    )


def write(results: Results, folder: Path) -> Path:
    """Write ``folder/report.html`` with the pictures below ``folder``, scaled down, in it."""
    path = Path(folder) / PAGE_FILE
    with atomic_write(path) as temporary:
        temporary.write_text(render(results, Path(folder)), encoding="utf-8", newline="\n")
    return path


def render(results: Results, folder: Path) -> str:
    """The page as text; pure but for the pictures, which are read from ``folder``."""
    import jinja2

    style, script, template = (
        (_PARTS / name).read_text(encoding="utf-8") for name in ("page.css", "page.js", "report.html.j2")
    )
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style, script)]
    policy = (
        f"default-src 'none'; img-src data:; style-src 'sha256-{hashes[0]}'; script-src 'sha256-{hashes[1]}'; "
        "base-uri 'none'; form-action 'none'"
    )
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.globals |= {"table": tables.table, "column": tables.Column, "at": at}
    parts = {"policy": policy, "style": style, "script": script, "results_json": script_json(results)}
    return environment.from_string(template).render(**parts, **_content(figures.clean(results), folder))


def script_json(document: Any) -> str:
    """JSON that may stand in a script element: no character of it can end the element or start another."""
    text = json.dumps(document, allow_nan=False, separators=(",", ":"))  # in ASCII, so that no surrogate is left
    return re.sub("[<>&]", lambda match: f"\\u{ord(match[0]):04x}", text)


def _content(results: Results, folder: Path) -> dict[str, Any]:
    """What the template shows, all of it but the page's own parts."""
    numbers, rows = figures.row_numbers(results), tables.in_order(results)
    labels = {c["id"]: figures.full_label(results, c) for c in rows}
    by_group = figures.groups(results, figures.against_of(results))
    numbered = {f"{numbers[c['id']]}: {labels[c['id']]}": c for c in rows}
    return {
        "title": markdown.TITLE,
        "results": results,
        "summary": markdown.summary(results),
        "conditions": markdown.conditions(results),
        "basis": recommend.basis(results),
        "note": recommend.ranking_note(results),
        "recommendations": recommend.recommend(results),
        "rows": rows,
        "numbers": numbers,
        "labels": labels,
        "settings": list(tables.SETTINGS),
        "comparison": tables.COMPARISON,
        "group_titles": [figures.group_title(results, group) for group in by_group],
        "absences": tables.absences(results, numbers),
        "frontiers": [chart for against in AGAINST for chart in _frontiers(results, against, numbers)],
        "drifts": _drifts(rows, numbers),
        "stages": _stages(numbered),
        "sustained": _sustained([c for c in rows if c["sustained"]], numbers),
        "resources": _resources(numbered, numbers),
        "inputs": list(thumbnails.shown_inputs(results, folder)) if any(c["pictures"] for c in rows) else [],
        "views": thumbnails.VIEWS,
    }


def _labels(configurations: list[Configuration], numbers: Mapping[str, int]) -> list[str]:
    """A label for each with its row's number, without what all of them share."""
    texts = figures.distinct_labels([c["label"] for c in configurations])
    return [f"{numbers[c['id']]}: {text}" for c, text in zip(configurations, texts, strict=True)]


def _frontiers(results: Results, against: str, numbers: Mapping[str, int]) -> list[charts.Chart]:
    """A plot for each group of at least two; baselines stand beside what samples on their machine."""
    by_group, drawn = figures.groups(results, against), []
    chosen = {each.chosen["id"] for each in recommend.recommend(results) if each.chosen}
    for group, members in by_group.items():
        ranked, beside = (
            [c for c in some if c["id"] not in figures.unranked(some, against)]
            for some in (members, by_group.get(Group(group.machine), []))
        )
        if group.start is None or not ranked or len(ranked) + len(beside) < 2:
            continue
        kinds = dict.fromkeys((c["id"] for c in ranked), "dominated")
        kinds |= dict.fromkeys(recommend.frontier_ids(ranked, against), "frontier")
        labels = _labels(ranked, numbers) + [f"{numbers[c['id']]}: {c['label']}" for c in beside]
        points = [
            charts.Point(
                latency_ms(c) or 0.0,
                figures.hole_psnr_db(c, against) or 0.0,
                label,
                kinds.get(c["id"], "baseline"),
                c["id"] in chosen,
            )
            for c, label in zip(ranked + beside, labels, strict=True)
        ]
        y_title = f"hole PSNR against the {AGAINST[against]} (dB)"
        drawn.append(charts.scatter(figures.group_title(results, group), points, y_title))
    return drawn


def _drifts(rows: list[Configuration], numbers: Mapping[str, int]) -> list[charts.Chart]:
    """A line for each configuration that is not equal to its reference."""
    differing = [c for c in rows if any(drift(c))]
    equal = ", ".join(str(numbers[c["id"]]) for c in rows if drift(c) and not any(drift(c)))
    note = f"Equal to the reference at every step, so not drawn: {equal}." if equal else ""
    lines = dict(zip(_labels(differing, numbers), map(drift, differing), strict=True))
    title = "Difference to the reference's latent"
    return [charts.lines(title, lines, "sampling step", "RMS difference", True, note)] if lines else []


def _stages(numbered: Mapping[str, Configuration]) -> list[charts.Chart]:
    parts = {label: c["derived"]["stage_ms"] for label, c in numbered.items() if c["derived"]["stage_ms"]}
    totals = {label: latency_ms(numbered[label]) or 0.0 for label in parts}
    return [charts.bars("Stages of one picture", parts, "ms", totals)] if parts else []


def _sustained(shown: list[Configuration], numbers: Mapping[str, int]) -> list[charts.Chart]:
    lines = dict(zip(_labels(shown, numbers), [c["sustained"]["by_minute_ms"] for c in shown], strict=True))
    return [charts.lines("Median of each minute", lines, "minute", "median latency (ms)", False)] if lines else []


def _resources(numbered: Mapping[str, Configuration], numbers: Mapping[str, int]) -> list[charts.Chart]:
    """Memory and energy as bars, and the multiply-adds of a step by class of operator."""
    memory = {}
    work: dict[str, tuple[Configuration, dict[str, float]]] = {}
    for label, c in numbered.items():
        sizes = {place: at(c, f"memory.peak_{place}_bytes") for place in ("host", "device")}
        memory[label] = {place: size / 1e6 for place, size in sizes.items() if size is not None}
        classes = {name: macs["multiplications"] / 1e9 for name, macs in (at(c, "work.by_class") or {}).items()}
        # Equal steps of one bundle are one bar.
        work.setdefault(f"{at(c, 'bundle.name')} {at(c, 'bundle.precision')} {classes}", (c, classes))
    energy = {label: {"energy": at(c, "energy.joules_per_image") or 0.0} for label, c in numbered.items()}
    labels = _labels([c for c, classes in work.values() if any(classes.values())], numbers)
    macs = dict(zip(labels, [classes for _, classes in work.values() if any(classes.values())], strict=True))
    drawn = (
        ("Peak memory", memory, "MB"),
        ("Energy of one picture", energy, "J"),
        ("Multiplications of one step by class of operator (10\u2079)", macs, ""),
    )
    shown = [(title, {k: v for k, v in parts.items() if any(v.values())}, unit) for title, parts, unit in drawn]
    return [charts.bars(title, parts, unit) for title, parts, unit in shown if parts]
