"""The end of a child process."""

from __future__ import annotations

import subprocess
from typing import Any


def end(process: subprocess.Popen[Any], grace_s: float) -> None:
    """Ask a running process to end, and make it after ``grace_s`` seconds, or at once if this one is interrupted."""
    process.terminate()
    try:
        process.wait(grace_s)
    except subprocess.TimeoutExpired:
        pass
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
