"""Power from ``tegrastats``, which every Jetson has: a line an interval, whose fields differ by module and JetPack.

What is read: rails (``VDD_IN 4824mW/4824mW``, now and mean; ``463/463`` before JetPack 5), the GPU's clock
(``GR3D_FREQ 63%@[621]``), temperatures (``tj@50.25C``; -256 is a sensor that sleeps). Samples of the lines, with where
they come from, are in tests/data/tegrastats.
"""

from __future__ import annotations

import os
import re
import select
import shutil
import subprocess
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..system.jetson import Board
from ..system.subprocess_job import end
from .meter import Sample, Source, SourceError
from .rails import Throttling, power_mode, total_watts

_MILLIWATTS = re.compile(r"\b([A-Z][A-Z0-9_]*) (\d+)mW(?:/\d+mW)*(?!\w)|\b([A-Z][A-Z0-9_]*) (\d+)/\d+(?!\w)")
_TEMPERATURE = re.compile(r"\b([A-Za-z]\w*)@(-?\d+(?:\.\d+)?)C\b")
_GPU = re.compile(r"\bGR3D_FREQ (?:(\d+)%)?(?:@\[?(\d+(?:,\d+)*)\]?)?")
_SILENCE_S = 5.0


@dataclass(frozen=True)
class Line:
    """One line of tegrastats: watts by rail, degrees Celsius by sensor, the GPU's load in percent and clock."""

    rails: dict[str, float]
    temperatures_c: dict[str, float]
    gpu_load: int | None
    gpu_mhz: float | None


def parse_line(line: str) -> Line:
    """What can be read of a line; what it does not have is empty or None."""
    rails = {}
    for name, milliwatts, old_name, old in _MILLIWATTS.findall(line):
        if (name or old_name) != "NC":  # a channel that is not connected
            rails[name or old_name] = int(milliwatts or old) / 1000
    temperatures = {name: float(value) for name, value in _TEMPERATURE.findall(line) if float(value) > -256}
    gpu = _GPU.search(line)
    fastest = max(map(int, gpu.group(2).split(","))) if gpu and gpu.group(2) else 0  # 0: it is switched off
    return Line(
        rails=rails,
        temperatures_c=temperatures,
        gpu_load=int(gpu.group(1)) if gpu and gpu.group(1) else None,
        gpu_mhz=float(fastest) if fastest else None,
    )


class TegrastatsSource(Source):
    """Runs ``command`` (tegrastats by default) and reads its newest line. ``root`` is where sysfs lies."""

    name = "tegrastats"
    paced = True

    def __init__(self, board: Board, root: Path, period_s: float, command: Sequence[str] | None = None) -> None:
        self.power_mode = power_mode(board)
        self.covers = "the module"
        self._root = root
        self._command = list(command or ("tegrastats", "--interval", str(max(1, round(period_s * 1000)))))
        self._process: subprocess.Popen[bytes] | None = None
        self._unread = b""
        self._reading = threading.Lock()  # whoever closes the pipe waits for who reads it

    def open(self) -> None:
        program = self._command[0]
        if shutil.which(program) is None:
            raise SourceError(f"the program {program} is not found: it comes with JetPack, outside of containers")
        self._throttling, self._unread = Throttling(self._root), b""
        try:
            self._process = subprocess.Popen(self._command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        except OSError as error:
            raise SourceError(f"{program} does not start ({error.strerror or error})") from None

    def sample(self) -> Sample:
        with self._reading:
            parsed = parse_line(self._newest_line())
        total = total_watts(parsed.rails)
        if total is None:
            found = ", ".join(parsed.rails) or "none"
            raise SourceError(f"its rails ({found}) are not those of a known module")
        watts, rails = total
        self.covers = f"the module: {rails}"
        return Sample(
            watts=watts,
            clocks_mhz={} if parsed.gpu_mhz is None else {"gpu": parsed.gpu_mhz},
            temperature_c=max(parsed.temperatures_c.values(), default=None),
            throttles=self._throttling.seen(),
        )

    def close(self) -> None:
        if self._process is None:
            return
        process, self._process = self._process, None
        end(process, _SILENCE_S)
        with self._reading:
            if process.stdout is not None:
                process.stdout.close()

    def _newest_line(self) -> str:
        """Waits for a whole line; of several the last, for a late reader must not fall behind."""
        process = self._process
        if process is None or process.stdout is None:
            raise SourceError("tegrastats is not running")
        pipe = process.stdout.fileno()
        while b"\n" not in self._unread:
            if not select.select([pipe], [], [], _SILENCE_S)[0]:
                raise SourceError(f"{self._command[0]} printed nothing for {_SILENCE_S:.0f} s")
            data = os.read(pipe, 65536)
            if not data:
                raise SourceError(f"{self._command[0]} ended: run it by hand, it may need `sudo`")
            self._unread += data
        *lines, self._unread = self._unread.split(b"\n")
        return lines[-1].decode("utf-8", errors="replace")
