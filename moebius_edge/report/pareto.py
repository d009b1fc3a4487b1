"""The Pareto frontier of latency and accuracy: what no other configuration beats in both."""

from __future__ import annotations

from collections.abc import Sequence

from .figures import Configuration, hole_psnr_db, latency_ms, unranked


def frontier(points: Sequence[tuple[float | None, float | None]]) -> list[int]:
    """Indices of the points (cost, gain) that no other dominates, in the order of rising cost.

    A point is dominated where another costs no more, gains no less, and is better in one of the two. Equal points
    do not dominate each other, so all of them stay. A point without one of its figures is never on the frontier.
    """
    known = [(cost, -gain, index) for index, (cost, gain) in enumerate(points) if cost is not None and gain is not None]
    kept: list[int] = []
    best: tuple[float, float] | None = None  # the last point kept: the least cost for the most gain so far
    for cost, loss, index in sorted(known):
        if best is None or loss < best[1] or (cost, loss) == best:
            kept.append(index)
            best = (cost, loss)
    return kept


def frontier_ids(configurations: Sequence[Configuration], against: str | None) -> list[str]:
    """The ids of those of one group that are on the frontier of median latency and hole PSNR, fastest first."""
    out = unranked(configurations, against)
    ranked = [c for c in configurations if c["id"] not in out]
    return [ranked[i]["id"] for i in frontier([(latency_ms(c), hole_psnr_db(c, against)) for c in ranked])]
