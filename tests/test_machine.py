"""Facts about the machine. NVML is a stand-in for the module ``pynvml``; no NVIDIA library is loaded."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moebius_edge.errors import MachineError
from moebius_edge.system import machine, nvml
from moebius_edge.system.nvml import Gpu, GpuMonitor, gpu_memory_in_use, gpus


class FakePynvml(SimpleNamespace):
    """``pynvml`` with one H100, or ``count`` of them; ``lacks`` are the functions that the driver refuses."""

    class NVMLError(Exception):
        pass

    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0

    def __init__(self, monkeypatch: pytest.MonkeyPatch, count: int = 1, **facts: Any) -> None:
        super().__init__(**{"count": count, "lacks": (), "flags": 0x01, "processes": [], "sessions": 0, **facts})
        self.opened: list[Any] = []
        monkeypatch.setitem(sys.modules, "pynvml", self)
        for name in ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"):
            monkeypatch.delenv(name, raising=False)

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("nvml") and name in object.__getattribute__(self, "lacks"):
            return self._refuse
        return object.__getattribute__(self, name)

    def _refuse(self, *arguments: Any) -> Any:
        raise self.NVMLError("Not Supported")

    def _open(self, which: Any) -> Any:
        self.opened.append(which)
        return which

    def _start(self, change: int) -> None:
        self.sessions += change

    def __getattr__(self, name: str) -> Any:
        answers = {
            "nvmlInit": lambda: self._start(1),
            "nvmlShutdown": lambda: self._start(-1),
            "nvmlDeviceGetCount": lambda: self.count,
            "nvmlDeviceGetHandleByIndex": self._open,
            "nvmlDeviceGetHandleByUUID": self._open,
            "nvmlSystemGetDriverVersion": lambda: "570.86.15",
            "nvmlDeviceGetName": lambda gpu: "NVIDIA H100",
            "nvmlDeviceGetCudaComputeCapability": lambda gpu: (9, 0),
            "nvmlDeviceGetMemoryInfo": lambda gpu: SimpleNamespace(total=80 << 30),
            "nvmlDeviceGetComputeRunningProcesses": lambda gpu: self.processes,
            "nvmlDeviceGetEnforcedPowerLimit": lambda gpu: 350_000,
            "nvmlDeviceGetPowerUsage": lambda gpu: 200_000,
            "nvmlDeviceGetTotalEnergyConsumption": lambda gpu: 5_040_000,
            "nvmlDeviceGetClockInfo": lambda gpu, kind: {1: 1755, 2: 2619}[kind],
            "nvmlDeviceGetTemperature": lambda gpu, sensor: 61,
            "nvmlDeviceGetCurrentClocksEventReasons": lambda gpu: self.flags,
            "nvmlDeviceGetCurrentClocksThrottleReasons": lambda gpu: self.flags,
        }
        if name not in answers:
            raise AttributeError(name)
        return answers[name]


def test_gpus_are_read_through_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakePynvml(monkeypatch, count=2)
    h100 = Gpu(name="NVIDIA H100", driver="570.86.15", compute_capability="9.0", memory_bytes=80 << 30)
    assert gpus() == [h100, h100] and fake.sessions == 0
    assert machine.machine_info()["gpus"][0]["memory_bytes"] == 80 << 30
    FakePynvml(monkeypatch, lacks=("nvmlDeviceGetMemoryInfo",))
    assert gpus()[0].memory_bytes is None, "an integrated GPU shares the host's memory"


def test_without_the_package_or_a_driver_no_gpu_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    FakePynvml(monkeypatch, lacks=("nvmlInit",))
    assert (gpus(), gpu_memory_in_use()) == ([], None)
    with pytest.raises(MachineError, match=r"the NVIDIA driver does not answer \(Not Supported\): check it with `nvid"):
        GpuMonitor()
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert (gpus(), gpu_memory_in_use()) == ([], None)
    with pytest.raises(MachineError, match="nvidia-ml-py is missing: run `pip install nvidia-ml-py`"):
        GpuMonitor()


@pytest.mark.parametrize(
    ("listed", "held"),
    [
        ([(1, 100), (os.getpid(), 700), (os.getpid(), 24)], 724),
        ([(1, 100)], None),
        ([(os.getpid(), None)], None),
    ],
)
def test_gpu_memory_is_this_processs_own(
    listed: list[tuple[int, int | None]], held: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    FakePynvml(monkeypatch, processes=[SimpleNamespace(pid=pid, usedGpuMemory=size) for pid, size in listed])
    assert gpu_memory_in_use() == held


def test_a_reading_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakePynvml(monkeypatch)
    monitor = GpuMonitor()
    clocks = {"gpu": 1755.0, "memory": 2619.0}
    assert monitor.read() == nvml.GpuReading(200.0, 5040.0, clocks, 61.0, throttles=()), "idling is no throttling"
    assert monitor.power_limit_watts == 350.0
    fake.flags = 0x04 | 0x40
    assert monitor.read().throttles == ("power cap", "thermal slowdown (hardware)")
    fake.lacks = ("nvmlDeviceGetCurrentClocksEventReasons",)
    assert monitor.read().throttles is not None, "an older driver has another name for it"
    fake.lacks = tuple(name for name in dir(nvml) + ["nvmlDeviceGetPowerUsage", "nvmlDeviceGetClockInfo"])
    assert monitor.read().watts is None and monitor.read().clocks_mhz == {}
    monitor.close()
    assert fake.sessions == 0


@pytest.mark.parametrize(
    ("environment", "opened"),
    [
        ({}, None),
        ({"CUDA_VISIBLE_DEVICES": "1"}, None),
        ({"CUDA_VISIBLE_DEVICES": "1", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}, 1),
        ({"CUDA_VISIBLE_DEVICES": "GPU-8f,GPU-9a"}, "GPU-8f"),
    ],
)
def test_which_of_two_gpus_computes(
    environment: dict[str, str], opened: int | str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakePynvml(monkeypatch, count=2)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if opened is None:
        with pytest.raises(MachineError, match="2 GPUs are here, and which one computes is not known: set CUDA_DEVICE"):
            GpuMonitor()
    else:
        GpuMonitor()
        assert fake.opened == [opened]
    fake.lacks = ("nvmlDeviceGetCount", "nvmlDeviceGetHandleByUUID")
    with pytest.raises(MachineError, match=r"the GPU cannot be opened \(Not Supported\)"):
        GpuMonitor()


def test_processes_that_the_kernel_ended_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = {"/proc/vmstat": "nr_free 9\noom_kill 3\n", "/sys/fs/cgroup/memory.events": "low 0\noom 1\noom_kill 2\n"}
    monkeypatch.setattr(machine, "_read", lambda path: texts.get(str(path)))
    assert machine.oom_kills() == 5
