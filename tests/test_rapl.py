"""A CPU's energy counters in folders like the kernel's: summed, wrapped around, kept by root."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from moebius_edge.report.meter import SourceError
from moebius_edge.report.power import open_meter
from moebius_edge.report.rapl import RaplSource


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two packages, with the zone of the cores inside the first."""
    for zone, energy in (("intel-rapl:0", 900), ("intel-rapl:0:0", 400), ("intel-rapl:1", 0)):
        folder = tmp_path / "sys/class/powercap" / zone
        folder.mkdir(parents=True)
        (folder / "energy_uj").write_text(f"{energy}000000\n")
        (folder / "max_energy_range_uj").write_text("1000000000\n")
    return tmp_path


def set_joules(root: Path, zone: str, joules: int) -> None:
    (root / f"sys/class/powercap/intel-rapl:{zone}/energy_uj").write_text(f"{joules}000000\n")


def test_packages_are_summed_and_counters_start_again(root: Path) -> None:
    source = RaplSource(root)
    source.open()
    assert source.sample().joules == 0
    set_joules(root, "0", 950)
    set_joules(root, "1", 20)
    set_joules(root, "0:0", 700)  # inside package 0: counted there
    assert source.sample().joules == 70
    set_joules(root, "0", 10)
    assert source.sample().joules == 70 + 60


def test_the_meter_uses_it_for_a_cpu(root: Path) -> None:
    with open_meter("cpu", root) as meter:
        set_joules(root, "1", 5)
        time.sleep(0.3)
    energy = meter.energy()
    assert (energy.source, energy.covers) == ("rapl", "the CPU packages, not the memory")
    assert energy.joules is not None and 4 < energy.joules <= 5, "read a moment before and after the block"


def test_counters_that_cannot_be_read(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = root / "sys/class/powercap/intel-rapl:0/energy_uj"
    path.write_text("none\n")
    with pytest.raises(SourceError, match=f"{path} cannot be read"):
        RaplSource(root).open()

    def refuse(self: Path) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(SourceError, match=f"{path} is root's: run `sudo chmod a\\+r {path}`"):
        RaplSource(root).open()
