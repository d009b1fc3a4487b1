"""Lines of tegrastats from ten boards, read; the process started, read at its newest line, and ended."""

from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path

import pytest

from moebius_edge.report.meter import SourceError
from moebius_edge.report.rails import total_watts
from moebius_edge.report.tegrastats import TegrastatsSource, parse_line
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
    line = parse_line(lines(name)[0])
    assert total_watts(line.rails) == (pytest.approx(watts), rails)
    assert line.gpu_mhz == gpu_mhz and max(line.temperatures_c.values()) == hottest


def test_every_sample_has_a_row() -> None:
    names = {path.name for path in LINES.glob("*.txt")}
    page = (LINES / "README.md").read_text()
    assert len(names) == 10 and all(f"`{name}`" in page for name in names)


def test_all_of_a_line() -> None:
    busy = parse_line(lines("orin-nano-jetpack6")[1])
    assert busy.rails == {"VDD_IN": 16.321, "VDD_CPU_GPU_CV": 7.104, "VDD_SOC": 3.12}, "now, not the mean since"
    assert (busy.gpu_load, busy.gpu_mhz) == (99, 612.0)
    assert busy.temperatures_c["tj"] == 58.312 and len(busy.temperatures_c) == 6
    asleep = parse_line(lines("agx-orin-jetpack5")[0])
    assert "GPU" not in asleep.temperatures_c and "NC" not in asleep.rails
    assert "RAM" not in asleep.rails and "SWAP" not in asleep.rails
    empty = parse_line("tegrastats: permission denied")
    assert (empty.rails, empty.temperatures_c, empty.gpu_load, empty.gpu_mhz) == ({}, {}, None, None)


def test_rails_of_no_known_module() -> None:
    assert total_watts({"VDD_GPU_SOC": 2.0, "VDD_CPU_CV": 1.0}) is None
    assert total_watts({"VDD_IN": 5.0, "VDD_SOC": 1.0}) == (5.0, "VDD_IN"), "VDD_SOC is fed by VDD_IN"


def source(code: str) -> TegrastatsSource:
    return TegrastatsSource(nano(), BOARDS / "orin-nano-8gb", 0.1, [sys.executable, "-u", "-c", code])


def test_the_newest_line_is_read() -> None:
    idle, busy = lines("orin-nano-jetpack6")
    read = source(f"import time; print({idle!r}); print({busy!r}); time.sleep(60)")
    read.open()
    try:
        time.sleep(0.5)  # both lines wait
        sample = read.sample()
    finally:
        read.close()
    assert (sample.watts, sample.clocks_mhz, sample.temperature_c) == (16.321, {"gpu": 612.0}, 58.625)
    assert read.covers == "the module: VDD_IN" and read.power_mode == "25W (1)"
    with pytest.raises(SourceError, match="tegrastats is not running"):
        read.sample()


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("print('RAM 1/2MB VDD_GPU 1mW/1mW')", r"its rails \(VDD_GPU\) are not those of a known module"),
        ("print('no power here')", r"its rails \(none\)"),
        ("pass", "ended: run it by hand, it may need `sudo`"),
    ],
)
def test_what_cannot_be_read(code: str, text: str) -> None:
    read = source(code)
    read.open()
    with pytest.raises(SourceError, match=text):
        read.sample()
    read.close()


def test_a_silent_program_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moebius_edge.report.tegrastats._SILENCE_S", 0.2)
    read = source("import time; time.sleep(60)")
    read.open()
    with pytest.raises(SourceError, match="printed nothing for 0 s"):
        read.sample()
    read.close()


def test_a_machine_without_it() -> None:
    with pytest.raises(SourceError, match="the program tegrastats is not found: it comes with JetPack"):
        TegrastatsSource(nano(), BOARDS / "orin-nano-8gb", 0.1).open()


def test_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What is really started, by a script of that name on the path."""
    script = tmp_path / "tegrastats"
    line = shlex.quote(lines("orin-nano-jetpack6-user")[0])
    script.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/arguments\necho {line}\nexec sleep 60\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    read = TegrastatsSource(nano(), BOARDS / "orin-nano-8gb", 0.25)
    read.open()
    assert read.sample().watts == 4.824
    read.close()
    assert (tmp_path / "arguments").read_text() == "--interval 250\n"
