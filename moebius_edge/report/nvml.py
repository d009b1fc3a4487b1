"""Power of an NVIDIA GPU through NVML, NVIDIA's management library, by the package nvidia-ml-py (module ``pynvml``).

Volta and later count their energy in millijoules, which is exact over a block; before that the power's samples are
integrated. From Ampere on a reading of power is itself a mean over a second, so that short blocks need the counter.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from typing import Any

from .meter import Sample, Source, SourceError

# nvmlClocksEventReasons that mean slower than asked for; idling and clocks that were set are none.
_THROTTLES = {
    0x04: "power cap",
    0x08: "hardware slowdown",
    0x20: "thermal slowdown (software)",
    0x40: "thermal slowdown (hardware)",
    0x80: "power brake",
}


class NvmlSource(Source):
    """The GPU that CUDA calls 0. ``package`` stands in for ``pynvml``, ``environment`` for the process's."""

    name = "nvml"
    covers = "the GPU with its memory and regulators, not the host"

    def __init__(self, package: Any = None, environment: Mapping[str, str] | None = None) -> None:
        self._package = package
        self._environment = os.environ if environment is None else environment
        self._nvml: Any = None
        self._gpu: Any = None

    def open(self) -> None:
        try:
            nvml = self._package or importlib.import_module("pynvml")
        except ImportError:
            raise SourceError("the package nvidia-ml-py is missing: run `pip install nvidia-ml-py`") from None
        try:
            nvml.nvmlInit()
        except nvml.NVMLError as error:
            raise SourceError(f"the driver does not answer ({error}): check `nvidia-smi`") from None
        self._nvml = nvml
        self._gpu = self._chosen()
        limit = self._ask("nvmlDeviceGetEnforcedPowerLimit")
        self.power_limit_watts = None if limit is None else limit / 1000

    def sample(self) -> Sample:
        nvml, clocks = self._nvml, {}
        millijoules, milliwatts = self._ask("nvmlDeviceGetTotalEnergyConsumption"), self._ask("nvmlDeviceGetPowerUsage")
        for name, kind in (("gpu", nvml.NVML_CLOCK_SM), ("memory", nvml.NVML_CLOCK_MEM)):
            mhz = self._ask("nvmlDeviceGetClockInfo", kind)
            if mhz is not None:
                clocks[name] = float(mhz)
        flags = self._ask("nvmlDeviceGetCurrentClocksEventReasons")
        if flags is None:  # its name before driver 535
            flags = self._ask("nvmlDeviceGetCurrentClocksThrottleReasons")
        temperature = self._ask("nvmlDeviceGetTemperature", nvml.NVML_TEMPERATURE_GPU)
        return Sample(
            watts=None if milliwatts is None else milliwatts / 1000,
            joules=None if millijoules is None else millijoules / 1000,
            clocks_mhz=clocks,
            temperature_c=None if temperature is None else float(temperature),
            throttles=None if flags is None else tuple(text for bit, text in _THROTTLES.items() if flags & bit),
        )

    def close(self) -> None:
        if self._nvml is not None:
            nvml, self._nvml, self._gpu = self._nvml, None, None
            nvml.nvmlShutdown()

    def _chosen(self) -> Any:
        """NVML numbers GPUs by their slots, CUDA by their speed: with several only an explicit choice is safe."""
        nvml, visible = self._nvml, self._environment.get("CUDA_VISIBLE_DEVICES", "").split(",")[0].strip()
        try:
            if visible.startswith("GPU-"):
                return nvml.nvmlDeviceGetHandleByUUID(visible)
            count = nvml.nvmlDeviceGetCount()
            by_slot = self._environment.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID"
            if count > 1 and not (visible.isdigit() and by_slot):
                raise SourceError(
                    f"{count} GPUs are here, and which one computes is not known: "
                    "set CUDA_DEVICE_ORDER=PCI_BUS_ID and CUDA_VISIBLE_DEVICES=0"
                )
            return nvml.nvmlDeviceGetHandleByIndex(int(visible) if visible.isdigit() else 0)
        except nvml.NVMLError as error:
            raise SourceError(f"the GPU cannot be opened ({error}): check CUDA_VISIBLE_DEVICES") from None

    def _ask(self, function: str, *arguments: Any) -> Any:
        """The GPU's answer; None where this GPU, driver or package does not have the question."""
        try:
            return getattr(self._nvml, function)(self._gpu, *arguments)
        except (AttributeError, self._nvml.NVMLError):
            return None
