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
from moebius_edge.report.power import (
    Ina3221Source,
    Meter,
    NvmlSource,
    RaplSource,
    TegrastatsSource,
    integrate,
    open_meter,
    parse_line,
)
from moebius_edge.system.jetson import Board, read_board
from moebius_edge.system.nvml import GpuReading

LINES = Path(__file__).parent / "data" / "tegrastats"
BOARDS = Path(__file__).parent / "data" / "jetson"


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


def lines(name: str) -> list[str]:
    return (LINES / f"{name}.txt").read_text().splitlines()


def nano() -> Board:
    board = read_board(BOARDS / "orin-nano-8gb")
    assert board is not None
    return board


@pytest.mark.parametrize(
    ("name", "watts", "rails", "gpu_mhz", "hottest"),
    [
        ("orin-nano-jetpack6", 5.251, "VDD_IN", 305, 49.625),
        ("orin-nano-jetpack6-user", 4.824, "VDD_IN", None, 50.25),
        ("orin-nano-jetpack5", 4.412, "VDD_IN", None, 47.906),
        ("agx-orin-jetpack5", 6.755, "VDD_GPU_SOC + VDD_CPU_CV + VIN_SYS_5V0", None, 44.562),
        ("agx-orin-jetpack6", 8.726, "VDD_GPU_SOC + VDD_CPU_CV + VIN_SYS_5V0", None, 52.562),
        ("agx-thor-jetpack7", 9.25, "VDD_GPU + VDD_CPU_SOC_MSS + VIN_SYS_5V0", None, 36.062),
        ("agx-thor-with-input", 26.686, "VIN", None, 39.906),
        ("xavier-nx-jetpack5", 2.763, "VDD_IN", 114, 50.0),
        ("agx-xavier", 5.258, "GPU + CPU + SOC + CV + VDDRQ + SYS5V", 114, 50.0),
        ("nano-jetpack4", 1.75, "POM_5V_IN", 76, 50.0),
    ],
)
def test_boards(name: str, watts: float, rails: str, gpu_mhz: float | None, hottest: float) -> None:
    found, temperatures, clocks = parse_line(lines(name)[0])
    source = tegrastats("pass")
    reading = source.reading(found, clocks, max(temperatures.values()))
    source.close()
    assert (reading.watts, source.covers) == (pytest.approx(watts), f"the module: {rails}")
    assert reading.clocks_mhz == ({"gpu": gpu_mhz} if gpu_mhz else {}) and reading.temperature_c == hottest


def test_all_of_a_line() -> None:
    rails, temperatures, clocks = parse_line(lines("orin-nano-jetpack6")[1])
    assert rails == {"VDD_IN": 16.321, "VDD_CPU_GPU_CV": 7.104, "VDD_SOC": 3.12}, "now, not the mean since"
    assert clocks == {"gpu": 612.0} and temperatures["tj"] == 58.312 and len(temperatures) == 6
    rails, temperatures, _ = parse_line(lines("agx-orin-jetpack5")[0])
    assert "GPU" not in temperatures and not {"NC", "RAM", "SWAP"} & rails.keys()
    assert parse_line("tegrastats: permission denied") == ({}, {}, {})


def tegrastats(code: str) -> TegrastatsSource:
    return TegrastatsSource(nano(), BOARDS / "orin-nano-8gb", 0.1, [sys.executable, "-u", "-c", code])


def test_the_newest_line_is_read() -> None:
    idle, busy = lines("orin-nano-jetpack6")
    source = tegrastats(f"import time; print({idle!r}); print({busy!r}); time.sleep(60)")
    try:
        time.sleep(0.5)  # both lines wait
        reading = source.read()
    finally:
        source.close()
    assert (reading.watts, reading.clocks_mhz, reading.temperature_c) == (16.321, {"gpu": 612.0}, 58.625)
    assert source.covers == "the module: VDD_IN" and source.power_mode == "25W (1)"


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("print('RAM 1/2MB VDD_GPU 1mW/1mW')", r"its rails \(VDD_GPU\) are not those of a known module"),
        ("print('no power here')", r"its rails \(none\)"),
        ("pass", "ended: run it by hand, it may need `sudo`"),
        ("import time; time.sleep(60)", "printed nothing for 0 s"),
    ],
)
def test_what_cannot_be_read(code: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if "sleep" in code:
        monkeypatch.setattr("moebius_edge.report.power._SILENCE_S", 0.2)
    source = tegrastats(code)
    with pytest.raises(MachineError, match=text):
        source.read()
    source.close()


def test_a_jetson_prefers_tegrastats(jetson: Path, tmp_path: Path) -> None:
    """What is really started, by a script of that name on the path."""
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "tegrastats"
    loop = "while :; do echo GR3D_FREQ 9%@[612] VDD_IN 7000mW/6000mW; /bin/sleep 0.02; done"
    program.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/arguments\n{loop}\n')
    program.chmod(0o755)
    with open_meter("cpu", jetson, period_s=0.02) as meter:
        pass
    assert meter.name == "tegrastats" and meter.energy()["mean_watts"] == 7
    assert (tmp_path / "arguments").read_text() == "--interval 20\n"


@pytest.fixture
def jetson(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An Orin Nano's files with its sensors', and no programs."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    root = tmp_path / "root"
    shutil.copytree(BOARDS / "orin-nano-8gb", root)
    sensors(root).mkdir(parents=True)
    channels = {1: ("VDD_IN", 4960, 1200), 2: ("VDD_CPU_GPU_CV", 4960, 400), 3: ("VDD_SOC", 4968, 300)}
    for number, (label, millivolts, milliamperes) in channels.items():
        (sensors(root) / f"in{number}_label").write_text(f"{label}\n")
        (sensors(root) / f"in{number}_input").write_text(f"{millivolts}\n")
        (sensors(root) / f"curr{number}_input").write_text(f"{milliamperes}\n")
    (sensors(root) / "in7_label").write_text("sum of shunt voltages\n")
    return root


def sensors(root: Path) -> Path:
    return root / "sys/bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon1"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_jetson_in_a_container_reads_its_sensors(jetson: Path, device: str) -> None:
    with open_meter(device, jetson, period_s=0.01) as meter:
        pass
    energy = meter.energy()
    assert (energy["source"], energy["covers"], energy["power_mode"]) == ("ina3221", "the module: VDD_IN", "25W (1)")
    assert energy["mean_watts"] == pytest.approx(4.96 * 1.2)
    assert energy["clocks"] == {"GPU 17000000.gpu_mhz": 306.0, "CPU 0,1,2,3,4,5_mhz": 729.6}
    assert energy["throttled"] is None, "there are neither alerts nor counters"


def test_a_jetson_without_any_power(jetson: Path) -> None:
    current = sensors(jetson) / "curr1_input"
    current.write_text("<none>\n")
    assert f"ina3221: {current} holds no number" in open_meter("cpu", jetson).reason
    for name in ("in1_label", "in1_input", "curr1_input"):
        current.with_name(name).unlink()
    assert "its rails (VDD_CPU_GPU_CV, VDD_SOC) are not those of a known module" in open_meter("cpu", jetson).reason
    shutil.rmtree(sensors(jetson))
    meter = open_meter("cpu", jetson)
    assert meter.source is None and meter.reason == (
        "tegrastats: the program tegrastats is not found: it comes with JetPack, outside containers; "
        "ina3221: there are no rails under /sys/bus/i2c/drivers/ina3221"
    )


def test_throttling_is_seen(jetson: Path) -> None:
    alert, idle = (jetson / f"sys/class/thermal/cooling_device{n}" for n in (0, 1))
    for folder, kind in ((alert, "gpu-throttle-alert"), (idle, "pwm-fan")):
        folder.mkdir()
        (folder / "type").write_text(f"{kind}\n")
        (folder / "cur_state").write_text("1\n")
    counter = jetson / "sys/class/hwmon/hwmon3/oc3_event_cnt"
    counter.parent.mkdir(parents=True)
    counter.write_text("7\n")
    source = Ina3221Source(nano(), jetson)
    assert source.read().throttles == ("gpu-throttle-alert",), "seven events were before"
    (alert / "cur_state").write_text("0\n")
    assert source.read().throttles == ()
    counter.write_text("8\n")
    assert source.read().throttles == ("over-current oc3",)
