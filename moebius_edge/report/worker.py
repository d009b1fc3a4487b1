"""One configuration, or a peak, measured in a process of its own: its peak memory is its own, its death is only a row.

``supervise`` starts the process and is what the report calls; ``python -m moebius_edge.report.worker`` is the process.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..errors import MachineError, MoebiusError, OutOfMemory
from ..progress import Progress
from ..system.subprocess_job import Note, ProcessFailed, run_job, serve_job

WORKER = (sys.executable, "-m", "moebius_edge.report.worker")
Outcome = dict[str, Any]  # "status" and "reason"; the measured figures where the status is ok


def supervise(spec: Mapping[str, Any], on_progress: Progress, command: Sequence[str] = WORKER) -> Outcome:
    """Have ``spec`` measured in a process, and return its figures, or why there are none.

    Interrupted, it ends the process first.
    """
    return attempt(lambda: run_job(command, dict(spec), "the process", on_progress))


def attempt(measure: Callable[[], dict[str, Any]]) -> Outcome:
    """What ``measure`` returns with the status ok, or the status and reason of what it raised."""
    try:
        return {**measure(), "status": "ok", "reason": None}
    except OutOfMemory as error:
        return _failed("out of memory", str(error))
    except MemoryError as error:
        return _failed("out of memory", f"not enough memory: {error}" if str(error) else "not enough memory")
    except ProcessFailed as error:
        return _failed("failed", str(error))
    except MachineError as error:
        return _failed("missing", str(error))
    except MoebiusError as error:  # a damaged bundle, an engine that does not fit, a NaN
        return _failed("gated", str(error))
    except Exception as error:  # a bug, or a library's: this row is lost, the others are not
        return _failed("failed", f"{type(error).__name__}: {error}")


def _failed(status: str, reason: str) -> Outcome:
    return {"status": status, "reason": " ".join(reason.split())[:500]}


def _measure(spec: dict[str, Any], progress: Progress, note: Note) -> dict[str, Any]:
    from .measuring import measure
    from .peaks import measure_peaks

    if "configuration" in spec:
        return measure(spec, progress)
    return {"peaks": measure_peaks(spec["runtime"], spec["precision"]).to_dict()}


if __name__ == "__main__":
    sys.exit(serve_job(_measure))
