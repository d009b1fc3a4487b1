"""A configuration's work, and the machine's peak that it is held against, as ``results.json`` has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..bundle import Bundle
from .peaks import Peaks
from .work import Amount, Work, count_work

_PEAKS = ("multiplications_per_second", "bytes_per_second", "runtime", "precision")


def work_figures(bundle: Bundle, settings: Mapping[str, Any]) -> dict[str, Any]:
    """``work`` of one call of the denoiser, without its share of the peak."""
    guided = bundle.distilled_guidance is None and settings["guidance"] != 1  # two rows a call
    return count_work(bundle.component_path("denoiser"), 2 if guided else 1).to_dict()


def with_share(work: Mapping[str, Any] | None, step_ms: float, peaks: Mapping[str, Any] | None) -> Any:
    """``work`` with its share of the peak: the denoiser's median call took ``step_ms``."""
    if work is None or peaks is None or work["multiplications_per_step"] is None:
        return work
    counted = Work({name: Amount(**amount) for name, amount in work["by_class"].items()})
    return counted.to_dict(step_ms / 1e3, Peaks(**peaks))


def no_peaks(reason: str) -> dict[str, Any]:
    """``peaks`` where they could not be measured."""
    return {**dict.fromkeys(_PEAKS), "reason": reason}
