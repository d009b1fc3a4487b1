"""What else is measured of a configuration: its energy, its work, and the machine's peak that the work is held against.

---- power.py, work.py and peaks.py come in here, and nowhere else: each function says what stands without them. ----
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from ..bundle import Bundle

_ENERGY = ("source", "joules_per_image", "mean_watts", "power_mode", "clocks", "throttled")
_PEAKS = ("multiplications_per_second", "bytes_per_second", "runtime", "precision")


def open_meter(device: str) -> Any:
    """The power meter of ``device``, to be entered with ``with``; None where there is none."""
    power = _module("power")
    return None if power is None else power.open_meter(device)


def energy_figures(meter: Any, images: int) -> dict[str, Any]:
    """``energy`` of ``results.json``, of the block that ``meter`` was entered for; it made so many images."""
    if meter is None:
        return {**dict.fromkeys(_ENERGY), "reason": "power is not measured by this version"}
    figures: dict[str, Any] = meter.energy().to_dict(images)
    return figures


def work_figures(bundle: Bundle, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """``work`` of one call of the denoiser, without its share of the peak; None where it is not counted."""
    work = _module("work")
    if work is None:
        return None
    guided = bundle.distilled_guidance is None and settings["guidance"] != 1  # two rows a call
    figures: dict[str, Any] = work.count_work(bundle.component_path("denoiser"), 2 if guided else 1).to_dict()
    return figures


def measures_peaks() -> bool:
    return _module("peaks") is not None


def peak_figures(runtime: Mapping[str, Any], precision: str) -> dict[str, Any]:
    """``peaks`` of ``results.json`` for a runtime, as its ``info``, and a precision; takes seconds."""
    figures: dict[str, Any] = _module("peaks").measure_peaks(runtime, precision).to_dict()
    return figures


def with_share(work: Mapping[str, Any] | None, step_ms: float, peaks: Mapping[str, Any] | None) -> Any:
    """``work`` with its share of the peak: the denoiser's median call took ``step_ms``."""
    if work is None or peaks is None or work["multiplications_per_step"] is None:
        return work
    module, peaks_module = _module("work"), _module("peaks")
    counted = module.Work({name: module.Amount(**amount) for name, amount in work["by_class"].items()})
    return counted.to_dict(step_ms / 1e3, peaks_module.Peaks(**peaks))


def no_peaks(reason: str) -> dict[str, Any]:
    return {**dict.fromkeys(_PEAKS), "reason": reason}


def _module(name: str) -> Any:
    try:
        return importlib.import_module(f"{__package__}.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"{__package__}.{name}":
            raise
        return None
