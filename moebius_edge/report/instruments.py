"""A configuration's work, and the machine's peak that it is held against, as ``results.json`` has them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from ..bundle.bundle import Bundle
from ..sampling.calls import Sampling
from ..sampling.guidance import choose_guidance
from ..sampling.scheduler import SCHEDULERS
from ..spec import DENOISER, SHALLOW
from .peaks import Peaks
from .work import Amount, Work, count_work, mean_work

_PEAKS = ("multiplications_per_second", "bytes_per_second", "runtime", "precision")


def network_calls(settings: Mapping[str, Any]) -> Counter[tuple[str, int]]:
    """How many calls of a trajectory are of which component and have how many rows, of a configuration's settings."""
    sampled = choose_guidance(settings["guidance"], settings["distilled_guidance"]).sampled
    scheduler = SCHEDULERS[settings["scheduler"]](settings["steps"], settings["strength"])
    sampling = Sampling(scheduler, sampled, settings["guidance_interval"], settings["cache_interval"])
    return Counter((DENOISER if call.full else SHALLOW, call.rows) for call in sampling.calls())


def work_figures(bundle: Bundle, settings: Mapping[str, Any]) -> dict[str, Any]:
    """``work`` of a call of the denoiser, the mean of all that ``settings`` make, without its share of the peak."""
    calls = network_calls(settings)
    counted = [(count_work(bundle.component_path(name), rows), count) for (name, rows), count in calls.items()]
    return mean_work(counted).to_dict()


def with_share(work: Mapping[str, Any] | None, step_ms: float, peaks: Mapping[str, Any] | None) -> Any:
    """``work`` with its share of the peak: the denoiser's call took ``step_ms``."""
    if work is None or peaks is None or work["multiplications_per_step"] is None:
        return work
    counted = Work({name: Amount(**amount) for name, amount in work["by_class"].items()})
    return counted.to_dict(step_ms / 1e3, Peaks(**peaks))


def no_peaks(reason: str) -> dict[str, Any]:
    """``peaks`` where they could not be measured."""
    return {**dict.fromkeys(_PEAKS), "reason": reason}
