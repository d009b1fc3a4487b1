"""Which guidance a run has, and which of it is left for the sampler to apply."""

from __future__ import annotations

from typing import Any

import pytest

from moebius_edge.errors import UsageError
from moebius_edge.guidance import choose_guidance, is_distillable


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
@pytest.mark.parametrize("chosen", [-1.0, float("nan"), float("inf")])
def test_what_is_no_guidance_is_refused(chosen: float, distilled: float | None) -> None:
    with pytest.raises(UsageError, match=rf"guidance is {chosen}: give a number of 0 or more, such as 2.0"):
        choose_guidance(chosen, distilled)


@pytest.mark.parametrize(
    ("value", "good"),
    [(2, True), (1.01, True), (1.0, False), (0.5, False), (-2.0, False), (float("nan"), False)]
    + [(float("inf"), False), (True, False), ("2", False), (None, False)],
)
def test_what_can_be_distilled(value: Any, good: bool) -> None:
    assert is_distillable(value) is good
