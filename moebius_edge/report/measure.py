"""Measuring one configuration: load, warm up, run, and only then look at the pictures.

``python -m moebius_edge.report.measure`` is the process that ``collect`` starts for each.

Latents are copied and pictures compared in a pass of their own after the timed ones, so that neither the latencies
nor the peak memory hold any of it.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Mapping
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from ..bundle.bundle import ENGINES_FOLDER, Bundle
from ..errors import MachineError
from ..pipeline.inpainter import Inpainter
from ..pipeline.latency import StageTimer
from ..progress import Progress
from ..system.machine import peak_memory_bytes
from ..system.nvml import gpu_memory_in_use
from ..system.packages import install
from ..system.subprocess_job import serve_job
from .accuracy import AgainstReference, AgainstTruth, Trace
from .baselines import CLASSICAL, OnnxBaseline, read_description
from .flops import arithmetic
from .inputs import Input, Loaded, Loader, rgb8, write_shown
from .power import open_meter

# The settings that ``Inpainter.inpaint`` takes.
_PASSED = ("start", "steps", "guidance", "guidance_interval", "strength", "scheduler", "cache_interval", "seed")
_MINUTE_S = 60.0


class BaselineTarget:
    """A classical method or a described ONNX model; its one stage is the whole."""

    def __init__(self, configuration: Mapping[str, Any]) -> None:
        source = configuration["source"]
        if "method" in source:
            self._fill: Any = CLASSICAL[source["method"]][1]
            self._info = {"name": "opencv", "version": cv2.__version__, "device": "cpu"}
        else:
            model = OnnxBaseline(read_description(Path(source["description"])))
            self._fill, self._info = model.fill, model.info

    def fill(self, loaded: Loaded, timer: StageTimer | None, trace: Trace | None = None) -> np.ndarray:
        """The picture with its hole filled, uint8 RGB."""
        image = rgb8(loaded.picture)
        with nullcontext() if timer is None else timer.measure("total"):
            return np.asarray(self._fill(image, loaded.hole))

    def facts(self, timer: StageTimer) -> dict[str, Any]:
        return {"runtime": self._info}

    def close(self) -> None:
        """Nothing is held."""


class BundleTarget:
    """A bundle on a runtime, or in PyTorch the checkpoint that it was made from."""

    def __init__(self, configuration: Mapping[str, Any]) -> None:
        source, runtime = configuration["source"], configuration["runtime"]
        self._settings, self._is_torch = configuration["settings"], configuration["kind"] == "torch"
        if self._is_torch:
            bundle = Bundle.load(Path(source["bundle"]))
            checkpoint = _open_checkpoint(Path(source["checkpoint"]), Path(source["vae"]), bundle)
            self._inpainter = Inpainter(bundle, checkpoint).__enter__()
        else:
            self._inpainter = Inpainter(Path(source["bundle"]), runtime["name"], runtime["device"]).__enter__()

    def fill(self, loaded: Loaded, timer: StageTimer | None, trace: Trace | None = None) -> np.ndarray:
        """The picture with its hole filled, uint8 RGB."""
        on_step, on_window = (None, None) if trace is None else (trace.on_step, trace.on_window)
        settings = {key: self._settings[key] for key in _PASSED}
        if settings["guidance_interval"] is not None:
            settings["guidance_interval"] = tuple(settings["guidance_interval"])
        settings |= {"on_step": on_step, "on_window": on_window, "timer": timer}
        return rgb8(self._inpainter.inpaint(loaded.picture, loaded.hole, **settings).picture)

    def facts(self, timer: StageTimer) -> dict[str, Any]:
        """The runtime, the bytes of its engines and, but for PyTorch, the arithmetic of the files with ``timer``."""
        bundle, runtime = self._inpainter.bundle, self._inpainter.runtime.report()
        work = {} if self._is_torch else arithmetic(bundle, self._settings, runtime, timer)
        return {"runtime": runtime, "engine_bytes": _engine_bytes(bundle, runtime), **work}

    def close(self) -> None:
        self._inpainter.close()


Target = BaselineTarget | BundleTarget


def _engine_bytes(bundle: Bundle, runtime: Mapping[str, Any]) -> int | None:
    """The size of TensorRT's plans, whose folder the runtime names; None with another runtime."""
    if not runtime["name"].startswith("tensorrt"):
        return None
    return sum(path.stat().st_size for path in (bundle.path / ENGINES_FOLDER / runtime["provider"]).glob("*.plan"))


def _open_checkpoint(checkpoint: Path, vae: Path, bundle: Bundle) -> Any:
    """The runtime of the networks in float32 on the CPU, for the resolution of ``bundle``; it needs PyTorch."""
    try:
        from ..export.source import find_source, load_config, load_student, load_vae
        from ..runtimes.pytorch import TorchRuntime

        source = find_source(checkpoint, vae, None)
        student = load_student(source, load_config(source))
        return TorchRuntime(student, load_vae(source), bundle.components)
    except ModuleNotFoundError as error:
        raise MachineError(f"the PyTorch reference needs {error.name}", str(install("export"))) from error


def measure(spec: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    """The figures of the configuration in ``spec``, which ``collect`` made.

    Raises what loading and running it raise.
    """
    configuration, runs, warmup = spec["configuration"], spec["runs"], spec["warmup"]
    loader = Loader([Input(*(path and Path(path) for path in paths)) for paths in spec["inputs"]])
    cold, timer = StageTimer(), StageTimer()
    progress("loading", 0, 0)
    with cold.measure("load"):
        kind = BaselineTarget if configuration["kind"] == "baseline" else BundleTarget
        target: Target = kind(configuration)
    with closing(target):
        for number in range(warmup):
            _pass(target, loader, cold, progress, f"warm-up {number + 1} of {warmup}")
        device = configuration["runtime"]["device"]
        with open_meter(device) as meter:
            for number in range(runs):
                _pass(target, loader, timer, progress, f"run {number + 1} of {runs}")
        figures = {
            "latency": _latency(cold, timer, warmup, runs),
            "memory": {"peak_host_bytes": peak_memory_bytes(), **peak_device_memory(device)},
            "energy": meter.energy(runs * len(loader)),
            "sustained": _sustained(target, loader, timer, spec["sustained_minutes"], progress),
        }
        figures |= _compare(target, loader, spec, progress)
        return {**figures, **target.facts(timer)}


def _pass(target: Target, loader: Loader, timer: StageTimer, progress: Progress, what: str) -> None:
    for done, loaded in enumerate(loader):
        progress(what, done, len(loader))
        target.fill(loaded, timer)


def _latency(cold: StageTimer, timer: StageTimer, warmup: int, runs: int) -> dict[str, Any]:
    """Statistics of the timed runs; a stage's first call is the process's, which the warm-up made if there was one."""
    first, stages, total = cold.summary(), timer.summary(), timer.summary()["total"]
    for name, row in stages.items():
        row["first_ms"] = first.get(name, row)["first_ms"]
        del row["total_ms"]
    return {
        "load_ms": first["load"]["first_ms"],
        "warmup": warmup,
        "runs": runs,
        "images_per_second": total["count"] / (total["total_ms"] / 1e3),
        "stages": stages,
    }


def _sustained(
    target: Target, loader: Loader, timer: StageTimer, minutes: float, progress: Progress
) -> dict[str, Any] | None:
    """The same pictures over and over for ``minutes``: cold is the timed runs' median, soaked the last minute's."""
    if minutes <= 0:
        return None
    by_minute: dict[int, list[float]] = {}
    start = time.monotonic()
    while (elapsed := time.monotonic() - start) < minutes * _MINUTE_S:
        progress("sustained, seconds", int(elapsed), int(minutes * _MINUTE_S))
        for loaded in loader:
            once = StageTimer()
            target.fill(loaded, once)
            minute = int((time.monotonic() - start) / _MINUTE_S)
            by_minute.setdefault(minute, []).append(once.summary()["total"]["first_ms"])
    medians = [statistics.median(values) for values in by_minute.values()]
    return {
        "minutes": minutes,
        "cold_median_ms": timer.summary()["total"]["median_ms"],
        "soaked_median_ms": medians[-1],
        "by_minute_ms": medians,
    }


def _compare(target: Target, loader: Loader, spec: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    """One more pass, untimed: the pictures and the accuracy; a reference keeps its traces for the others."""
    folder, record, reference = Path(spec["folder"]), spec["record"], spec["reference"]
    against = AgainstReference(reference["id"]) if reference else None
    truth = AgainstTruth() if any(source.truth for source in loader.inputs) else None
    pictures: dict[str, str] = {}
    for number, loaded in enumerate(loader):
        progress("accuracy", number, len(loader))
        trace = Trace()
        result = target.fill(loaded, None, trace if record or against else None)
        if record:
            trace.save(Path(record) / trace_name(number))
        if against is not None:
            against.add(trace, Path(reference["folder"]) / trace_name(number))
        if truth is not None and loaded.truth is not None:
            truth.add(result, loaded.truth, loaded.hole)
        pictures[loaded.source.name] = write_shown(folder, spec["configuration"]["id"], loaded.source.shown, result)
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
    return {"peak_device_bytes": held, "reason": None if held else "NVML does not list this process's GPU memory"}


if __name__ == "__main__":
    sys.exit(serve_job(lambda spec, progress, note: measure(spec, progress)))
