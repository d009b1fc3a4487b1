"""The process that measures one configuration, or a peak: ``python -m moebius_edge.report.worker SPEC OUTCOME``.

Whatever can be caught becomes a status with a one-line reason; ``supervise.py`` finds out about the rest.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import MachineError, MoebiusError
from ..system.files import atomic_write


def attempt(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What ``measure`` returns with the status ok, or the status and reason of what it raised."""
    try:
        return {**measure(), "status": "ok", "reason": None}
    except MemoryError as error:
        return _failed("out of memory", f"not enough memory: {error}" if str(error) else "not enough memory")
    except MachineError as error:
        short = "not enough memory" in str(error) or "out of memory" in str(error)
        return _failed("out of memory" if short else "missing", str(error))
    except MoebiusError as error:  # a damaged bundle, an engine that does not fit, a NaN
        return _failed("gated", str(error))
    except Exception as error:  # a bug, or a library's: this row is lost, the others are not
        return _failed("failed", f"{type(error).__name__}: {error}")


def _failed(status: str, reason: str) -> dict[str, Any]:
    return {"status": status, "reason": " ".join(reason.split())[:500]}


def main(arguments: list[str]) -> int:
    from .flops import measure_peak
    from .measure import measure

    spec_path, outcome_path = map(Path, arguments)
    spec = json.loads(spec_path.read_text(encoding="utf-8"))
    # Libraries print on descriptor 1: what they say goes where errors go.
    report = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)
    signal.signal(signal.SIGTERM, _leave)
    threading.Thread(target=_end_with_parent, daemon=True).start()

    def progress(what: str, done: int, total: int) -> None:
        report.write(json.dumps([what, done, total]) + "\n")

    def task() -> dict[str, Any]:
        if "configuration" in spec:
            return measure(spec, progress)
        return {"peak": measure_peak(spec["runtime"], spec["precision"])}

    outcome = attempt(task)
    with atomic_write(outcome_path) as temporary:
        temporary.write_text(json.dumps(outcome, allow_nan=False), encoding="utf-8")
    return 0


def _leave(number: int, frame: object) -> None:
    raise SystemExit(128 + number)  # past every `finally`, so that no temporary file stays


def _end_with_parent() -> None:
    """Nothing is ever written to this process: reading ends when whoever started it has gone."""
    while os.read(0, 1):
        pass
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
