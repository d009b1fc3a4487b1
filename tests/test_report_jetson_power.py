"""A Jetson's power: lines of tegrastats from ten boards, its process, its sensors' files, and what throttles it."""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path

import pytest

from moebius_edge.errors import MachineError
from moebius_edge.report.jetson_power import Ina3221Source, TegrastatsSource, parse_line
from moebius_edge.report.power import open_meter
from moebius_edge.system.jetson import Board, read_board

LINES = Path(__file__).parent / "data" / "tegrastats"
BOARDS = Path(__file__).parent / "data" / "jetson"


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
        monkeypatch.setattr("moebius_edge.report.jetson_power._SILENCE_S", 0.2)
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
