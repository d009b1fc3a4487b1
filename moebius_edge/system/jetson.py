"""What a Jetson is and how it is set up, read from the files of its system. Nothing is executed.

``root`` is where those files are, for the tests have samples. A fact that cannot be learnt is None or empty. In a
container most of /etc and /var is the container's own, so that less is known there.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from .machine import read_number, read_sizes, read_text

ROOT = Path("/")
OLDEST_L4T = 36  # JetPack 6: the first with Python 3.10
# A rule, not a measurement: the published model's files in float32 are 1.24 GB, and whoever builds an engine holds
# the weights twice for a time, beside CUDA's own half gigabyte.
NEED_BYTES = 3_000_000_000
SMALL_BYTES = 9_000_000_000  # the 8 GB boards
SWAP_BYTES = 4_000_000_000  # more than the compressed swap that JetPack sets up, which lies in the same memory
_BINDINGS = "python3-libnvinfer"


@dataclass(frozen=True)
class Clock:
    """The range a clock may move in, and where it is, in MHz."""

    name: str
    minimum_mhz: float
    maximum_mhz: float
    current_mhz: float | None

    @property
    def locked(self) -> bool:
        """As ``jetson_clocks`` leaves it: nothing between least and most."""
        return self.minimum_mhz == self.maximum_mhz


@dataclass(frozen=True)
class Board:
    """A Jetson. ``power_modes`` maps nvpmodel's numbers to names; temperatures are in degrees Celsius."""

    model: str
    l4t: str | None
    jetpack: str | None  # the system's packages
    tensorrt: str | None
    tensorrt_bindings: bool  # its Python module, for the system's Python
    power_mode: int | None
    power_modes: dict[int, str]
    memory_bytes: int | None
    memory_available_bytes: int | None
    swap_bytes: int | None
    clocks: list[Clock] = field(default_factory=list)
    temperatures_c: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Finding:
    """One thing to know: ``fine``, or with the command that mends it."""

    name: str
    fine: bool
    detail: str
    remedy: str = ""


def read_board(root: Path | None = None) -> Board | None:
    """The Jetson this runs on, or None on any other machine."""
    root = ROOT if root is None else root
    compatible = read_text(root / "proc/device-tree/compatible") or ""
    release = read_text(root / "etc/nv_tegra_release")
    if release is None and "nvidia,tegra" not in compatible:
        return None
    packages = _installed(root / "var/lib/dpkg/status")
    l4t = _l4t(release) or _numbers(packages.get("nvidia-l4t-core"))
    tensorrt = packages.get("tensorrt") or packages.get("libnvinfer10") or packages.get("libnvinfer11")
    meminfo = read_sizes(root / "proc/meminfo")
    # Lines of nvpmodel.conf such as < POWER_MODEL ID=0 NAME=15W >
    modes = re.findall(r"<\s*POWER_MODEL\s+ID=(\d+)\s+NAME=(\S+)", read_text(root / "etc/nvpmodel.conf") or "")
    mode = re.search(r"pmode:(\d+)", read_text(root / "var/lib/nvpmodel/status") or "")
    return Board(
        model=read_text(root / "proc/device-tree/model") or "Jetson",
        l4t=l4t,
        jetpack=_numbers(packages.get("nvidia-jetpack") or packages.get("nvidia-jetpack-runtime")),
        tensorrt=_numbers(tensorrt),
        tensorrt_bindings=_BINDINGS in packages,
        power_mode=int(mode.group(1)) if mode else None,
        power_modes={int(number): name for number, name in modes},
        memory_bytes=meminfo.get("MemTotal"),
        memory_available_bytes=meminfo.get("MemAvailable"),
        swap_bytes=meminfo.get("SwapTotal"),
        clocks=[*_gpu_clocks(root), *_cpu_clocks(root)],
        temperatures_c=_temperatures(root),
    )


def findings(board: Board) -> list[Finding]:
    """What speaks for or against measuring, and building the published model, on this board as it is."""
    return [finding for finding in (_system(board), _speed(board), _room(board)) if finding is not None]


def _system(board: Board) -> Finding | None:
    if board.l4t is None:
        return None
    detail = (
        f"L4T {board.l4t}, JetPack {board.jetpack or 'not installed'}, TensorRT {board.tensorrt or 'not installed'}"
    )
    if int(board.l4t.split(".")[0]) < OLDEST_L4T:
        return Finding("JetPack", False, f"{detail}: too old, its Python is below 3.10; flash JetPack 6 or newer")
    if board.tensorrt is None:
        return Finding("JetPack", False, detail, "sudo apt install nvidia-jetpack")
    if not board.tensorrt_bindings:
        return Finding("JetPack", False, f"{detail} without its Python module", f"sudo apt install {_BINDINGS}")
    return Finding("JetPack", True, detail)


def _speed(board: Board) -> Finding | None:
    """Any power mode is a choice, but latencies vary where the clocks do."""
    parts = []
    if board.power_mode is not None:
        parts.append(f"power mode {board.power_modes.get(board.power_mode, 'unnamed')} ({board.power_mode})")
        fastest = next((i for i, name in board.power_modes.items() if name.startswith("MAXN")), board.power_mode)
        if fastest != board.power_mode:
            parts[-1] += f", the fastest is {board.power_modes[fastest]} (sudo nvpmodel -m {fastest})"
    moving = [c for c in board.clocks if not c.locked]
    if moving:
        ranges = ", ".join(f"{c.name} {c.minimum_mhz:.0f} to {c.maximum_mhz:.0f} MHz" for c in moving)
        parts.append(f"clocks not locked, so latencies vary: {ranges}")
    elif board.clocks:
        parts.append("clocks locked: " + ", ".join(f"{c.name} {c.maximum_mhz:.0f} MHz" for c in board.clocks))
    remedy = "sudo jetson_clocks" if moving else ""
    return Finding("clocks", not moving, "; ".join(parts), remedy) if parts else None


def _room(board: Board) -> Finding | None:
    total, free = board.memory_bytes, board.memory_available_bytes
    if total is None or free is None:
        return None
    detail = f"{free / 1e9:.1f} of {total / 1e9:.1f} GB free, shared by CPU and GPU"
    if free < NEED_BYTES:
        detail += f"; an engine of the published model is built in about {NEED_BYTES / 1e9:.0f} GB"
        return Finding("memory", False, detail, "sudo systemctl isolate multi-user.target  # ends the desktop")
    swap = board.swap_bytes or 0
    if total < SMALL_BYTES and swap < SWAP_BYTES:
        detail += f"; a board of 8 GB with {swap / 1e9:.1f} GB of swap has little to spare while it builds an engine"
        make = "sudo fallocate -l 8G /swapfile && sudo chmod 600 /swapfile && sudo mkswap /swapfile"
        return Finding("memory", False, detail, f"{make} && sudo swapon /swapfile")
    return Finding("memory", True, detail)


def _numbers(version: str | None) -> str | None:
    """The leading numbers of a Debian version: ``10.3.0.30-1+cuda12.5`` -> ``10.3.0.30``."""
    match = re.match(r"\d+(\.\d+)*", version or "")
    return match.group() if match else None


def _l4t(release: str | None) -> str | None:
    """``# R36 (release), REVISION: 4.3, GCID: ...`` -> ``36.4.3``."""
    match = re.search(r"R(\d+) \(release\), REVISION: ([\d.]+)", release or "")
    return f"{match.group(1)}.{match.group(2)}" if match else None


def _installed(status: Path) -> dict[str, str]:
    """Versions of the packages that dpkg's database lists as installed."""
    versions = {}
    for paragraph in (read_text(status) or "").split("\n\n"):
        fields = dict(re.findall(r"^(Package|Status|Version): (.*)$", paragraph, re.MULTILINE))
        if fields.get("Status", "").endswith(" installed"):
            versions[fields.get("Package", "")] = fields.get("Version", "")
    return versions


def _gpu_clocks(root: Path) -> list[Clock]:
    """Orin has one device, ``17000000.gpu``; Thor has ``gpu-gpc-0`` and ``gpu-nvd-0``. Their unit is Hz."""
    folders = sorted((root / "sys/class/devfreq").glob("*"))
    clocks = [_clock(f"GPU {f.name}", f, "", 1e6) for f in folders if re.search(r"gpu|ga10b|gv11b", f.name)]
    return [clock for clock in clocks if clock is not None]


def _cpu_clocks(root: Path) -> list[Clock]:
    """One entry for all cores that move in the same range. Their unit is kHz."""
    groups: dict[tuple[float, float], list[Clock]] = {}
    folders = (root / "sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq")
    for core, folder in sorted((int(folder.parent.name[3:]), folder) for folder in folders):
        clock = _clock(str(core), folder, "scaling_", 1e3)
        if clock is not None:  # a core that is switched off has none
            groups.setdefault((clock.minimum_mhz, clock.maximum_mhz), []).append(clock)
    return [replace(group[0], name=f"CPU {','.join(clock.name for clock in group)}") for group in groups.values()]


def _clock(name: str, folder: Path, prefix: str, per_mhz: float) -> Clock | None:
    least, most, now = (read_number(folder / f"{prefix}{which}_freq") for which in ("min", "max", "cur"))
    if least is None or most is None:
        return None
    return Clock(name, least / per_mhz, most / per_mhz, None if now is None else now / per_mhz)


def _temperatures(root: Path) -> dict[str, float]:
    """Degrees of each zone; a zone whose sensor sleeps cannot be read and is left out."""
    zones = sorted((root / "sys/class/thermal").glob("thermal_zone*"))
    readings = [(read_text(zone / "type"), read_number(zone / "temp")) for zone in zones]
    return {kind.removesuffix("-thermal"): value / 1000 for kind, value in readings if kind and value is not None}
