"""Energy of what a block computes: a meter samples a power source in a thread meanwhile, and integrates.

    with open_meter(device) as meter:
        ...
    energy = meter.energy(images)

On a Jetson the module's own rails are read, whatever computes. Elsewhere a GPU is asked through NVML and a CPU through
RAPL; one is never measured for the other, for its figure would be that of something else.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import MachineError
from ..system import jetson
from ..system.nvml import GpuMonitor
from ..system.nvml import GpuReading as Reading

PERIOD_S = 0.1
_RAPL = "sys/class/powercap"


class Meter:
    """Measures the block it is entered for; without a ``source`` nothing, for the ``reason``.

    A source is open, has ``read() -> Reading``, ``close()`` and ``covers``, which says what the power is that of, and
    may have ``power_mode`` and ``power_limit_watts``. Reading it raises MachineError.

    A source that counts energy itself is read at the block's start and end, so that no reading in between matters. From
    one that only knows power the energy is the mean of the readings, by the trapezoidal rule, times the duration.
    """

    def __init__(self, name: str = "", source: Any = None, reason: str = "", period_s: float = PERIOD_S):
        self.name, self.source, self.reason = name, source, reason
        self._period_s = period_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="power meter", daemon=True)
        self._readings: list[tuple[float, Reading]] = []
        self._started = self._ended = 0.0

    def __enter__(self) -> Meter:
        if self.source is not None:
            self._read()
            self._thread.start()
        self._started = time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended = time.perf_counter()
        self._stop.set()
        if self.source is not None:
            self._thread.join()
            self._read()
            self.source.close()

    def _sample(self) -> None:
        while not self.reason and not self._stop.wait(self._period_s):
            self._read()

    def _read(self) -> None:
        if not self.reason:
            try:
                reading = self.source.read()
                self._readings.append((time.perf_counter(), reading))
            except MachineError as error:
                self.reason = str(error)

    def energy(self, images: int = 1) -> dict[str, Any]:
        """``energy`` of the block as ``results.json`` has it; the block made this many ``images``."""
        readings, seconds = [reading for _, reading in self._readings], self._ended - self._started
        joules, most = integrate(self._readings, seconds)
        unread = f"{self.name} gave no reading of power in {seconds:.2f} s: run longer" if joules is None else None
        flags = [reading.throttles for reading in readings if reading.throttles is not None]
        clocks: dict[str, list[float]] = {}
        for name, mhz in (item for reading in readings for item in reading.clocks_mhz.items()):
            clocks.setdefault(name, []).append(mhz)
        temperatures = [reading.temperature_c for reading in readings if reading.temperature_c is not None]
        return {
            "source": self.name or None,
            "covers": None if self.source is None else self.source.covers,
            "seconds": seconds,
            "joules": joules,
            "joules_per_image": None if joules is None else joules / images,
            "mean_watts": None if joules is None or seconds <= 0 else joules / seconds,
            "max_watts": most,
            "samples": len(readings),
            "power_mode": getattr(self.source, "power_mode", None),
            "power_limit_watts": getattr(self.source, "power_limit_watts", None),
            "clocks": {f"{name}_mhz": sum(values) / len(values) for name, values in clocks.items()},
            "max_temperature_c": max(temperatures, default=None),
            "throttled": any(flags) if flags else None,
            "throttle_reasons": sorted({name for seen in flags for name in seen}) if flags else None,
            "reason": self.reason or unread,
        }


def integrate(readings: list[tuple[float, Any]], seconds: float) -> tuple[float | None, float | None]:
    """(joules of ``seconds``, largest watts) of (time, reading) pairs."""
    counted = [(t, r.joules) for t, r in readings if r.joules is not None]
    powers = [(t, r.watts) for t, r in readings if r.watts is not None]
    most = max((w for _, w in powers), default=None)
    if len(counted) > 1:
        if most is None:
            steps = zip(counted, counted[1:], strict=False)
            most = max((b - a) / (u - t) for (t, a), (u, b) in steps if u > t)
        span = counted[-1][0] - counted[0][0]
        return (counted[-1][1] - counted[0][1]) * (seconds / span if span > 0 else 1.0), most
    if not powers:
        return None, None
    span = powers[-1][0] - powers[0][0]
    if span == 0:
        return powers[0][1] * seconds, most
    area = sum((u - t) * (a + b) / 2 for (t, a), (u, b) in zip(powers, powers[1:], strict=False))
    return area / span * seconds, most


class NvmlSource(GpuMonitor):
    """The GPU that CUDA calls 0. From Ampere on its power is a mean over a second: short blocks need its counter."""

    covers = "the GPU with its memory and regulators, not the host"


class RaplSource:
    """The counters of all CPU packages under ``root``: microjoules that start again at ``max_energy_range_uj``.

    The cores, caches and memory controllers are in them, the memory is not.
    """

    covers = "the CPU packages, not the memory"

    def __init__(self, root: Path) -> None:
        zones = sorted((root / _RAPL).glob("intel-rapl:*"))
        self._zones = [z for z in zones if z.name.count(":") == 1 and (z / "energy_uj").exists()]
        if not self._zones:
            raise MachineError(f"this machine offers no energy counter: there is no /{_RAPL}/intel-rapl:0")
        self._last, self._total = {zone: read_number(zone / "energy_uj") for zone in self._zones}, 0

    def read(self) -> Reading:
        for zone in self._zones:
            now = read_number(zone / "energy_uj")
            passed = now - self._last[zone]
            self._total += passed if passed >= 0 else passed + read_number(zone / "max_energy_range_uj")
            self._last[zone] = now
        return Reading(None, self._total / 1e6)

    def close(self) -> None:
        """Nothing is held."""


def read_number(path: Path) -> int:
    """The whole number in a file of the kernel; kernels since 2020 let only root read some of them."""
    try:
        return int(path.read_text())
    except OSError as error:
        raise MachineError(f"{path} cannot be read ({error.strerror}): run `sudo chmod a+r {path}`") from None
    except ValueError:
        raise MachineError(f"{path} holds no number") from None


def open_meter(device: str, root: Path | None = None, period_s: float = PERIOD_S) -> Meter:
    """A meter for what computes on ``device``, to be entered with ``with``; its ``reason`` is set where none works.

    The first source that opens and tells a power is taken. ``root`` is where the system's files lie.
    """
    from .jetson_power import Ina3221Source, TegrastatsSource

    root = jetson.ROOT if root is None else root
    board = jetson.read_board(root)
    sources: dict[str, Callable[[], Any]] = {"nvml": NvmlSource}
    if board is not None:
        sources = {
            "tegrastats": lambda: TegrastatsSource(board, root, period_s),
            "ina3221": lambda: Ina3221Source(board, root),
        }
    elif device == "cpu":
        sources = {"rapl": lambda: RaplSource(root)}
    problems = []
    for name, make in sources.items():
        source, problem = None, "it tells no power"
        try:
            source = make()
            reading = source.read()
            if reading.watts is not None or reading.joules is not None:
                return Meter(name, source, period_s=period_s)
        except MachineError as error:
            problem = str(error)
        if source is not None:
            source.close()
        problems.append(f"{name}: {problem}")
    return Meter(reason="; ".join(problems))
