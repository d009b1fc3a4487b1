"""What is measured, behind one small interface: a bundle on a runtime, its checkpoint in PyTorch, or a baseline."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np

from ..bundle.bundle import ENGINES_FOLDER, Bundle
from ..pipeline.inpainter import Inpainter
from ..pipeline.latency import StageTimer
from .accuracy import Trace
from .baselines import Baseline, open_baseline
from .inputs import Loaded, rgb8
from .instruments import work_figures

# Of the settings, to ``Inpainter.inpaint``.
_PASSED = ("start", "steps", "guidance", "strength", "scheduler", "cache_interval", "seed")


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

    def work(self) -> dict[str, Any] | None: ...


def open_subject(configuration: Mapping[str, Any]) -> Subject:
    """Not loaded yet: entering it does that."""
    return Filler(configuration) if configuration["kind"] == "baseline" else Network(configuration)


class Network:
    """A bundle on a runtime, or the checkpoint it was made from in PyTorch."""

    def __init__(self, configuration: Mapping[str, Any]) -> None:
        self._configuration = configuration
        settings = configuration["settings"]
        self._settings: dict[str, Any] = {key: settings[key] for key in _PASSED}
        if settings.get("guidance_interval") is not None:
            self._settings["guidance_interval"] = tuple(settings["guidance_interval"])
        self._inpainter: Inpainter | None = None

    def __enter__(self) -> Network:
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
        on_step, on_window = (None, None) if trace is None else (trace.on_step, trace.on_window)
        result = self._inpainter.inpaint(
            loaded.picture, loaded.hole, on_step=on_step, on_window=on_window, timer=timer, **self._settings
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

    def work(self) -> dict[str, Any] | None:
        """Of the bundle's files, which PyTorch does not execute."""
        assert self._inpainter is not None
        if self._configuration["kind"] == "torch":
            return None
        return work_figures(self._inpainter.bundle, self._configuration["settings"])


class Filler:
    """A baseline: one stage, the whole."""

    def __init__(self, configuration: Mapping[str, Any]) -> None:
        self._source = configuration["source"]
        self._baseline: Baseline | None = None

    def __enter__(self) -> Filler:
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

    def work(self) -> dict[str, Any] | None:
        return None
