"""Classifier-free guidance: how strong it is, where on the trajectory, and whether the network has learned it.

A student with distilled guidance predicts e = eu + g (ec - eu) itself, at the one g it was trained for, from its
conditional branch alone (Meng et al., arXiv 2210.03142, section 3.1): the sampler then has no second branch to run.

Guidance may be limited to an interval of noise levels (Kynkäänniemi et al., arXiv 2404.07724, section 3), outside of
which the conditional branch runs alone too. Their levels are σ = √(1-ᾱ)/√ᾱ; here they are timesteps, which rise with σ.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from ..errors import UsageError
from ..spec import NUM_TRAIN_TIMESTEPS

Interval = tuple[int, int]  # (low, high): guidance at the timesteps low <= t < high

GUIDANCE = 2.0  # upstream's
MAX_GUIDANCE = 1000.0  # far above any use, and far below what overflows float32


class Guidance(NamedTuple):
    """``scale`` is g, which every output states; ``sampled`` is the guidance that the sampling loop applies."""

    scale: float
    sampled: float


def choose_guidance(chosen: float | None, distilled: float | None) -> Guidance:
    """The guidance of a run: ``chosen``, by default the network's ``distilled`` one, without that ``GUIDANCE``.

    With distilled guidance ``sampled`` is 1, at which the sampler runs the conditional branch alone.

    Raises:
        UsageError: ``chosen`` is out of range, or is not the guidance that is distilled.
    """
    if chosen is None:
        chosen = GUIDANCE if distilled is None else distilled
    if not 0 <= chosen <= MAX_GUIDANCE:  # NaN fails too
        raise UsageError(f"guidance is {chosen}", f"give a number from 0 to {MAX_GUIDANCE:g}, such as {GUIDANCE}")
    if distilled is None:
        return Guidance(chosen, chosen)
    if chosen != distilled:
        problem = f"guidance is {chosen}, and the model has guidance {distilled} distilled into it and takes no other"
        raise UsageError(problem, "leave it out, or use a model without distilled guidance")
    return Guidance(chosen, 1.0)


def check_interval(interval: Interval | None, distilled: float | None) -> None:
    """Raise ``UsageError`` unless ``interval`` is None or an interval of timesteps, which may be empty.

    A network with ``distilled`` guidance takes none: it is guided at every timestep.
    """
    if interval is None:
        return
    (low, high), problem = interval, f"guidance interval is {interval[0]},{interval[1]}"
    if not 0 <= low <= high <= NUM_TRAIN_TIMESTEPS:
        remedy = f"give LOW,HIGH with 0 <= LOW <= HIGH <= {NUM_TRAIN_TIMESTEPS}, such as 200,800"
        raise UsageError(problem, f"{remedy}; timesteps near 0 are nearly free of noise")
    if distilled is not None:
        problem += f", and the model has guidance {distilled} distilled into it, at every timestep"
        raise UsageError(problem, "leave it out, or use a model without distilled guidance")


def guidance_at(t: int, guidance: float, interval: Interval | None) -> float:
    """``guidance`` at timestep ``t``; outside of ``interval`` it is 1."""
    return guidance if interval is None or interval[0] <= t < interval[1] else 1.0


def is_distillable(guidance: Any) -> bool:
    """Whether ``guidance`` is a number above 1, for only that can be distilled: 1 means no guidance."""
    return isinstance(guidance, (int, float)) and not isinstance(guidance, bool) and 1 < guidance <= MAX_GUIDANCE
