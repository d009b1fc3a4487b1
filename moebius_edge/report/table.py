"""The report's tables: which columns, how a figure is written, what a row sorts by. Markdown and page share them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ..metrics.fidelity import PSNR_CAP_DB
from .figures import (
    REFERENCE,
    TRUTH,
    Configuration,
    Results,
    cache_interval,
    drift,
    hole_psnr_db,
    is_ok,
    latency_ms,
    memory_bytes,
    number,
    words,
)

ABSENT = "\N{EN DASH}"
Value = float | str | None


@dataclass(frozen=True)
class Column:
    """``digits`` after the point; None gives the column as many as its smallest figure needs. Or ``scientific``."""

    title: str
    value: Callable[[Configuration], Value]
    unit: str = ""
    digits: int | None = None
    numeric: bool = True
    scientific: bool = False

    @property
    def heading(self) -> str:
        return f"{self.title} ({self.unit})" if self.unit else self.title


@dataclass(frozen=True)
class Cell:
    """What is shown, and the value that the row sorts by (None sorts last)."""

    text: str
    value: Value


def comparison_columns(standing: Mapping[str, str]) -> list[Column]:
    """The main table; ``standing`` says by id whether one is recommended or on the frontier."""
    return [
        _words("Standing", lambda c: standing.get(c["id"]) or ("not ranked" if is_ok(c) else words(c, "status"))),
        *settings_columns(),
        Column("Hole PSNR to truth", lambda c: hole_psnr_db(c, TRUTH), "dB", 1),
        Column("Hole PSNR to reference", lambda c: hole_psnr_db(c, REFERENCE), "dB", 1),
        Column("Hole SSIM to truth", lambda c: number(c, "accuracy", "against_truth", "hole_ssim"), "", 3),
        Column("LPIPS", lambda c: number(c, "accuracy", "against_truth", "lpips"), "", 3),
        Column("FID", lambda c: number(c, "accuracy", "against_truth", "fid"), "", 1),
        Column("Median", latency_ms, "ms"),
        Column("p95", lambda c: number(c, "latency", "stages", "total", "p95_ms"), "ms"),
        Column("Peak memory", lambda c: _scaled(memory_bytes(c), 1e-6), "MB", 0),
        Column("Energy", lambda c: number(c, "energy", "joules_per_image"), "J/image"),
    ]


def settings_columns() -> list[Column]:
    """What a figure depends on, in every table."""
    return [
        _words("Start", lambda c: words(c, "settings", "start")),
        Column("Steps", lambda c: number(c, "settings", "steps_executed"), "executed", 0),
        Column("Guidance", lambda c: number(c, "settings", "guidance"), "", 1),
        _words("Scheduler", lambda c: words(c, "settings", "scheduler")),
        Column("Cache interval", cache_interval, "", 0),
        Column("Seed", lambda c: number(c, "settings", "seed"), "", 0),
    ]


def resource_columns() -> list[Column]:
    """Memory, energy and arithmetic."""
    return [
        *settings_columns(),
        Column("Host peak", lambda c: _scaled(number(c, "memory", "peak_host_bytes"), 1e-6), "MB", 0),
        Column("Device peak", lambda c: _scaled(number(c, "memory", "peak_device_bytes"), 1e-6), "MB", 0),
        Column("Bundle", lambda c: _scaled(number(c, "bundle", "bytes"), 1e-6), "MB", 1),
        Column("Engines", lambda c: _scaled(number(c, "bundle", "engine_bytes"), 1e-6), "MB", 1),
        Column("Energy", lambda c: number(c, "energy", "joules_per_image"), "J/image"),
        Column("Power", lambda c: number(c, "energy", "mean_watts"), "W"),
        _words("Power mode", lambda c: words(c, "energy", "power_mode")),
        _words("Throttled", _throttled),
        Column("Multiplications", lambda c: _scaled(number(c, "work", "multiplications_per_step"), 1e-9), "10⁹/step"),
        Column("Moved", lambda c: _scaled(number(c, "work", "bytes_per_step"), 1e-6), "MB/step", 0),
        Column("Share of peak", lambda c: _scaled(number(c, "work", "share_of_peak"), 100), "%", 0),
    ]


def stage_columns(stages: Sequence[str], milliseconds: Callable[[Configuration], Mapping[str, float]]) -> list[Column]:
    """One column a stage, in ms an image."""

    def of_stage(name: str) -> Callable[[Configuration], Value]:
        return lambda c: milliseconds(c).get(name)

    return [
        *settings_columns(),
        *(Column(name, of_stage(name), "ms") for name in stages if name != "total"),
        Column("total", latency_ms, "ms"),
        Column("Throughput", lambda c: number(c, "latency", "images_per_second"), "images/s"),
        Column("Loading", lambda c: number(c, "latency", "load_ms"), "ms", 0),
    ]


def drift_columns() -> list[Column]:
    """RMS differences of the latent to the reference's, and what became of them in the picture."""

    def after(which: Callable[[list[float]], float]) -> Callable[[Configuration], Value]:
        return lambda c: which(found) if (found := drift(c)) else None

    return [
        *settings_columns(),
        Column("First step", after(lambda found: found[0]), scientific=True),
        Column("Largest", after(max), scientific=True),
        Column("Last step", after(lambda found: found[-1]), scientific=True),
        Column("Hole PSNR to reference", lambda c: hole_psnr_db(c, REFERENCE), "dB", 1),
        Column("Worst pixel", lambda c: number(c, "accuracy", "against_reference", "worst_pixel_levels"), "levels", 1),
    ]


def sustained_columns() -> list[Column]:
    """Medians of the first and the last minute of a load without pauses."""
    cold, soaked = (
        lambda c: number(c, "sustained", "cold_median_ms"),
        lambda c: number(c, "sustained", "soaked_median_ms"),
    )

    def change(c: Configuration) -> Value:
        before, after = cold(c), soaked(c)
        return None if not before or after is None else 100 * (after / before - 1)

    return [
        *settings_columns(),
        Column("Duration", lambda c: number(c, "sustained", "minutes"), "min", 0),
        Column("Cold", cold, "ms"),
        Column("Soaked", soaked, "ms"),
        Column("Change", change, "%", 1),
    ]


def used(columns: Sequence[Column], configurations: Sequence[Configuration]) -> list[Column]:
    """The columns in which any of the configurations has a value."""
    return [column for column in columns if any(column.value(c) is not None for c in configurations)]


def cells(column: Column, configurations: Sequence[Configuration]) -> list[Cell]:
    """One column's cells; its figures have the same number of digits after the point."""
    values = [column.value(c) for c in configurations]
    digits = column.digits
    if digits is None:
        digits = needed_digits([v for v in values if isinstance(v, (int, float))])
    return [Cell(_shown(column, value, digits), value) for value in values]


def needed_digits(values: Sequence[float]) -> int:
    """Digits after the point that leave the smallest of the values three significant ones; at most 3."""
    smallest = min((abs(v) for v in values if v), default=1000.0)
    return max(0, min(3, 2 - math.floor(math.log10(smallest))))


def failure(configuration: Configuration) -> str | None:
    """Why a configuration has no figures, for its row; None for one that has."""
    if is_ok(configuration):
        return None
    return words(configuration, "reason")


def absences(results: Results, numbers: Mapping[str, int]) -> list[tuple[str, str, str]]:
    """What is absent, why, and in which rows; rows that say the same are one entry."""
    found: dict[tuple[str, str], list[int]] = {}
    for configuration in filter(is_ok, results["configurations"]):  # the others have one reason for everything
        for what, *path in (
            ("difference to the reference", "accuracy", "reference_reason"),
            ("difference to the truth", "accuracy", "truth_reason"),
            ("device memory", "memory", "reason"),
            ("energy", "energy", "reason"),
            ("share of peak", "work", "reason"),
            ("LPIPS", "accuracy", "against_truth", "lpips_reason"),
            ("FID", "accuracy", "against_truth", "fid_reason"),
        ):
            if reason := words(configuration, *path):
                found.setdefault((what, reason), []).append(numbers[configuration["id"]])
    return [(what, reason, ranges(rows)) for (what, reason), rows in found.items()]


def ranges(rows: Sequence[int]) -> str:
    """Rising numbers with neighbours put together: 1 to 5, 8, 9."""
    runs: list[list[int]] = []
    for row in rows:
        if runs and row == runs[-1][-1] + 1:
            runs[-1].append(row)
        else:
            runs.append([row])
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)


def _throttled(configuration: Configuration) -> str | None:
    energy = configuration["energy"]
    return None if not energy or energy["throttled"] is None else ("yes" if energy["throttled"] else "no")


def _words(title: str, value: Callable[[Configuration], str | None]) -> Column:
    return Column(title, value, numeric=False)


def _shown(column: Column, value: Value, digits: int) -> str:
    if value is None:
        return ABSENT
    if isinstance(value, str):
        return value
    if column.unit == "dB" and value >= PSNR_CAP_DB:
        return "equal"
    if isinstance(value, int) and digits == 0:
        return str(value)  # a seed has more digits than a float
    return f"{value:.1e}" if column.scientific else f"{value:.{digits}f}"


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor
