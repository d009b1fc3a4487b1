"""Energy of what a block computes: a meter samples a power source in a thread meanwhile, and integrates.

    with open_meter(device) as meter:
        ...
    energy = meter.energy(images)

On a Jetson the module's own rails are read, whatever computes. Elsewhere a GPU is asked through NVML and a CPU through
RAPL; one is never measured for the other, for its figure would be that of something else.

A Jetson's power comes from ``tegrastats``, which every Jetson has, or from the INA3221 sensors that it reads itself.
Rails differ by module, and some feed others, so that adding all would count twice. Sources: NVIDIA's Jetson Linux
Developer Guide, "Power and Performance", the tables of INA3221 channels and the sections on throttling.
"""

from __future__ import annotations

import os
import re
import select
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..errors import MachineError
from ..system import jetson
from ..system.nvml import GpuMonitor
from ..system.nvml import GpuReading as Reading
from ..system.subprocess_job import end

PERIOD_S = 0.1
_RAPL = "sys/class/powercap"
# Measured at the input: alone the whole. Orin Nano, Orin NX, Xavier NX, TX2; Thor's board; the first Nano.
INPUTS = ("VDD_IN", "VIN", "POM_5V_IN")
# Independent rails whose sum is the module's power where there is no input rail.
SUMS = (
    ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"),  # AGX Orin; VDDQ_VDD2_1V8AO is fed by VIN_SYS_5V0
    ("VDD_GPU", "VDD_CPU_SOC_MSS", "VIN_SYS_5V0"),  # AGX Thor
    ("GPU", "CPU", "SOC", "CV", "VDDRQ", "SYS5V"),  # AGX Xavier
)
# ``VDD_IN 4824mW/4824mW``, now and mean; ``463/463`` before JetPack 5.
_MILLIWATTS = re.compile(r"\b([A-Z][A-Z0-9_]*) (\d+)mW(?:/\d+mW)*(?!\w)|\b([A-Z][A-Z0-9_]*) (\d+)/\d+(?!\w)")
_TEMPERATURE = re.compile(r"\b([A-Za-z]\w*)@(-?\d+(?:\.\d+)?)C\b")  # -256 is a sensor that sleeps
_GPU_CLOCK = re.compile(r"\bGR3D_FREQ (?:\d+%)?@\[?(\d+(?:,\d+)*)\]?")
_SENSORS = ("sys/bus/i2c/drivers/ina3221/*/hwmon/hwmon*", "sys/bus/i2c/drivers/ina3221x/*/hwmon/hwmon*")
_SILENCE_S = 5.0


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


def parse_line(line: str) -> tuple[dict[str, float], dict[str, float], dict[str, float]]:
    """Of a line of tegrastats watts by rail, degrees Celsius by sensor, and the GPU's clock; empty what it lacks."""
    rails = {}
    for name, milliwatts, old_name, old in _MILLIWATTS.findall(line):
        if (name or old_name) != "NC":  # a channel that is not connected
            rails[name or old_name] = int(milliwatts or old) / 1000
    temperatures = {name: float(value) for name, value in _TEMPERATURE.findall(line) if float(value) > -256}
    clocks = [float(mhz) for found in _GPU_CLOCK.findall(line) for mhz in found.split(",")]
    return rails, temperatures, ({"gpu": max(clocks)} if any(clocks) else {})  # 0: it is switched off


class _Rails:
    """What both sources have in common: the power of the module, its mode, and what holds it back."""

    def __init__(self, board: jetson.Board, root: Path) -> None:
        self.covers, self.power_mode = "the module", None
        if board.power_mode is not None:
            self.power_mode = f"{board.power_modes.get(board.power_mode, 'unnamed')} ({board.power_mode})"
        folders = sorted((root / "sys/class/thermal").glob("cooling_device*"))
        self._alerts = [folder for folder in folders if _text(folder / "type").endswith("throttle-alert")]
        self._counts = {p: _text(p) for p in sorted((root / "sys/class/hwmon").glob("hwmon*/oc*_event_cnt"))}

    def reading(self, rails: dict[str, float], clocks: dict[str, float], hottest: float | None) -> Reading:
        known: list[tuple[str, ...]] = [*((name,) for name in INPUTS), *SUMS]
        names = next((names for names in known if all(name in rails for name in names)), None)
        if names is None:
            raise MachineError(f"its rails ({', '.join(rails) or 'none'}) are not those of a known module")
        self.covers = f"the module: {' + '.join(names)}"
        return Reading(sum(rails[name] for name in names), None, clocks, hottest, self._throttles())

    def _throttles(self) -> tuple[str, ...] | None:
        """Alerts that are raised, and over-current events since this was made; None where, as in a container,
        neither can be seen."""
        if not self._alerts and not self._counts:
            return None
        alerts = [_text(folder / "type") for folder in self._alerts if _text(folder / "cur_state") not in ("", "0")]
        events = [path for path, before in self._counts.items() if _text(path) != before]
        return (*alerts, *(f"over-current {path.name.split('_')[0]}" for path in events))

    def close(self) -> None:
        """Nothing is held."""


class TegrastatsSource(_Rails):
    """Runs ``command`` (tegrastats by default) and reads its newest line. ``root`` is where sysfs lies."""

    def __init__(self, board: jetson.Board, root: Path, period_s: float, command: Sequence[str] = ()) -> None:
        super().__init__(board, root)
        self._command = list(command or ("tegrastats", "--interval", str(max(1, round(period_s * 1000)))))
        if shutil.which(self._command[0]) is None:
            raise MachineError(
                f"the program {self._command[0]} is not found: it comes with JetPack, outside containers"
            )
        try:
            self._process = subprocess.Popen(self._command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        except OSError as error:
            raise MachineError(f"{self._command[0]} does not start ({error.strerror or error})") from None
        self._unread = b""

    def read(self) -> Reading:
        rails, temperatures, clocks = parse_line(self._newest_line())
        return self.reading(rails, clocks, max(temperatures.values(), default=None))

    def close(self) -> None:
        end(self._process, _SILENCE_S)
        if self._process.stdout is not None:
            self._process.stdout.close()

    def _newest_line(self) -> str:
        """Wait for a whole line; of several the last is taken, for a late reader must not fall behind."""
        assert self._process.stdout is not None
        pipe = self._process.stdout.fileno()
        while b"\n" not in self._unread:
            if not select.select([pipe], [], [], _SILENCE_S)[0]:
                raise MachineError(f"{self._command[0]} printed nothing for {_SILENCE_S:.0f} s")
            data = os.read(pipe, 65536)
            if not data:
                raise MachineError(f"{self._command[0]} ended: run it by hand, it may need `sudo`")
            self._unread += data
        *lines, self._unread = self._unread.split(b"\n")
        return lines[-1].decode("utf-8", errors="replace")


class Ina3221Source(_Rails):
    """The sensors' rails under ``root``, which a container sees too. Clocks are those of the moment of opening.

    A sensor has channels with ``in<n>_label``, ``in<n>_input`` in mV and ``curr<n>_input`` in mA. The channels that sum
    up shunt voltages have labels too, and no current.
    """

    def __init__(self, board: jetson.Board, root: Path) -> None:
        super().__init__(board, root)
        self._clocks = {c.name: c.current_mhz for c in board.clocks if c.current_mhz is not None}
        self._channels: dict[str, tuple[Path, Path]] = {}
        for label in sorted(path for pattern in _SENSORS for path in root.glob(f"{pattern}/in*_label")):
            number = label.name.removeprefix("in").removesuffix("_label")
            voltage, current = label.with_name(f"in{number}_input"), label.with_name(f"curr{number}_input")
            name = _text(label)
            if current.exists() and "sum" not in name and name != "NC":
                self._channels[name] = (voltage, current)
        if not self._channels:
            raise MachineError("there are no rails under /sys/bus/i2c/drivers/ina3221")

    def read(self) -> Reading:
        rails = {name: read_number(v) * read_number(a) / 1e6 for name, (v, a) in self._channels.items()}
        return self.reading(rails, self._clocks, None)


def _text(path: Path) -> str:
    with suppress(OSError):
        return path.read_text(encoding="utf-8", errors="replace").strip()
    return ""


def open_meter(device: str, root: Path | None = None, period_s: float = PERIOD_S) -> Meter:
    """A meter for what computes on ``device``, to be entered with ``with``; its ``reason`` is set where none works.

    The first source that opens and tells a power is taken. ``root`` is where the system's files lie.
    """
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
