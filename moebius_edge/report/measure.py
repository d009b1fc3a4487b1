"""Measuring one configuration: load, warm up, run, and only then look at the pictures.

``python -m moebius_edge.report.measure`` is the process that ``collect`` starts for each.

Pictures are compared in a pass of their own after the timed ones, so that neither the latencies nor the peak memory
hold any of it.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from ..imaging.classical import navier_stokes, telea
from ..pipeline.inpainter import Inpainter
from ..pipeline.latency import StageTimer
from ..progress import Progress
from ..system.machine import peak_memory_bytes
from ..system.nvml import gpu_memory_in_use
from ..system.subprocess_job import serve_job
from .accuracy import Fidelity, Trace
from .inputs import Input, Loaded, load_input, rgb8, write_shown
from .power import open_meter

# The settings that ``Inpainter.inpaint`` takes.
_PASSED = ("start", "steps", "guidance", "guidance_interval", "strength", "scheduler", "cache_interval", "seed")
CLASSICAL = {"telea": telea, "navier-stokes": navier_stokes}
_MINUTE_S = 60.0


class BaselineTarget:
    """OpenCV's classical inpainting; its one stage is the whole."""

    def __init__(self, configuration: Mapping[str, Any]) -> None:
        self._fill = CLASSICAL[configuration["id"]]

    def fill(self, loaded: Loaded, timer: StageTimer | None, trace: Trace | None = None) -> np.ndarray:
        """The picture with its hole filled, uint8 RGB."""
        image = rgb8(loaded.picture)
        with nullcontext() if timer is None else timer.measure("total"):
            return self._fill(image, loaded.hole)

    def runtime(self) -> dict[str, Any]:
        return {"name": "opencv", "version": cv2.__version__, "device": "cpu"}

    def close(self) -> None:
        """Nothing is held."""


class BundleTarget:
    """A bundle on a runtime."""

    def __init__(self, configuration: Mapping[str, Any]) -> None:
        runtime, self._settings = configuration["runtime"], configuration["settings"]
        path = Path(configuration["bundle"]["path"])
        self._inpainter = Inpainter(path, runtime["name"], runtime["device"]).__enter__()

    def fill(self, loaded: Loaded, timer: StageTimer | None, trace: Trace | None = None) -> np.ndarray:
        """The picture with its hole filled, uint8 RGB."""
        settings = {key: self._settings[key] for key in _PASSED}
        if settings["guidance_interval"] is not None:
            settings["guidance_interval"] = tuple(settings["guidance_interval"])
        settings |= {"on_window": trace and trace.on_window, "timer": timer}
        return rgb8(self._inpainter.inpaint(loaded.picture, loaded.hole, **settings).picture)

    def runtime(self) -> dict[str, Any]:
        return self._inpainter.runtime.report()

    def close(self) -> None:
        self._inpainter.close()


Target = BaselineTarget | BundleTarget


def measure(spec: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    """The figures of the configuration in ``spec``, which ``collect`` made.

    Raises what loading and running it raise.
    """
    configuration, runs, warmup = spec["configuration"], spec["runs"], spec["warmup"]
    inputs = [Input(*(path and Path(path) for path in paths)) for paths in spec["inputs"]]
    cold, timer = StageTimer(), StageTimer()
    progress("loading", 0, 0)
    with cold.measure("load"):
        kind = BaselineTarget if configuration["kind"] == "baseline" else BundleTarget
        target: Target = kind(configuration)
    with closing(target):
        for number in range(warmup):
            _pass(target, inputs, cold, progress, f"warm-up {number + 1} of {warmup}")
        device = configuration["runtime"]["device"]
        with open_meter(device) as meter:
            for number in range(runs):
                _pass(target, inputs, timer, progress, f"run {number + 1} of {runs}")
        figures = {
            "latency": _latency(cold, timer, warmup, runs),
            "memory": {"peak_host_bytes": peak_memory_bytes(), **peak_device_memory(device)},
            "energy": meter.energy(runs * len(inputs)),
            "sustained": _sustained(target, inputs, timer, spec["sustained_minutes"], progress),
        }
        return {**figures, **_compare(target, inputs, spec, progress), "runtime": target.runtime()}


def _pass(target: Target, inputs: Sequence[Input], timer: StageTimer, progress: Progress, what: str) -> None:
    for done, source in enumerate(inputs):
        progress(what, done, len(inputs))
        target.fill(load_input(source), timer)


def _latency(cold: StageTimer, timer: StageTimer, warmup: int, runs: int) -> dict[str, Any]:
    """Statistics of the timed runs; a stage's first call is the process's, which the warm-up made if there was one."""
    first, stages = cold.summary(), timer.summary()
    for name, row in stages.items():
        row["first_ms"] = first.get(name, row)["first_ms"]
    return {"load_ms": first["load"]["first_ms"], "warmup": warmup, "runs": runs, "stages": stages}


def _sustained(
    target: Target, inputs: Sequence[Input], timer: StageTimer, minutes: float, progress: Progress
) -> dict[str, Any] | None:
    """The same pictures over and over for ``minutes``: cold is the timed runs' median, soaked the last minute's."""
    if minutes <= 0:
        return None
    by_minute: dict[int, list[float]] = {}
    start = time.monotonic()
    while (elapsed := time.monotonic() - start) < minutes * _MINUTE_S:
        progress("sustained, seconds", int(elapsed), int(minutes * _MINUTE_S))
        for source in inputs:
            once = StageTimer()
            target.fill(load_input(source), once)
            minute = int((time.monotonic() - start) / _MINUTE_S)
            by_minute.setdefault(minute, []).append(once.summary()["total"]["first_ms"])
    medians = [statistics.median(values) for values in by_minute.values()]
    return {
        "minutes": minutes,
        "cold_median_ms": timer.summary()["total"]["median_ms"],
        "soaked_median_ms": medians[-1],
        "by_minute_ms": medians,
    }


def _compare(target: Target, inputs: Sequence[Input], spec: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    """One more pass, untimed: the pictures and the accuracy; a reference keeps its traces for the others."""
    folder, record, reference = Path(spec["folder"]), spec["record"], spec["reference"]
    against, truth = Fidelity(), Fidelity()
    pictures: dict[str, str] = {}
    for number, source in enumerate(inputs):
        progress("accuracy", number, len(inputs))
        loaded, trace = load_input(source), Trace()
        result = target.fill(loaded, None, trace if reference else None)
        if record:
            trace.save(Path(record) / trace_name(number))
        if reference:
            against.add_reference(trace, Path(reference["folder"]) / trace_name(number))
        if loaded.truth is not None:
            truth.add_truth(result, loaded.truth, loaded.hole)
        pictures[source.name] = write_shown(folder, spec["configuration"]["id"], source.shown, result)
    accuracy = {
        "against_reference": {"reference": reference["id"], **against.result()} if reference else None,
        "against_truth": truth.result() if any(source.truth for source in inputs) else None,
    }
    return {"accuracy": accuracy, "pictures": pictures}


def trace_name(number: int) -> str:
    return f"{number:04d}.npy"


def peak_device_memory(device: str) -> dict[str, Any]:
    """``peak_device_bytes``, or why it is not known.

    It is what the process holds after its runs: neither ONNX Runtime's arena nor TensorRT gives memory back before.
    """
    if device == "cpu":
        return {"peak_device_bytes": None, "reason": "it runs on the CPU, whose memory is the host's"}
    held = gpu_memory_in_use()
    return {"peak_device_bytes": held, "reason": None if held else "NVML does not list this process's GPU memory"}


if __name__ == "__main__":
    sys.exit(serve_job(lambda spec, progress, note: measure(spec, progress)))
