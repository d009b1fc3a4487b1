"""Power from a Jetson's INA3221 sensors in sysfs: what tegrastats itself reads, and what a container still sees.

Each sensor has channels with ``in<n>_label``, ``in<n>_input`` in mV and ``curr<n>_input`` in mA. The channels that sum
up shunt voltages have labels too, and no current.
"""

from __future__ import annotations

from pathlib import Path

from ..system.jetson import Board
from .meter import Sample, Source, SourceError
from .rails import Throttling, power_mode, total_watts

_SENSORS = ("sys/bus/i2c/drivers/ina3221/*/hwmon/hwmon*", "sys/bus/i2c/drivers/ina3221x/*/hwmon/hwmon*")


class Ina3221Source(Source):
    """The rails under ``root``. Clocks are those of the moment when it was opened."""

    name = "ina3221"

    def __init__(self, board: Board, root: Path) -> None:
        self.covers = "the module"
        self.power_mode = power_mode(board)
        self._clocks = {c.name: c.current_mhz for c in board.clocks if c.current_mhz is not None}
        self._root = root
        self._channels: dict[str, tuple[Path, Path]] = {}

    def open(self) -> None:
        self._throttling = Throttling(self._root)
        self._channels = {}
        for pattern in _SENSORS:
            for label in sorted(self._root.glob(f"{pattern}/in*_label")):
                number = label.name[len("in") : -len("_label")]
                voltage, current = label.with_name(f"in{number}_input"), label.with_name(f"curr{number}_input")
                name = _read(label)
                if current.exists() and "sum" not in name and name != "NC":
                    self._channels[name] = (voltage, current)
        if not self._channels:
            raise SourceError("there are no rails under /sys/bus/i2c/drivers/ina3221")

    def sample(self) -> Sample:
        rails = {name: _number(v) * _number(a) / 1e6 for name, (v, a) in self._channels.items()}
        total = total_watts(rails)
        if total is None:
            raise SourceError(f"its rails ({', '.join(rails)}) are not those of a known module")
        watts, names = total
        self.covers = f"the module: {names}"
        return Sample(watts=watts, clocks_mhz=self._clocks, throttles=self._throttling.seen())


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError as error:
        raise SourceError(f"{path} cannot be read ({error.strerror or error}): run `sudo chmod +r {path}`") from None


def _number(path: Path) -> int:
    text = _read(path)
    try:
        return int(text)
    except ValueError:
        raise SourceError(f"{path} holds {text!r} and no number") from None
