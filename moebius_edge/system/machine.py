"""Facts about this machine, from the standard library, /proc and NVML.

A fact that cannot be learnt is None or empty, never a guess. No runtime is imported to learn its version, so asking is
cheap and cannot fail on a broken package.
"""

from __future__ import annotations

import os
import platform
import re
import tempfile
from contextlib import suppress
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from ..errors import MachineError
from .nvml import gpus

# The instructions that decide how fast a CPU multiplies matrices in float32, float16, bfloat16 and int8.
CPU_FEATURES = (
    *("avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_bf16", "amx_int8"),
    *("asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2"),  # Arm
)
_CGROUP = Path("/sys/fs/cgroup")
_MEMINFO = Path("/proc/meminfo")
DRIVER_FILE = Path("/proc/driver/nvidia/version")  # NVIDIA's kernel module, seen in every container of the host


def machine_info() -> dict[str, Any]:
    """What a latency depends on: operating system, board, CPU, memory, GPUs. Sizes are in bytes."""
    memory = [read_sizes(_MEMINFO).get("MemTotal"), read_number(_CGROUP / "memory.max")]
    rows = re.findall(r"^([^:\n]+?)\s*:[ \t]*(.*)$", read_text(Path("/proc/cpuinfo")) or "", re.MULTILINE)
    cpu = dict(reversed(rows))  # of each field its first row
    flags = cpu.get("flags") or cpu.get("Features") or ""  # Arm's
    models = (cpu.get(field) for field in ("model name", "Hardware", "Model"))
    return {
        "system": f"{platform.system()} {platform.release()}",
        "architecture": platform.machine(),
        "board": _board(),
        "python": platform.python_version(),
        "cpu": {
            "model": next(filter(None, models), None) or platform.processor() or None,
            "logical_cpus": os.cpu_count(),
            "cores_available": available_cores(),
            "features": [feature for feature in CPU_FEATURES if feature in flags.split()],
        },
        "memory_bytes": min((size for size in memory if size is not None), default=None),
        "gpus": [asdict(gpu) for gpu in gpus()],
    }


def available_cores() -> int:
    """The CPU cores that this process may keep busy, often fewer than the machine's.

    Counts what the affinity allows, two hardware threads of one core as one (matrix products gain nothing
    from the second), and no more than a container's quota.
    """
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    topology = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    cores = {read_text(Path(topology.format(cpu))) or str(cpu) for cpu in os.sched_getaffinity(0)}
    quota = float("inf")
    with suppress(ValueError):  # "max" is no number: there is no quota
        allowed, period = (read_text(_CGROUP / "cpu.max") or "").split()
        quota = max(1, round(int(allowed) / int(period)))
    return int(min(len(cores), quota))


def peak_memory_bytes() -> int | None:
    """The most memory that this process has held so far, on the host only.

    Linux's VmHWM is read, not ``getrusage``, whose value a child process inherits from a larger parent.
    """
    return read_sizes(Path("/proc/self/status")).get("VmHWM")


def available_memory_bytes(swap: bool = True) -> int | None:
    """What can be taken without evicting others: free memory and ``swap``, or less in a container near its limit.

    An integrated GPU shares this memory and cannot use swap.
    """
    sizes, memory = [], read_sizes(_MEMINFO)
    if "MemAvailable" in memory:
        sizes.append(memory["MemAvailable"] + (memory.get("SwapFree", 0) if swap else 0))
    limit, current = read_number(_CGROUP / "memory.max"), read_number(_CGROUP / "memory.current")
    if limit is not None and current is not None:
        sizes.append(max(0, limit - current))
    return min(sizes, default=None)


def oom_kills() -> int:
    """How many processes the kernel has ended for want of memory, on this machine and in this container."""
    texts = (read_text(Path("/proc/vmstat")), read_text(_CGROUP / "memory.events"))
    lines = [line.split() for text in texts if text for line in text.splitlines()]
    return sum(int(line[1]) for line in lines if line[0] == "oom_kill")


def cache_directory() -> Path:
    """Where downloads and engines are cached: ``XDG_CACHE_HOME``, else ``.cache`` in the home folder.

    A user without a home folder, as in many containers, has a private folder among the temporary files instead. It is
    made here, for everybody may write beside it.

    Raises:
        MachineError: that folder cannot be made, or is another user's.
    """
    if chosen := os.environ.get("XDG_CACHE_HOME"):
        return Path(os.path.expanduser(chosen))
    if has_home():
        return Path.home() / ".cache"
    user = os.getuid() if hasattr(os, "getuid") else 0  # as os.stat has it on Windows
    folder = Path(tempfile.gettempdir()) / f"moebius-edge-{user}"
    problem, remedy = f"there is no home folder, and {folder}", "set XDG_CACHE_HOME to a folder of yours"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        owner = os.lstat(folder).st_uid
    except OSError as error:
        raise MachineError(f"{problem} cannot be made ({error.strerror})", remedy) from None
    if owner != user:
        raise MachineError(f"{problem} belongs to another user", remedy)
    return folder


def has_home() -> bool:
    """Whether ``HOME`` or the list of users names a home folder."""
    try:
        Path.home()
    except RuntimeError:
        return False
    return True


def package_version(*names: str) -> tuple[str, str] | None:
    """(name, version) of the first of these distributions that is installed."""
    for name in names:
        with suppress(metadata.PackageNotFoundError):
            return name, metadata.version(name)
    return None


def has_nvidia_gpu() -> bool:
    """Whether there is an NVIDIA GPU, whether or not CUDA can use it: its driver is loaded, or this is a Jetson."""
    return bool(gpus()) or DRIVER_FILE.exists() or "jetson" in (_board() or "").lower()


def _board() -> str | None:
    return read_text(Path("/proc/device-tree/model")) or None  # the device tree has it, as on a Jetson


def read_text(path: Path) -> str | None:
    """A file's text without the NULs that end a device tree's strings; None where it cannot be read."""
    with suppress(OSError):
        return path.read_text(encoding="utf-8", errors="replace").strip("\0\n ")
    return None


def read_number(path: Path) -> int | None:
    """The number in a file; None also for "max", by which a control group says that there is no limit."""
    text = read_text(path)
    return int(text) if text and re.fullmatch(r"-?\d+", text) else None


def read_sizes(path: Path) -> dict[str, int]:
    """The sizes in a file such as /proc/meminfo, in bytes."""
    rows = re.findall(r"^(\w+):\s+(\d+) kB", read_text(path) or "", re.MULTILINE)
    return {name: int(kilobytes) * 1024 for name, kilobytes in rows}
