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


def fake_pynvml(monkeypatch: pytest.MonkeyPatch, *lacks: str, count: int = 1, processes: Any = ()) -> SimpleNamespace:
    """``pynvml`` with ``count`` H100s; the functions ``lacks`` are refused by the driver."""
    fake = SimpleNamespace(NVMLError=type("NVMLError", (Exception,), {}), opened=[], sessions=0, flags=0x01)
    fake.NVML_CLOCK_SM, fake.NVML_CLOCK_MEM, fake.NVML_TEMPERATURE_GPU = 1, 2, 0

    def refuse(*functions: str) -> None:
        def refused(*arguments: Any) -> Any:
            raise fake.NVMLError("Not Supported")

        vars(fake).update(dict.fromkeys(functions, refused))

    def open_gpu(which: Any) -> Any:
        fake.opened.append(which)
        return which

    fake.refuse = refuse
    fake.nvmlInit = lambda: setattr(fake, "sessions", fake.sessions + 1)
    fake.nvmlShutdown = lambda: setattr(fake, "sessions", fake.sessions - 1)
    fake.nvmlDeviceGetHandleByIndex = fake.nvmlDeviceGetHandleByUUID = open_gpu
    fake.nvmlDeviceGetClockInfo = lambda gpu, kind: {1: 1755, 2: 2619}[kind]
    answers = {
        "nvmlDeviceGetCount": count,
        "nvmlSystemGetDriverVersion": "570.86.15",
        "nvmlDeviceGetName": "NVIDIA H100",
        "nvmlDeviceGetCudaComputeCapability": (9, 0),
        "nvmlDeviceGetMemoryInfo": SimpleNamespace(total=80 << 30),
        "nvmlDeviceGetComputeRunningProcesses": processes,
        "nvmlDeviceGetEnforcedPowerLimit": 350_000,
        "nvmlDeviceGetPowerUsage": 200_000,
        "nvmlDeviceGetTotalEnergyConsumption": 5_040_000,
        "nvmlDeviceGetTemperature": 61,
    }
    vars(fake).update({name: lambda *_, answer=answer: answer for name, answer in answers.items()})
    fake.nvmlDeviceGetCurrentClocksEventReasons = lambda gpu: fake.flags
    fake.nvmlDeviceGetCurrentClocksThrottleReasons = lambda gpu: fake.flags
    refuse(*lacks)
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    for name in ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"):
        monkeypatch.delenv(name, raising=False)
    return fake


def test_gpus_are_read_through_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = fake_pynvml(monkeypatch, count=2)
    h100 = Gpu(name="NVIDIA H100", driver="570.86.15", compute_capability="9.0", memory_bytes=80 << 30)
    assert gpus() == [h100, h100] and fake.sessions == 0
    assert machine.machine_info()["gpus"][0]["memory_bytes"] == 80 << 30
    fake_pynvml(monkeypatch, "nvmlDeviceGetMemoryInfo")
    assert gpus()[0].memory_bytes is None, "an integrated GPU shares the host's memory"


def test_without_the_package_or_a_driver_no_gpu_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_pynvml(monkeypatch, "nvmlInit")
    for text in (r"NVIDIA driver does not answer \(Not Supported\): check it", "run `pip install nvidia-ml-py`"):
        assert (gpus(), gpu_memory_in_use()) == ([], None)
        with pytest.raises(MachineError, match=text):
            GpuMonitor()
        monkeypatch.setitem(sys.modules, "pynvml", None)


def test_gpu_memory_is_this_processs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    own = os.getpid()
    for listed, held in (([(1, 100), (own, 700), (own, 24)], 724), ([(1, 100)], None), ([(own, None)], None)):
        fake_pynvml(monkeypatch, processes=[SimpleNamespace(pid=pid, usedGpuMemory=size) for pid, size in listed])
        assert gpu_memory_in_use() == held


def test_a_reading_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = fake_pynvml(monkeypatch)
    monitor = GpuMonitor()
    clocks = {"gpu": 1755.0, "memory": 2619.0}
    assert monitor.read() == nvml.GpuReading(200.0, 5040.0, clocks, 61.0, throttles=()), "idling is no throttling"
    assert monitor.power_limit_watts == 350.0
    fake.flags = 0x04 | 0x40
    assert monitor.read().throttles == ("power cap", "thermal slowdown (hardware)")
    fake.refuse("nvmlDeviceGetCurrentClocksEventReasons")
    assert monitor.read().throttles is not None, "an older driver has another name for it"
    fake.refuse("nvmlDeviceGetPowerUsage", "nvmlDeviceGetClockInfo")
    assert monitor.read().watts is None and monitor.read().clocks_mhz == {}
    monitor.close()
    assert fake.sessions == 0


def test_which_of_two_gpus_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = fake_pynvml(monkeypatch, count=2)
    for visible in ("", "1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        with pytest.raises(MachineError, match="2 GPUs are here, and which one computes is not known: set CUDA_DEVICE"):
            GpuMonitor()
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    GpuMonitor()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-8f,GPU-9a")
    GpuMonitor()
    assert fake.opened == [1, "GPU-8f"]
    fake.refuse("nvmlDeviceGetCount", "nvmlDeviceGetHandleByUUID")
    with pytest.raises(MachineError, match=r"the GPU cannot be opened \(Not Supported\)"):
        GpuMonitor()


def test_processes_that_the_kernel_ended_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = {"/proc/vmstat": "nr_free 9\noom_kill 3\n", "/sys/fs/cgroup/memory.events": "low 0\noom 1\noom_kill 2\n"}
    monkeypatch.setattr(machine, "read_text", lambda path: texts.get(str(path)))
    assert machine.oom_kills() == 5
