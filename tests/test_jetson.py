"""What is read from a Jetson's files, on samples, and what speaks against measuring or building there."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from moebius_edge.system.jetson import NEED_BYTES, Board, Clock, findings, read_board

SAMPLES = Path(__file__).parent / "data" / "jetson"


def board(root: Path | str) -> Board:
    read = read_board(SAMPLES / root)
    assert read is not None
    return read


@pytest.fixture
def nano(tmp_path: Path) -> Path:
    """A copy of the Orin Nano's files to change."""
    shutil.copytree(SAMPLES / "orin-nano-8gb", tmp_path / "nano")
    return tmp_path / "nano"


def finding(read: Board, name: str) -> tuple[bool, str, str]:
    (found,) = (f for f in findings(read) if f.name == name)
    return found.fine, found.detail, found.remedy


def test_an_orin_nano() -> None:
    read = board("orin-nano-8gb")
    assert read.model == "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super"
    assert (read.l4t, read.jetpack, read.tensorrt, read.tensorrt_bindings) == ("36.4.3", "6.2", "10.3.0.30", True)
    assert read.power_mode == 1 and read.power_modes == {0: "15W", 1: "25W", 2: "MAXN_SUPER", 3: "7W"}
    assert read.memory_bytes == 7802940 * 1024 and read.memory_available_bytes == 5210616 * 1024
    assert read.swap_bytes == 3901456 * 1024
    assert read.clocks == [
        Clock("GPU 17000000.gpu", 306.0, 918.0, 306.0),
        Clock("CPU 0,1,2,3,4,5", 729.6, 1344.0, 729.6),
    ]
    assert read.temperatures_c == {"cpu": 49.812, "gpu": 48.5, "soc0": 47.937, "tj": 49.812}, "cv0 sleeps"


def test_an_agx_orin_whose_clocks_are_locked() -> None:
    read = board("agx-orin-64gb")
    assert (read.l4t, read.tensorrt) == ("36.4.4", "10.3.0.30")
    assert read.jetpack is None, "the metapackage is removed"
    assert all(clock.locked for clock in read.clocks) and len(read.clocks) == 2
    assert [(f.name, f.fine, f.remedy) for f in findings(read)] == [
        (name, True, "") for name in ("JetPack", "clocks", "memory")
    ]
    assert finding(read, "clocks")[1] == (
        "power mode MAXN (0); clocks locked: GPU 17000000.gpu 1300 MHz, CPU 0,4,8 2202 MHz"
    )


def test_a_freshly_flashed_thor() -> None:
    read = board("agx-thor-128gb")
    assert (read.model, read.l4t, read.jetpack) == ("NVIDIA Jetson AGX Thor Developer Kit", "38.2.0", None)
    assert [clock.name for clock in read.clocks] == ["GPU gpu-gpc-0", "GPU gpu-nvd-0", "CPU 0,12"]
    detail = "L4T 38.2.0, JetPack not installed, TensorRT not installed"
    assert finding(read, "JetPack") == (False, detail, "sudo apt install nvidia-jetpack")
    fine, detail, remedy = finding(read, "clocks")
    assert not fine and remedy == "sudo jetson_clocks"
    assert detail.startswith("power mode 120W (1), the fastest is MAXN (sudo nvpmodel -m 0); clocks not locked")
    assert "GPU gpu-gpc-0 315 to 1386 MHz" in detail
    assert finding(read, "memory")[0]


def test_one_free_clock_is_enough_to_warn(nano: Path) -> None:
    (nano / "sys/class/devfreq/17000000.gpu/min_freq").write_text("918000000\n")
    fine, detail, _ = finding(board(nano), "clocks")
    assert not fine and "GPU" not in detail and "CPU 0,1,2,3,4,5 730 to 1344 MHz" in detail
    for core in range(5):
        (nano / f"sys/devices/system/cpu/cpu{core}/cpufreq/scaling_min_freq").write_text("1344000\n")
    assert "CPU 5 730 to 1344 MHz" in finding(board(nano), "clocks")[1]
    shutil.rmtree(nano / "sys/devices/system/cpu/cpu5/cpufreq")  # switched off by the power mode
    assert finding(board(nano), "clocks")[0]


def test_memory_that_is_short(nano: Path) -> None:
    fine, detail, remedy = finding(board(nano), "memory")
    assert not fine and detail.startswith("5.3 of 8.0 GB free") and "8 GB with 4.0 GB of swap" in detail
    assert remedy.startswith("sudo fallocate") and remedy.endswith("sudo swapon /swapfile")
    meminfo = nano / "proc/meminfo"
    roomy = meminfo.read_text().replace("3901456 kB", "8388608 kB")
    for free, fine in ((5210616, True), (NEED_BYTES // 1024 + 1, True), (NEED_BYTES // 1024 - 1, False)):
        meminfo.write_text(roomy.replace("5210616 kB", f"{free} kB"))
        result = finding(board(nano), "memory")
        assert result[0] == fine and ("about 3 GB" in result[1]) != fine


def test_what_is_missing_or_says_nothing_is_unknown(nano: Path, tmp_path: Path) -> None:
    assert read_board(tmp_path) is None
    (tmp_path / "proc/device-tree").mkdir(parents=True)
    (tmp_path / "proc/device-tree/compatible").write_text("raspberrypi,5-model-b\0brcm,bcm2712\0")
    assert read_board(tmp_path) is None, "another machine is no Jetson"
    (nano / "etc/nv_tegra_release").write_text("# no release\n")
    (nano / "var/lib/nvpmodel/status").write_bytes(b"\xff\xfe")
    (nano / "sys/class/devfreq/17000000.gpu/max_freq").write_text("<unknown>\n")
    (nano / "var/lib/dpkg/status").write_text("Package\n\nPackage: tensorrt\nVersion: 10.3\n")
    read = board(nano)
    assert (read.l4t, read.power_mode, read.tensorrt) == (None, None, None), "no status: not installed"
    assert [clock.name for clock in read.clocks] == ["CPU 0,1,2,3,4,5"]
    for name in ("etc", "var", "sys"):  # as in a container
        shutil.rmtree(nano / name)
    read = board(nano)
    assert (read.l4t, read.jetpack, read.tensorrt, read.power_mode) == (None, None, None, None)
    assert read.clocks == [] and read.power_modes == {} and read.temperatures_c == {}
    assert [f.name for f in findings(read)] == ["memory"]
    (nano / "proc/meminfo").unlink()
    assert findings(board(nano)) == []


def test_a_system_that_cannot_build_engines(nano: Path) -> None:
    status = nano / "var/lib/dpkg/status"
    status.write_text(status.read_text().replace("Package: python3-libnvinfer\n", "Package: python3-other\n"))
    fine, detail, remedy = finding(board(nano), "JetPack")
    assert not fine and detail.endswith("TensorRT 10.3.0.30 without its Python module")
    assert remedy == "sudo apt install python3-libnvinfer"
    (nano / "etc/nv_tegra_release").write_text("# R35 (release), REVISION: 6.0, GCID: 1, BOARD: generic\n")
    fine, detail, _ = finding(board(nano), "JetPack")
    assert not fine and "too old, its Python is below 3.10; flash JetPack 6" in detail
