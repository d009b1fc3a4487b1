"""ONNX Runtime back-end: on the CPU, and with its GPU build on CUDA or TensorRT's execution provider.

A requested provider that is not really in use is an error; ONNX Runtime alone would run on the CPU and say
nothing. Precision is the file's: no option changes a number's type. Providers and their options are
``providers.py``'s, device buffers ``binding.py``'s, and the proof of what ran where ``placement.py``'s.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import BundleError, MachineError, OutOfMemory, UsageError
from ..system.files import utf8_path
from ..system.machine import available_cores
from .base import Arrays, Runtime, batched
from .binding import BoundSession
from .onnx_check import check_onnx_file, time_limit
from .placement import Placement, check_placement, node_counts, read_placement
from .providers import (
    MAX_BATCH,
    PROVIDERS,
    absence,
    engine_folder,
    engines_missing,
    first_line,
    import_onnxruntime,
    quiet_options,
    session_providers,
    start_problem,
)

if TYPE_CHECKING:
    from ..bundle.bundle import Bundle

_OUT_OF_MEMORY = re.compile(r"bad.?alloc|failed to allocate|out of memory", re.IGNORECASE)
_STALE_ENGINE = re.compile(r"deserializ", re.IGNORECASE)

# What loading and one row of a call may take on a CPU: a constant, and a share by the size of the file. The published
# autoencoder's decoder (200 MB, 512x512, the slowest for its size) has ten minutes for what takes 20 s on two server
# cores.
_LOAD_SECONDS, _LOAD_BYTES_PER_SECOND = 30.0, 5e6
_ROW_SECONDS, _ROW_BYTES_PER_SECOND = 20.0, 200e6 / 600
_ROW_RESOLUTION = 512


class OrtRuntime(Runtime):
    """One inference session a component, on the device ``cpu``, ``cuda`` or ``tensorrt``.

    ``threads`` is how many CPU threads one operator may use; by default as many as the cores this
    process may run on, which in a container is fewer than the machine has.

    Off the CPU every component runs once on zeros while it is activated. That builds TensorRT's engines, lets CUDA
    choose its kernels, and shows on which provider each node runs.
    """

    def __init__(self, bundle: Bundle, device: str = "cpu", threads: int | None = None) -> None:
        super().__init__(bundle.components)
        if device not in PROVIDERS:
            known = ", ".join(PROVIDERS)
            raise UsageError(f"runtime onnxruntime has no device {device!r}: choose one of {known}")
        if threads is not None and threads < 1:
            raise UsageError(f"threads must be 1 or more, got {threads}")
        self._bundle = bundle
        self._paths = {name: bundle.component_path(name) for name in bundle.components}
        self._device = device
        self._threads = available_cores() if threads is None else threads
        self._ort = import_onnxruntime()
        self._provider = PROVIDERS[device].name
        if lack := absence(self._ort, device):
            raise MachineError(f"{lack}, or use the device cpu")
        self._sessions: dict[str, Any] = {}
        self._bound: dict[str, BoundSession] = {}
        self._placements: dict[str, Placement] = {}
        if bundle.int8 is not None and (device == "cpu") != (bundle.int8["target"] == "cpu"):
            self.notes.append(_elsewhere(bundle.int8["target"], device))
        if device == "tensorrt" and (missing := engines_missing(bundle, self._ort.__version__)):
            folder = engine_folder(bundle, missing[0], self._ort.__version__).parent
            self.notes.append(f"TensorRT builds engines for {', '.join(missing)} first, for minutes; kept in {folder}")

    @property
    def info(self) -> dict[str, Any]:
        facts: dict[str, Any] = {
            "name": "onnxruntime",
            "version": self._ort.__version__,
            "device": self._device,
            "provider": self._provider,
            "threads": self._threads,
        }
        if self._placements:
            facts["nodes"] = node_counts(self._placements)
        return facts

    def activate(self) -> None:
        if self._device == "cpu":
            for name, path in self._paths.items():
                self._sessions[name] = self._open(name, path)
            return
        if problem := start_problem(self._ort, self._device):
            raise MachineError(f"{problem}, or use the device cpu")
        with tempfile.TemporaryDirectory(prefix="moebius-edge-") as folder:
            for name, path in self._paths.items():
                session = self._open(name, path, profile=Path(folder) / name)
                self._sessions[name] = session
                self._bound[name] = BoundSession(self._ort, session, self.components[name], "cuda")
                self._warm(name)

    def deactivate(self) -> None:
        self._bound.clear()  # buffers before the sessions whose allocators they came from
        self._sessions.clear()
        self._placements.clear()

    def _open(self, name: str, path: Path, profile: Path | None = None) -> Any:
        check_onnx_file(path)
        options = quiet_options(self._ort, self._threads)
        if profile is not None:
            options.enable_profiling = True
            options.profile_file_prefix = os.fspath(profile)
        providers = session_providers(self._ort, self._device, self.components[name], self._engines(name))
        try:
            with utf8_path(path) as name_on_disk, self._limit_load(path):
                session = self._ort.InferenceSession(name_on_disk, options, providers=providers, enable_fallback=0)
        except MachineError:
            raise
        except Exception as error:  # onnxruntime raises a class of its own for every cause
            raise self._problem(f"cannot load {path}", error) from error
        if self._provider not in session.get_providers():
            raise MachineError(
                f"onnxruntime could not start {self._provider}: check the driver with `nvidia-smi`, "
                "or use the device cpu"
            )
        declared = self.components[name]
        for kind, nodes, tensors in (
            ("inputs", session.get_inputs(), declared.inputs),
            ("outputs", session.get_outputs(), declared.outputs),
        ):
            found, expected = sorted(n.name for n in nodes), sorted(t.name for t in tensors)
            if found != expected:
                raise BundleError(
                    f"{path} has the {kind} {', '.join(found)}, bundle.json says {', '.join(expected)}: "
                    "export it again"
                )
        return session

    def _engines(self, name: str) -> Path:
        """TensorRT's cache folder, made where it is used; elsewhere nobody looks at it."""
        if self._device != "tensorrt":
            return self._bundle.path
        folder = engine_folder(self._bundle, name, self._ort.__version__)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise MachineError(
                f"cannot make the engine cache {folder} ({error.strerror}): run `mkdir -p {folder}`"
            ) from error
        return folder

    def _warm(self, name: str) -> None:
        """Run a component on zeros under the profiler, and prove from the profile that the provider ran it."""
        rows = MAX_BATCH.get(name, 1)
        component = self.components[name]
        feeds = {t.name: np.zeros(batched(t, rows), t.dtype) for t in component.inputs}
        self._run(name, feeds, [t.name for t in component.outputs])
        placement = read_placement(Path(self._sessions[name].end_profiling()))
        check_placement(name, placement, self._provider, self._device)
        self._placements[name] = placement

    def _run(self, component: str, feeds: Arrays, outputs: Sequence[str]) -> Arrays:
        try:
            if component in self._bound:
                return self._bound[component].run(feeds, outputs)
            options = self._ort.RunOptions()
            with self._limit_call(component, feeds, options):
                made = self._sessions[component].run(outputs, feeds, options)
        except BundleError:
            raise
        except Exception as error:
            raise self._problem(f"{component} failed", error) from error
        return dict(zip(outputs, made, strict=True))

    def _limit_load(self, path: Path) -> AbstractContextManager[None]:
        """On a CPU: folding the constants of a hostile graph could take forever. On a GPU an engine may be built."""
        if self._device != "cpu":
            return nullcontext()
        seconds = _LOAD_SECONDS + path.stat().st_size / _LOAD_BYTES_PER_SECOND
        return time_limit(seconds, f"{path} does not load within {seconds:.0f} s: export the bundle again")

    @contextmanager
    def _limit_call(self, component: str, feeds: Arrays, options: Any) -> Iterator[None]:
        """On a CPU: ONNX Runtime is told to stop, between two operators, after far more time than a network takes."""
        if self._device != "cpu":
            yield
            return
        rows = len(next(iter(feeds.values())))
        scale = (self._bundle.resolution / _ROW_RESOLUTION) ** 2
        seconds = rows * (_ROW_SECONDS + scale * self._paths[component].stat().st_size / _ROW_BYTES_PER_SECOND)
        took = f"{component} took over {seconds:.0f} s for {rows} rows"
        message = f"{took}, as no network of its size does: export the bundle again"

        def stop() -> None:
            options.terminate = True

        try:
            with time_limit(seconds, message, stop):
                yield
        except Exception as error:
            if options.terminate:
                raise BundleError(message) from error
            raise

    def _problem(self, what: str, error: Exception) -> BundleError | MachineError:
        """Our error for one of ONNX Runtime's, its first line kept."""
        reason = first_line(error)
        if isinstance(error, MemoryError) or _OUT_OF_MEMORY.search(str(error)):
            return OutOfMemory(f"{what}: not enough memory on {self._device} ({reason})", "close other programs")
        if self._device == "tensorrt" and _STALE_ENGINE.search(str(error)):
            folder = engine_folder(self._bundle, next(iter(self._paths)), self._ort.__version__).parent
            return MachineError(
                f"{what}: its engine is damaged, or another TensorRT's ({reason}): run `rm -r {folder}`, "
                "and it is built again"
            )
        return BundleError(
            f"{what} in onnxruntime {self._ort.__version__} ({reason}): run `pip install -U onnxruntime` "
            "or export the bundle again"
        )


def _elsewhere(target: str, device: str) -> str:
    """Where an INT8 file runs that was made for something else: its pairs stand where that something fuses them."""
    right = "--target cpu, or fp32" if device == "cpu" else "--target tensorrt"
    return f"this bundle is INT8 for {target}: on {device} it gives the same pictures slowly; export with {right}"
