"""ONNX Runtime: on the CPU, and with its GPU build on CUDA's execution provider.

A requested provider that is not really in use is an error; ONNX Runtime alone would run on the CPU and say
nothing. Precision is the file's: no option changes a number's type. Providers and their options stand in ``providers``.
On a GPU the denoiser's calls are recorded as CUDA graphs, and the deep feature stays where it was computed.
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
from ..sampling.calls import Call
from ..sampling.scheduler import Scheduler
from ..spec import DENOISER, SHALLOW, Component, Tensor
from ..system.files import utf8_path
from ..system.packages import mend_onnxruntime
from .base import Arrays, HostLatents, LatentBatch, Runtime, batched, choose_threads
from .onnx_check import check_onnx_file
from .providers import (
    CPU,
    PROVIDERS,
    absence,
    first_line,
    import_onnxruntime,
    is_out_of_memory,
    log_severity,
    quiet_options,
    session_providers,
    start_problem,
)

Placement = dict[str, Counter[str]]  # provider -> operator -> number of nodes

_GPU_FAILURE = re.compile(r"\b(CUDA|CUDNN|CUBLAS) (failure|error)|\b(CUDNN|CUBLAS)_STATUS_", re.IGNORECASE)
_HEAVY = re.compile(r"Conv|MatMul|Gemm|Einsum")  # where nearly all of a network's time goes, fused kinds included


class OrtRuntime(Runtime):
    """One inference session a component, on the device ``cpu`` or ``cuda``.

    On the GPU every component runs on zeros while it is activated, at each number of rows that sampling one picture
    takes. That lets CUDA choose its kernels and record its graphs, and shows on which provider each node runs.

    Args:
        components: their tensors by name, every size fixed but the batch.
        paths: the ONNX file of each component.
        threads: how many CPU threads one operator may use; by default as many as the cores this process may run on,
            which in a container is fewer than the machine has.
        branches: the most rows that the denoiser is called with for a picture: 2, or 1 with distilled guidance.
    """

    def __init__(
        self,
        components: Mapping[str, Component],
        paths: Mapping[str, Path],
        device: str = "cpu",
        threads: int | None = None,
        branches: int = 2,
    ) -> None:
        super().__init__(components)
        if device not in PROVIDERS:
            raise UsageError(f"runtime onnxruntime has no device {device!r}", f"choose one of {', '.join(PROVIDERS)}")
        self.paths = dict(paths)
        self._branches = branches
        self._device = device
        self._threads = choose_threads(threads)
        self._ort = import_onnxruntime()
        self._provider = PROVIDERS[device][0]
        if lack := absence(self._ort, device):
            raise MachineError(f"{lack}, or use the device cpu")
        self._sessions: dict[str, Any] = {}
        self._bound: dict[str, BoundSession] = {}
        self._placements: dict[str, Placement] = {}
        self._graph_problem = ""
        self.deep_of: LatentBatch | None = None  # whose deep feature the GPU holds

    @property
    def info(self) -> dict[str, Any]:
        facts: dict[str, Any] = {"name": "onnxruntime", "version": self._ort.__version__, "device": self._device}
        facts |= {"provider": self._provider, "threads": self._threads}
        if self._device != "cpu":
            recorded = any(bound.records for bound in self._bound.values())
            graphs = "recorded" if recorded else "not recorded"
            facts["cuda_graph"] = f"failed: {self._graph_problem}" if self._graph_problem else graphs
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
                if gpu:
                    self._open_on_gpu(name, path, Path(folder) / name)
                else:
                    self._sessions[name] = self._open(name, path)

    def deactivate(self) -> None:
        self._bound.clear()  # buffers before the sessions whose allocators they came from
        self._sessions.clear()
        self._placements.clear()
        self._graph_problem, self.deep_of = "", None

    def start_sampling(self, latents: np.ndarray, condition: np.ndarray, scheduler: Scheduler) -> LatentBatch:
        if not self._bound:
            return super().start_sampling(latents, condition, scheduler)
        self._check_active()
        return BoundLatents(self, latents, condition, scheduler)

    def run_shallow(self, feeds: Arrays) -> np.ndarray:
        """The noise by the shallow part, from the deep feature that the denoiser has left on the GPU."""
        return self._execute(SHALLOW, feeds, ["noise"])["noise"]

    def _open_on_gpu(self, name: str, path: Path, profile: Path) -> None:
        """Open and warm up a component. A denoiser whose calls cannot be recorded goes on without; ``info`` says so."""
        graphs = name in (DENOISER, SHALLOW) and not self._graph_problem
        try:
            self._bind(name, path, profile, graphs)
        except (BundleError, MachineError) as error:
            if not graphs or isinstance(error, OutOfMemory):
                raise
            self._graph_problem = error.problem
            self._bound.pop(name, None)
            self._sessions.pop(name, None)
            self._bind(name, path, profile, graphs=False)

    def _bind(self, name: str, path: Path, profile: Path, graphs: bool) -> None:
        self._sessions[name] = session = self._open(name, path, profile, graphs)
        owner = self._bound.get(DENOISER) if name == SHALLOW else None
        self._bound[name] = BoundSession(self._ort, session, self.components[name], "cuda", owner)
        self._warm(name, graphs)

    def _open(self, name: str, path: Path, profile: Path | None = None, graphs: bool = False) -> Any:
        check_onnx_file(path)
        options = quiet_options(self._ort, self._threads)
        if profile is not None:
            options.enable_profiling = True
            options.profile_file_prefix = os.fspath(profile)
        declared = self.components[name]
        providers = session_providers(self._ort, self._device, graphs)
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

    def _warm(self, name: str, graphs: bool) -> None:
        """Run a component on zeros: once under the profiler, to prove that the provider runs it; then as sampling will.

        With ``graphs`` the first run of each number of rows records it.
        """
        component, bound = self.components[name], self._bound[name]
        rows = range(self._branches, 0, -1) if name in (DENOISER, SHALLOW) else (1,)
        feeds = [{t.name: np.zeros(batched(t, count), t.dtype) for t in component.inputs} for count in rows]
        outputs = [t.name for t in component.outputs]
        self._run(name, feeds[0], outputs)
        placement = read_placement(Path(self._sessions[name].end_profiling()))
        check_placement(name, placement, self._provider, self._device)
        self._placements[name] = placement
        bound.records = graphs
        for each in feeds if graphs else feeds[1:]:
            self._run(name, each, outputs)

    def _run(self, component: str, feeds: Arrays, outputs: Sequence[str]) -> Arrays:
        if component in (DENOISER, SHALLOW):
            self.deep_of = None  # either call overwrites it
        return self._execute(component, feeds, outputs)

    def _execute(self, component: str, feeds: Arrays, outputs: Sequence[str]) -> Arrays:
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
        if is_out_of_memory(error):
            return OutOfMemory(f"{what}: not enough memory on {self._device} ({reason})", "close other programs")
        problem = f"{what} in onnxruntime {self._ort.__version__} ({reason})"
        if _GPU_FAILURE.search(str(error)):
            return MachineError(problem, "check the GPU with `nvidia-smi` and start again, or use the device cpu")
        return BundleError(problem, f"{mend_onnxruntime('-U')}, or export the bundle again")


class BoundLatents(HostLatents):
    """Latents in host memory whose deep feature, 10 MB a row at the published size, stays on the GPU."""

    _runtime: OrtRuntime

    def _predict(self, call: Call, feeds: Arrays) -> np.ndarray:
        if call.full:
            noise = self._runtime.run(DENOISER, feeds, ("noise",))["noise"]
            self._runtime.deep_of = self
            return noise
        if self._runtime.deep_of is not self:
            raise RuntimeError("another call of the denoiser has replaced the deep feature of these latents")
        return self._runtime.run_shallow(feeds)


class BoundSession:
    """Runs ``session`` on buffers of ``device_type``, ``cuda`` or ``cpu``, one set of them for each batch size.

    A plain ``session.run`` allocates on the device for every call and copies through pageable memory it also allocates;
    here a step copies into the same addresses each time, and what comes back is the caller's. An input that is an
    output of ``owner`` lies in its buffer. With ``records`` a session made for it records and replays a CUDA graph for
    each batch size, and the thread that recorded is the one that replays.
    """

    def __init__(
        self,
        ort: ModuleType,
        session: Any,
        component: Component,
        device_type: str,
        owner: BoundSession | None = None,
    ) -> None:
        self._ort, self._session, self._component, self._device = ort, session, component, device_type
        self._owner = owner
        self._buffers: dict[int, tuple[Any, dict[str, Any], dict[str, Any]]] = {}  # batch -> binding, inputs, outputs
        self.records = False

    def run(self, feeds: Arrays, outputs: Sequence[str]) -> Arrays:
        """Those ``outputs`` by name, as arrays of their own: the next call overwrites the device's buffers only.

        An input that is not in ``feeds`` is what its buffer holds.
        """
        batch = len(next(iter(feeds.values())))
        binding, bound_inputs, bound_outputs = self.buffers(batch)
        for name, array in feeds.items():
            bound_inputs[name].update_inplace(array)
        binding.synchronize_inputs()
        options = self._ort.RunOptions()
        options.log_severity_level = log_severity()  # as the session's
        options.add_run_config_entry("gpu_graph_id", str(batch) if self.records else "-1")  # -1: record nothing
        self._session.run_with_iobinding(binding, options)
        binding.synchronize_outputs()
        return {name: np.array(bound_outputs[name].numpy()) for name in outputs}

    def buffers(self, batch: int) -> tuple[Any, dict[str, Any], dict[str, Any]]:
        """The binding for that batch size, and its inputs and outputs by name."""
        if batch not in self._buffers:
            binding = self._session.io_binding()
            theirs = {} if self._owner is None else self._owner.buffers(batch)[2]
            inputs = {t.name: theirs.get(t.name) or self._allocate(t, batch) for t in self._component.inputs}
            outputs = {t.name: self._allocate(t, batch) for t in self._component.outputs}
            for name, buffer in inputs.items():
                binding.bind_ortvalue_input(name, buffer)
            for name, buffer in outputs.items():
                binding.bind_ortvalue_output(name, buffer)
            self._buffers[batch] = binding, inputs, outputs
        return self._buffers[batch]

    def _allocate(self, tensor: Tensor, batch: int) -> Any:
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
