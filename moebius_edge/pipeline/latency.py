"""Where the time goes: a timer a stage, its percentiles, and the latency report as JSON.

Host wall-clock only: a stage ends when its result is in host memory, so device work is included, and
copies with it. The first call, which pays for warming up, is kept apart and also counts in the percentiles.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import __version__
from ..system.machine import machine_info, peak_memory_bytes

if TYPE_CHECKING:
    from ..bundle.bundle import Bundle

REPORT_SCHEMA_VERSION = 1

# ``denoise`` has one entry a network call. ``total`` is one picture from pixels to pixels; the rest of a
# run lies outside of it: ``load`` checks the bundle and opens its graphs, ``read`` and ``write`` are files.
STAGES = ("load", "read", "write", "preprocess", "vae_encode", "denoise", "vae_decode", "stitch", "total")


class StageTimer:
    """Collects milliseconds by stage. One timer may serve many pictures."""

    def __init__(self) -> None:
        self._waited = 0.0
        self._ms: dict[str, list[float]] = {stage: [] for stage in STAGES}

    @contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        """Time a block; a block that raises leaves no entry, for half a stage is no figure."""
        start, waited = time.perf_counter(), self._waited
        yield
        self.add(stage, (time.perf_counter() - start - (self._waited - waited)) * 1e3)

    def add(self, stage: str, ms: float) -> None:
        """Count ``ms`` milliseconds for ``stage``, one of ``STAGES``."""
        self._ms[stage].append(ms)

    def leave_out(self, seconds: float) -> None:
        """Do not count ``seconds`` of waiting for other pictures in the stage that is being measured."""
        self._waited += seconds

    def merge(self, other: StageTimer) -> None:
        """Add the latencies of another timer."""
        for stage, values in other._ms.items():
            self._ms[stage] += values

    def totals_ms(self) -> dict[str, float]:
        """The milliseconds of each measured stage in all."""
        return {stage: round(sum(values), 1) for stage, values in self._ms.items() if values}

    def summary(self) -> dict[str, dict[str, float]]:
        """For each measured stage, in order: count, and in ms first, median, 95th and 99th percentile,
        interquartile range and total.

        Percentiles interpolate linearly between the sorted values; with few values p99 is near the largest.
        """
        summary: dict[str, dict[str, float]] = {}
        for stage, values in self._ms.items():
            if values:
                lower, *middle, upper = np.percentile(values, [25, 50, 95, 99, 75]).tolist()
                shares = dict(zip(("median_ms", "p95_ms", "p99_ms"), middle, strict=True))
                spread = {"iqr_ms": upper - lower, "total_ms": sum(values)}
                summary[stage] = {"count": len(values), "first_ms": values[0], **shares, **spread}
        return summary


def latency_report(
    timer: StageTimer, runtime_info: Mapping[str, Any], bundle: Bundle, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """A JSON-ready report: stages (``*_ms``), peak memory, and all that the figures depend on.

    ``runtime_info`` is ``Runtime.info``, ``settings`` those of ``Result.settings``. A consumer checks
    ``schema_version``, which changes when a key changes its meaning.
    """
    return {
        "schema_version": REPORT_SCHEMA_VERSION,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "version": __version__,
        "bundle": {
            "name": bundle.name,
            "precision": bundle.precision,
            "resolution": bundle.resolution,
            "denoiser_sha256": bundle.files["denoiser.onnx"]["sha256"],
        },
        "runtime": dict(runtime_info),
        "settings": dict(settings),
        "stages": timer.summary(),
        "peak_memory_bytes": peak_memory_bytes(),
        "machine": machine_info(),
    }
