"""``moebius-edge profile`` from the outside: what is counted, measured, quoted and refused."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from commanding import Captured, as_json, printed, refused

from moebius_edge.model import profile as networks
from moebius_edge.model.profile import Size

SIZES = {"student": Size(226_041_531, 154_873_901_056), "teacher": Size(862_251_708, 338_993_807_360)}


@pytest.fixture(autouse=True)
def counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counting takes seconds, and has tests of its own."""
    monkeypatch.setattr(networks, "measure_size", SIZES.__getitem__)
    monkeypatch.setattr(networks, "measure_shallow", lambda: 12_345_678_901)


def test_what_is_counted_beside_the_paper(capsys: Captured) -> None:
    lines = printed(capsys, "profile")
    assert lines[2:7] == [
        "student PyTorch, float32 0.226 B 0.1549 20",
        "student shallow call, deep features reused 0.01235",
        "teacher PyTorch, float32 0.862 B 0.339 20",
        "student quoted from the paper 0.226 B 0.154 26.0 20 0.52",
        "teacher quoted from the paper 0.862 B 0.338 46.9 20 0.94",
    ]
    assert any("one NVIDIA L40S, batch 1, 512x512" in line for line in lines)
    assert lines[-1] == "latency not measured: moebius-edge profile --measure (minutes, 5.2 GB of memory)"


def test_json_says_why_there_is_no_latency(capsys: Captured) -> None:
    document = as_json(capsys, "profile")
    student, shallow, teacher = document["networks"]
    assert [row["network"] for row in document["networks"]] == ["student", "student", "teacher"]
    assert (shallow["form"], shallow["parameters"]) == ("shallow call, deep features reused", None)
    assert (shallow["multiplications"], shallow["calls"], shallow["step_ms"]) == (12_345_678_901, None, None)
    for row in (student, teacher):
        assert (row["step_ms"], row["total_s"], row["step_runs_ms"]) == (None, None, [])
        assert row["reason"] == "not measured: moebius-edge profile --measure"
        assert (row["rows_per_step"], row["steps"], row["calls"]) == (2, 20, 19)
    assert document["quoted"]["teacher"]["step_ms"] == 46.89
    assert document["convention"].startswith("multiply-adds of convolutions")


def test_measured(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def measure(name: str, rows: int, runs: int, threads: int, on_run: Any, shallow: bool = False) -> list[float]:
        calls.append((name, rows, runs, threads, shallow))
        on_run(1)
        if shallow:
            return [1.0]
        return [5.0, 4.0, 9.0] if name == "student" else [20.0] * 3

    monkeypatch.setattr(networks, "measure_step", measure)
    student, shallow, teacher = as_json(capsys, "profile", "--measure", "--threads", "1")["networks"]
    assert calls == [("student", 2, 3, 1, False), ("student", 2, 3, 1, True), ("teacher", 2, 3, 1, False)]
    assert (shallow["step_ms"], shallow["total_s"], shallow["reason"]) == (1000.0, None, None), "a part of a picture"
    assert (student["step_ms"], student["total_s"], student["reason"]) == (5000.0, 95.0, None), "the median, 19 calls"
    assert student["step_runs_ms"] == [5000.0, 4000.0, 9000.0] and teacher["total_s"] == 380.0
    assert printed(capsys, "profile", "--measure")[-1].startswith("measured the median call on")


def test_without_pytorch(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in sys.modules if n.startswith("moebius_edge.model")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr("moebius_edge.model", raising=False)
    monkeypatch.setitem(sys.modules, "torch", None)
    refused(capsys, 3, 'profile needs torch: run `pip install "moebius-edge[export]"`', "profile")
