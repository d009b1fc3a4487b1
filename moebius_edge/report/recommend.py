"""Which configuration to take for the stated limits, and in plain words why the others fell out.

Of those that fit the limits it is the fastest whose fills are within 1 dB of the best of them, or, where a floor is
given, at or above it. A hole within 40 dB counts as perfect (an RMS difference of 2.6 of 255 levels is hardly seen).
Each group of like configurations gets a recommendation of its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..metrics.fidelity import PSNR_CAP_DB
from . import figures
from .figures import AGAINST, Configuration, Results, hole_psnr_db, latency_ms, memory_bytes, unranked

TOLERANCE_DB = 1.0
PERFECT_DB = 40.0
Limits = Mapping[str, Any]  # as in ``results.json``; the PSNR is the hole's, by ``figures.against_of``


class Recommendation(NamedTuple):
    """What to take in the group of this ``title``: the ``chosen`` configuration, None where none fits.

    ``sentences`` say why. ``others`` are pairs of a configuration and why it is not the one, in the document's order.
    """

    title: str
    chosen: Configuration | None
    sentences: list[str]
    others: list[tuple[Configuration, str]]


def recommend(results: Results) -> list[Recommendation]:
    """One recommendation for each group that samples, in the order of ``figures.groups``."""
    against = figures.against_of(results)
    recommendations = []
    for group, members in figures.groups(results, against).items():
        if group.start is not None:
            chosen, sentences, reasons = _choose(members, results["limits"], against)
            others = [(c, reasons[c["id"]]) for c in members if c["id"] in reasons]
            recommendations.append(Recommendation(figures.group_title(results, group), chosen, sentences, others))
    return recommendations


def ranking_note(results: Results) -> str:
    """What a reader must know of the ranking before believing it; empty where nothing."""
    against = figures.against_of(results)
    if against == figures.TRUTH and any(group.start == "image" for group in figures.groups(results, None)):
        return (
            "Start image begins from the original with noise upon it, so its fills keep a trace of what is under the "
            "mask: they compare conversions well, but flatter the quality, and may flatter few steps more than many. "
            "They are never ranked with other starts."
        )
    if against == figures.REFERENCE:
        return (
            "Without ground truth only runs with the same settings are ranked together, with or without reuse of deep "
            "features: the reference says how well a conversion or reuse keeps the fill, not how good a fill is."
        )
    return ""


def basis(results: Results) -> str:
    """The limits, and what accuracy is measured against, in words."""
    against = figures.against_of(results)
    return f"Limits: {limits_text(results['limits'])}. Accuracy: " + (
        f"PSNR of the hole against the {AGAINST[against]}." if against else "not measured."
    )


def standings(results: Results) -> dict[str, str]:
    """By id "recommended", "frontier" or "dominated" for what is ranked within its group, or "baseline"."""
    against = figures.against_of(results)
    standing: dict[str, str] = {}
    for group, members in figures.groups(results, against).items():
        if group.start is None:
            standing |= {c["id"]: "baseline" for c in members if figures.is_ok(c)}
        else:
            out, best = unranked(members, against), frontier_ids(members, against)
            standing |= {c["id"]: "frontier" if c["id"] in best else "dominated" for c in members if c["id"] not in out}
    chosen = [each.chosen for each in recommend(results)]
    return standing | {c["id"]: "recommended" for c in chosen if c}


def frontier(points: Sequence[tuple[float | None, float | None]]) -> list[int]:
    """Indices of the points (cost, gain) that no other dominates, in the order of rising cost.

    A point is dominated where another costs no more, gains no less, and is better in one of the two. Equal points
    do not dominate each other, so all of them stay. A point without one of its figures is never on the frontier.
    """
    known = [(cost, -gain, index) for index, (cost, gain) in enumerate(points) if cost is not None and gain is not None]
    indices: list[int] = []
    best: tuple[float, float] | None = None  # the least cost for the most gain so far
    for cost, loss, index in sorted(known):
        if best is None or loss < best[1] or (cost, loss) == best:
            indices.append(index)
            best = (cost, loss)
    return indices


def frontier_ids(configurations: Sequence[Configuration], against: str | None) -> list[str]:
    """The ids of those of one group that are on the frontier of median latency and hole PSNR, fastest first."""
    out = unranked(configurations, against)
    ranked = [c for c in configurations if c["id"] not in out]
    return [ranked[i]["id"] for i in frontier([(latency_ms(c), hole_psnr_db(c, against)) for c in ranked])]


def limits_text(limits: Limits) -> str:
    """Such as: at most 500 ms an image, at least 30 dB in the hole, at most 800 MB of memory."""
    latency, psnr, memory = (limits[name] for name in ("max_latency_ms", "min_psnr_db", "max_memory_bytes"))
    texts = [
        latency is not None and f"at most {_ms(latency)} an image",
        psnr is not None and f"at least {psnr:g} dB in the hole",
        memory is not None and f"at most {_mb(memory)} of memory",
    ]
    return ", ".join(text for text in texts if text) or "none stated"


def _missed(configuration: Configuration, limits: Limits, against: str | None) -> str:
    """Which limits it does not keep to, in words; empty where it fits. What was not measured fits no limit on it."""
    latency, memory, psnr = _latency(configuration), memory_bytes(configuration), hole_psnr_db(configuration, against)
    longest, largest, floor = (limits[name] for name in ("max_latency_ms", "max_memory_bytes", "min_psnr_db"))
    texts = []
    if longest is not None and latency > longest:
        texts.append(f"{_ms(latency)} is over {_ms(longest)}")
    if largest is not None and (memory is None or memory > largest):
        texts.append("its memory was not measured" if memory is None else f"{_mb(memory)} is over {_mb(largest)}")
    if floor is not None and (psnr is None or psnr < floor):
        texts.append("its accuracy was not measured" if psnr is None else f"{psnr:.1f} dB is under {floor:g} dB")
    return "; ".join(texts)


def _choose(
    members: list[Configuration], limits: Limits, against: str | None
) -> tuple[Configuration | None, list[str], dict[str, str]]:
    """The configuration to take, sentences about it, and by id why each of the others is not it."""
    reasons = unranked(members, against)
    ranked = [c for c in members if c["id"] not in reasons]
    reasons |= {c["id"]: text for c in ranked if (text := _missed(c, limits, against))}
    fitting = [c for c in ranked if c["id"] not in reasons]
    if not fitting:
        problem = f"fits the limits: {limits_text(limits)}" if ranked else "could be ranked"
        return None, [f"No configuration {problem}."], reasons
    best = max(fitting, key=lambda c: (_psnr(c, against), -_latency(c)))
    floor = limits["min_psnr_db"]
    if floor is None:
        floor = min(_psnr(best, against), PERFECT_DB) - TOLERANCE_DB
    near = [c for c in fitting if against is None or _psnr(c, against) >= floor]
    chosen = min(near, key=lambda c: (_latency(c), -_psnr(c, against), memory_bytes(c) or math.inf, c["id"]))
    for other in fitting:
        if other not in near:
            reasons[other["id"]] = f"{_db(other, against)} in the hole, under {floor:.1f} dB"
        elif other is not chosen:
            slower = f"no faster: {_ms(_latency(other))} against {_ms(_latency(chosen))}"
            reasons[other["id"]] = slower + (f", with {_db(other, against)} in the hole" if against else "")
    return chosen, _praise(chosen, best, limits, against), reasons


def _praise(chosen: Configuration, best: Configuration, limits: Limits, against: str | None) -> list[str]:
    """What speaks for ``chosen``, where ``best`` is the most accurate within the limits."""
    memory = memory_bytes(chosen)
    figures = f"{_ms(_latency(chosen))} an image (median)"
    figures += f", hole PSNR {_db(chosen, against)} against the {AGAINST[against]}" if against else ""
    figures += "" if memory is None else f", {_mb(memory)} of memory"
    reason = "It is the fastest" if set(limits.values()) == {None} else "Of those within the limits it is the fastest"
    if against is None:
        reason += ". No accuracy was measured, so this says nothing of its fills"
    elif limits["min_psnr_db"] is None and _psnr(best, against) > PERFECT_DB:
        reason += f" with {PERFECT_DB - TOLERANCE_DB:g} dB or more (under 3 of 255 levels RMS)"
    elif limits["min_psnr_db"] is None:
        reason += f" within {TOLERANCE_DB:g} dB of the best"
    sentences = [f"Take {chosen['label']}.", f"{figures}.", f"{reason}."]
    if against is not None and chosen is not best:
        accurate = f"The most accurate, {best['label']}, has {_db(best, against)} and takes {_ms(_latency(best))}"
        sentences.append(f"{accurate}, {_latency(best) / _latency(chosen):.1f} times as long.")
    return sentences


def _latency(configuration: Configuration) -> float:
    """The latency of one that is ranked, which always has one."""
    return latency_ms(configuration) or 0.0


def _psnr(configuration: Configuration, against: str | None) -> float:
    return hole_psnr_db(configuration, against) or 0.0


def _db(configuration: Configuration, against: str | None) -> str:
    value = _psnr(configuration, against)
    return "no difference" if value >= PSNR_CAP_DB else f"{value:.1f} dB"


def _ms(value: float) -> str:
    return f"{value:.0f} ms" if value >= 100 else f"{value:.3g} ms"


def _mb(value: float) -> str:
    """Bytes in MB of 10⁶."""
    return f"{value / 1e6:.0f} MB"
