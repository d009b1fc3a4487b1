"""Processes that end in every way a process can, and what is left to say of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from moebius_edge.system import subprocess_job as module
from moebius_edge.system.subprocess_job import WORKER, supervise


def run(code: str, seen: list[Any] | None = None) -> dict[str, Any]:
    """A process that executes ``code`` in place of the measuring one; ``sys.argv`` is what that would get."""
    note: Callable[..., None] = (lambda *step: seen.append(step)) if seen is not None else (lambda *step: None)
    return supervise({"runs": 1}, note, [sys.executable, "-c", f"import json, os, signal, sys, time\n{code}"])


def test_what_it_writes_is_the_outcome_and_what_it_prints_is_progress() -> None:
    seen: list[Any] = []
    code = (
        "print(json.dumps(['warm-up', 1, 3]), flush=True)\nprint('a library says hello')\n"
        "spec = json.load(open(sys.argv[1]))\nprint('5')\n"
        "open(sys.argv[2], 'w').write(json.dumps({'status': 'ok', 'got': spec}))"
    )
    assert run(code, seen) == {"status": "ok", "got": {"runs": 1}}
    assert seen == [("warm-up", 1, 3)]


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", "the process crashed with SIGSEGV"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "the process was killed by SIGKILL"),
        ("print('no such library', file=sys.stderr)\nos.abort()", "the process crashed with SIGABRT: no such library"),
        ("sys.exit(3)", "the process ended with exit code 3"),
        ("raise ValueError('odd')", "the process ended with exit code 1: ValueError: odd"),
        ("pass", "the process ended with exit code 0"),
    ],
)
def test_a_process_that_dies_is_a_row(code: str, reason: str) -> None:
    assert run(code) == {"status": "failed", "reason": reason}


def test_a_kill_for_want_of_memory_is_told_by_the_kernels_count(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = iter([4, 5])
    monkeypatch.setattr(module, "oom_kills", lambda: next(counts))
    monkeypatch.setattr(module, "available_memory_bytes", lambda: 2_500_000_000)
    outcome = run("os.kill(os.getpid(), signal.SIGKILL)")
    assert outcome["status"] == "out of memory"
    assert outcome["reason"] == (
        "the kernel killed the process for want of memory; 2.5 GB are free without it: close other programs"
    )


def gone(pid: int) -> bool:
    """Whether the process ended, within a few seconds."""
    for _ in range(100):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        with suppress(OSError):
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        time.sleep(0.1)
    return False


def test_an_interrupt_ends_the_process_first(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    code = f"open({str(pid)!r}, 'w').write(str(os.getpid()))\nprint('[\"x\", 1, 2]', flush=True)\ntime.sleep(60)"

    def interrupt(*step: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        supervise({}, interrupt, [sys.executable, "-c", f"import os, time\n{code}"])
    assert gone(int(pid.read_text()))


def test_one_that_does_not_listen_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_GRACE_S", 0.3)

    def interrupt(*step: Any) -> None:
        raise KeyboardInterrupt

    code = "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint('[\"x\", 1, 2]', flush=True)\n"
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        supervise({}, interrupt, [sys.executable, "-c", f"{code}time.sleep(60)"])
    assert time.monotonic() - start < 30


def test_the_worker_ends_when_nobody_waits(tmp_path: Path) -> None:
    """Its standard input is closed when whoever started it dies, in whatever way."""
    code = (
        "import os, sys, threading, time\nfrom moebius_edge.report.worker import _end_with_parent\n"
        "threading.Thread(target=_end_with_parent, daemon=True).start()\nprint('up', flush=True)\ntime.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"up\n"
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(20) == 1
    process.stdout.close()


def test_the_real_worker_answers_a_termination_by_tidying_up(tmp_path: Path) -> None:
    assert WORKER[1:] == ("-m", "moebius_edge.report.worker")
    code = (
        "import signal, time\nfrom moebius_edge.report.worker import _leave\n"
        "from moebius_edge.system.files import atomic_write\nsignal.signal(signal.SIGTERM, _leave)\n"
        f"with atomic_write({str(tmp_path / 'x.png')!r}):\n    print('in', flush=True)\n    time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"in\n"
    threading.Timer(0.1, process.send_signal, [signal.SIGTERM]).start()
    assert process.wait(20) == 128 + signal.SIGTERM
    process.stdout.close()
    assert list(tmp_path.iterdir()) == []
