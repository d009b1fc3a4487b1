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
from collections.abc import Callable
from typing import IO, Any

from ..errors import BundleError, MachineError


def run_build(
    request: dict[str, Any], on_progress: Callable[[float], None], notes: list[str]
) -> dict[str, Any]:
    """Send ``request`` (``build_engine.REQUEST``) to a process of its own; the record of the plan it made.

    ``on_progress`` is told a fraction from 0 to 1, and ``notes`` gets what the user should know.

    Raises:
        BundleError: TensorRT cannot build the file.
        MachineError: memory or disk ran out, the GPU does not suit, or the process was killed or crashed.
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
        try:
            assert child.stdin is not None and child.stdout is not None
            with child.stdout:
                last = _converse(child.stdin, child.stdout, request, on_progress, notes)
            code = child.wait()
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()
        if last.get("event") == "done":
            return dict(last["result"])
        if last.get("event") == "failed":
            raise (BundleError if last["kind"] == "bundle" else MachineError)(last["message"])
        raise _died(request["component"], code, errors)


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
