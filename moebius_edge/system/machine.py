"""Facts about this machine, from the standard library and /proc alone.

A fact that cannot be learnt is None or empty, never a guess. Nothing is imported to find its version, so
asking is cheap and cannot fail on a broken package.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from ..errors import MachineError

# The instructions that decide how fast a CPU multiplies matrices in float32, float16, bfloat16 and int8.
CPU_FEATURES = (
    *("avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_bf16", "amx_int8"),
    *("asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2"),  # Arm
)


def machine_info() -> dict[str, Any]:
    """What a latency figure depends on: operating system, board, CPU, memory, GPUs. Sizes in bytes."""
    return {
        "system": f"{platform.system()} {platform.release()}",
        "architecture": platform.machine(),
        "board": _board(),
        "python": platform.python_version(),
        "cpu": {
            "model": _cpu_model(),
            "logical_cpus": os.cpu_count(),
            "cores_available": available_cores(),
            "features": _cpu_features(),
        },
        "memory_bytes": _memory_bytes(),
        "gpus": gpus(),
    }


def available_cores() -> int:
    """The CPU cores this process may keep busy, often fewer than the machine's.

    Counts what the affinity allows, two hardware threads of one core as one (matrix products gain nothing
    from the second), and no more than a container's quota.
    """
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    cores = set()
    for cpu in os.sched_getaffinity(0):
        siblings = str(cpu)
        with suppress(OSError):
            siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text()
        cores.add(siblings)
    quota = float("inf")
    with suppress(OSError, ValueError):  # "max" is no number: no quota
        allowed, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        quota = max(1, round(int(allowed) / int(period)))
    return int(min(len(cores), quota))


def peak_memory_bytes() -> int | None:
    """The most memory this process has held so far; host memory only, not a discrete GPU's.

    Linux's VmHWM is preferred to ``getrusage``, whose figure a child inherits from a larger parent.
    """
    if (kilobytes := _proc_field("/proc/self/status", "VmHWM")) is not None:
        return int(kilobytes.split()[0]) * 1024
    with suppress(ImportError):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    return None


def available_memory_bytes() -> int | None:
    """What can be taken without evicting others: free memory and swap, less where a container's limit is near."""
    sizes = []
    fields = [_proc_field("/proc/meminfo", name) for name in ("MemAvailable", "SwapFree")]
    if fields[0] is not None:
        sizes.append(sum(int(f.split()[0]) * 1024 for f in fields if f))
    with suppress(OSError, ValueError):  # "max" is no number: no limit
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        sizes.append(max(0, limit - int(Path("/sys/fs/cgroup/memory.current").read_text())))
    return min(sizes, default=None)


def cache_directory() -> Path:
    """Where downloads and engines are kept: ``XDG_CACHE_HOME``, else ``.cache`` in the home folder.

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
        raise MachineError(f"{problem} cannot be made ({error.strerror}): {remedy}") from None
    if owner != user:
        raise MachineError(f"{problem} belongs to another user: {remedy}")
    return folder


def has_home() -> bool:
    """Whether ``HOME`` or the list of users names a home folder."""
    try:
        Path.home()
    except RuntimeError:
        return False
    return True


def oom_kills() -> int:
    """How many processes the kernel has ended for want of memory, on this machine and in this container."""
    count = 0
    for path in ("/proc/vmstat", "/sys/fs/cgroup/memory.events", "/sys/fs/cgroup/memory/memory.oom_control"):
        with suppress(OSError, ValueError):
            fields = dict(line.split(None, 1) for line in Path(path).read_text().splitlines() if " " in line)
            count += int(fields.get("oom_kill", 0))
    return count


def package_version(*names: str) -> tuple[str, str] | None:
    """(name, version) of the first of these distributions that is installed."""
    for name in names:
        with suppress(metadata.PackageNotFoundError):
            return name, metadata.version(name)
    return None


def gpus() -> list[dict[str, Any]]:
    """NVIDIA GPUs by ``nvidia-smi``: name, driver, compute capability, memory. Empty without the program."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    fields = "name,driver_version,compute_cap,memory.total"
    query = [program, f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []  # installed without a driver, as in many containers
    rows = [[field.strip() for field in line.split(",")] for line in answer.splitlines() if line.strip()]
    return [
        {
            "name": name,
            "driver": driver,
            "compute_capability": capability,
            # integrated GPUs share the host's memory and answer [N/A]
            "memory_bytes": int(float(memory) * 2**20) if memory.replace(".", "", 1).isdigit() else None,
        }
        for name, driver, capability, memory in (row for row in rows if len(row) == 4)
    ]


def gpu_memory_in_use() -> int | None:
    """Bytes of GPU memory that this process holds, by ``nvidia-smi``; None where that does not list it.

    It does not on a Jetson, and in a container whose process numbers are its own.
    """
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    query = [program, "--query-compute-apps=pid,used_gpu_memory", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    rows = [[field.strip() for field in line.split(",")] for line in answer.splitlines()]
    sizes = [row[1] for row in rows if len(row) == 2 and row[0] == str(os.getpid())]
    return sum(int(size) << 20 for size in sizes) if sizes and all(size.isdigit() for size in sizes) else None


def gpu_name() -> str | None:
    """The first NVIDIA GPU's name; a Jetson, which may lack ``nvidia-smi``, is called by its board's."""
    board = _board() or ""
    found = gpus()
    return found[0]["name"] if found else (board if "jetson" in board.lower() else None)


def _board() -> str | None:
    """The board's name where the device tree has one, as on a Jetson."""
    with suppress(OSError):
        text = Path("/proc/device-tree/model").read_text(encoding="utf-8", errors="replace")
        return text.strip("\0\n ") or None
    return None


def _cpu_model() -> str | None:
    for field in ("model name", "Hardware", "Model"):
        if value := _proc_field("/proc/cpuinfo", field):
            return value
    return platform.processor() or None


def _cpu_features() -> list[str]:
    flags = (_proc_field("/proc/cpuinfo", "flags") or _proc_field("/proc/cpuinfo", "Features") or "").split()
    return [feature for feature in CPU_FEATURES if feature in flags]


def _memory_bytes() -> int | None:
    """Physical memory, or the container's limit where that is lower."""
    sizes = []
    if (kilobytes := _proc_field("/proc/meminfo", "MemTotal")) is not None:
        sizes.append(int(kilobytes.split()[0]) * 1024)
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):  # "max" is no number: no limit
            sizes.append(int(Path(limit).read_text()))
    if not sizes and hasattr(os, "sysconf"):
        with suppress(ValueError, OSError):
            sizes.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(sizes, default=None)


def _proc_field(path: str, field: str) -> str | None:
    """The first ``field: value`` of a /proc file."""
    with suppress(OSError):
        for line in Path(path).read_text(encoding="utf-8", errors="replace").splitlines():
            name, colon, value = line.partition(":")
            if colon and name.strip() == field:
                return value.strip()
    return None
