"""Which guidance a run has, which calls it takes, and which of them compute all of the denoiser."""

from __future__ import annotations

import re
from typing import Any

import pytest

from moebius_edge.errors import UsageError
from moebius_edge.sampling.calls import Sampling
from moebius_edge.sampling.guidance import Interval, check_interval, choose_guidance, guidance_at, is_distillable
from moebius_edge.sampling.scheduler import DDIM


@pytest.mark.parametrize(
    ("chosen", "distilled", "scale", "sampled"),
    [
        *[(None, None, 2.0, 2.0), (0.0, None, 0.0, 0.0), (1.5, None, 1.5, 1.5)],
        *[(None, 3.0, 3.0, 1.0), (3, 3.0, 3.0, 1.0)],
    ],
)
def test_what_is_distilled_is_not_applied_again(
    chosen: float | None, distilled: float | None, scale: float, sampled: float
) -> None:
    assert choose_guidance(chosen, distilled) == (scale, sampled)
    for other in (1.0, 0.0, 2.9):
        with pytest.raises(UsageError, match=rf"is {other}, and the model has guidance 3.0 dist.*: leave it out"):
            choose_guidance(other, 3.0)


@pytest.mark.parametrize("distilled", [None, 3.0])
@pytest.mark.parametrize("chosen", [-1.0, 1e308, float("nan"), float("inf")])
def test_what_is_no_guidance_is_refused(chosen: float, distilled: float | None) -> None:
    with pytest.raises(UsageError, match=re.escape(f"guidance is {chosen}: give a number from 0 to 1000, such as")):
        choose_guidance(chosen, distilled)


def test_an_interval_of_timesteps_and_what_is_none() -> None:
    for low, high in ((-1, 5), (800, 200), (0, 1001)):
        with pytest.raises(UsageError, match=rf"interval is {low},{high}: give LOW,HIGH with 0 <= .* <= 1000, such"):
            check_interval((low, high), None)
    for interval in ((0, 1000), (200, 800)):
        check_interval(interval, None)
        with pytest.raises(UsageError, match=r"is \d+,\d+, and the model has guidance 3.0 dist.*: leave it out"):
            check_interval(interval, 3.0)
    check_interval(None, 3.0)


def test_guidance_holds_from_low_to_below_high() -> None:
    assert [guidance_at(t, 3.0, (200, 800)) for t in (0, 199, 200, 799, 800, 999)] == [1, 1, 3, 3, 1, 1]
    assert guidance_at(0, 3.0, None) == guidance_at(999, 3.0, (0, 1000)) == 3
    assert guidance_at(500, 3.0, (500, 500)) == 1


@pytest.mark.parametrize(
    ("value", "good"),
    [(2, True), (1.01, True), (1.0, False), (0.5, False), (-2.0, False), (float("nan"), False)]
    + [(float("inf"), False), (True, False), ("2", False), (None, False)],
)
def test_what_can_be_distilled(value: Any, good: bool) -> None:
    assert is_distillable(value) is good


@pytest.mark.parametrize(
    ("steps", "guidance", "interval", "cache", "rows", "full", "reused"),
    [
        (5, 1.0, None, 1, "11111", "FFFFF", "....."),
        (7, 2.0, None, 3, "2222222", "F..F..F", "r..r..."),
        (3, 2.0, None, 100, "222", "F..", "r.."),
        (5, 3.0, (200, 700), 3, "12221", "FF..F", ".r..."),  # the timesteps are 800, 600, .. 0
        (4, 3.0, (250, 500), 5, "1121", "F.FF", "r..."),
    ],
)
def test_the_calls_of_a_trajectory(
    steps: int, guidance: float, interval: Interval | None, cache: int, rows: str, full: str, reused: str
) -> None:
    """A call is full one in so many times, and where rows come or go: the feature has too many, or lacks some."""
    calls = Sampling(DDIM(steps), guidance, interval, cache).calls()
    assert [call.timestep for call in calls] == DDIM(steps).timesteps
    assert [(call.index, call.total) for call in calls] == [(i, steps) for i in range(1, steps + 1)]
    assert "".join(str(call.rows) for call in calls) == rows
    assert "".join("F" if call.full else "." for call in calls) == full
    assert "".join("r" if call.full and call.reused else "." for call in calls) == reused
    assert {call.guidance for call in calls} == {1.0 if count == "1" else guidance for count in rows}
