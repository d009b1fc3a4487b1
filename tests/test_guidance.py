"""Which guidance a run has, and which of it is left for the sampler to apply."""

from __future__ import annotations

import re
from typing import Any

import pytest

from moebius_edge.errors import UsageError
from moebius_edge.sampling.guidance import Interval, check_interval, choose_guidance, guidance_at, is_distillable


@pytest.mark.parametrize(
    ("chosen", "distilled", "scale", "sampled"),
    [
        (None, None, 2.0, 2.0),
        (0.0, None, 0.0, 0.0),
        (1.5, None, 1.5, 1.5),
        (None, 3.0, 3.0, 1.0),
        (3, 3.0, 3.0, 1.0),
    ],
)
def test_what_is_distilled_is_not_applied_again(
    chosen: float | None, distilled: float | None, scale: float, sampled: float
) -> None:
    assert choose_guidance(chosen, distilled) == (scale, sampled)


@pytest.mark.parametrize("chosen", [1.0, 0.0, 2.9])
def test_another_guidance_than_the_distilled_is_refused(chosen: float) -> None:
    with pytest.raises(UsageError, match=rf"guidance is {chosen}, and the model has guidance 3.0 dist.*: leave it out"):
        choose_guidance(chosen, 3.0)


@pytest.mark.parametrize("distilled", [None, 3.0])
@pytest.mark.parametrize("chosen", [-1.0, 1e308, float("nan"), float("inf")])
def test_what_is_no_guidance_is_refused(chosen: float, distilled: float | None) -> None:
    with pytest.raises(UsageError, match=re.escape(f"guidance is {chosen}: give a number from 0 to 1000, such as")):
        choose_guidance(chosen, distilled)


@pytest.mark.parametrize("interval", [(-1, 5), (800, 200), (0, 1001)])
def test_what_is_no_interval_is_refused(interval: Interval) -> None:
    low, high = interval
    with pytest.raises(UsageError, match=rf"interval is {low},{high}: give LOW,HIGH with 0 <= .* <= 1000, such"):
        check_interval(interval, None)


def test_distilled_guidance_has_no_interval() -> None:
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
