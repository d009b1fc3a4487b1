"""The page's charts from the results document: the frontier, drift, stages, memory and energy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import partial

from . import charts, table
from .figures import (
    AGAINST,
    Configuration,
    Group,
    Results,
    clean,
    distinct_labels,
    drift,
    full_label,
    group_title,
    groups,
    hole_psnr_db,
    label,
    latency_ms,
    number,
    series,
    stage_ms,
    unranked,
    words,
)
from .markup import figure, html_table, simple_table
from .pareto import frontier_ids
from .recommend import standings

_KEY = (
    '<p class="note"><span class="key frontier"></span>on the frontier: nothing else is as fast and as accurate'
    '<span class="key recommended"></span>recommended<span class="key"></span>dominated'
    '<span class="key baseline"></span>baseline, not ranked with the others. '
    "Better is up and to the left; the numbers are those of the table.</p>"
)


def frontier_plots(results: Results, numbers: Mapping[str, int]) -> str:
    """A plot for each group of at least two, against the truth and against the reference where these are known."""
    to_truth, to_reference = (_frontiers(results, against, numbers) for against in AGAINST)
    if len(to_reference) > 1 and to_truth:  # one for each set of settings: beside the others, not before them
        inner = "\n".join(to_reference)
        summary = f"Against the float32 reference, each set of settings by itself: {len(to_reference)} plots"
        to_reference = [f"<details><summary>{summary}</summary>{inner}</details>"]
    parts = to_truth + to_reference
    return _KEY + "\n".join(parts) if parts else ""


def _frontiers(results: Results, against: str, numbers: Mapping[str, int]) -> list[str]:
    found, parts = groups(results, against), []
    for group, members in found.items():
        if group.start is None and any(g.start and g.machine == group.machine for g in found):
            continue  # they stand beside the others
        beside = _ranked(found.get(Group(group.machine, None, None), []), against) if group.start else []
        ranked = _ranked(members, against)
        if ranked and len(ranked) + len(beside) > 1:
            parts.append(_frontier(results, group, ranked, beside, against, numbers))
    return parts


def _frontier(
    results: Results,
    group: Group,
    ranked: list[Configuration],
    beside: list[Configuration],
    against: str,
    numbers: Mapping[str, int],
) -> str:
    best = frontier_ids(ranked, against)
    kinds = {c["id"]: "frontier" if c["id"] in best else "dominated" for c in ranked}
    shown = ranked + beside
    labels = distinct_labels([label(c) for c in ranked]) + [label(c) for c in beside]
    chosen = [i for i, standing in standings(results).items() if standing == "recommended"]
    points = [
        charts.Point(x, y, numbers[c["id"]], text, kinds.get(c["id"], "baseline"), c["id"] in chosen)
        for c, text in zip(shown, labels, strict=True)
        if (x := latency_ms(c)) is not None and (y := hole_psnr_db(c, against)) is not None
    ]
    names = "; ".join(f"{p.label}, {p.x:.4g} ms, {p.y:.1f} dB" for p in points if p.kind == "frontier")
    description = f"Latency against hole PSNR of {len(points)} configurations. On the frontier: {names}."
    y_title = f"hole PSNR against the {AGAINST[against]} (dB)"
    draw = partial(charts.scatter, points, "median latency of one picture (ms)", y_title, description)
    return figure(group_title(results, group), draw)


def _ranked(members: list[Configuration], against: str) -> list[Configuration]:
    out = unranked(members, against)
    return [c for c in members if c["id"] not in out]


def drift_plots(results: Results, numbers: Mapping[str, int]) -> str:
    """A line for each configuration that is not equal to its reference."""
    parts = []
    for group, members in groups(results, None).items():
        known = [c for c in members if drift(c)]
        drawn = [c for c in known if any(drift(c))]
        equal = table.ranges([numbers[c["id"]] for c in known if not any(drift(c))])
        note = f"Equal to the reference at every step, so not drawn: {equal}." if equal else ""
        labels = distinct_labels([label(c) for c in drawn])
        lines = [charts.Line(numbers[c["id"]], text, drift(c)) for c, text in zip(drawn, labels, strict=True)]
        if not lines:
            continue
        ends = "; ".join(f"{one.label}, {one.values[-1]:.2g}" for one in lines)
        description = f"Drift of {len(lines)} configurations over the steps. At the last: {ends}."
        draw = partial(charts.lines, lines, "sampling step", "RMS difference of the latent", description)
        parts.append(figure(group_title(results, group), draw, note))
        figures = html_table(table.drift_columns(), known, numbers, results)
        parts.append(f"<details><summary>The figures</summary>{figures}</details>")
    intro = (
        "<p>How far the latent is after each step from that of the float32 reference, on the same noise and with the "
        "same settings, but without reuse of deep features where that was measured.</p>"
    )
    return intro + "\n".join(parts) if parts else ""


def stage_plots(results: Results, numbers: Mapping[str, int]) -> str:
    """Stacked bars with their figures in a table, and the sustained rate where it was measured."""
    parts = []
    for group, members in groups(results, None).items():
        shown = sorted((c for c in members if stage_ms(c)), key=lambda c: latency_ms(c) or 0.0)
        if not shown:
            continue
        drawn = [charts.Bar(numbers[c["id"]], label(c), stage_ms(c), latency_ms(c)) for c in shown]
        digits = table.needed_digits([sum(bar.parts.values()) for bar in drawn])
        names = list(dict.fromkeys(name for bar in drawn for name in bar.parts))
        title = group_title(results, group)
        draw = partial(charts.bars, drawn, "ms", digits, f"Stages, {title}; the figures are in the table below")
        parts.append(figure(title, draw))
        figures = html_table(table.stage_columns(names, stage_ms), shown, numbers, results)
        parts.append(f"<details><summary>The figures</summary>{figures}</details>")
    parts += _sustained(results, numbers)
    intro = (
        "<p>One picture by stage: each stage's median times its calls a picture; where calls of the denoiser differ "
        "(guidance on an interval, reuse), what the other stages leave of the total.</p>"
    )
    return intro + "\n".join(parts) if parts else ""


def _sustained(results: Results, numbers: Mapping[str, int]) -> list[str]:
    shown = [c for c in results["configurations"] if c["sustained"]]
    if not shown:
        return []
    labels = distinct_labels([full_label(results, c) for c in shown])
    lines = [
        charts.Line(numbers[c["id"]], text, series(c, "sustained", "by_minute_ms"))
        for c, text in zip(shown, labels, strict=True)
    ]
    draw = partial(charts.lines, lines, "minute", "median latency (ms)", "Latency by minute; see the table", log=False)
    rows = html_table(table.sustained_columns(), shown, numbers, results)
    return ["<h3>Under sustained load</h3>", figure("Median of each minute", draw), rows]


def resource_plots(results: Results, numbers: Mapping[str, int]) -> str:
    """Memory and energy as bars, arithmetic by operator class, and all of it as a table with the reasons for gaps."""
    shown = [c for c in results["configurations"] if c["memory"] or c["energy"] or c["work"]]
    memory = []
    for c in shown:
        sizes = {place: number(c, "memory", f"peak_{place}_bytes") for place in ("host", "device")}
        known = {place: size / 1e6 for place, size in sizes.items() if size is not None}
        if known:
            memory.append(charts.Bar(numbers[c["id"]], full_label(results, c), known))
    energy = [
        charts.Bar(numbers[c["id"]], full_label(results, c), {"energy": joules})
        for c in shown
        if (joules := number(c, "energy", "joules_per_image")) is not None
    ]
    parts = [
        _bars("Peak memory", memory, "MB", 0),
        _bars("Energy of one picture", energy, "J"),
        _bars("Multiplications of one step by class of operator (10\u2079)", _work(shown, numbers), ""),
    ]
    if shown:
        parts.append(html_table(table.used(table.resource_columns(), shown), shown, numbers, results))
    if absent := table.absences(results, numbers):
        parts.append("<h3>What is absent, and why</h3>" + simple_table(("Figure", "Reason", "In No."), absent))
    return "\n".join(part for part in parts if part)


def _work(shown: list[Configuration], numbers: Mapping[str, int]) -> list[charts.Bar]:
    """A bar for each bundle; where guidance or reuse makes its steps differ, one for each that does."""
    found: dict[tuple[str, ...], tuple[Configuration, dict[str, float]]] = {}
    for c in shown:
        by_class = c["work"]["by_class"] if c["work"] else {}
        classes = {clean(name): (number(each, "multiplications") or 0) / 1e9 for name, each in by_class.items()}
        if any(classes.values()):
            name = " ".join(filter(None, [words(c, "bundle", "name") or label(c), words(c, "bundle", "precision")]))
            found.setdefault((name, str(classes)), (c, classes))
    bundles = Counter(name for name, _ in found)
    settings = distinct_labels([label(c) for c, _ in found.values()])
    return [
        charts.Bar(numbers[c["id"]], name if bundles[name] == 1 else text, classes)
        for ((name, _), (c, classes)), text in zip(found.items(), settings, strict=True)
    ]


def _bars(title: str, drawn: list[charts.Bar], unit: str, digits: int | None = None) -> str:
    if not drawn:
        return ""
    if digits is None:
        digits = table.needed_digits([sum(bar.parts.values()) for bar in drawn])
    draw = partial(charts.bars, drawn, unit, digits, f"{title}; the figures are in the table below")
    return figure(title, draw)
