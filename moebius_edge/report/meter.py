"""A power meter: samples a source in a thread while a block runs, and integrates.

    with open_meter(device) as meter:
        ...
    energy = meter.energy()

A source that counts energy itself is read at the block's start and end, so that no sample in between matters. From one
that only tells power the energy is the mean of the samples, by the trapezoidal rule, times the block's duration.
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

PERIOD_S = 0.1
_PATIENCE_S = 10.0  # for a source to let go of the sampling thread


class SourceError(Exception):
    """A source cannot be read: why, and where there is one the command that mends it."""


@dataclass(frozen=True)
class Sample:
    """What a source tells at one moment: ``joules`` from any origin on; ``throttles`` is None where it cannot tell."""

    watts: float | None = None
    joules: float | None = None
    clocks_mhz: Mapping[str, float] = field(default_factory=dict)
    temperature_c: float | None = None
    throttles: tuple[str, ...] | None = None


class Source(ABC):
    """Where samples come from. ``covers`` says what the power is that of.

    ``paced``: ``sample`` itself waits for the next reading, and returns or raises once ``close`` was called.
    """

    name: str
    covers: str
    paced = False
    power_mode: str | None = None
    power_limit_watts: float | None = None

    @abstractmethod
    def open(self) -> None:
        """Raises SourceError. May be called again after ``close``."""

    @abstractmethod
    def sample(self) -> Sample:
        """Raises SourceError."""

    def close(self) -> None:  # noqa: B027  most sources hold nothing
        """Also after ``open`` failed."""


@dataclass(frozen=True)
class Energy:
    """What a block took. Figures that are not known are None; ``reason`` says why ``joules`` is."""

    source: str | None
    covers: str | None
    seconds: float
    joules: float | None
    mean_watts: float | None
    max_watts: float | None
    samples: int
    power_mode: str | None
    power_limit_watts: float | None
    clocks_mhz: dict[str, float]  # means
    max_temperature_c: float | None
    throttles: tuple[str, ...] | None  # reasons seen in any sample
    reason: str | None

    def to_dict(self, images: int = 1) -> dict[str, Any]:
        """As ``results.json`` has it; the block made this many ``images``."""
        return {
            "source": self.source,
            "covers": self.covers,
            "seconds": self.seconds,
            "joules": self.joules,
            "joules_per_image": None if self.joules is None else self.joules / images,
            "mean_watts": self.mean_watts,
            "max_watts": self.max_watts,
            "samples": self.samples,
            "power_mode": self.power_mode,
            "power_limit_watts": self.power_limit_watts,
            "clocks": {f"{name}_mhz": value for name, value in self.clocks_mhz.items()},
            "max_temperature_c": self.max_temperature_c,
            "throttled": None if self.throttles is None else bool(self.throttles),
            "throttle_reasons": None if self.throttles is None else list(self.throttles),
            "reason": self.reason,
        }


class Meter:
    """Measures the block it is entered for; without a ``source`` nothing, for the ``reason``. One block at a time."""

    def __init__(self, source: Source | None, reason: str = "", period_s: float = PERIOD_S) -> None:
        self.source, self.reason = source, reason
        self._period_s = period_s
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._readings: list[tuple[float, Sample]] = []
        self._started = self._ended = 0.0
        self._problem = ""

    def __enter__(self) -> Meter:
        self._readings, self._problem, self._thread = [], "", None
        self._stop.clear()
        if self.source is not None:
            try:
                self.source.open()
                if not self.source.paced:
                    self._read()
            except SourceError as error:
                self._problem = str(error)
            else:
                self._thread = threading.Thread(target=self._sample, name="power meter", daemon=True)
                self._thread.start()
        self._started = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ended = time.perf_counter()
        self._stop.set()
        if self.source is None:
            return
        if self._thread is not None and not self.source.paced:
            self._thread.join(_PATIENCE_S)
            if not self._problem:
                with suppress(SourceError):
                    self._read()
        self.source.close()
        if self._thread is not None:
            self._thread.join(_PATIENCE_S)

    def energy(self) -> Energy:
        """Of the block that ended last."""
        source, samples = self.source, [s for _, s in self._readings]
        seconds = self._ended - self._started
        joules, most = _integrate(self._readings, seconds)
        reason = self.reason or self._problem
        if joules is None and not reason:
            reason = f"{source.name if source else 'the meter'} gave no reading of power in {seconds:.2f} s: run longer"
        flags = [s.throttles for s in samples if s.throttles is not None]
        temperatures = [s.temperature_c for s in samples if s.temperature_c is not None]
        return Energy(
            source=None if source is None else source.name,
            covers=None if source is None else source.covers,
            seconds=seconds,
            joules=joules,
            mean_watts=None if joules is None or seconds <= 0 else joules / seconds,
            max_watts=most,
            samples=len(samples),
            power_mode=None if source is None else source.power_mode,
            power_limit_watts=None if source is None else source.power_limit_watts,
            clocks_mhz=_mean_clocks(samples),
            max_temperature_c=max(temperatures, default=None),
            throttles=tuple(sorted({name for found in flags for name in found})) if flags else None,
            reason=reason or None,
        )

    def _sample(self) -> None:
        assert self.source is not None
        try:
            while not self._stop.is_set():
                if self.source.paced or not self._stop.wait(self._period_s):
                    self._read()
        except SourceError as error:
            if not self._stop.is_set():  # closing it is how a paced source is woken
                self._problem = str(error)

    def _read(self) -> None:
        assert self.source is not None
        sample = self.source.sample()
        self._readings.append((time.perf_counter(), sample))


def _integrate(readings: list[tuple[float, Sample]], seconds: float) -> tuple[float | None, float | None]:
    """(joules of ``seconds``, largest watts) of (time, sample) pairs."""
    counted = [(t, s.joules) for t, s in readings if s.joules is not None]
    powers = [(t, s.watts) for t, s in readings if s.watts is not None]
    most = max((w for _, w in powers), default=None)
    if len(counted) > 1:
        if most is None:
            steps = zip(counted, counted[1:], strict=False)
            most = max((b - a) / (u - t) for (t, a), (u, b) in steps if u > t)
        span = counted[-1][0] - counted[0][0]
        return (counted[-1][1] - counted[0][1]) * (seconds / span if span > 0 else 1.0), most
    if not powers:
        return None, None
    if len(powers) == 1 or powers[-1][0] == powers[0][0]:
        return powers[0][1] * seconds, most
    area = sum((u - t) * (a + b) / 2 for (t, a), (u, b) in zip(powers, powers[1:], strict=False))
    return area / (powers[-1][0] - powers[0][0]) * seconds, most


def _mean_clocks(samples: list[Sample]) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    for sample in samples:
        for name, value in sample.clocks_mhz.items():
            found.setdefault(name, []).append(value)
    return {name: sum(values) / len(values) for name, values in found.items()}
