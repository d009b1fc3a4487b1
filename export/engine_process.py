"""The parent's side of ``build_engine``: start it, pass on its news, end it, and say what became of it.

The process does not outlive an error or Ctrl-C here, and its memory is the system's again when it ends.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from ..errors import BundleError, MachineError

STALLED_S = 300.0  # without processor time; a build on the GPU launches and times kernels all the time


def run_build(
    request: dict[str, Any], on_progress: Callable[[float], None], notes: list[str]
) -> dict[str, Any]:
    """Send ``request`` (``build_engine.REQUEST``) to a process of its own; the record of the plan it made.

    ``on_progress`` is told a fraction from 0 to 1, and ``notes`` gets what the user should know.

    Raises:
        BundleError: TensorRT cannot build the file.
        MachineError: memory or disk ran out, the GPU does not suit, or the process was killed, crashed or hung.
    """
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}  # a tensorrt.py in the current folder is none of ours
    with tempfile.TemporaryFile() as errors:
        child = subprocess.Popen(
            _command(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            encoding="utf-8",
            env=environment,
            start_new_session=True,  # Ctrl-C on the terminal is for this process, which then ends the child
        )
        watch = _Watch(child)
        try:
            assert child.stdin is not None and child.stdout is not None
            watch.start()
            with child.stdout:
                last = _converse(child.stdin, child.stdout, request, on_progress, notes)
            code = child.wait()
        finally:
            watch.stop()
            if child.poll() is None:
                child.kill()
                child.wait()
        if last.get("event") == "done":
            return dict(last["result"])
        if last.get("event") == "failed":
            raise (BundleError if last["kind"] == "bundle" else MachineError)(last["message"])
        if watch.stalled:
            raise MachineError(
                f"the build of {request['component']} hung, it used no processor time for {STALLED_S:g} seconds, "
                "probably short of memory: close other programs, add swap, or pass a smaller --workspace"
            )
        raise _died(request["component"], code, errors)


class _Watch(threading.Thread):
    """Kills ``child`` when it hangs: seen with TensorRT for RTX after an allocation had failed.

    Where /proc does not tell a process's time (not on Linux) it does nothing.
    """

    def __init__(self, child: subprocess.Popen[str]) -> None:
        super().__init__(daemon=True)
        self._child = child
        self._ended = threading.Event()
        self.stalled = False

    def run(self) -> None:
        last = self._ticks()
        while last is not None and not self._ended.wait(STALLED_S):
            now = self._ticks()
            if now == last and self._child.poll() is None:
                self.stalled = True
                self._child.kill()
                return
            last = now

    def stop(self) -> None:
        self._ended.set()
        if self.ident is not None:  # Ctrl-C may come before it was started
            self.join()

    def _ticks(self) -> int | None:
        """Processor time of all the child's threads, in the kernel's ticks."""
        with suppress(OSError, ValueError, IndexError):
            fields = Path(f"/proc/{self._child.pid}/stat").read_text().rpartition(")")[2].split()
            return int(fields[11]) + int(fields[12])  # utime and stime, the 14th and 15th of all
        return None


def _converse(
    stdin: IO[str],
    stdout: IO[str],
    request: dict[str, Any],
    on_progress: Callable[[float], None],
    notes: list[str],
) -> dict[str, Any]:
    """Send the request, pass on what comes, and return the last reply."""
    reply: dict[str, Any] = {}
    try:
        with stdin:
            json.dump(request, stdin)
    except BrokenPipeError:  # it died at once; its exit code says how
        return reply
    for line in stdout:
        reply = json.loads(line)
        if reply["event"] == "progress":
            on_progress(reply["fraction"])
        elif reply["event"] == "note":
            notes.append(reply["text"])
    return reply


def _died(component: str, code: int, errors: IO[bytes]) -> MachineError:
    errors.seek(0)
    lines = errors.read().decode(errors="replace").strip().splitlines()
    said = f" ({lines[-1].strip():.200})" if lines else ""
    if code in (-signal.SIGKILL, 128 + signal.SIGKILL):
        return MachineError(
            f"the build of {component} was killed, probably out of memory: close other programs, add swap, or pass a "
            "smaller --workspace or --max-batch"
        )
    how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
    return MachineError(
        f"the build of {component} ended {how}{said}: try another version of TensorRT, and report it if that fails too"
    )


def _command() -> list[str]:
    return [sys.executable, "-m", f"{__package__}.build_engine"]
