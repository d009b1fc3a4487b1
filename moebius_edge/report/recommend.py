"""Which configuration to take for a stated budget, and in plain words why the others fell out.

Of those that fit the budget it is the fastest whose fills are within 1 dB of the best of them, or, where a floor is
given, at or above it. A hole within 40 dB counts as perfect (an RMS difference of 2.6 of 255 levels is hardly seen).
Each group of like configurations gets a recommendation of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..metrics.fidelity import PSNR_CAP_DB
from .budget import Budget, misses, shown_mb, shown_ms
from .figures import (
    AGAINST,
    REFERENCE,
    TRUTH,
    Configuration,
    Group,
    Results,
    against_of,
    groups,
    hole_psnr_db,
    is_ok,
    label,
    latency_ms,
    memory_bytes,
    unranked,
)
from .pareto import frontier_ids

TOLERANCE_DB = 1.0
PERFECT_DB = 40.0


@dataclass(frozen=True)
class Recommendation:
    """What to take in one group.

    Attributes:
        group: what was ranked together.
        against: what the PSNR was measured against, None where nothing was.
        chosen: the configuration to take, None where none fits.
        nearest: where none fits, the one that misses the budget least.
        sentences: the recommendation in words.
        others: (configuration, why it is not the one), in the document's order.
    """

    group: Group
    against: str | None
    chosen: Configuration | None
    nearest: Configuration | None
    sentences: list[str]
    others: list[tuple[Configuration, str]] = field(default_factory=list)


def recommend(results: Results, budget: Budget) -> list[Recommendation]:
    """One recommendation for each group that samples; pure, in the order of ``figures.groups``."""
    against = against_of(results)
    found = groups(results, against)
    return [
        _of_group(group, members, budget, against, found.get(Group(group.machine, None, None), []))
        for group, members in found.items()
        if group.start is not None
    ]


def ranking_notes(results: Results) -> list[str]:
    """What a reader must know of the ranking before believing it."""
    against, starts = against_of(results), {group.start for group in groups(results, None)}
    notes = []
    if against == TRUTH and "image" in starts:
        notes.append(
            "Start image begins from the original with noise upon it, so its fills keep a trace of what is under the "
            "mask: they compare conversions well, but flatter the quality, and may flatter few steps more than many. "
            "They are never ranked with other starts."
        )
    if against == REFERENCE:
        notes.append(
            "Without ground truth only runs with the same settings are ranked together, with or without reuse of deep "
            "features: the reference says how well a conversion or reuse keeps the fill, not how good a fill is."
        )
    return notes


def standings(results: Results) -> dict[str, str]:
    """By id "recommended", "frontier" or "dominated" for what is ranked within its group, or "baseline"."""
    against = against_of(results)
    found: dict[str, str] = {}
    for group, members in groups(results, against).items():
        if group.start is None:
            found |= {c["id"]: "baseline" for c in members if is_ok(c)}
            continue
        out, best = unranked(members, against), frontier_ids(members, against)
        found |= {c["id"]: "frontier" if c["id"] in best else "dominated" for c in members if c["id"] not in out}
    chosen = [each.chosen for each in recommend(results, Budget.of(results))]
    return found | {c["id"]: "recommended" for c in chosen if c}


def _of_group(
    group: Group,
    members: list[Configuration],
    budget: Budget,
    against: str | None,
    baselines: list[Configuration],
) -> Recommendation:
    out = unranked(members, against)
    ranked = [c for c in members if c["id"] not in out]
    missed = {c["id"]: misses(c, budget, against) for c in ranked}
    fitting = [c for c in ranked if not missed[c["id"]]]
    beside = _best_baseline(baselines, against)
    if not fitting:
        nearest = min(ranked, key=lambda c: (max(r for r, _ in missed[c["id"]]), c["id"]), default=None)
        out |= {c["id"]: _listed(missed[c["id"]]) for c in ranked}
        sentences = _nothing_fits(nearest, budget, against, out)
        others = [(c, out[c["id"]]) for c in members if c is not nearest]
        return Recommendation(group, against, None, nearest, sentences + beside, others)
    best = max(fitting, key=lambda c: (_psnr(c, against), -_latency(c)))
    floor = budget.min_psnr_db
    if floor is None and against is not None:
        floor = min(_psnr(best, against), PERFECT_DB) - TOLERANCE_DB
    near = [c for c in fitting if floor is None or _psnr(c, against) >= floor]
    chosen = min(near, key=lambda c: (_latency(c), -_psnr(c, against), memory_bytes(c) or math.inf, c["id"]))
    for other in ranked:
        if missed[other["id"]]:
            out[other["id"]] = _listed(missed[other["id"]])
        elif other in near:
            out[other["id"]] = _slower(other, chosen, against)
        else:
            out[other["id"]] = f"{_db(other, against)} in the hole, under {floor:.1f} dB"
    others = [(c, out[c["id"]]) for c in members if c is not chosen]
    return Recommendation(group, against, chosen, None, _take(chosen, best, budget, against) + beside, others)


def _take(chosen: Configuration, best: Configuration, budget: Budget, against: str | None) -> list[str]:
    memory = memory_bytes(chosen)
    figures = [f"{shown_ms(_latency(chosen))} an image (median)"]
    if against is not None:
        figures.append(f"hole PSNR {_db(chosen, against)} against the {AGAINST[against]}")
    if memory is not None:
        figures.append(f"{shown_mb(memory)} of memory")
    sentences = [f"Take {label(chosen)}.", f"{', '.join(figures)}."]
    it_is = "Of those within the budget it is" if budget.stated else "It is"
    if against is None:
        return [*sentences, f"{it_is} the fastest. No accuracy was measured, so this says nothing of its fills."]
    tolerance = f"{TOLERANCE_DB:g} dB"
    if budget.min_psnr_db is not None:
        sentences.append(f"{it_is} the fastest.")
    elif chosen is best:
        return [*sentences, f"{it_is} the most accurate, and none within {tolerance} of it is faster."]
    elif _psnr(best, against) > PERFECT_DB:
        sentences.append(
            f"{it_is} the fastest with {PERFECT_DB - TOLERANCE_DB:g} dB or more (under 3 of 255 levels RMS)."
        )
    else:
        sentences.append(f"{it_is} the fastest within {tolerance} of the best.")
    if chosen is not best:
        times = _latency(best) / _latency(chosen) if _latency(chosen) > 0 else math.inf
        best_one = f"The most accurate, {label(best)}, has {_db(best, against)} and takes {shown_ms(_latency(best))}"
        sentences.append(f"{best_one}, {times:.1f} times as long.")
    return sentences


def _nothing_fits(nearest: Configuration | None, budget: Budget, against: str | None, out: dict[str, str]) -> list[str]:
    if nearest is None:
        return ["Nothing to recommend: no configuration could be ranked."]
    figures = f"{shown_ms(_latency(nearest))} an image"
    if against is not None:
        figures += f", hole PSNR {_db(nearest, against)} against the {AGAINST[against]}"
    return [
        f"No configuration fits the budget: {budget.text()}.",
        f"Nearest comes {label(nearest)} with {figures}; but {out[nearest['id']]}.",
    ]


def _slower(other: Configuration, chosen: Configuration, against: str | None) -> str:
    text = f"slower: {shown_ms(_latency(other))} against {shown_ms(_latency(chosen))}"
    if _latency(other) == _latency(chosen):
        text = f"no faster: {shown_ms(_latency(other))} too"
    return text if against is None else f"{text}, with {_db(other, against)} in the hole"


def _best_baseline(baselines: Sequence[Configuration], against: str | None) -> list[str]:
    if against is None:
        return []
    out = unranked(baselines, against)
    if not (ranked := [c for c in baselines if c["id"] not in out]):
        return []
    best = max(ranked, key=lambda c: _psnr(c, against))
    figures = f"{_db(best, against)} in the hole in {shown_ms(_latency(best))}"
    return [f"Beside it, not ranked: the best baseline, {label(best)}, reaches {figures}."]


def _latency(configuration: Configuration) -> float:
    value = latency_ms(configuration)
    assert value is not None  # ``unranked`` has kept out the others
    return value


def _psnr(configuration: Configuration, against: str | None) -> float:
    value = 0.0 if against is None else hole_psnr_db(configuration, against)
    assert value is not None
    return value


def _db(configuration: Configuration, against: str | None) -> str:
    value = _psnr(configuration, against)
    return "no difference" if value >= PSNR_CAP_DB else f"{value:.1f} dB"


def _listed(missed: list[tuple[float, str]]) -> str:
    return "; ".join(text for _, text in missed)
