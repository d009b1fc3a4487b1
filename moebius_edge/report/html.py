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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..system.files import atomic_write
from . import charts, markdown, thumbnails
from .charts import Chart, Point
from .figures import (
    AGAINST,
    Configuration,
    Group,
    Results,
    against_of,
    at,
    clean,
    distinct_labels,
    drift,
    full_label,
    group_title,
    groups,
    hole_psnr_db,
    latency_ms,
    row_numbers,
    stage_ms,
    unranked,
)
from .markdown import TITLE, conditions, summary
from .recommend import basis, frontier_ids, ranking_notes, recommend
from .tables import COMPARISON, SETTINGS, Column, absences, in_order, ranges, table

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

    style, script = ((_PARTS / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals |= {"table": table, "column": Column, "at": at}
    template = environment.from_string((_PARTS / "report.html.j2").read_text(encoding="utf-8"))
    return template.render(
        policy=_policy(style, script),
        style=style,
        script=script,
        results_json=script_json(results),
        **_content(clean(results), folder),
    )


def script_json(document: Any) -> str:
    """JSON that may stand in a script element: no character of it can end the element or start another."""
    text = json.dumps(document, allow_nan=False, separators=(",", ":"))  # in ASCII, so that no surrogate is left
    return re.sub("[<>&]", lambda match: f"\\u{ord(match[0]):04x}", text)


def _policy(style: str, script: str) -> str:
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style, script)]
    return (
        f"default-src 'none'; img-src data:; style-src 'sha256-{hashes[0]}'; script-src 'sha256-{hashes[1]}'; "
        "base-uri 'none'; form-action 'none'"
    )


def _content(results: Results, folder: Path) -> dict[str, Any]:
    """What the template shows, all of it but the page's own parts."""
    numbers, rows = row_numbers(results), in_order(results)
    by_group = groups(results, None)
    return {
        "title": TITLE,
        "results": results,
        "summary": summary(results),
        "basis": basis(results),
        "notes": ranking_notes(results),
        "recommendations": recommend(results),
        "conditions": conditions(results),
        "rows": rows,
        "numbers": numbers,
        "labels": {c["id"]: full_label(results, c) for c in rows},
        "settings": list(SETTINGS),
        "comparison": COMPARISON,
        "group_titles": [group_title(results, group) for group in groups(results, against_of(results))],
        "stage_groups": {
            group_title(results, group): [
                c for c in rows if c["derived"]["stage_ms"] and c["id"] in {m["id"] for m in members}
            ]
            for group, members in by_group.items()
        },
        "frontiers": [chart for against in AGAINST for chart in _frontiers(results, against, numbers)],
        "drifts": _drifts(results, numbers),
        "stages": [chart for group, members in by_group.items() for chart in _stages(results, group, members, numbers)],
        "resources": _resources(results, numbers),
        "sustained": _sustained(results, numbers),
        "absences": absences(results, numbers),
        "inputs": list(thumbnails.shown_inputs(results, folder)) if any(c["pictures"] for c in rows) else [],
        "views": {
            thumbnails.RESULT: "result",
            thumbnails.TO_TRUTH: f"difference to the ground truth, times {thumbnails.AMPLIFICATION}",
            thumbnails.TO_REFERENCE: f"difference to the float32 reference, times {thumbnails.AMPLIFICATION}",
        },
    }


def _labels(configurations: Sequence[Configuration], numbers: Mapping[str, int]) -> list[str]:
    """A label for each with its row's number, without what all of them share."""
    texts = distinct_labels([c["label"] for c in configurations])
    return [f"{numbers[c['id']]}: {text}" for c, text in zip(configurations, texts, strict=True)]


def _frontiers(results: Results, against: str, numbers: Mapping[str, int]) -> list[Chart]:
    """A plot for each group of at least two; baselines stand beside what samples on their machine."""
    by_group, drawn = groups(results, against), []
    chosen = {each.chosen["id"] for each in recommend(results) if each.chosen}
    for group, members in by_group.items():
        if group.start is None:
            continue
        ranked, beside = (
            [c for c in some if c["id"] not in unranked(some, against)]
            for some in (members, by_group.get(Group(group.machine), []))
        )
        if not ranked or len(ranked) + len(beside) < 2:
            continue
        best = frontier_ids(ranked, against)
        kinds = {c["id"]: "frontier" if c["id"] in best else "dominated" for c in ranked}
        labels = distinct_labels([c["label"] for c in ranked]) + [c["label"] for c in beside]
        points = [
            Point(
                latency_ms(c) or 0.0,
                hole_psnr_db(c, against) or 0.0,
                numbers[c["id"]],
                label,
                kinds.get(c["id"], "baseline"),
                c["id"] in chosen,
            )
            for c, label in zip(ranked + beside, labels, strict=True)
        ]
        y_title = f"hole PSNR against the {AGAINST[against]} (dB)"
        drawn.append(charts.scatter(group_title(results, group), points, y_title))
    return drawn


def _drifts(results: Results, numbers: Mapping[str, int]) -> list[Chart]:
    """A line for each configuration that is not equal to its reference."""
    drawn = []
    for group, members in groups(results, None).items():
        known = [c for c in members if drift(c)]
        differing = [c for c in known if any(drift(c))]
        equal = ranges([numbers[c["id"]] for c in known if not any(drift(c))])
        note = f"Equal to the reference at every step, so not drawn: {equal}." if equal else ""
        if differing:
            lines = dict(zip(_labels(differing, numbers), map(drift, differing), strict=True))
            title, y_title = group_title(results, group), "RMS difference of the latent"
            drawn.append(charts.lines(title, lines, "sampling step", y_title, True, note))
    return drawn


def _stages(results: Results, group: Group, members: list[Configuration], numbers: Mapping[str, int]) -> list[Chart]:
    shown = sorted((c for c in members if stage_ms(c)), key=lambda c: latency_ms(c) or 0.0)
    labels = [f"{numbers[c['id']]}: {c['label']}" for c in shown]
    parts = {label: stage_ms(c) for label, c in zip(labels, shown, strict=True)}
    totals = {label: latency_ms(c) or 0.0 for label, c in zip(labels, shown, strict=True)}
    return [charts.bars(group_title(results, group), parts, "ms", totals)] if parts else []


def _sustained(results: Results, numbers: Mapping[str, int]) -> list[Chart]:
    shown = [c for c in results["configurations"] if c["sustained"]]
    lines = dict(zip(_labels(shown, numbers), [c["sustained"]["by_minute_ms"] for c in shown], strict=True))
    return [charts.lines("Median of each minute", lines, "minute", "median latency (ms)", False)] if shown else []


def _resources(results: Results, numbers: Mapping[str, int]) -> list[Chart]:
    """Memory and energy as bars, and the multiply-adds of a step by class of operator."""
    memory, energy = {}, {}
    work: dict[str, tuple[Configuration, dict[str, float]]] = {}
    for c in results["configurations"]:
        label = f"{numbers[c['id']]}: {full_label(results, c)}"
        sizes = {place: at(c, f"memory.peak_{place}_bytes") for place in ("host", "device")}
        if known := {place: size / 1e6 for place, size in sizes.items() if size is not None}:
            memory[label] = known
        if (joules := at(c, "energy.joules_per_image")) is not None:
            energy[label] = {"energy": joules}
        classes = {name: macs["multiplications"] / 1e9 for name, macs in (at(c, "work.by_class") or {}).items()}
        if any(classes.values()):  # equal steps of one bundle are one bar
            work.setdefault(f"{at(c, 'bundle.name')} {at(c, 'bundle.precision')} {classes}", (c, classes))
    macs = dict(zip(_labels([c for c, _ in work.values()], numbers), [each for _, each in work.values()], strict=True))
    drawn = (
        ("Peak memory", memory, "MB"),
        ("Energy of one picture", energy, "J"),
        ("Multiplications of one step by class of operator (10\u2079)", macs, ""),
    )
    return [charts.bars(title, parts, unit) for title, parts, unit in drawn if parts]
