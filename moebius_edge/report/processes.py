"""The end of a child process."""

from __future__ import annotations

import subprocess
from typing import Any


def end(process: subprocess.Popen[Any], grace_s: float) -> None:
    """Ask a running process to end, and make it after ``grace_s`` seconds."""
    process.terminate()
    try:
        process.wait(grace_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
