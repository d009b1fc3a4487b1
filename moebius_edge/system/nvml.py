"""What NVML, NVIDIA's management library, knows of the GPUs, through the package nvidia-ml-py (module ``pynvml``).

The package is imported when something is asked, so that a machine without it works; no GPU is known there.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from ..errors import MachineError

# The bits of nvmlClocksEventReasons that mean slower than asked for. Idling and clocks that a user set are none.
_THROTTLE_REASONS = {
    0x04: "power cap",
    0x08: "hardware slowdown",
    0x20: "thermal slowdown (software)",
    0x40: "thermal slowdown (hardware)",
    0x80: "power brake",
}


@dataclass(frozen=True)
class Gpu:
    """An NVIDIA GPU. ``memory_bytes`` is None for an integrated GPU, which shares the host's memory."""

    name: str
    driver: str
    compute_capability: str
    memory_bytes: int | None


@dataclass(frozen=True)
class GpuReading:
    """A GPU at one moment. ``joules`` count from any origin on; what the GPU does not report is None or absent."""

    watts: float | None
    joules: float | None
    clocks_mhz: dict[str, float] = field(default_factory=dict)
    temperature_c: float | None = None
    throttles: tuple[str, ...] | None = None


def gpus() -> list[Gpu]:
    """The NVIDIA GPUs of this machine in the order of their slots; empty without the package or without a driver."""
    try:
        with _library() as nvml:
            return [_describe(nvml, nvml.nvmlDeviceGetHandleByIndex(i)) for i in range(nvml.nvmlDeviceGetCount())]
    except MachineError:
        return []


def _describe(nvml: Any, handle: Any) -> Gpu:
    memory = _ask(nvml, "nvmlDeviceGetMemoryInfo", handle)
    return Gpu(
        name=nvml.nvmlDeviceGetName(handle),
        driver=nvml.nvmlSystemGetDriverVersion(),
        compute_capability=".".join(map(str, nvml.nvmlDeviceGetCudaComputeCapability(handle))),
        memory_bytes=None if memory is None else int(memory.total),
    )


def gpu_memory_in_use() -> int | None:
    """Bytes of GPU memory that this process holds; None where NVML does not list the process.

    It does not on a Jetson, nor in a container whose process numbers are its own.
    """
    try:
        with _library() as nvml:
            handles = map(nvml.nvmlDeviceGetHandleByIndex, range(nvml.nvmlDeviceGetCount()))
            processes = [p for handle in handles for p in nvml.nvmlDeviceGetComputeRunningProcesses(handle)]
    except MachineError:
        return None
    sizes = [process.usedGpuMemory for process in processes if process.pid == os.getpid()]
    return sum(sizes) if sizes and None not in sizes else None


class GpuMonitor:
    """The GPU that CUDA calls 0, opened so that it can be read many times; ``close`` it afterwards.

    ``power_limit_watts`` is the enforced limit, or None.

    Raises:
        MachineError: the package is missing, the driver does not answer, or it is not known which GPU computes.
    """

    def __init__(self) -> None:
        self._session = _library()
        self._nvml = self._session.__enter__()
        try:
            self._handle = _computing_gpu(self._nvml)
        except BaseException:
            self.close()
            raise
        milliwatts = self._ask("nvmlDeviceGetEnforcedPowerLimit")
        self.power_limit_watts = None if milliwatts is None else milliwatts / 1000

    def read(self) -> GpuReading:
        """The GPU as it is now; only GPUs from Volta on count their energy."""
        nvml = self._nvml
        milliwatts = self._ask("nvmlDeviceGetPowerUsage")
        millijoules = self._ask("nvmlDeviceGetTotalEnergyConsumption")
        kinds = {"gpu": nvml.NVML_CLOCK_SM, "memory": nvml.NVML_CLOCK_MEM}
        clocks = {name: self._ask("nvmlDeviceGetClockInfo", kind) for name, kind in kinds.items()}
        temperature = self._ask("nvmlDeviceGetTemperature", nvml.NVML_TEMPERATURE_GPU)
        flags = self._ask("nvmlDeviceGetCurrentClocksEventReasons")
        if flags is None:  # what drivers before 535 call it
            flags = self._ask("nvmlDeviceGetCurrentClocksThrottleReasons")
        return GpuReading(
            watts=None if milliwatts is None else milliwatts / 1000,
            joules=None if millijoules is None else millijoules / 1000,
            clocks_mhz={name: float(mhz) for name, mhz in clocks.items() if mhz is not None},
            temperature_c=None if temperature is None else float(temperature),
            throttles=None if flags is None else tuple(t for bit, t in _THROTTLE_REASONS.items() if flags & bit),
        )

    def close(self) -> None:
        """Shut the library down; this may be called only once."""
        self._session.__exit__(None, None, None)

    def _ask(self, function: str, *arguments: Any) -> Any:
        return _ask(self._nvml, function, self._handle, *arguments)


@contextmanager
def _library() -> Iterator[Any]:
    """The module ``pynvml``, initialised. An error of NVML, also in the block, becomes a ``MachineError``."""
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        raise MachineError("the package nvidia-ml-py is missing", "run `pip install nvidia-ml-py`") from None
    try:
        nvml.nvmlInit()
        try:
            yield nvml
        finally:
            nvml.nvmlShutdown()
    except nvml.NVMLError as error:
        raise MachineError(f"the NVIDIA driver does not answer ({error})", "check it with `nvidia-smi`") from None


def _ask(nvml: Any, function: str, *arguments: Any) -> Any:
    """The answer of an NVML function; None where this GPU, driver or package does not have it."""
    try:
        return getattr(nvml, function)(*arguments)
    except (AttributeError, nvml.NVMLError):
        return None


def _computing_gpu(nvml: Any) -> Any:
    """The handle of CUDA's GPU 0. NVML numbers GPUs by their slots and CUDA by their speed.

    With several GPUs only an explicit choice is therefore safe.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0].strip()
    try:
        if visible.startswith("GPU-"):
            return nvml.nvmlDeviceGetHandleByUUID(visible)
        count = nvml.nvmlDeviceGetCount()
        by_slot = os.environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID"
        if count > 1 and not (visible.isdigit() and by_slot):
            remedy = "set CUDA_DEVICE_ORDER=PCI_BUS_ID and CUDA_VISIBLE_DEVICES=0"
            raise MachineError(f"{count} GPUs are here, and which one computes is not known", remedy)
        return nvml.nvmlDeviceGetHandleByIndex(int(visible) if visible.isdigit() else 0)
    except nvml.NVMLError as error:
        raise MachineError(f"the GPU cannot be opened ({error})", "check CUDA_VISIBLE_DEVICES") from None
