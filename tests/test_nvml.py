"""A GPU's power on a stand-in for ``pynvml``; no NVIDIA library is loaded."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from moebius_edge.report.meter import Meter, SourceError
from moebius_edge.report.nvml import NvmlSource


class NVMLError(Exception):
    pass


class Fake(SimpleNamespace):
    """``pynvml`` of a driver that does all; ``lacks`` are the functions it refuses."""

    NVMLError = NVMLError
    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0

    def __init__(self, count: int = 1, flags: int = 0x01, lacks: tuple[str, ...] = ()) -> None:
        super().__init__(count=count, flags=flags, lacks=lacks, millijoules=5_000_000, open=0, asked=[])

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("nvml") and name in object.__getattribute__(self, "lacks"):

            def refuse(*arguments: Any) -> Any:
                raise NVMLError("Not Supported")

            return refuse
        return object.__getattribute__(self, name)

    def nvmlInit(self) -> None:
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlDeviceGetCount(self) -> int:
        return int(self.count)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:
        self.asked.append(index)
        return f"slot {index}"

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        self.asked.append(uuid)
        return uuid

    def nvmlDeviceGetEnforcedPowerLimit(self, gpu: str) -> int:
        return 350_000

    def nvmlDeviceGetTotalEnergyConsumption(self, gpu: str) -> int:
        self.millijoules += 40_000
        return int(self.millijoules)

    def nvmlDeviceGetPowerUsage(self, gpu: str) -> int:
        return 200_000

    def nvmlDeviceGetClockInfo(self, gpu: str, kind: int) -> int:
        return {1: 1755, 2: 2619}[kind]

    def nvmlDeviceGetCurrentClocksEventReasons(self, gpu: str) -> int:
        return int(self.flags)

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, gpu: str) -> int:
        return int(self.flags)

    def nvmlDeviceGetTemperature(self, gpu: str, sensor: int) -> int:
        return 61


def opened(package: Fake, **environment: str) -> NvmlSource:
    source = NvmlSource(package, environment)
    source.open()
    return source


def test_all_that_a_gpu_tells() -> None:
    source = opened(Fake())
    sample = source.sample()
    assert (sample.watts, sample.joules, sample.temperature_c) == (200.0, 5040.0, 61.0)
    assert sample.clocks_mhz == {"gpu": 1755.0, "memory": 2619.0}
    assert sample.throttles == (), "idle is no throttling"
    assert source.power_limit_watts == 350.0


def test_throttling() -> None:
    assert opened(Fake(flags=0x04 | 0x40)).sample().throttles == ("power cap", "thermal slowdown (hardware)")
    old = Fake(flags=0x08, lacks=("nvmlDeviceGetCurrentClocksEventReasons",))
    assert opened(old).sample().throttles == ("hardware slowdown",)


def test_the_counter_is_used_where_it_is_there() -> None:
    package = Fake()
    with Meter(NvmlSource(package, {}), period_s=10) as meter:
        pass
    assert meter.energy().samples == 2 and package.open == 0, "shut down again"
    joules = meter.energy().joules
    assert joules is not None and 0 < joules <= 40
    without = Fake(lacks=("nvmlDeviceGetTotalEnergyConsumption",))
    with Meter(NvmlSource(without, {}), period_s=0.01) as meter:
        pass
    assert meter.energy().mean_watts == pytest.approx(200)


def test_a_gpu_that_tells_little() -> None:
    lacks = tuple(n for n in dir(Fake) if n.startswith("nvmlDeviceGet") and "Handle" not in n and "Count" not in n)
    sample = opened(Fake(lacks=lacks)).sample()
    assert (sample.watts, sample.joules, sample.throttles, dict(sample.clocks_mhz)) == (None, None, None, {})


@pytest.mark.parametrize(
    ("environment", "asked"),
    [
        ({}, None),
        ({"CUDA_VISIBLE_DEVICES": "1"}, None),
        ({"CUDA_VISIBLE_DEVICES": "1", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}, 1),
        ({"CUDA_VISIBLE_DEVICES": "GPU-8f,GPU-9a"}, "GPU-8f"),
    ],
)
def test_which_of_two_gpus(environment: dict[str, str], asked: int | str | None) -> None:
    package = Fake(count=2)
    if asked is None:
        with pytest.raises(SourceError, match="2 GPUs are here, and which one computes is not known: set CUDA_DEVICE"):
            opened(package, **environment)
    else:
        opened(package, **environment)
        assert package.asked == [asked]


def test_a_driver_that_does_not_answer() -> None:
    source = NvmlSource(Fake(lacks=("nvmlInit",)), {})
    with pytest.raises(SourceError, match=r"the driver does not answer \(Not Supported\): check `nvidia-smi`"):
        source.open()
    source.close()
    with pytest.raises(SourceError, match=r"the GPU cannot be opened \(Not Supported\)"):
        opened(Fake(lacks=("nvmlDeviceGetHandleByIndex",)))
