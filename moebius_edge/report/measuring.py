"""Measuring one configuration, inside its own process: load, warm up, run, and only then look at what was made.

Latents are copied and pictures compared in a pass of their own after the timed ones, so that neither the latencies
nor the peak memory hold any of it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ..pipeline.latency import StageTimer
from ..system.machine import peak_memory_bytes
from ..system.nvml import gpu_memory_in_use
from .accuracy import AgainstReference, AgainstTruth, Trace
from .inputs import Input, Loader, write_shown
from .power import open_meter
from .subjects import Subject, open_subject

Progress = Callable[[str, int, int], None]  # what is being done, done, total
_MINUTE_S = 60.0


def measure(spec: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    """The figures of the configuration in ``spec``, which ``collect`` made.

    Raises what loading and running it raise.
    """
    configuration, runs, warmup = spec["configuration"], spec["runs"], spec["warmup"]
    loader = Loader([Input.from_json(values) for values in spec["inputs"]])
    cold, timer = StageTimer(), StageTimer()
    progress("loading", 0, 0)
    with ExitStack() as stack:
        with cold.measure("load"):
            subject = stack.enter_context(open_subject(configuration))
        for number in range(warmup):
            _pass(subject, loader, cold, progress, f"warm-up {number + 1} of {warmup}")
        device = configuration["runtime"]["device"]
        with open_meter(device) as meter:
            for number in range(runs):
                _pass(subject, loader, timer, progress, f"run {number + 1} of {runs}")
        runtime = subject.runtime()
        figures = {
            "runtime": runtime,
            "latency": _latency(cold, timer, warmup, runs),
            "mean_call_ms": _mean_call_ms(timer),
            "memory": {"peak_host_bytes": peak_memory_bytes(), **peak_device_memory(device)},
            "energy": meter.energy().to_dict(runs * len(loader)),
            "sustained": _sustained(subject, loader, timer, spec["sustained_minutes"], progress),
            "engine_bytes": subject.engine_bytes(),
        }
        return {**figures, **_look(subject, loader, spec, progress), "work": subject.work()}


def _pass(subject: Subject, loader: Loader, timer: StageTimer, progress: Progress, what: str) -> None:
    for done, loaded in enumerate(loader):
        progress(what, done, len(loader))
        subject.fill(loaded, timer)


def _latency(cold: StageTimer, timer: StageTimer, warmup: int, runs: int) -> dict[str, Any]:
    """Statistics of the timed runs; a stage's first call is the process's, which the warm-up made if there was one."""
    first, stages = cold.summary(), timer.summary()
    for name, row in stages.items():
        row["first_ms"] = first.get(name, row)["first_ms"]
        del row["total_ms"]
    total = timer.summary()["total"]
    return {
        "load_ms": first["load"]["first_ms"],
        "warmup": warmup,
        "runs": runs,
        "images_per_second": total["count"] / (total["total_ms"] / 1e3),
        "stages": stages,
    }


def _mean_call_ms(timer: StageTimer) -> float | None:
    """Of the denoiser; None for what has none."""
    calls = timer.summary().get("denoise")
    return None if calls is None else calls["total_ms"] / calls["count"]


def _sustained(
    subject: Subject, loader: Loader, timer: StageTimer, minutes: float, progress: Progress
) -> dict[str, Any] | None:
    """The same pictures over and over for ``minutes``: cold is the timed runs' median, soaked the last minute's."""
    if minutes <= 0:
        return None
    by_minute: list[list[float]] = []
    start = time.monotonic()
    while (elapsed := time.monotonic() - start) < minutes * _MINUTE_S:
        progress("sustained, seconds", int(elapsed), int(minutes * _MINUTE_S))
        for loaded in loader:
            once = StageTimer()
            subject.fill(loaded, once)
            minute = int((time.monotonic() - start) / _MINUTE_S)
            by_minute += [[] for _ in range(minute + 1 - len(by_minute))]
            by_minute[minute].append(once.summary()["total"]["first_ms"])
    medians = [statistics.median(values) for values in by_minute if values]
    return {
        "minutes": minutes,
        "cold_median_ms": timer.summary()["total"]["median_ms"],
        "soaked_median_ms": medians[-1],
        "by_minute_ms": medians,
    }


def _look(subject: Subject, loader: Loader, spec: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    """One more pass, untimed: the pictures and the accuracy; a reference keeps its traces for the others."""
    configuration, folder = spec["configuration"], Path(spec["folder"])
    record, reference = spec["record"], spec["reference"]
    against = AgainstReference(reference["id"]) if reference else None
    truth = AgainstTruth() if any(values["truth"] for values in spec["inputs"]) else None
    pictures: dict[str, str] = {}
    for number, loaded in enumerate(loader):
        progress("accuracy", number, len(loader))
        trace = Trace() if record or reference else None
        result = subject.fill(loaded, None, trace)
        name = trace_name(number)
        if record:
            assert trace is not None
            Path(record).mkdir(parents=True, exist_ok=True)
            trace.save(Path(record) / name)
        if against is not None:
            assert trace is not None
            against.add(trace, Path(reference["folder"]) / name)
        if truth is not None and loaded.truth is not None:
            truth.add(result, loaded.truth, loaded.hole)
        pictures[loaded.source.name] = write_shown(folder, configuration["id"], loaded.source.shown, result)
    accuracy = {
        "against_reference": against.result() if against else None,
        "against_truth": truth.result() if truth else None,
    }
    return {"accuracy": accuracy, "pictures": pictures}


def trace_name(number: int) -> str:
    return f"{number:04d}.npz"


def peak_device_memory(device: str) -> dict[str, Any]:
    """``peak_device_bytes``, or why it is not known.

    It is what the process holds after its runs: neither ONNX Runtime's arena nor TensorRT gives memory back before.
    """
    if device == "cpu":
        return {"peak_device_bytes": None, "reason": "it runs on the CPU, whose memory is the host's"}
    held = gpu_memory_in_use()
    reason = "NVML does not list this process's GPU memory" if held is None else None
    return {"peak_device_bytes": held, "reason": reason}
