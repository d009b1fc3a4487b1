"""The meter on sources whose power is known, the counters of CPUs and GPUs, and a Jetson's rails."""

from __future__ import annotations

import shutil
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from moebius_edge.errors import MachineError
from moebius_edge.report.power import JetsonSource, Meter, NvmlSource, RaplSource, integrate, open_meter
from moebius_edge.system.jetson import Board, read_board
from moebius_edge.system.nvml import GpuReading

BOARDS = Path(__file__).parent / "data" / "jetson"


def Reading(watts: float | None = None, joules: float | None = None, **more: Any) -> GpuReading:  # noqa: N802
    return GpuReading(watts, joules, **more)


class Known:
    """Tells what ``script`` holds, then its last again; ``fails`` at that reading."""

    covers, power_mode = "a resistor", "MAXN (0)"

    def __init__(self, *script: GpuReading, fails: int | None = None) -> None:
        self.script, self.fails = list(script), fails
        self.taken = self.closed = 0

    def read(self) -> GpuReading:
        if self.taken == self.fails:
            raise MachineError("it broke: mend it")
        self.taken += 1
        return self.script[min(self.taken, len(self.script)) - 1]

    def close(self) -> None:
        self.closed += 1


def energy(source: Known, images: int = 1) -> dict[str, Any]:
    with Meter("known", source, period_s=0.01) as meter:
        time.sleep(0.1)
    assert source.closed == 1
    return meter.energy(images)


def test_constant_power_and_what_else_was_seen() -> None:
    steady = energy(Known(Reading(watts=10.0)))
    assert steady["mean_watts"] == pytest.approx(10) and steady["joules_per_image"] >= 1.0
    assert (steady["source"], steady["covers"], steady["power_mode"]) == ("known", "a resistor", "MAXN (0)")
    assert steady["reason"] is None and steady["throttled"] is None
    hot, cool = Reading(watts=8.0, throttles=("power cap",)), Reading(watts=8.0, throttles=())
    found = energy(Known(hot, cool), images=4)
    assert found["throttled"] and found["throttle_reasons"] == ["power cap"]
    assert found["mean_watts"] == pytest.approx(8) and 0.2 <= found["joules_per_image"] < 8 * 30 / 4
    assert energy(Known(cool))["throttled"] is False


def test_the_trapezoidal_rule() -> None:
    """5 W for a second, then to 15 W within two; the block was half a second longer than its readings."""
    readings = [(0.0, Reading(watts=5.0)), (1.0, Reading(watts=5.0)), (3.0, Reading(watts=15.0))]
    assert integrate(readings, 3.5) == pytest.approx((5 * 1 + 10 * 2) / 3 * 3.5)
    assert integrate(readings[:1], 2.0) == 10.0, "one reading stands for all"
    assert integrate([], 2.0) is None


def test_a_counter_is_preferred_to_samples() -> None:
    readings = [(float(t), Reading(watts=50.0, joules=joules)) for t, joules in enumerate((1000.0, 1020.0, 1030.0))]
    assert integrate(readings, 2.0) == 30.0
    assert integrate(readings, 1.0) == 15.0, "read over two seconds, of a block of one"


def test_a_source_that_breaks_or_tells_nothing() -> None:
    broken = energy(Known(Reading(watts=3.0), fails=2))
    assert broken["reason"] == "it broke: mend it" and broken["mean_watts"] == pytest.approx(3)
    nothing = energy(Known(Reading(watts=3.0), fails=0))
    assert (nothing["joules_per_image"], nothing["mean_watts"], nothing["reason"]) == (None, None, "it broke: mend it")
    assert energy(Known(Reading()))["reason"].startswith("known gave no reading of power in 0.1")


def test_an_error_in_the_block_ends_the_thread() -> None:
    source = Known(Reading(watts=1.0))
    with pytest.raises(ZeroDivisionError), Meter("known", source, period_s=0.01):
        raise ZeroDivisionError
    assert source.closed == 1
    assert not [t for t in threading.enumerate() if t.name == "power meter"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two CPU packages, with the zone of the cores inside the first."""
    for zone, joules in (("intel-rapl:0", 900), ("intel-rapl:0:0", 400), ("intel-rapl:1", 0)):
        folder = tmp_path / "sys/class/powercap" / zone
        folder.mkdir(parents=True)
        (folder / "energy_uj").write_text(f"{joules}000000\n")
        (folder / "max_energy_range_uj").write_text("1000000000\n")
    return tmp_path


def set_joules(root: Path, zone: str, joules: int) -> None:
    (root / f"sys/class/powercap/intel-rapl:{zone}/energy_uj").write_text(f"{joules}000000\n")


def test_packages_are_summed_and_counters_start_again(root: Path) -> None:
    source = RaplSource(root)
    assert source.read().joules == 0
    set_joules(root, "0", 950)
    set_joules(root, "1", 20)
    set_joules(root, "0:0", 700)  # inside package 0: counted there
    assert source.read().joules == 70
    set_joules(root, "0", 10)
    assert source.read().joules == 70 + 60


def test_a_cpu_is_measured_by_its_counters(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_meter("cpu", root) as meter:
        set_joules(root, "1", 5)
        time.sleep(0.3)
    found = meter.energy()
    assert (found["source"], found["covers"]) == ("rapl", "the CPU packages, not the memory")
    assert 4 < found["joules_per_image"] <= 5, "read a moment before and after the block"
    path = root / "sys/class/powercap/intel-rapl:0/energy_uj"
    path.write_text("none\n")
    assert f"rapl: {path} holds no number" in open_meter("cpu", root).reason

    def refuse(self: Path, *options: Any, **more: Any) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_text", refuse)
    reason = f"rapl: {path} cannot be read (Permission denied): run `sudo chmod a+r {path}`"
    assert open_meter("cpu", root).reason == reason


def test_a_machine_without_any_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    for device, reason in (
        ("cpu", "rapl: this machine offers no energy counter: there is no /sys/class/powercap/intel-rapl:0"),
        ("cuda", "nvml: the package nvidia-ml-py is missing: run `pip install nvidia-ml-py`"),
    ):
        with open_meter(device, tmp_path) as meter:
            pass
        found = meter.energy()
        assert found.pop("reason") == reason and found.pop("throttle_reasons") == [] and set(found.values()) == {None}


def test_a_gpu_is_measured_by_nvml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that counts 40 J between two readings."""
    monitor = Known(*(Reading(200.0, 40.0 * n) for n in range(1, 9)))
    monkeypatch.setattr("moebius_edge.report.power.NvmlSource", lambda: monitor)
    with open_meter("cuda", tmp_path, period_s=10) as meter:
        pass
    assert meter.energy()["source"] == "nvml" and 0 < meter.energy()["joules_per_image"] <= 40
    assert monitor.taken == 2 and "not the host" in NvmlSource.covers


def nano() -> Board:
    board = read_board(BOARDS / "orin-nano-8gb")
    assert board is not None
    return board


def write_rails(root: Path, **milliwatts: int) -> Path:
    """Sensors with these rails, at 1 V each, and one channel without a current; returns their folder."""
    folder = root / "sys/bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon1"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for number, (label, current) in enumerate(milliwatts.items(), start=1):
        (folder / f"in{number}_label").write_text(f"{label}\n")
        (folder / f"in{number}_input").write_text("1000\n")
        (folder / f"curr{number}_input").write_text(f"{current}\n")
    (folder / "in7_label").write_text("sum of shunt voltages\n")
    return folder


@pytest.mark.parametrize(
    ("rails", "watts", "covers"),
    [
        (dict(VDD_IN=5251, VDD_CPU_GPU_CV=1104, VDD_SOC=1520), 5.251, "VDD_IN"),
        (
            dict(VDD_GPU_SOC=2763, VDD_CPU_CV=798, VIN_SYS_5V0=3194, VDDQ_VDD2_1V8AO=399),
            6.755,
            "VDD_GPU_SOC + VDD_CPU_CV + VIN_SYS_5V0",
        ),
        (
            dict(VDD_GPU=2000, VDD_CPU_SOC_MSS=3250, VIN_SYS_5V0=4000),
            9.25,
            "VDD_GPU + VDD_CPU_SOC_MSS + VIN_SYS_5V0",
        ),
    ],
)
def test_the_rails_of_a_module(tmp_path: Path, rails: dict[str, int], watts: float, covers: str) -> None:
    """Of Orin Nano, AGX Orin and AGX Thor: what feeds another rail counts once."""
    write_rails(tmp_path, **rails)
    source = JetsonSource(nano(), tmp_path)
    assert (source.read().watts, source.covers) == (pytest.approx(watts), f"the module: {covers}")


@pytest.fixture
def jetson(tmp_path: Path) -> Path:
    """An Orin Nano's files, as a container shows them."""
    shutil.copytree(BOARDS / "orin-nano-8gb", tmp_path / "root")
    return tmp_path / "root"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_jetson_reads_its_sensors(jetson: Path, device: str) -> None:
    write_rails(jetson, VDD_IN=5952)
    with open_meter(device, jetson, period_s=0.01) as meter:
        pass
    energy = meter.energy()
    assert (energy["source"], energy["covers"], energy["power_mode"]) == ("ina3221", "the module: VDD_IN", "25W (1)")
    assert energy["mean_watts"] == pytest.approx(5.952)
    assert energy["throttled"] is None, "there are neither alerts nor counters"


def test_a_jetson_without_any_power(jetson: Path) -> None:
    assert open_meter("cpu", jetson).reason == "ina3221: its rails (none) are not those of a known module"
    folder = write_rails(jetson, VDD_SOC=1, VDD_GPU=2)
    assert "its rails (VDD_SOC, VDD_GPU) are not those of a known module" in open_meter("cpu", jetson).reason
    folder = write_rails(jetson, VDD_IN=1)
    (folder / "curr1_input").write_text("<none>\n")
    with open_meter("cpu", jetson) as meter:
        pass
    assert meter.energy()["reason"] == f"{folder}/curr1_input holds no number"


def test_throttling_is_seen(jetson: Path) -> None:
    write_rails(jetson, VDD_IN=1)
    alert, idle = (jetson / f"sys/class/thermal/cooling_device{n}" for n in (0, 1))
    for folder, kind in ((alert, "gpu-throttle-alert"), (idle, "pwm-fan")):
        folder.mkdir()
        (folder / "type").write_text(f"{kind}\n")
        (folder / "cur_state").write_text("1\n")
    counter = jetson / "sys/class/hwmon/hwmon3/oc3_event_cnt"
    counter.parent.mkdir(parents=True)
    counter.write_text("7\n")
    source = JetsonSource(nano(), jetson)
    assert source.read().throttles == ("gpu-throttle-alert",), "seven events were before"
    (alert / "cur_state").write_text("0\n")
    assert source.read().throttles == ()
    counter.write_text("8\n")
    assert source.read().throttles == ("over-current oc3",)
