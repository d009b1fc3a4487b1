"""The meter on sources whose power is known, the counters of CPUs and GPUs, and which source a machine has."""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from moebius_edge.errors import MachineError
from moebius_edge.report.power import Meter, NvmlSource, RaplSource, integrate, open_meter
from moebius_edge.system.nvml import GpuReading


def Reading(watts: float | None = None, joules: float | None = None, **more: Any) -> GpuReading:  # noqa: N802
    return GpuReading(watts, joules, **more)


class Known:
    """Tells what ``script`` holds, then its last again; ``fails`` at that reading."""

    covers, power_mode, power_limit_watts = "a resistor", "MAXN (0)", 25.0

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
    assert steady["joules"] == pytest.approx(10 * steady["seconds"]) and steady["seconds"] >= 0.1
    assert steady["mean_watts"] == pytest.approx(10) and steady["max_watts"] == 10 and steady["samples"] > 3
    assert (steady["source"], steady["covers"], steady["reason"]) == ("known", "a resistor", None)
    assert steady["throttled"] is None
    hot = Reading(watts=8.0, clocks_mhz={"gpu": 900.0}, temperature_c=71.0, throttles=("power cap",))
    cool = Reading(watts=4.0, clocks_mhz={"gpu": 300.0}, temperature_c=50.0, throttles=())
    found = energy(Known(hot, cool), images=4)
    assert found["max_temperature_c"] == 71 and 300 < found["clocks"]["gpu_mhz"] < 900
    assert found["throttled"] and found["throttle_reasons"] == ["power cap"]
    assert found["joules_per_image"] == pytest.approx(found["joules"] / 4)
    assert (found["power_mode"], found["power_limit_watts"]) == ("MAXN (0)", 25.0)
    assert energy(Known(cool))["throttled"] is False


def test_the_trapezoidal_rule() -> None:
    """5 W for a second, then to 15 W within two; the block was half a second longer than its readings."""
    readings = [(0.0, Reading(watts=5.0)), (1.0, Reading(watts=5.0)), (3.0, Reading(watts=15.0))]
    joules, most = integrate(readings, 3.5)
    assert joules == pytest.approx((5 * 1 + 10 * 2) / 3 * 3.5) and most == 15
    assert integrate(readings[:1], 2.0) == (10.0, 5.0), "one reading stands for all"
    assert integrate([], 2.0) == (None, None)


def test_a_counter_is_preferred_to_samples() -> None:
    readings = [(0.0, Reading(watts=50.0, joules=1000.0)), (1.0, Reading(watts=90.0, joules=1020.0)),
                (2.0, Reading(watts=50.0, joules=1030.0))]  # fmt: skip
    assert integrate(readings, 2.0) == (30.0, 90.0)
    counted = [(t, Reading(joules=s.joules)) for t, s in readings]
    assert integrate(counted, 2.0) == (30.0, 20.0), "the most is the steepest step's"
    assert integrate(counted, 1.0)[0] == 15.0, "read over two seconds, of a block of one"


def test_a_source_that_breaks_or_tells_nothing() -> None:
    broken = energy(Known(Reading(watts=3.0), fails=2))
    assert broken["reason"] == "it broke: mend it" and broken["samples"] == 2
    assert broken["joules"] == pytest.approx(3 * broken["seconds"])
    nothing = energy(Known(Reading(watts=3.0), fails=0))
    assert (nothing["joules"], nothing["mean_watts"], nothing["reason"]) == (None, None, "it broke: mend it")
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
    assert 4 < found["joules"] <= 5, "read a moment before and after the block"
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
        assert found.pop("seconds") >= 0 and found.pop("reason") == reason
        assert found.pop("samples") == 0 and found.pop("clocks") == {} and set(found.values()) == {None}


def test_a_gpu_is_measured_by_nvml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Monitor(Known):
        """Of a GPU that takes 200 W and counts 40 J between two readings."""

        power_limit_watts = 350.0

        def __init__(self) -> None:
            super().__init__(*(Reading(200.0, 40.0 * n) for n in range(1, 9)))

    monkeypatch.setattr("moebius_edge.report.power.NvmlSource", Monitor)
    with open_meter("cuda", tmp_path, period_s=10) as meter:
        pass
    found = meter.energy()
    assert (found["source"], found["samples"], found["power_limit_watts"]) == ("nvml", 2, 350)
    assert 0 < found["joules"] <= 40 and found["max_watts"] == 200
    assert "not the host" in NvmlSource.covers
