"""TensorRT's progress: phases within phases, each with its own number of steps, as one figure from 0 to 1."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any


class Fraction:
    """Nested phases, each with a number of steps, as one figure from 0 to 1 that never goes back.

    ``report`` is called for every hundredth. TensorRT may call from several threads.
    """

    def __init__(self, report: Callable[[float], None]) -> None:
        self._report = report
        self._phases: dict[str, list[Any]] = {}  # name -> [parent, steps, done]
        self._highest = 0.0
        self._lock = threading.Lock()

    def start(self, name: str, parent: str | None, steps: int) -> None:
        with self._lock:
            self._phases[name] = [parent, max(1, steps), 0]

    def step(self, name: str, step: int) -> None:
        with self._lock:
            if name in self._phases:
                self._phases[name][2] = step + 1
            self._update()

    def finish(self, name: str) -> None:
        with self._lock:
            self._phases.pop(name, None)

    def _update(self) -> None:
        roots = [n for n, (parent, _, _) in self._phases.items() if parent not in self._phases]
        value = min(1.0, self._of(roots[0])) if roots else 0.0
        if value >= self._highest + 0.01:
            self._highest = value
            self._report(value)

    def _of(self, name: str) -> float:
        _, steps, done = self._phases[name]
        inner = [self._of(n) for n, (parent, _, _) in self._phases.items() if parent == name]
        return float(min(done + (max(inner) if inner else 0.0), steps)) / steps


def make_monitor(trt: Any, fraction: Fraction) -> Any:
    """TensorRT's progress monitor that reports to ``fraction``; keep a reference as long as the build lasts."""

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            fraction.start(phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            try:
                fraction.step(phase_name, step)
            except OSError:  # the parent is gone, and nobody wants the plan: False stops the build
                return False
            return True

        def phase_finish(self, phase_name: str) -> None:
            fraction.finish(phase_name)

    return Monitor()
