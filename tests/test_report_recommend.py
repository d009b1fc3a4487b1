"""The recommendation: the rule, the limits, why the others fell out, what comes nearest; and the Pareto frontier."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
from report_sample import configuration, report_of, sample_results

from moebius_edge.report.recommend import Recommendation, basis, frontier, ranking_note, recommend, standings


def one(configurations: list[dict[str, Any]], **limits: float) -> Recommendation:
    results = report_of(configurations)
    results["limits"] |= limits
    (found,) = recommend(results)
    return found


def chosen(found: Recommendation) -> str | None:
    return found.chosen and found.chosen["id"]


def reasons(found: Recommendation) -> dict[str, str]:
    return {c["id"]: reason for c, reason in found.others}


FOUR = [
    configuration("slow", latency=1000, truth=28.0, memory=400e6),
    configuration("middle", latency=400, truth=27.2, memory=300e6),
    configuration("fast", latency=100, truth=24.0, memory=200e6),
    configuration("broken", status="failed", reason="the process ended with signal 11"),
]


def test_without_a_budget_the_fastest_within_a_decibel_of_the_best() -> None:
    found = one(FOUR)
    assert chosen(found) == "middle"
    assert found.sentences == [
        "Take middle.",
        "400 ms an image (median), hole PSNR 27.2 dB against the ground truth, 300 MB of memory.",
        "It is the fastest within 1 dB of the best.",
        "The most accurate, slow, has 28.0 dB and takes 1000 ms, 2.5 times as long.",
    ]
    assert reasons(found) == {
        "slow": "no faster: 1000 ms against 400 ms, with 28.0 dB in the hole",
        "fast": "24.0 dB in the hole, under 27.0 dB",
        "broken": "failed: the process ended with signal 11",
    }


@pytest.mark.parametrize(
    ("limits", "taken"),
    [
        (dict(max_latency_ms=399), "fast"),
        (dict(max_latency_ms=400), "middle"),  # the limit itself fits
        (dict(min_psnr_db=27.5), "slow"),
        (dict(min_psnr_db=20), "fast"),
        (dict(max_memory_bytes=250e6), "fast"),
        (dict(max_latency_ms=500, min_psnr_db=25, max_memory_bytes=300e6), "middle"),
    ],
)
def test_limits(limits: dict[str, float], taken: str) -> None:
    found = one(FOUR, **limits)
    assert chosen(found) == taken
    if "min_psnr_db" in limits:
        assert found.sentences[2] == "Of those within the limits it is the fastest."


def test_where_nothing_fits_every_configuration_says_what_it_misses() -> None:
    found = one(FOUR, max_latency_ms=350, min_psnr_db=27.0, max_memory_bytes=350e6)
    assert found.chosen is None
    limits = "at most 350 ms an image, at least 27 dB in the hole, at most 350 MB of memory"
    assert found.sentences == [f"No configuration fits the limits: {limits}."]
    assert reasons(found) == {
        "slow": "1000 ms is over 350 ms; 400 MB is over 350 MB",
        "middle": "400 ms is over 350 ms",
        "fast": "24.0 dB is under 27 dB",
        "broken": "failed: the process ended with signal 11",
    }
    assert one(FOUR, max_latency_ms=0, max_memory_bytes=0).chosen is None


def test_memory_that_was_not_measured_fits_no_limit_on_it() -> None:
    unknown = configuration("unknown", latency=10, truth=30.0, memory=None)
    found = one([unknown, *FOUR], max_memory_bytes=350e6)
    assert chosen(found) == "middle"
    assert reasons(found)["unknown"] == "its memory was not measured"
    assert chosen(one([unknown, *FOUR])) == "unknown"


def test_ties_go_to_accuracy_then_memory_then_name() -> None:
    rows = [
        configuration("b", latency=100, truth=27.0, memory=300e6),
        configuration("a", latency=100, truth=27.0, memory=300e6),
        configuration("lean", latency=100, truth=27.0, memory=200e6),
        configuration("worse", latency=100, truth=26.5, memory=100e6),
    ]
    found = one(rows)
    assert chosen(found) == "lean"
    assert reasons(found)["a"] == "no faster: 100 ms against 100 ms, with 27.0 dB in the hole"
    assert chosen(one(rows[:2])) == "a"


def test_beyond_what_is_seen_the_fastest_wins() -> None:
    rows = [
        configuration("exact", latency=900, reference=200.0),
        configuration("half", latency=300, reference=62.0),
        configuration("quarter", latency=200, reference=38.0),
    ]
    found = one(rows)
    assert chosen(found) == "half"
    assert "It is the fastest with 39 dB or more (under 3 of 255 levels RMS)." in found.sentences
    assert "The most accurate, exact, has no difference and takes 900 ms, 3.0 times as long." in found.sentences
    assert reasons(found)["quarter"] == "38.0 dB in the hole, under 39.0 dB"


def test_without_truth_only_like_settings_are_ranked_and_it_is_said() -> None:
    rows = [
        configuration("twenty", latency=900, reference=200.0, steps=20),
        configuration("four", latency=200, reference=200.0, steps=4, measured_against="four"),
    ]
    results = report_of(rows)
    assert [r.chosen["id"] for r in recommend(results) if r.chosen] == ["twenty", "four"]
    assert ranking_note(results).startswith("Without ground truth only runs with the same settings are ranked")


def test_what_was_measured_otherwise_is_no_rank() -> None:
    """Against another reference; and where nothing ran there is no rank at all."""
    rows = [
        configuration("one", latency=900, reference=60.0),
        configuration("two", latency=100, reference=60.0, measured_against="another"),
    ]
    found = one(rows)
    assert chosen(found) == "one" and reasons(found) == {"two": "measured against another reference"}
    found = one(FOUR[3:])
    assert found.chosen is None and reasons(found) == {"broken": "failed: the process ended with signal 11"}
    assert found.sentences == ["No configuration could be ranked."]


def test_unlike_things_are_not_ranked_together() -> None:
    rows = [
        configuration("a", latency=900, truth=28.0),
        configuration("b", latency=100, truth=28.0, start="noise"),
        configuration("d", latency=100, truth=28.0, machine="other"),
    ]
    found = recommend(report_of(rows))
    assert [(r.chosen or {}).get("id") for r in found] == ["a", "b", "d"]
    assert all(not r.others for r in found)


def test_no_accuracy_at_all() -> None:
    found = one([configuration("a", latency=90), configuration("b", latency=80)])
    assert chosen(found) == "b"
    assert found.sentences[-1] == "It is the fastest. No accuracy was measured, so this says nothing of its fills."
    assert one([configuration("a", latency=90)], min_psnr_db=1).chosen is None


def test_baselines_stand_beside() -> None:
    telea = configuration("telea", latency=5, truth=25.0)
    telea["settings"] = None
    worse = configuration("worse", latency=500, truth=26.0)
    assert standings(report_of([telea, *FOUR, worse])) == {
        **{"telea": "baseline", "middle": "recommended"},
        **{"slow": "frontier", "fast": "frontier", "worse": "dominated"},
    }, "what failed has no standing"


def test_the_limits_in_words() -> None:
    results = sample_results()
    assert basis(results).startswith("Limits: at most 2000 ms an image. Accuracy: PSNR of the hole against the ground")
    results["limits"] = {"max_latency_ms": None, "min_psnr_db": 0.0, "max_memory_bytes": 5_000_000}
    assert "Limits: at least 0 dB in the hole, at most 5 MB of memory." in basis(results)
    assert basis(report_of([])) == "Limits: none stated. Accuracy: not measured."


def test_what_lacks_a_figure_is_never_on_the_frontier() -> None:
    assert frontier([(None, 9.0), (1.0, None), (None, None), (2.0, 3.0)]) == [3]
    assert frontier([(None, None)]) == frontier([]) == []


def test_frontier_is_what_no_point_dominates() -> None:
    """Against the definition, on grids coarse enough for many ties."""
    rng = random.Random(0)
    for _ in range(200):
        points = [(float(rng.randrange(6)), float(rng.randrange(6))) for _ in range(12)]
        wanted = {
            i
            for i, (cost, gain) in enumerate(points)
            if not any(c <= cost and g >= gain and (c, g) != (cost, gain) for c, g in points)
        }
        found = frontier(points)
        assert set(found) == wanted
        costs = [points[i][0] for i in found]
        assert all(a <= b for a, b in itertools.pairwise(costs))
