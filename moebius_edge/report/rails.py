"""A Jetson's power rails: which of them add up to the module, and whether the board holds its clocks back.

Rails differ by module, and some feed others, so that adding all would count twice. Sources: NVIDIA's Jetson Linux
Developer Guide, "Power and Performance", the tables of INA3221 channels and the sections on throttling.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from ..system.jetson import Board

# Measured at the input: alone the whole. Orin Nano, Orin NX, Xavier NX, TX2; Thor's board; the first Nano.
INPUTS = ("VDD_IN", "VIN", "POM_5V_IN")
# Independent rails whose sum is the module's power where there is no input rail.
SUMS = (
    ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"),  # AGX Orin; VDDQ_VDD2_1V8AO is fed by VIN_SYS_5V0
    ("VDD_GPU", "VDD_CPU_SOC_MSS", "VIN_SYS_5V0"),  # AGX Thor
    ("GPU", "CPU", "SOC", "CV", "VDDRQ", "SYS5V"),  # AGX Xavier
)


def total_watts(rails: Mapping[str, float]) -> tuple[float, str] | None:
    """(watts, the rails they are of) for the module, or None where no known set of rails is there."""
    for name in INPUTS:
        if name in rails:
            return rails[name], name
    for names in SUMS:
        if all(name in rails for name in names):
            return sum(rails[name] for name in names), " + ".join(names)
    return None


def power_mode(board: Board) -> str | None:
    """``MAXN (0)``, as nvpmodel has it."""
    if board.power_mode is None:
        return None
    return f"{board.power_modes.get(board.power_mode, 'unnamed')} ({board.power_mode})"


class Throttling:
    """What holds a Jetson back: throttle alerts that are raised, and over-current events since this was made.

    ``seen`` is None where the system has neither file, as in a container.
    """

    def __init__(self, root: Path) -> None:
        self._alerts = [
            folder
            for folder in sorted((root / "sys/class/thermal").glob("cooling_device*"))
            if _text(folder / "type").endswith("throttle-alert")
        ]
        self._counters = sorted((root / "sys/class/hwmon").glob("hwmon*/oc*_event_cnt"))
        self._before = [_count(path) for path in self._counters]

    def seen(self) -> tuple[str, ...] | None:
        if not self._alerts and not self._counters:
            return None
        raised = [_text(a / "type") for a in self._alerts if (_count(a / "cur_state") or 0) > 0]
        for path, before in zip(self._counters, self._before, strict=True):
            now = _count(path)
            if now is not None and before is not None and now > before:
                raised.append(f"over-current {path.name.split('_')[0]}")
        return tuple(raised)


def _text(path: Path) -> str:
    with suppress(OSError):
        return path.read_text(encoding="utf-8", errors="replace").strip()
    return ""


def _count(path: Path) -> int | None:
    text = _text(path)
    return int(text) if re.fullmatch(r"-?\d+", text) else None
