"""A job in a process of its own: all its memory is given back when it ends, and its death is one line here.

The parent calls ``run_job``, the child ``serve_job``. The request is one line of JSON on the child's standard input,
whose end then tells the child that nobody waits any more. The child answers with lines of JSON, one event each:
``progress`` and ``note`` while it works, and at the end ``result`` or ``error``.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from .. import errors
from ..errors import MachineError, MoebiusError, OutOfMemory
from ..options import VERBOSE
from ..progress import Progress, no_progress
from .machine import available_memory_bytes, oom_kills

Note = Callable[[str], None]  # takes a line for the user

STALL_S = 300.0  # without processor time a job counts as hung; one that waits for a GPU still polls it
GRACE_S = 10.0  # how long an interrupted job may tidy up


class ProcessFailed(MachineError):
    """A job's process crashed, was killed, hung, or failed with an error that is not the user's."""


def run_job(
    command: Sequence[str],
    request: dict[str, Any],
    name: str,
    progress: Progress = no_progress,
    note: Note | None = None,
    memory_remedy: str = "close other programs or add swap",
) -> dict[str, Any]:
    """Run ``command``, a program that calls ``serve_job``, on ``request``, and return its result.

    ``name`` says in errors what the job is, such as "the build of denoiser"; ``memory_remedy`` what mends a lack of
    memory. Interrupted, or when ``progress`` raises, the process is ended first.

    Raises:
        OutOfMemory: the kernel killed the process for lack of memory.
        ProcessFailed: the process crashed, was killed, hung or met an unexpected error.
        MoebiusError: of the class that the job raised.
    """
    kills = oom_kills()
    reply: dict[str, Any] = {}
    with tempfile.TemporaryFile() as stderr:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            encoding="utf-8",
            env={**os.environ, "PYTHONSAFEPATH": "1"},  # a tensorrt.py in the current folder is not imported
            start_new_session=True,  # Ctrl-C on the terminal is for this process, which then ends the child
        )
        watch = _StallWatch(process)
        try:
            watch.start()
            reply = _converse(process, request, progress, note)
            process.wait()
        finally:
            watch.stop()
            end(process, GRACE_S)
            for stream in (process.stdin, process.stdout):
                with suppress(BrokenPipeError):
                    stream.close()  # type: ignore[union-attr]
        stderr.seek(0)
        lines = stderr.read().decode(errors="replace").strip().splitlines()
        if os.environ.get(VERBOSE) == "1" and lines:
            print("\n".join(lines), file=sys.stderr)
    if reply.get("event") == "result" and process.returncode == 0:
        return dict(reply["result"])
    if reply.get("event") == "error":
        kind = getattr(errors, reply["kind"], None) or ProcessFailed
        raise kind(reply["problem"] if kind is not ProcessFailed else f"{name}: {reply['problem']}", reply["remedy"])
    if watch.stalled:
        problem = f"{name} hung, it used no processor time for {STALL_S:g} seconds, probably short of memory"
        raise ProcessFailed(problem, memory_remedy)
    if process.returncode == -signal.SIGKILL and oom_kills() > kills:
        available = available_memory_bytes()
        size = "" if available is None else f"; {available / 1e9:.1f} GB are free without it"
        raise OutOfMemory(f"the kernel killed {name} for lack of memory{size}", memory_remedy)
    raise ProcessFailed(f"{name} {cause_of_death(process.returncode, lines[-1] if lines else '')}")


def serve_job(task: Callable[[dict[str, Any], Progress, Note], dict[str, Any]]) -> int:
    """The child's whole program: answer the request on standard input by ``task(request, progress, note)``.

    What libraries print goes to standard error. On SIGTERM every ``finally`` is executed, so that no temporary file
    stays; where standard input ends the process ends at once. Returns the exit code.
    """
    replies = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    request = json.loads(sys.stdin.readline())
    threading.Thread(target=_exit_with_parent, daemon=True).start()

    def reply(event: str, **values: Any) -> None:
        replies.write(json.dumps({"event": event, **values}, allow_nan=False) + "\n")

    def progress(what: str, done: int, total: int) -> None:
        reply("progress", step=[what, done, total])

    try:
        reply("result", result=task(request, progress, lambda text: reply("note", text=text)))
    except MoebiusError as error:
        kind = next(c.__name__ for c in type(error).__mro__ if c.__module__ == errors.__name__)
        reply("error", kind=kind, problem=error.problem, remedy=error.remedy)
    except MemoryError as error:
        problem = f"not enough memory: {error}" if str(error) else "not enough memory"
        reply("error", kind=OutOfMemory.__name__, problem=problem, remedy="close other programs")
    except Exception as error:
        traceback.print_exc()
        problem = " ".join(f"{type(error).__name__}: {error}".split())
        reply("error", kind=ProcessFailed.__name__, problem=f"{problem:.500}", remedy="")
    return 0


def end(process: subprocess.Popen[Any], grace_s: float) -> None:
    """Ask a process to end, and make it after ``grace_s`` seconds, or at once if this one is interrupted."""
    if process.poll() is not None:
        return
    process.terminate()
    try:
        with suppress(subprocess.TimeoutExpired):
            process.wait(grace_s)
    finally:
        process.kill()
        process.wait()


def _converse(
    process: subprocess.Popen[str], request: dict[str, Any], progress: Progress, note: Note | None
) -> dict[str, Any]:
    """Send the request, pass on progress and notes, and return the last reply."""
    assert process.stdin is not None and process.stdout is not None
    reply: dict[str, Any] = {}
    with suppress(BrokenPipeError):  # the process died at once, and its exit code says how
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
    for line in process.stdout:
        reply = json.loads(line)
        if reply["event"] == "progress":
            progress(*reply["step"])
        elif reply["event"] == "note" and note is not None:
            note(reply["text"])
    return reply


class _StallWatch(threading.Thread):
    """Kills a process that hangs, which TensorRT for RTX does after a failed allocation.

    It does nothing where /proc does not say how much processor time a process has used (not on Linux).
    """

    def __init__(self, process: subprocess.Popen[str]) -> None:
        super().__init__(daemon=True)
        self._process, self._ended = process, threading.Event()
        self.stalled = False

    def run(self) -> None:
        last = self._ticks()
        while last is not None and not self._ended.wait(STALL_S):
            now = self._ticks()
            if now == last and self._process.poll() is None:
                self.stalled = True
                self._process.kill()
                return
            last = now

    def stop(self) -> None:
        self._ended.set()
        if self.ident is not None:  # an interrupt may come before the thread was started
            self.join()

    def _ticks(self) -> int | None:
        """The processor time of all the process's threads, in the kernel's ticks."""
        with suppress(OSError, ValueError, IndexError):
            fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
            return int(fields[11]) + int(fields[12])  # utime and stime
        return None


def cause_of_death(code: int, last_line: str) -> str:
    if code >= 0:
        cause = f"ended with exit code {code}"
    elif code == -signal.SIGKILL:
        cause = "was killed by SIGKILL, which is what happens when memory runs out"
    else:
        cause = f"crashed with {signal.Signals(-code).name}"
    return f"{cause}: {last_line.strip():.300}" if last_line else cause


def _exit_with_parent() -> None:
    while os.read(0, 1):
        pass
    os._exit(1)
