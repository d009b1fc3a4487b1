"""Energy of what a block computes: a meter samples a power source in a thread meanwhile, and integrates.

    with open_meter(device) as meter:
        ...
    energy = meter.energy(images)

On a Jetson the module's own rails are read, whatever computes. Elsewhere a GPU is asked through NVML and a CPU through
RAPL; one is never measured for the other, for its figure would be that of something else.

A Jetson's rails are INA3221 sensors, which the kernel shows in sysfs, in a container too. Rails differ by module, and
some feed others, so that adding all would count twice. Sources: NVIDIA's Jetson Linux Developer Guide, "Power and
Performance", the tables of INA3221 channels and the sections on throttling; the kernel's "Naming and data format
standards for sysfs files" (hwmon).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..errors import MachineError
from ..system import jetson
from ..system.nvml import GpuMonitor
from ..system.nvml import GpuReading as Reading

PERIOD_S = 0.1
_RAPL = "sys/class/powercap"
_SENSORS = "sys/bus/i2c/drivers/ina3221*/*/hwmon/hwmon*/in*_label"
# What is the module's power: its input rail, or the independent rails of a module that has none.
RAILS = (
    ("VDD_IN",),  # Orin Nano, Orin NX
    ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"),  # AGX Orin; VDDQ_VDD2_1V8AO is fed by VIN_SYS_5V0
    ("VDD_GPU", "VDD_CPU_SOC_MSS", "VIN_SYS_5V0"),  # AGX Thor
)


class Meter:
    """Measures the block it is entered for; without a ``source`` nothing, for the ``reason``.

    A source is open, has ``read() -> Reading``, ``close()`` and ``covers``, which says what the power is that of, and
    may have a ``power_mode``. Reading it raises MachineError.

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
        seconds = self._ended - self._started
        joules = integrate(self._readings, seconds)
        unread = f"{self.name} gave no reading of power in {seconds:.2f} s: run longer" if joules is None else None
        flags = [reading.throttles for _, reading in self._readings if reading.throttles is not None]
        return {
            "source": self.name or None,
            "covers": None if self.source is None else self.source.covers,
            "joules_per_image": None if joules is None else joules / images,
            "mean_watts": None if joules is None or seconds <= 0 else joules / seconds,
            "power_mode": getattr(self.source, "power_mode", None),
            "throttled": any(flags) if flags else None,
            "throttle_reasons": sorted({name for names in flags for name in names}),
            "reason": self.reason or unread,
        }


def integrate(readings: list[tuple[float, Any]], seconds: float) -> float | None:
    """Joules of ``seconds`` from (time, reading) pairs, or None where they tell no power."""
    counted = [(t, r.joules) for t, r in readings if r.joules is not None]
    powers = [(t, r.watts) for t, r in readings if r.watts is not None]
    if len(counted) > 1:
        span = counted[-1][0] - counted[0][0]
        return float(counted[-1][1] - counted[0][1]) * (seconds / span if span > 0 else 1.0)
    if not powers:
        return None
    span = powers[-1][0] - powers[0][0]
    area = sum((u - t) * (a + b) / 2 for (t, a), (u, b) in zip(powers, powers[1:], strict=False))
    return float(area / span if span > 0 else powers[0][1]) * seconds


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


class JetsonSource:
    """The rails of a Jetson's INA3221 sensors under ``root``, and what holds the module back.

    A sensor has channels with ``in<n>_label``, ``in<n>_input`` in mV and ``curr<n>_input`` in mA. The channels that sum
    up shunt voltages have labels too, and no current.
    """

    def __init__(self, board: jetson.Board, root: Path) -> None:
        mode = board.power_mode
        self.power_mode = None if mode is None else f"{board.power_modes.get(mode, 'unnamed')} ({mode})"
        channels: dict[str, tuple[Path, Path]] = {}
        for label in sorted(root.glob(_SENSORS)):
            number = label.name.removeprefix("in").removesuffix("_label")
            current = label.with_name(f"curr{number}_input")
            if current.exists():
                channels[_text(label)] = (label.with_name(f"in{number}_input"), current)
        names = next((names for names in RAILS if all(name in channels for name in names)), None)
        if names is None:
            raise MachineError(f"its rails ({', '.join(channels) or 'none'}) are not those of a known module")
        self.covers = f"the module: {' + '.join(names)}"
        self._channels = [channels[name] for name in names]
        devices = sorted((root / "sys/class/thermal").glob("cooling_device*"))
        self._alerts = [device for device in devices if _text(device / "type").endswith("throttle-alert")]
        self._counts = {p: _text(p) for p in sorted((root / "sys/class/hwmon").glob("hwmon*/oc*_event_cnt"))}

    def read(self) -> Reading:
        watts = sum(read_number(voltage) * read_number(current) / 1e6 for voltage, current in self._channels)
        return Reading(watts, None, throttles=self._throttles())

    def _throttles(self) -> tuple[str, ...] | None:
        """Alerts that are raised, and over-current events since this was made; None where, as in a container,
        neither can be seen."""
        if not self._alerts and not self._counts:
            return None
        alerts = [_text(device / "type") for device in self._alerts if _text(device / "cur_state") not in ("", "0")]
        events = [path for path, before in self._counts.items() if _text(path) != before]
        return (*alerts, *(f"over-current {path.name.split('_')[0]}" for path in events))

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


def _text(path: Path) -> str:
    with suppress(OSError):
        return path.read_text(encoding="utf-8", errors="replace").strip()
    return ""


def open_meter(device: str, root: Path | None = None, period_s: float = PERIOD_S) -> Meter:
    """A meter for what computes on ``device``, to be entered with ``with``; its ``reason`` is set where none works.

    ``root`` is where the system's files lie.
    """
    root = jetson.ROOT if root is None else root
    board = jetson.read_board(root)
    name: str = "nvml"
    make: Callable[[], Any] = NvmlSource
    if board is not None:
        name, make = "ina3221", lambda: JetsonSource(board, root)
    elif device == "cpu":
        name, make = "rapl", lambda: RaplSource(root)
    try:
        source = make()
    except MachineError as error:
        return Meter(reason=f"{name}: {error}")
    return Meter(name, source, period_s=period_s)
