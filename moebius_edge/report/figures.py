"""The figures of a configuration, any of which may be absent, and which configurations may be ranked together.

Results are those of ``results.load``, so that their types are known.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Any, NamedTuple

from ..text import counted

Configuration = dict[str, Any]
Results = dict[str, Any]
TRUTH, REFERENCE = "truth", "reference"
AGAINST = {TRUTH: "ground truth", REFERENCE: "float32 reference"}


def at(entry: Any, path: str) -> Any:
    """The value at ``path``, names with dots between, or None where any of them is absent or null."""
    for name in path.split("."):
        entry = entry.get(name) if isinstance(entry, dict) else None
    return entry


def clean(document: Any) -> Any:
    """``document`` with every text on one line and nothing in it that could hide or reorder what is read.

    Documents come from anywhere: control characters and marks that reorder text become U+FFFD.
    """
    if isinstance(document, str):
        hidden = ("Cc", "Cf", "Cs")
        return "".join("\ufffd" if unicodedata.category(c) in hidden else c for c in " ".join(document.split()))
    if isinstance(document, dict):
        return {clean(key): clean(value) for key, value in document.items()}
    return [clean(value) for value in document] if isinstance(document, list) else document


def row_numbers(results: Results) -> dict[str, int]:
    """The number by which tables and charts call a configuration, by id."""
    return {c["id"]: n for n, c in enumerate(results["configurations"], start=1)}


def full_label(results: Results, configuration: Configuration) -> str:
    """The label, with the machine's where there are several."""
    machines = results["machines"]
    return configuration["label"] + (f", {machines[configuration['machine']]['label']}" if len(machines) > 1 else "")


def is_ok(configuration: Configuration) -> bool:
    return bool(configuration["status"] == "ok")


def latency_ms(configuration: Configuration) -> float | None:
    """Median milliseconds of one picture, from pixels to pixels."""
    median: float | None = at(configuration, "latency.stages.total.median_ms")
    return median if median is not None and median > 0 else None


def memory_bytes(configuration: Configuration) -> float | None:
    """Peak of the host's memory, plus the device's where it has its own."""
    host, device = (at(configuration, f"memory.peak_{where}_bytes") for where in ("host", "device"))
    return None if host is None else host + (device or 0)


def hole_psnr_db(configuration: Configuration, against: str | None) -> float | None:
    """PSNR inside the hole against ``TRUTH`` or ``REFERENCE``, in dB."""
    psnr: float | None = at(configuration, f"accuracy.against_{against}.hole_psnr_db")
    return psnr


def stage_ms(configuration: Configuration) -> dict[str, float]:
    """Mean milliseconds of each stage in one picture, all of its calls together, and ``other`` for the rest."""
    stages = at(configuration, "latency.stages") or {}
    if not stages or not stages["total"]["count"]:
        return {}
    times = {name: stage["total_ms"] / stages["total"]["count"] for name, stage in stages.items()}
    total = times.pop("total")
    rest = total - sum(times.values())
    return {**times, "other": rest} if times and rest > 0.005 * total else times or {"total": total}


class Group(NamedTuple):
    """What may be ranked together: one machine and one start.

    A fill that started from the noised original (start ``image``) has seen a trace of it. ``start`` is None for a
    baseline, which does not sample. Against the reference also one set of ``settings``: each row's reference is the
    float32 run of its own. Precision and reuse of deep features are none of them: what these cost is what the
    reference tells.
    """

    machine: str
    start: str | None = None
    settings: str | None = None


def against_of(results: Results) -> str | None:
    """What the report ranks by: ``TRUTH`` where any configuration was measured against it, then ``REFERENCE``."""
    rows = [c for c in results["configurations"] if is_ok(c)]
    return next((a for a in AGAINST if any(hole_psnr_db(c, a) is not None for c in rows)), None)


def groups(results: Results, against: str | None) -> dict[Group, list[Configuration]]:
    """The configurations by group; what samples comes first on each machine, the document's order is kept."""
    members: dict[Group, list[Configuration]] = {}
    for c in results["configurations"]:
        settings, compared = c["settings"], None
        if settings is not None and against == REFERENCE:
            interval = settings["guidance_interval"]
            compared = f"{counted(settings['steps_executed'], 'step')} executed, guidance {settings['guidance']:g}"
            compared += "" if interval is None else f" from t {interval[0]:g} to {interval[1]:g}"
            compared += f", {settings['scheduler']}"
        members.setdefault(Group(c["machine"], settings and settings["start"], compared), []).append(c)
    machines = list(results["machines"])
    order = sorted(members, key=lambda g: (machines.index(g.machine), g.start is None))
    return {group: members[group] for group in order}


def group_title(results: Results, group: Group) -> str:
    """Such as: AMD EPYC, 2 cores; start image."""
    what = f"start {group.start}" if group.start else "baselines"
    return "; ".join(filter(None, (results["machines"][group.machine]["label"], what, group.settings)))


def unranked(configurations: Sequence[Configuration], against: str | None) -> dict[str, str]:
    """Why some configurations of one group cannot be ranked, by id: no figure, or one that is not like the others'."""
    sides = {c["id"]: at(c, f"accuracy.against_{against}") or {} for c in configurations}
    reference = next((side["reference"] for side in sides.values() if "reference" in side), None)
    reasons = {}
    for configuration in configurations:
        side = sides[configuration["id"]]
        if not is_ok(configuration):
            reasons[configuration["id"]] = f"{configuration['status']}: {configuration['reason']}"
        elif latency_ms(configuration) is None:
            reasons[configuration["id"]] = "its latency was not measured"
        elif against and not side:
            reasons[configuration["id"]] = f"its hole was not measured against the {AGAINST[against]}"
        elif side.get("reference") != reference:
            reasons[configuration["id"]] = "measured against another reference"
    return reasons
