"""jtop on a stand-in for its package; the service is not run."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moebius_edge.report.jetson_stats import JtopSource
from moebius_edge.report.meter import Meter, SourceError
from moebius_edge.system.jetson import read_board

ROOT = Path(__file__).parent / "data" / "jetson" / "agx-orin-64gb"


class Jtop:
    """One connection to the service."""

    power: Any = {"tot": {"power": 23_400, "avg": 21_000}, "rail": {}}
    problem = ""

    def __init__(self, interval: float) -> None:
        self.interval, self.running = interval, False

    def start(self) -> None:
        if self.problem:
            raise RuntimeError(self.problem)
        self.running = True

    def ok(self) -> bool:
        return self.running

    def close(self) -> None:
        self.running = False


def source(**changes: Any) -> JtopSource:
    board = read_board(ROOT)
    assert board is not None
    return JtopSource(board, ROOT, 0.5, SimpleNamespace(jtop=type("Changed", (Jtop,), changes)))


def test_the_total_in_watts() -> None:
    with Meter(source(), period_s=0.01) as meter:
        while not meter._readings:
            pass
    energy = meter.energy()
    assert (energy.mean_watts, energy.source, energy.power_mode) == (pytest.approx(23.4), "jtop", "MAXN (0)")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"problem": "The jtop.service is not active."}, r"its service does not answer \(The jtop.service is not act"),
        ({"ok": lambda self: False}, "its service ended: run `sudo systemctl restart jtop`"),
        ({"power": {"rail": {}}}, "it tells no total power for this module"),
    ],
)
def test_a_service_that_fails(changes: dict[str, Any], text: str) -> None:
    read = source(**changes)
    with pytest.raises(SourceError, match=text):
        read.open()
        read.sample()
    read.close()
