"""Energy of a CPU by RAPL, the counters of Intel's (and AMD's) processors, in the kernel's powercap files.

The counters are microjoules since some moment and start again at ``max_energy_range_uj``. Kernels since 2020 let only
root read them.
"""

from __future__ import annotations

from pathlib import Path

from .meter import Sample, Source, SourceError

_FOLDER = "sys/class/powercap"


class RaplSource(Source):
    """The sum of all CPU packages under ``root``: cores, caches and memory controllers, not the memory itself."""

    name = "rapl"
    covers = "the CPU packages, not the memory"

    def __init__(self, root: Path) -> None:
        self._root = root
        self._zones: list[Path] = []
        self._last: dict[Path, int] = {}
        self._total = 0

    def open(self) -> None:
        zones = sorted((self._root / _FOLDER).glob("intel-rapl:*"))
        self._zones = [z for z in zones if z.name.count(":") == 1 and (z / "energy_uj").exists()]
        if not self._zones:
            raise SourceError(f"this machine offers no energy counter: there is no /{_FOLDER}/intel-rapl:0")
        self._last, self._total = {zone: _number(zone / "energy_uj") for zone in self._zones}, 0

    def sample(self) -> Sample:
        for zone in self._zones:
            now = _number(zone / "energy_uj")
            passed = now - self._last[zone]
            self._total += passed if passed >= 0 else passed + _number(zone / "max_energy_range_uj")
            self._last[zone] = now
        return Sample(joules=self._total / 1e6)


def _number(path: Path) -> int:
    try:
        return int(path.read_text())
    except PermissionError:
        raise SourceError(f"{path} is root's: run `sudo chmod a+r {path}`") from None
    except (OSError, ValueError) as error:
        raise SourceError(f"{path} cannot be read ({error})") from None
