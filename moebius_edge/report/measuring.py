"""Measuring one configuration, inside its own process: load, warm up, run, and only then look at what was made.

Latents are copied and pictures compared in a pass of their own after the timed ones, so that neither the latencies
nor the peak memory hold any of it.
"""

from __future__ import annotations

import importlib
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np

from ..bundle import ENGINES_FOLDER, Bundle
from ..latency import StageTimer
from ..machine import peak_memory_bytes
from ..pipeline import Inpainter
from .accuracy import AgainstReference, AgainstTruth, Trace
from .baselines import Baseline, open_baseline
from .inputs import Input, Loaded, Loader, rgb8, write_shown

Progress = Callable[[str, int, int], None]  # what is being done, done, total
_PASSED = ("start", "steps", "guidance", "strength", "scheduler", "seed")  # of the settings, to ``Inpainter.inpaint``
_MINUTE_S = 60.0


class Subject(Protocol):
    """What is measured; loading happens on entering."""

    def __enter__(self) -> Subject: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...

    def fill(self, loaded: Loaded, timer: StageTimer | None, trace: Trace | None = None) -> np.ndarray:
        """The picture with its hole filled, uint8 RGB."""
        ...

    def runtime(self) -> dict[str, Any]: ...

    def engine_bytes(self) -> int | None: ...


def measure(spec: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    """The figures of the configuration in ``spec``, which is what ``collect.worker_spec`` made.

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
        meter = open_meter(device)
        with meter if meter is not None else nullcontext():
            for number in range(runs):
                _pass(subject, loader, timer, progress, f"run {number + 1} of {runs}")
        runtime = subject.runtime()
        figures = {
            "runtime": runtime,
            "latency": _latency(cold, timer, warmup, runs),
            "memory": {"peak_host_bytes": peak_memory_bytes(), **peak_device_memory(device)},
            "energy": energy_figures(meter, runs * len(loader)),
            "sustained": _sustained(subject, loader, timer, spec["sustained_minutes"], progress),
            "engine_bytes": subject.engine_bytes(),
        }
        figures |= _look(subject, loader, spec, progress)
    return {**figures, "work": work_figures(configuration, figures, spec)}


def open_subject(configuration: Mapping[str, Any]) -> Subject:
    """Not loaded yet: entering it does that."""
    return _Filler(configuration) if configuration["kind"] == "baseline" else _Network(configuration)


class _Network:
    """A bundle on a runtime, or the checkpoint it was made from in PyTorch."""

    def __init__(self, configuration: Mapping[str, Any]) -> None:
        self._configuration = configuration
        self._settings: dict[str, Any] = {key: configuration["settings"][key] for key in _PASSED}
        self._inpainter: Inpainter | None = None

    def __enter__(self) -> _Network:
        source, wanted = self._configuration["source"], self._configuration["runtime"]
        bundle = Bundle.load(Path(source["bundle"]))
        if self._configuration["kind"] == "torch":
            from .pytorch import open_checkpoint

            runtime = open_checkpoint(Path(source["checkpoint"]), Path(source["vae"]), bundle)
            self._inpainter = Inpainter(bundle, runtime).__enter__()
        else:
            self._inpainter = Inpainter(bundle, wanted["name"], wanted["device"]).__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        if self._inpainter is not None:
            self._inpainter.close()

    def fill(self, loaded: Loaded, timer: StageTimer | None, trace: Trace | None = None) -> np.ndarray:
        assert self._inpainter is not None
        on_step, on_region = (None, None) if trace is None else (trace.on_step, trace.on_region)
        result = self._inpainter.inpaint(
            loaded.picture, loaded.hole, on_step=on_step, on_region=on_region, timer=timer, **self._settings
        )
        return rgb8(result.picture)

    def runtime(self) -> dict[str, Any]:
        assert self._inpainter is not None
        return self._inpainter.runtime.report()

    def engine_bytes(self) -> int | None:
        """Of TensorRT's plans, whose folder the runtime names; ONNX Runtime's cache is found by its own name."""
        assert self._inpainter is not None
        runtime, bundle = self._inpainter.runtime.info, self._inpainter.bundle
        folders = []
        if runtime["name"].startswith("tensorrt"):
            folders = [bundle.path / ENGINES_FOLDER / runtime["provider"]]
        elif runtime["device"] == "tensorrt":
            from ..runtimes.providers import engine_folder

            folders = [engine_folder(bundle, name, runtime["version"]) for name in bundle.components]
        files = [path for folder in folders for path in folder.rglob("*") if path.suffix in (".plan", ".engine")]
        return sum(path.stat().st_size for path in files) if files else None


class _Filler:
    """A baseline: one stage, the whole."""

    def __init__(self, configuration: Mapping[str, Any]) -> None:
        self._source = configuration["source"]
        self._baseline: Baseline | None = None

    def __enter__(self) -> _Filler:
        self._baseline = open_baseline(self._source)
        return self

    def __exit__(self, *error: object) -> None:
        self._baseline = None

    def fill(self, loaded: Loaded, timer: StageTimer | None, trace: Trace | None = None) -> np.ndarray:
        assert self._baseline is not None
        image = rgb8(loaded.picture)
        measured: AbstractContextManager[None] = nullcontext() if timer is None else timer.measure("total")
        with measured:
            return self._baseline.fill(image, loaded.hole)

    def runtime(self) -> dict[str, Any]:
        assert self._baseline is not None
        return self._baseline.info

    def engine_bytes(self) -> int | None:
        return None


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
            against.add(trace, Path(reference["folder"]) / name, loaded.hole)
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
    """``peak_device_bytes``, or why it is not known."""
    if device == "cpu":
        return {"peak_device_bytes": None, "reason": "it runs on the CPU, whose memory is the host's"}
    return {"peak_device_bytes": None, "reason": "no counter of this process's device memory is read yet"}


# ---- What power.py, work.py and peaks.py measure comes in here, and nowhere else. ----


def open_meter(device: str) -> Any:
    """The power meter of ``device``, a context manager; None where this program has none yet."""
    power = _instrument("power")
    return None if power is None else power.open_meter(device)


def energy_figures(meter: Any, images: int) -> dict[str, Any]:
    """``energy`` of the timed runs."""
    if meter is not None:
        figures: dict[str, Any] = meter.energy().to_dict(images)
        return figures
    keys = ("source", "joules_per_image", "mean_watts", "power_mode", "clocks", "throttled")
    return {**dict.fromkeys(keys), "reason": "power is not measured by this version"}


def work_figures(
    configuration: Mapping[str, Any], figures: Mapping[str, Any], spec: Mapping[str, Any]
) -> dict[str, Any] | None:
    """``work`` of one step, and its share of the machine's peak (``spec["peaks"]``); None for a baseline."""
    return None


def machine_peaks(device: str) -> dict[str, Any] | None:
    """``peaks`` of the machine; ``collect`` asks once for all configurations."""
    return None


def _instrument(name: str) -> Any:
    try:
        return importlib.import_module(f"{__package__}.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"{__package__}.{name}":
            raise
        return None
