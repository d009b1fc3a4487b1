"""ONNX Runtime: on the CPU, and with its GPU build on CUDA or TensorRT's execution provider.

A requested provider that is not really in use is an error; ONNX Runtime alone would run on the CPU and say
nothing. Precision is the file's: no option changes a number's type. Providers and their options stand in ``providers``.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from ..errors import BundleError, MachineError, OutOfMemory, UsageError
from ..spec import Component, Tensor
from ..system.files import utf8_path
from ..system.machine import available_cores
from .base import Arrays, Runtime, batched
from .onnx_check import check_onnx_file
from .providers import (
    CPU,
    MAX_BATCH,
    PROVIDERS,
    absence,
    first_line,
    import_onnxruntime,
    quiet_options,
    session_providers,
    start_problem,
)

Placement = dict[str, Counter[str]]  # provider -> operator -> number of nodes

_OUT_OF_MEMORY = re.compile(r"bad.?alloc|failed to allocate|out of memory", re.IGNORECASE)
_STALE_ENGINE = re.compile(r"deserializ", re.IGNORECASE)
_HEAVY = re.compile(r"Conv|MatMul|Gemm|Einsum")  # where nearly all of a network's time goes, fused kinds included


class OrtRuntime(Runtime):
    """One inference session a component, on the device ``cpu``, ``cuda`` or ``tensorrt``.

    Off the CPU every component runs once on zeros while it is activated. That builds TensorRT's engines, lets CUDA
    choose its kernels, and shows on which provider each node runs.

    Args:
        components: their tensors by name, every size fixed but the batch.
        paths: the ONNX file of each component.
        threads: how many CPU threads one operator may use; by default as many as the cores this process may run on,
            which in a container is fewer than the machine has.
        engine_folders: where TensorRT's provider keeps the engine of each component; without one it is built anew.
    """

    def __init__(
        self,
        components: Mapping[str, Component],
        paths: Mapping[str, Path],
        device: str = "cpu",
        threads: int | None = None,
        engine_folders: Mapping[str, Path] | None = None,
    ) -> None:
        super().__init__(components)
        if device not in PROVIDERS:
            raise UsageError(f"runtime onnxruntime has no device {device!r}", f"choose one of {', '.join(PROVIDERS)}")
        if threads is not None and threads < 1:
            raise UsageError(f"threads must be 1 or more, got {threads}")
        self.paths = dict(paths)
        self._engine_folders = dict(engine_folders or {})
        self._device = device
        self._threads = available_cores() if threads is None else threads
        self._ort = import_onnxruntime()
        self._provider = PROVIDERS[device].name
        if lack := absence(self._ort, device):
            raise MachineError(f"{lack}, or use the device cpu")
        self._sessions: dict[str, Any] = {}
        self._bound: dict[str, BoundSession] = {}
        self._placements: dict[str, Placement] = {}

    @property
    def info(self) -> dict[str, Any]:
        facts: dict[str, Any] = {"name": "onnxruntime", "version": self._ort.__version__, "device": self._device}
        facts |= {"provider": self._provider, "threads": self._threads}
        if self._placements:
            facts["nodes"] = {
                name: {provider: sum(nodes.values()) for provider, nodes in placement.items()}
                for name, placement in self._placements.items()
            }
        return facts

    def activate(self) -> None:
        gpu = self._device != "cpu"
        if gpu and (problem := start_problem(self._ort, self._device)):
            raise MachineError(f"{problem}, or use the device cpu")
        with tempfile.TemporaryDirectory(prefix="moebius-edge-") as folder:
            for name, path in self.paths.items():
                self._sessions[name] = self._open(name, path, Path(folder) / name if gpu else None)
                if gpu:
                    self._bound[name] = BoundSession(self._ort, self._sessions[name], self.components[name], "cuda")
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
        declared = self.components[name]
        folder = self._engine_folders.get(name) if self._device == "tensorrt" else None
        try:
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            problem = f"cannot make the engine cache {folder} ({error.strerror})"
            raise MachineError(problem, f"run `mkdir -p {folder}`") from error
        providers = session_providers(self._ort, self._device, declared, folder)
        try:
            with utf8_path(path) as name_on_disk:
                session = self._ort.InferenceSession(name_on_disk, options, providers=providers, enable_fallback=0)
        except MachineError:
            raise
        except Exception as error:  # onnxruntime raises a class of its own for every cause
            raise self._problem(f"cannot load {path}", error) from error
        if self._provider not in session.get_providers():
            problem = f"onnxruntime could not start {self._provider}"
            raise MachineError(problem, "check the driver with `nvidia-smi`, or use the device cpu")
        graph, tensors = (session.get_inputs(), session.get_outputs()), (declared.inputs, declared.outputs)
        for kind, *sides in zip(("inputs", "outputs"), graph, tensors, strict=True):
            names, expected = (", ".join(sorted(tensor.name for tensor in side)) for side in sides)
            if names != expected:
                raise BundleError(f"{path} has the {kind} {names}, bundle.json says {expected}", "export it again")
        return session

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
            results = self._sessions[component].run(outputs, feeds)
        except Exception as error:
            raise self._problem(f"{component} failed", error) from error
        return dict(zip(outputs, results, strict=True))

    def _problem(self, what: str, error: Exception) -> BundleError | MachineError:
        """Our error for one of ONNX Runtime's, its first line kept."""
        reason = first_line(error)
        if isinstance(error, MemoryError) or _OUT_OF_MEMORY.search(str(error)):
            return OutOfMemory(f"{what}: not enough memory on {self._device} ({reason})", "close other programs")
        if self._engine_folders and self._device == "tensorrt" and _STALE_ENGINE.search(str(error)):
            folder = next(iter(self._engine_folders.values())).parent
            problem = f"{what}: its engine is damaged, or another TensorRT's ({reason})"
            return MachineError(problem, f"run `rm -r {folder}`, and it is built again")
        problem = f"{what} in onnxruntime {self._ort.__version__} ({reason})"
        return BundleError(problem, "run `pip install -U onnxruntime` or export the bundle again")


class BoundSession:
    """Runs ``session`` on buffers of ``device_type``, ``cuda`` or ``cpu``, one set of them for each batch size.

    A plain ``session.run`` allocates on the device for every call and copies through pageable memory it also allocates;
    here a step copies into the same addresses each time, and what comes back is the caller's.
    """

    def __init__(self, ort: ModuleType, session: Any, component: Component, device_type: str) -> None:
        self._ort, self._session, self._component, self._device = ort, session, component, device_type
        self._buffers: dict[int, tuple[Any, dict[str, Any], dict[str, Any]]] = {}  # batch -> binding, inputs, outputs

    def run(self, feeds: Arrays, outputs: Sequence[str]) -> Arrays:
        """Those ``outputs`` by name, as arrays of their own: the next call overwrites the device's buffers only."""
        batch = len(next(iter(feeds.values())))
        if batch not in self._buffers:
            self._buffers[batch] = self._allocate(batch)
        binding, bound_inputs, bound_outputs = self._buffers[batch]
        for name, buffer in bound_inputs.items():
            buffer.update_inplace(feeds[name])
        binding.synchronize_inputs()
        self._session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        return {name: np.array(bound_outputs[name].numpy()) for name in outputs}

    def _allocate(self, batch: int) -> tuple[Any, dict[str, Any], dict[str, Any]]:
        binding = self._session.io_binding()
        inputs = {t.name: self._buffer(t, batch) for t in self._component.inputs}
        outputs = {t.name: self._buffer(t, batch) for t in self._component.outputs}
        for name, buffer in inputs.items():
            binding.bind_ortvalue_input(name, buffer)
        for name, buffer in outputs.items():
            binding.bind_ortvalue_output(name, buffer)
        return binding, inputs, outputs

    def _buffer(self, tensor: Tensor, batch: int) -> Any:
        shape, kind = list(batched(tensor, batch)), np.dtype(tensor.dtype).type
        return self._ort.OrtValue.ortvalue_from_shape_and_type(shape, kind, self._device, 0)


def read_placement(profile: Path) -> Placement:
    """Which provider ran how many nodes, from ONNX Runtime's profile of one call; copies count as well.

    A session may list a provider and still give it nothing: nodes it has no kernel for go to the CPU, without a word.
    """
    placement: Placement = {}
    for event in json.loads(profile.read_text(encoding="utf-8")):
        arguments = event.get("args") or {}
        if event.get("cat") == "Node" and "provider" in arguments:
            placement.setdefault(arguments["provider"], Counter())[arguments.get("op_name", "?")] += 1
    return placement


def check_placement(component: str, placement: Placement, provider: str, device: str) -> None:
    """Raise ``MachineError`` unless ``provider`` ran nodes and no product or convolution was left to the CPU.

    Shape arithmetic on the CPU is what ONNX Runtime intends and is no fault.
    """
    if not placement.get(provider):
        others = ", ".join(f"{sum(ops.values())} on {name}" for name, ops in placement.items()) or "none at all"
        problem = f"{provider} executes no node of {component} ({others})"
        raise MachineError(problem, f"update onnxruntime, or use another device than {device}")
    stray = Counter({op: n for op, n in placement.get(CPU, Counter()).items() if _HEAVY.search(op)})
    if stray:
        kinds = ", ".join(f"{n} {op}" for op, n in stray.most_common(4))
        problem = f"{component} would run {kinds} on the CPU, for {provider} has no kernel for them"
        raise MachineError(problem, f"use a bundle of a precision that {device} has, or the device cpu")
