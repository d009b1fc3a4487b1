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


def drift(configuration: Configuration) -> list[float]:
    """RMS distance of the latent from the reference's after each step; empty where it was not measured."""
    return at(configuration, "accuracy.against_reference.latent_rms_drift") or []


def stage_ms(configuration: Configuration) -> dict[str, float]:
    """Milliseconds of each stage in one picture, and ``other`` for the rest of ``total``.

    A stage may have several entries a picture (``denoise`` one a network call), so its median counts that often. Where
    calls differ their median is one kind's alone: there ``denoise`` is what the other stages leave of the total.
    """
    stages, total = at(configuration, "latency.stages"), latency_ms(configuration)
    if total is None or not stages["total"]["count"]:
        return {}
    pictures = stages["total"]["count"]
    times = {name: s["median_ms"] * s["count"] / pictures for name, s in stages.items() if name != "total"}
    if not times:
        return {"total": total}
    settings = configuration["settings"] or {"guidance_interval": None, "cache_interval": 1}
    if "denoise" in times and (settings["guidance_interval"] is not None or settings["cache_interval"] > 1):
        times["denoise"] += max(total - sum(times.values()), -times["denoise"])
    rest = total - sum(times.values())
    return {**times, "other": rest} if rest > 0.005 * total else times


class Group(NamedTuple):
    """What may be ranked together: one machine, one start, one seed.

    A fill that started from the noised original (start ``image``) has seen a trace of it, and two seeds give two
    different fills. ``start`` and ``seed`` are None for what does not sample, such as a classical baseline.
    Against the reference also one set of ``settings``: each row's reference is the float32 run of its own. Precision
    and reuse of deep features are none of them: what these cost is what the reference tells.
    """

    machine: str
    start: str | None = None
    seed: int | None = None
    settings: str | None = None


def against_of(results: Results) -> str | None:
    """What the report ranks by: ``TRUTH`` where any configuration was measured against it, then ``REFERENCE``."""
    rows = [c for c in results["configurations"] if is_ok(c)]
    return next((a for a in AGAINST if any(hole_psnr_db(c, a) is not None for c in rows)), None)


def groups(results: Results, against: str | None) -> dict[Group, list[Configuration]]:
    """The configurations by group; what samples comes first on each machine, the document's order is kept."""
    members: dict[Group, list[Configuration]] = {}
    by_id = {c["id"]: c for c in results["configurations"]}
    for c in results["configurations"]:
        reference, settings, compared = at(c, "accuracy.against_reference.reference"), c["settings"], None
        if settings is None:
            members.setdefault(Group(c["machine"]), []).append(c)
            continue
        if against == REFERENCE:
            interval, reused = settings["guidance_interval"], at(by_id.get(reference), "settings.cache_interval") or 1
            compared = f"{counted(settings['steps_executed'], 'step')} executed"
            compared += f", deep features every {reused} in all" if reused > 1 else ""
            compared += f", guidance {settings['guidance']:g}"
            compared += "" if interval is None else f" from t {interval[0]:g} to {interval[1]:g}"
            compared += f", {settings['scheduler']}"
        members.setdefault(Group(c["machine"], settings["start"], settings["seed"], compared), []).append(c)
    machines = list(dict.fromkeys(group.machine for group in members))
    order = sorted(members, key=lambda g: (machines.index(g.machine), g.start is None))
    return {group: members[group] for group in order}


def group_title(results: Results, group: Group) -> str:
    """Such as: AMD EPYC, 2 cores; start image, seed 0."""
    machine = results["machines"][group.machine]["label"]
    if group.start is None:
        return f"{machine}; baselines"
    return f"{machine}; start {group.start}, seed {group.seed}" + (f", {group.settings}" if group.settings else "")


def unranked(configurations: Sequence[Configuration], against: str | None) -> dict[str, str]:
    """Why some configurations of one group cannot be ranked, by id: no figure, or one that is not like the others'."""
    sides = {c["id"]: at(c, f"accuracy.against_{against}") or {} for c in configurations}
    most = max((side["images"] for side in sides.values() if side), default=0)
    reference = next((side["reference"] for side in sides.values() if "reference" in side), None)
    reasons = {}
    for configuration in configurations:
        side = sides[configuration["id"]]
        if not is_ok(configuration):
            reason = f"{configuration['status']}: {configuration['reason']}"
        elif latency_ms(configuration) is None:
            reason = "its latency was not measured"
        elif against and not side:
            reason = f"its hole was not measured against the {AGAINST[against]}"
        elif side and side["images"] < most:
            reason = f"measured on {side['images']} of {most} images"
        elif side and side.get("reference") != reference:
            reason = "measured against another reference"
        else:
            continue
        reasons[configuration["id"]] = reason
    return reasons
