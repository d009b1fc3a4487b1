"""The Pareto frontier: domination, ties, and points without a figure."""

from __future__ import annotations

import itertools
import random

import pytest
from report_sample import sample_results

from moebius_edge.report.figures import REFERENCE, TRUTH, groups
from moebius_edge.report.pareto import frontier, frontier_ids

Points = list[tuple[float | None, float | None]]


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([], []),
        ([(5.0, 1.0)], [0]),
        ([(2.0, 9.0), (1.0, 5.0), (3.0, 8.0)], [1, 0]),  # the third costs more than the first for less
        ([(1.0, 5.0), (1.0, 6.0)], [1]),  # the same cost: the better one
        ([(2.0, 5.0), (1.0, 5.0)], [1]),  # the same gain: the cheaper one
        ([(1.0, 5.0), (1.0, 5.0), (2.0, 6.0)], [0, 1, 2]),  # equals do not dominate each other
        ([(None, 9.0), (1.0, None), (None, None), (2.0, 3.0)], [3]),
        ([(None, None)], []),
        ([(0.0, -3.0), (1.0, -4.0)], [0]),
    ],
)
def test_frontier(points: Points, expected: list[int]) -> None:
    assert frontier(points) == expected


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


def test_frontier_ids_leave_out_what_cannot_be_ranked() -> None:
    results = sample_results()
    (members, *_) = groups(results, TRUTH).values()
    assert [i.removeprefix("sample-float32_onnxruntime-cpu_") for i in frontier_ids(members, TRUTH)] == [
        "ddim-4_g2_image",
        "dpm-2m-8_g2_image",
        "ddim-20_g2_image",
    ]
    fastest = next(c for c in members if "ddim-4" in c["id"])
    fastest["status"], fastest["reason"] = "failed", "stopped"
    assert fastest["id"] not in frontier_ids(members, TRUTH)


def test_against_the_reference_only_like_settings_meet() -> None:
    """Each row's reference is the float32 run of its own settings, so four steps are never beside twenty."""
    found = groups(sample_results(), REFERENCE)
    for group, members in found.items():
        if group.start is not None:
            assert len({(c["settings"]["steps"], c["settings"]["scheduler"]) for c in members}) == 1
    assert {group.settings for group in found} >= {
        "19 steps executed, guidance 2, ddim",
        "3 steps executed, guidance 2, ddim",
        None,
    }
