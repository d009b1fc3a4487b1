"""Which source is chosen on which machine, and what is said where none works."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from moebius_edge.report.power import open_meter

JETSON = Path(__file__).parent / "data" / "jetson" / "orin-nano-8gb"


@pytest.fixture
def jetson(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An Orin Nano's files, without programs and packages."""
    monkeypatch.setitem(sys.modules, "jtop", None)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    shutil.copytree(JETSON, tmp_path / "root")
    return tmp_path / "root"


def add_rails(root: Path) -> Path:
    folder = root / "sys/bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon1"
    folder.mkdir(parents=True)
    channels = {1: ("VDD_IN", 4960, 1200), 2: ("VDD_CPU_GPU_CV", 4960, 400), 3: ("VDD_SOC", 4968, 300)}
    for number, (label, millivolts, milliamperes) in channels.items():
        (folder / f"in{number}_label").write_text(f"{label}\n")
        (folder / f"in{number}_input").write_text(f"{millivolts}\n")
        (folder / f"curr{number}_input").write_text(f"{milliamperes}\n")
    (folder / "in7_label").write_text("sum of shunt voltages\n")
    return folder


def test_this_machine_says_why_it_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with open_meter("cpu", tmp_path) as meter:
        pass
    assert meter.energy().reason == (
        "rapl: this machine offers no energy counter: there is no /sys/class/powercap/intel-rapl:0"
    )
    assert open_meter("cuda", tmp_path).reason == (
        "nvml: the package nvidia-ml-py is missing: run `pip install nvidia-ml-py`"
    )


def test_a_jetson_without_any(jetson: Path) -> None:
    meter = open_meter("cpu", jetson)
    assert meter.source is None and meter.reason == (
        "tegrastats: the program tegrastats is not found: it comes with JetPack, outside of containers; "
        "ina3221: there are no rails under /sys/bus/i2c/drivers/ina3221; "
        "jtop: the package jetson-stats is missing: run `sudo pip3 install jetson-stats`"
    )


@pytest.mark.parametrize("device", ["cpu", "cuda", "tensorrt"])
def test_a_jetson_in_a_container_reads_its_sensors(jetson: Path, device: str) -> None:
    add_rails(jetson)
    with open_meter(device, jetson, period_s=0.01) as meter:
        pass
    energy = meter.energy()
    assert (energy.source, energy.covers, energy.power_mode) == ("ina3221", "the module: VDD_IN", "25W (1)")
    assert energy.mean_watts == pytest.approx(4.96 * 1.2)
    assert energy.clocks_mhz == {"GPU 17000000.gpu": 306.0, "CPU 0,1,2,3,4,5": 729.6}
    assert energy.throttles is None, "there are neither alerts nor counters"


def test_a_jetson_prefers_tegrastats(jetson: Path, tmp_path: Path) -> None:
    add_rails(jetson)
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "tegrastats"
    program.write_text("#!/bin/sh\nwhile :; do echo GR3D_FREQ 9%@[612] VDD_IN 7000mW/6000mW; /bin/sleep 0.02; done\n")
    program.chmod(0o755)
    with open_meter("cpu", jetson, period_s=0.02) as meter:
        pass
    assert meter.source is not None and meter.source.name == "tegrastats" and meter.reason == ""


def test_a_sensor_that_root_keeps(jetson: Path) -> None:
    broken = add_rails(jetson) / "curr1_input"
    broken.write_text("<none>\n")
    assert f"ina3221: {broken} holds '<none>' and no number" in open_meter("cpu", jetson).reason
    for name in ("in1_label", "in1_input", "curr1_input"):
        broken.with_name(name).unlink()
    assert "its rails (VDD_CPU_GPU_CV, VDD_SOC) are not those of a known module" in open_meter("cpu", jetson).reason


def test_throttling_is_seen(jetson: Path) -> None:
    add_rails(jetson)
    alert, idle = (jetson / f"sys/class/thermal/cooling_device{n}" for n in (0, 1))
    for folder, kind in ((alert, "gpu-throttle-alert"), (idle, "pwm-fan")):
        folder.mkdir()
        (folder / "type").write_text(f"{kind}\n")
        (folder / "cur_state").write_text("1\n")
    counter = jetson / "sys/class/hwmon/hwmon3/oc3_event_cnt"
    counter.parent.mkdir(parents=True)
    counter.write_text("7\n")
    with open_meter("cpu", jetson) as meter:
        pass
    assert meter.energy().throttles == ("gpu-throttle-alert",), "seven events were before"
    (alert / "cur_state").write_text("0\n")
    with meter:
        counter.write_text("8\n")
    assert meter.energy().throttles == ("over-current oc3",)
    with meter:
        pass
    assert meter.energy().throttles == ()
