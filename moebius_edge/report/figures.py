"""The figures of a configuration as the report's readers need them, each of which may be absent.

Text loses what could hide or reorder it, for a document may have come from anywhere. Nothing is ranked across groups,
see ``Group``.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

Configuration = Mapping[str, Any]
Results = Mapping[str, Any]

LARGEST = 1e24  # of any figure: above the most that a machine could count, below where floats overflow
TRUTH, REFERENCE = "truth", "reference"
AGAINST = {TRUTH: "ground truth", REFERENCE: "float32 reference"}


class Group(NamedTuple):
    """What may be ranked together: one machine, one start, one seed.

    A fill that started from the noised original (start ``image``) has seen a trace of it, and two seeds give two
    different fills. ``start`` and ``seed`` are None for what does not sample, such as a classical baseline.
    Against the reference also one set of ``settings``: each row's reference is the float32 run of its own. Precision
    and reuse of deep features are none of them: what these cost is what the reference tells.
    """

    machine: str
    start: str | None
    seed: int | None
    settings: str | None = None


def number(entry: Any, *path: str) -> float | None:
    """The number at ``path``, or None; what is beyond ``LARGEST`` is no measurement."""
    value = _at(entry, path)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value if is_number and abs(value) <= LARGEST else None


def series(entry: Any, *path: str) -> list[float]:
    """The numbers at ``path``; empty where any of them is none."""
    values = _at(entry, path)
    found = [number({"": value}, "") for value in values] if isinstance(values, list) else []
    known = [value for value in found if value is not None]
    return known if len(known) == len(found) else []


def words(entry: Any, *path: str) -> str | None:
    """The text at ``path`` on one line, or None where there is none."""
    value = _at(entry, path)
    return None if value is None or isinstance(value, (dict, list)) else clean(str(value)) or None


def clean(text: str) -> str:
    """On one line; control characters and marks that reorder text are shown as U+FFFD."""
    return "".join("\ufffd" if unicodedata.category(c) in ("Cc", "Cf", "Cs") else c for c in " ".join(text.split()))


def counted(count: int, noun: str) -> str:
    """1 file, 2 files."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def label(configuration: Configuration) -> str:
    return words(configuration, "label") or words(configuration, "id") or "unnamed"


def full_label(results: Results, configuration: Configuration) -> str:
    """The label, with the machine's where there are several."""
    where = f", {machine_label(results, configuration['machine'])}" if len(results["machines"]) > 1 else ""
    return label(configuration) + where


def is_ok(configuration: Configuration) -> bool:
    return configuration.get("status") == "ok"


def latency_ms(configuration: Configuration) -> float | None:
    """Median milliseconds of one picture, from pixels to pixels."""
    median = number(configuration, "latency", "stages", "total", "median_ms")
    return median if median is not None and median > 0 else None


def memory_bytes(configuration: Configuration) -> float | None:
    """Peak of the host's memory, plus the device's where it has its own."""
    host, device = (number(configuration, "memory", f"peak_{where}_bytes") for where in ("host", "device"))
    return None if host is None else host + (device or 0)


def hole_psnr_db(configuration: Configuration, against: str | None) -> float | None:
    """PSNR inside the hole against ``TRUTH`` or ``REFERENCE``, in dB."""
    return number(configuration, "accuracy", f"against_{against}", "hole_psnr_db")


def images(configuration: Configuration, against: str | None) -> float | None:
    """Over how many images that PSNR was taken."""
    return number(configuration, "accuracy", f"against_{against}", "images")


def reference_of(configuration: Configuration) -> str | None:
    """The id of the configuration that ``against_reference`` compares with."""
    found = _at(configuration, ("accuracy", "against_reference", "reference"))
    return found if isinstance(found, str) else None


def cache_interval(configuration: Configuration) -> int | None:
    """One call in so many computes the whole denoiser; 1 in documents from before that, None where nothing samples."""
    if configuration["settings"] is None:
        return None
    return int(number(configuration, "settings", "cache_interval") or 1)


def drift(configuration: Configuration) -> list[float]:
    """RMS distance of the latent from the reference's after each step; empty where it was not measured."""
    return series(configuration, "accuracy", "against_reference", "latent_rms_drift")


def stage_ms(configuration: Configuration) -> dict[str, float]:
    """Milliseconds of each stage in one picture, and ``other`` for the rest of ``total``.

    A stage may have several entries a picture (``denoise`` one a network call), so its median counts that often. Where
    calls differ their median is one kind's alone: there ``denoise`` is what the other stages leave of the total.
    """
    stages = _at(configuration, ("latency", "stages"))
    total, pictures = latency_ms(configuration), number(stages, "total", "count")
    if total is None or not pictures:
        return {}
    found = {}
    for name in stages:
        median, count = number(stages, name, "median_ms"), number(stages, name, "count")
        if name != "total" and median is not None and count is not None and median >= 0:
            found[clean(name)] = median * count / pictures
    if not found:
        return {"total": total}
    if "denoise" in found and _calls_differ(configuration):
        found["denoise"] += max(total - sum(found.values()), -found["denoise"])
    rest = total - sum(found.values())
    return {**found, "other": rest} if rest > 0.005 * total else found


def _calls_differ(configuration: Configuration) -> bool:
    """Whether some calls of the denoiser may have other rows than others, or compute a part alone."""
    limited = _at(configuration, ("settings", "guidance_interval")) is not None
    return limited or (cache_interval(configuration) or 1) > 1


def against_of(results: Results) -> str | None:
    """What the report ranks by: ``TRUTH`` where any configuration was measured against it, then ``REFERENCE``."""
    ran = [c for c in results["configurations"] if is_ok(c)]
    return next((a for a in AGAINST if any(hole_psnr_db(c, a) is not None for c in ran)), None)


def groups(results: Results, against: str | None) -> dict[Group, list[Configuration]]:
    """The configurations by group; what samples comes first on each machine, the document's order is kept."""
    found: dict[Group, list[Configuration]] = {}
    intervals = {c["id"]: cache_interval(c) or 1 for c in results["configurations"]}
    for configuration in results["configurations"]:
        reused = intervals.get(reference_of(configuration) or "", 1)
        found.setdefault(_group_of(configuration, against, reused), []).append(configuration)
    machines = list(dict.fromkeys(group.machine for group in found))
    order = sorted(found, key=lambda g: (machines.index(g.machine), g.start is None))
    return {group: found[group] for group in order}


def _group_of(configuration: Configuration, against: str | None, reused: int) -> Group:
    """``reused`` is the cache interval of its reference."""
    settings, machine = configuration["settings"], configuration["machine"]
    if settings is None:
        return Group(machine, None, None)
    alike = None
    if against == REFERENCE:
        steps, scheduler = settings["steps_executed"], clean(settings["scheduler"])
        interval = settings.get("guidance_interval")
        limited = "" if interval is None else f" from t {interval[0]} to {interval[1]}"
        said = f", deep features every {reused} in all" if reused > 1 else ""
        alike = f"{counted(steps, 'step')} executed{said}, guidance {settings['guidance']:g}{limited}, {scheduler}"
    return Group(machine, clean(settings["start"]), settings["seed"], alike)


def group_title(results: Results, group: Group) -> str:
    """Such as: AMD EPYC, 2 cores; start image, seed 0."""
    machine = machine_label(results, group.machine)
    if group.start is None:
        return f"{machine}; baselines"
    return f"{machine}; start {group.start}, seed {group.seed}" + (f", {group.settings}" if group.settings else "")


def machine_label(results: Results, machine: str) -> str:
    return words(results, "machines", machine, "label") or clean(machine)


def unranked(configurations: Sequence[Configuration], against: str | None) -> dict[str, str]:
    """Why some configurations of one group cannot be ranked, by id: no figure, or one that is not like the others'."""
    ran = [c for c in configurations if is_ok(c)]
    most = max((images(c, against) or 0 for c in ran), default=0)
    reference = next((r for r in map(reference_of, ran) if r), None)
    reasons = {}
    for configuration in configurations:
        count = images(configuration, against)
        if not is_ok(configuration):
            status, reason = words(configuration, "status"), words(configuration, "reason")
            reasons[configuration["id"]] = f"{status}: {reason}"
        elif latency_ms(configuration) is None:
            reasons[configuration["id"]] = "its latency was not measured"
        elif against and hole_psnr_db(configuration, against) is None:
            reasons[configuration["id"]] = f"its hole was not measured against the {AGAINST[against]}"
        elif count is not None and count < most:
            reasons[configuration["id"]] = f"measured on {count:g} of {most:g} images"
        elif against == REFERENCE and reference_of(configuration) != reference:
            reasons[configuration["id"]] = "measured against another reference"
    return reasons


def distinct_labels(labels: Sequence[str]) -> list[str]:
    """Labels without the comma-separated parts that all of them share, for the points of one plot."""
    parts = [text.split(", ") for text in labels]
    shared = set.intersection(*map(set, parts)) if len(parts) > 1 else set()
    return [", ".join(p for p in own if p not in shared) or text for own, text in zip(parts, labels, strict=True)]


def _at(entry: Any, path: Sequence[str]) -> Any:
    for key in path:
        entry = entry.get(key) if isinstance(entry, Mapping) else None
    return entry
