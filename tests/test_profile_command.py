"""``moebius-edge profile`` from the outside: what is counted, measured, quoted and refused."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest

from moebius_edge.bundle.bundle import Bundle
from moebius_edge.cli import main
from moebius_edge.commands import profile as profile_command
from moebius_edge.model import profile as networks
from moebius_edge.model.profile import Size
from moebius_edge.system import machine

Captured = pytest.CaptureFixture[str]
SIZES = {"student": Size(226_041_531, 154_873_901_056), "teacher": Size(862_251_708, 338_993_807_360)}


@pytest.fixture(autouse=True)
def counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counting takes seconds, and has tests of its own."""
    monkeypatch.setattr(networks, "measure_size", SIZES.__getitem__)
    monkeypatch.setattr(networks, "measure_shallow", lambda: 12_345_678_901)


def profiled(capsys: Captured, *arguments: str) -> dict[str, Any]:
    assert main(["profile", *arguments, "--json"]) == 0
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    return document


def test_the_table(capsys: Captured) -> None:
    assert main(["profile"]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "student PyTorch, float32 226 041 531 0.1549 not measured 20 (19 calls) not measured" in lines
    assert "student shallow call, deep features reused 0.0123 not measured" in lines
    assert "teacher PyTorch, float32 862 251 708 0.3390 not measured 20 (19 calls) not measured" in lines
    assert "student quoted from the paper 0.226 B 0.154 26.01 20 0.52" in lines
    assert "teacher quoted from the paper 0.862 B 0.338 46.89 20 0.94" in lines
    assert any("one NVIDIA L40S, batch 1, 512x512" in line for line in lines)
    assert "latency not measured: moebius-edge profile --measure (minutes, 5.2 GB of memory)" in lines
    assert not any(line.startswith("measured") for line in lines)


def test_json_says_why_there_is_no_latency(capsys: Captured) -> None:
    document = profiled(capsys)
    student, shallow, teacher = document["networks"]
    assert [n["network"] for n in document["networks"]] == ["student", "student", "teacher"]
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
    student, shallow, teacher = profiled(capsys, "--measure", "--threads", "1")["networks"]
    assert calls == [("student", 2, 3, 1, False), ("student", 2, 3, 1, True), ("teacher", 2, 3, 1, False)]
    assert (shallow["step_ms"], shallow["total_s"], shallow["reason"]) == (1000.0, None, None), "a part of a picture"
    assert (student["step_ms"], student["total_s"], student["reason"]) == (5000.0, 95.0, None), "the median, 19 calls"
    assert student["step_runs_ms"] == [5000.0, 4000.0, 9000.0] and teacher["total_s"] == 380.0
    assert main(["profile", "--measure"]) == 0
    out = capsys.readouterr().out
    assert "measured  the median call on" in out and "not measured" not in out


def test_memory_is_looked_at_first(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "available_memory_bytes", lambda: 1_000_000_000)
    assert main(["profile", "--measure"]) == 3
    assert "error: the student needs 1.4 GB of memory and 1.0 GB are free: close" in capsys.readouterr().err


def test_a_bundle_on_its_runtime(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile_command, "_full_size", Bundle.load)
    row = profiled(capsys, "--bundle", "tiny", "--runs", "2", "--threads", "1")["networks"][3]
    assert row["form"].startswith("tiny, onnxruntime") and row["form"].endswith("on cpu, float32")
    assert (row["rows_per_step"], row["multiplications"], row["parameters"]) == (2, 545_100_800, None)
    assert len(row["step_runs_ms"]) == 2 and row["total_s"] == pytest.approx(19 * row["step_ms"] / 1e3)
    assert row["runtime"]["threads"] == 1


def test_a_bundle_of_another_size_is_refused(capsys: Captured) -> None:
    assert main(["profile", "--bundle", "tiny"]) == 2
    assert "bundle tiny is not of the published size (256x256)" in capsys.readouterr().err


def test_without_pytorch(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in sys.modules if n.startswith("moebius_edge.model")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr("moebius_edge.model", raising=False)
    monkeypatch.setitem(sys.modules, "torch", None)
    assert main(["profile"]) == 3
    assert 'error: profile needs torch: run `pip install "moebius-edge[export]"`' in capsys.readouterr().err
