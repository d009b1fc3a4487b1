"""Power of a Jetson: from ``tegrastats``, which every Jetson has, or from the INA3221 sensors that it reads itself.

Rails differ by module, and some feed others, so that adding all would count twice. Sources: NVIDIA's Jetson Linux
Developer Guide, "Power and Performance", the tables of INA3221 channels and the sections on throttling.
"""

from __future__ import annotations

import os
import re
import select
import shutil
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from ..errors import MachineError
from ..system.jetson import Board
from ..system.subprocess_job import end
from .power import Reading, read_number

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

    def __init__(self, board: Board, root: Path) -> None:
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

    def __init__(self, board: Board, root: Path, period_s: float, command: Sequence[str] = ()) -> None:
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

    def __init__(self, board: Board, root: Path) -> None:
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
