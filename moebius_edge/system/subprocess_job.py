"""One configuration in a process of its own: its peak memory is its own, and its death is only a row.

The process is ``worker.py``'s. It gets a file to read and one to write; its standard output is progress, and the end
of its standard input tells it that nobody waits any more.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .machine import available_memory_bytes, oom_kills
from .processes import end

WORKER = (sys.executable, "-m", "moebius_edge.report.worker")
_GRACE_S = 10.0  # how long an interrupted process may tidy up
Outcome = dict[str, Any]  # "status" and "reason"; the measured figures where the status is ok


def supervise(
    spec: Mapping[str, Any], on_progress: Callable[[str, int, int], None], command: Sequence[str] = WORKER
) -> Outcome:
    """Have ``spec`` measured, and return what the process wrote, or what became of it.

    ``on_progress`` is called with (what is being done, done, total). Interrupted, it ends the process first.
    """
    with tempfile.TemporaryDirectory(prefix="moebius-edge-") as name:
        folder = Path(name)
        (folder / "spec.json").write_text(json.dumps(dict(spec)), encoding="utf-8")
        kills = oom_kills()
        with (folder / "stderr").open("wb") as errors:
            process = subprocess.Popen(
                [*command, str(folder / "spec.json"), str(folder / "outcome.json")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                start_new_session=True,  # Ctrl-C is for this process to handle
            )
            try:
                _follow(process, on_progress)
            finally:
                _end(process)
        if process.returncode == 0 and (folder / "outcome.json").is_file():
            outcome: Outcome = json.loads((folder / "outcome.json").read_text(encoding="utf-8"))
            return outcome
        said = (folder / "stderr").read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return _obituary(process.returncode, oom_kills() > kills, said[-1] if said else "")


def _follow(process: subprocess.Popen[str], on_progress: Callable[[str, int, int], None]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        try:
            what, done, total = json.loads(line)
        except (ValueError, TypeError):  # a library that prints
            continue
        on_progress(what, done, total)
    process.wait()


def _end(process: subprocess.Popen[str]) -> None:
    """Nothing of it is left running, and nothing it had opened."""
    if process.poll() is None:
        end(process, _GRACE_S)
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            stream.close()


def _obituary(code: int, out_of_memory: bool, said: str) -> Outcome:
    """The row of a process that ended without a word of its own."""
    if code >= 0:
        reason = f"the process ended with exit code {code}"
        return {"status": "failed", "reason": f"{reason}: {said:.300}" if said else reason}
    name = signal.Signals(-code).name
    if name == "SIGKILL" and out_of_memory:
        left = available_memory_bytes()
        size = "" if left is None else f"; {left / 1e9:.1f} GB are free without it"
        reason = f"the kernel killed the process for want of memory{size}: close other programs"
        return {"status": "out of memory", "reason": reason}
    reason = f"the process was killed by {name}" if name == "SIGKILL" else f"the process crashed with {name}"
    return {"status": "failed", "reason": f"{reason}: {said:.300}" if said else reason}
