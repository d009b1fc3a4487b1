"""Jobs that end in every way a process can, and what the parent says of them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from moebius_edge.errors import BundleError, MoebiusError, OutOfMemory
from moebius_edge.progress import no_progress
from moebius_edge.report.collect import supervise
from moebius_edge.system import subprocess_job as module
from moebius_edge.system.subprocess_job import ProcessFailed, run_job

SERVE = """
import ctypes, os, signal, sys, time
from moebius_edge.errors import *
from moebius_edge.system.subprocess_job import serve_job
def task(request, progress, note):
    {}
sys.exit(serve_job(task))
"""


def program(task: str) -> list[str]:
    """A program whose job is the statement ``task``."""
    return [sys.executable, "-c", SERVE.format(task)]


def test_a_job_gets_its_request_and_sends_progress_notes_and_its_result() -> None:
    steps: list[Any] = []
    notes: list[str] = []
    task = "print('a library prints'); progress('warm-up', 1, 3); note('odd')\n"
    task += "    return {'got': request, 'session': os.getsid(0)}"
    result = run_job(program(task), {"runs": 1}, "the job", lambda *step: steps.append(step), notes.append)
    assert result["got"] == {"runs": 1} and steps == [("warm-up", 1, 3)] and notes == ["odd"]
    assert result["session"] != os.getsid(0), "a terminal's Ctrl-C does not reach the job"


@pytest.mark.parametrize(
    ("task", "kind", "message"),
    [
        ("raise BundleError('a.onnx is cut short', 'export it')", BundleError, "a.onnx is cut short: export it"),
        ("raise OutOfMemory('GPU is full', 'close')", OutOfMemory, "GPU is full: close"),
        ("raise MemoryError('8 GB')", OutOfMemory, "not enough memory: 8 GB: close other programs"),
        ("raise ValueError('odd\\nlines')", ProcessFailed, "the job: ValueError: odd lines"),
        ("return {'nan': float('nan')}", ProcessFailed, "the job: ValueError: Out of range float values"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", ProcessFailed, "the job crashed with SIGSEGV"),
        ("os.kill(os.getpid(), signal.SIGKILL)", ProcessFailed, "the job was killed by SIGKILL, which is what happens"),
        ("print('no library', file=sys.stderr); os._exit(3)", ProcessFailed, "the job ended with exit code 3: no lib"),
        ("os._exit(0)", ProcessFailed, "the job ended with exit code 0"),
        (None, ProcessFailed, "the job ended with exit code 1: ZeroDivisionError: division by zero"),
    ],
)
def test_a_job_that_fails_raises_one_line(task: str | None, kind: type[MoebiusError], message: str) -> None:
    """Without a task the program dies before it reads."""
    command = [sys.executable, "-c", "1 / 0"] if task is None else program(task)
    with pytest.raises(MoebiusError) as caught:
        run_job(command, {"long": "x" * 1_000_000}, "the job")
    assert type(caught.value) is kind and str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_the_kernels_count_tells_a_kill_for_lack_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = iter([4, 5])
    monkeypatch.setattr(module, "oom_kills", lambda: next(counts))
    monkeypatch.setattr(module, "available_memory_bytes", lambda: 2_500_000_000)
    message = r"the kernel killed the job for lack of memory; 2\.5 GB are free without it: use less"
    with pytest.raises(OutOfMemory, match=message):
        run_job(program("os.kill(os.getpid(), signal.SIGKILL)"), {}, "the job", memory_remedy="use less")


def test_a_job_that_hangs_is_ended_and_a_busy_one_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STALL_S", 0.7)
    with pytest.raises(ProcessFailed, match=r"the job hung, it used no processor time for 0\.7 seconds, .*: add swap"):
        run_job([sys.executable, "-c", "import time; time.sleep(100)"], {}, "the job", memory_remedy="add swap")
    busy = "import os, time; end = time.time() + 3\nwhile time.time() < end: pass\nos._exit(7)"
    with pytest.raises(ProcessFailed, match="ended with exit code 7"):
        run_job([sys.executable, "-c", busy], {}, "the job")


@pytest.mark.parametrize(("ignores", "grace_s"), [(False, 30.0), (True, 0.3)])
def test_an_interrupt_ends_the_job_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ignores: bool, grace_s: float
) -> None:
    """A job that listens leaves no temporary file, and one that does not is killed."""
    monkeypatch.setattr(module, "GRACE_S", grace_s)
    pids = []

    def interrupt(what: str, done: int, total: int) -> None:
        pids.append(done)
        raise KeyboardInterrupt

    task = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n    " if ignores else ""
    task += "from moebius_edge.system.files import atomic_write\n"
    task += f"    with atomic_write({str(tmp_path / 'x.png')!r}):\n"
    task += "        progress('', os.getpid(), 0); time.sleep(60)"
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_job(program(task), {}, "the job", interrupt)
    assert not Path(f"/proc/{pids[0]}").exists() and time.monotonic() - start < 20
    assert (list(tmp_path.iterdir()) == []) is not ignores


def test_a_job_ends_with_its_parent() -> None:
    """Its standard input ends when the parent dies, in whatever way."""
    command = program("note('up'); time.sleep(60)")
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdin is not None and child.stdout is not None
    child.stdin.write(b"{}\n")
    child.stdin.flush()
    assert b"up" in child.stdout.readline()
    child.stdin.close()
    assert child.wait(20) == 1
    child.stdout.close()


@pytest.mark.parametrize(
    ("task", "status"),
    [
        ("return {'figure': 1}", "ok"),
        ("raise OutOfMemory('full', 'close')", "out of memory"),
        ("raise MachineError('no GPU', 'buy one')", "missing"),
        ("raise QualityError('far', 'try again')", "gated"),
        ("os.abort()", "failed"),
    ],
)
def test_a_report_gets_a_row_whatever_happens(task: str, status: str) -> None:
    outcome = supervise({}, no_progress, program(task))
    assert outcome["status"] == status and (outcome["reason"] is None) is (status == "ok")


def test_the_reports_own_worker_answers() -> None:
    outcome = supervise({"configuration": {}}, no_progress)
    assert outcome == {"status": "failed", "reason": "the process: KeyError: 'runs'"}
