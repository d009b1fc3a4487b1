"""OpenVINO: the same ONNX files on a plain CPU, where it has bfloat16 and INT8 kernels that ONNX Runtime lacks.

A component is compiled once for each number of rows that it is called with. Compiled models are kept in the user's
cache, so that the next start is fast. OpenVINO knows no local functions of ONNX, so they are written out first.

Few CPUs multiply float16. A component that is in half precision is computed in bfloat16 where the device has it, else
in float16; every other component is computed in float32, and so are the sines and cosines of the timestep.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import numpy as np

from ..errors import BundleError, MachineError, MoebiusError, OutOfMemory, UsageError
from ..spec import Component
from ..system.files import atomic_write, sha256_file
from ..system.machine import cache_directory
from ..system.packages import install
from .base import Arrays, Runtime, batched, choose_threads, is_verbose
from .onnx_check import check_onnx_file
from .onnx_inline import inline_functions

DEVICES = ("cpu", "gpu", "npu")
_HALF = {"BF16": "bf16", "FP16": "f16"}  # what a device says that it can -> the type's name; the faster first
_COMPILED_AS = 2  # raised where this module makes another model of the same file
_DIGEST_BYTES = 64  # in hexadecimal, so that what follows is aligned
_OUT_OF_MEMORY = re.compile(r"bad.?alloc|out of memory|cannot allocate|could not allocate", re.IGNORECASE)


class OpenVinoRuntime(Runtime):
    """One compiled model for each component and number of rows, on the device ``cpu``, ``gpu`` or ``npu`` of Intel's.

    Args:
        components: their tensors by name, every size fixed but the batch.
        paths: the ONNX file of each component.
        digests: the SHA-256 of each of these files. A component without one is compiled anew each time.
        half: the components that may be computed in 16 bits.
        rows: the component and its number of rows of each model that is compiled when the runtime is entered. All
            others are compiled at their first call.
        threads: by default as many as the cores this process may run on.
    """

    def __init__(
        self,
        components: Mapping[str, Component],
        paths: Mapping[str, Path],
        device: str = "cpu",
        threads: int | None = None,
        digests: Mapping[str, str] | None = None,
        half: Sequence[str] = (),
        rows: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__(components)
        if device not in DEVICES:
            raise UsageError(f"runtime openvino has no device {device!r}", f"choose one of {', '.join(DEVICES)}")
        self.paths, self._digests, self._rows = dict(paths), dict(digests or {}), dict(rows or {})
        self._device, self._threads = device, choose_threads(threads)
        self._ov = import_openvino()
        self._core = shared_core()
        there = self._core.available_devices
        if device.upper() not in {name.partition(".")[0] for name in there}:
            problem = f"OpenVINO {self._version} finds no {device} here, only {', '.join(there)}"
            raise MachineError(problem, "install the driver of the device, or use the device cpu")
        can = self._core.get_property(device.upper(), "OPTIMIZATION_CAPABILITIES")
        self._half_type = next((name for what, name in _HALF.items() if what in can), "f32")
        self._half = frozenset(half)
        if self._half and self._half_type == "f32":
            self.notes.append(f"this {device} computes neither in bfloat16 nor in float16: OpenVINO takes float32")
        model = self._core.get_property(device.upper(), "FULL_DEVICE_NAME")
        self._machine = [self._ov.get_version(), device, model, sorted(can)]
        self._requests: dict[tuple[str, int], Any] = {}
        self._mapped: list[Any] = []  # what imported models read their weights from, and do not hold themselves
        self._from_cache: dict[str, bool] = {}

    @property
    def _version(self) -> str:
        return str(self._ov.__version__).partition("-")[0]

    @property
    def info(self) -> dict[str, Any]:
        facts: dict[str, Any] = {"name": "openvino", "version": self._version, "device": self._device}
        facts |= {"provider": self._machine[2], "threads": self._threads}
        facts["precision"] = {name: self._precision(name) for name in self.components}
        if self._from_cache:
            facts["from_cache"] = dict(self._from_cache)
        return facts

    def activate(self) -> None:
        for name, path in self.paths.items():
            check_onnx_file(path)
            if name in self._rows:
                self._request(name, self._rows[name])

    def deactivate(self) -> None:
        self._requests.clear()  # before the memory that they read
        self._mapped.clear()
        self._from_cache.clear()

    def _run(self, component: str, feeds: Arrays, outputs: Sequence[str]) -> Arrays:
        request = self._request(component, len(next(iter(feeds.values()))))
        try:
            request.infer(feeds, share_inputs=True)
        except Exception as error:  # OpenVINO raises RuntimeError for every cause
            raise self._problem(f"{component} failed", error) from error
        return {name: np.array(request.get_tensor(name).data) for name in outputs}

    def _precision(self, component: str) -> str:
        return self._half_type if component in self._half else "f32"

    def _request(self, name: str, rows: int) -> Any:
        """What executes a component with that many rows; compiled, or read from the cache, the first time."""
        if (name, rows) not in self._requests:
            try:
                self._requests[name, rows] = self._load(name, rows).create_infer_request()
            except MoebiusError:
                raise
            except Exception as error:
                raise self._problem(f"cannot load {self.paths[name]}", error) from error
        return self._requests[name, rows]

    def _load(self, name: str, rows: int) -> Any:
        """The compiled model; in float32, with a note, where OpenVINO has no kernels in the 16 bits that it offers."""
        try:
            return self._find_or_compile(name, rows)
        except RuntimeError as error:
            half = self._precision(name)
            if half == "f32" or _OUT_OF_MEMORY.search(str(error)):
                raise
            self._half -= {name}
            self._note(f"OpenVINO cannot compile {name} in {half} here ({_reason(error)}): it takes float32")
            return self._find_or_compile(name, rows)

    def _find_or_compile(self, name: str, rows: int) -> Any:
        properties: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": self._precision(name),  # by default OpenVINO computes float32 in bfloat16
            "PERFORMANCE_HINT": "LATENCY",
        }
        facts = [_COMPILED_AS, self._digests.get(name), rows, properties, self._machine]
        if self._device == "cpu":
            # Pinned, the threads of two processes would take the same cores and leave others idle.
            properties = {**properties, "INFERENCE_NUM_THREADS": self._threads, "ENABLE_CPU_PINNING": False}
        if is_verbose():
            properties = {**properties, "LOG_LEVEL": "LOG_INFO"}
        path = self._cache_path(f"{name}-{rows}-{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]}")
        model = None if path is None else self._import(path, properties)
        self._from_cache[f"{name} of {rows}"] = model is not None
        if model is None:
            model = self._compile(name, rows, properties)
            if path is not None and sha256_file(self.paths[name]) == self._digests.get(name):
                self._keep(path, model)
        if is_verbose():  # the plugin for CPUs logs nothing itself
            chosen = {p: model.get_property(p) for p in model.get_property("SUPPORTED_PROPERTIES")}
            listed = ", ".join(f"{p} {value}" for p, value in chosen.items() if p != "SUPPORTED_PROPERTIES")
            print(f"openvino {name} of {rows}: {listed}", file=sys.stderr)
        return model

    def _compile(self, name: str, rows: int, properties: Mapping[str, Any]) -> Any:
        component = self.components[name]
        model = self._core.read_model(inline_functions(self.paths[name]))
        for kind, graph, tensors in (
            ("inputs", model.inputs, component.inputs),
            ("outputs", model.outputs, component.outputs),
        ):
            names, expected = sorted(port.any_name for port in graph), sorted(t.name for t in tensors)
            if names != expected:
                problem = f"{self.paths[name]} has the {kind} {', '.join(names)}"
                raise BundleError(f"{problem}, bundle.json says {', '.join(expected)}", "export it again")
        model.reshape({tensor.name: list(batched(tensor, rows)) for tensor in component.inputs})
        if self._precision(name) != "f32":
            keep_timestep_precise(model)
        return self._core.compile_model(model, self._device.upper(), dict(properties))

    def _cache_path(self, name: str) -> Path | None:
        try:
            return cache_directory() / "moebius-edge" / "openvino" / f"{name}.blob" if self._digests else None
        except MachineError as error:
            self._note(f"compiled models are not kept: {error.problem}")
            return None

    def _import(self, path: Path, properties: Mapping[str, Any]) -> Any:
        """The compiled model that was kept in a file, which starts with the SHA-256 of the rest; None without one."""
        try:
            data = np.memmap(path, np.uint8, "c")
            blob = data[_DIGEST_BYTES:]
            if hashlib.sha256(blob.data).hexdigest().encode() == data[:_DIGEST_BYTES].tobytes():  # else it might crash
                tensor = self._ov.Tensor(blob, shared_memory=True)
                self._mapped.append(tensor)
                return self._core.import_model(tensor, self._device.upper(), dict(properties))
            problem = "it is damaged"
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError) as error:  # an empty file cannot be mapped
            problem = str(error)
        except RuntimeError as error:
            problem = _reason(error)
        self._note(f"the compiled model {path} is not usable ({problem}): it is compiled again")
        return None

    def _keep(self, path: Path, model: Any) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            stream = io.BytesIO()
            model.export_model(stream)
            with stream.getbuffer() as blob, atomic_write(path) as temporary, open(temporary, "wb") as file:
                file.write(hashlib.sha256(blob).hexdigest().encode())
                file.write(blob)
        except (MoebiusError, OSError, RuntimeError) as error:  # not every device exports, and the disk may be full
            reason = _reason(error)
            self._note(f"compiled models are not kept in {path.parent} ({reason}): each start compiles them again")

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def _problem(self, what: str, error: Exception) -> BundleError | MachineError:
        reason = _reason(error)
        if isinstance(error, MemoryError) or _OUT_OF_MEMORY.search(str(error)):
            return OutOfMemory(f"{what}: not enough memory on {self._device} ({reason})", "close other programs")
        problem = f"{what} in openvino {self._version} ({reason})"
        return BundleError(problem, "update it with `pip install -U openvino`, or export the bundle again")


def keep_timestep_precise(model: Any) -> None:
    """Let OpenVINO compute the arguments of sines and cosines in ``model`` in float32, whatever it is compiled for.

    In bfloat16, with its 8 bits, a timestep of 850 is 848 and the argument of a sine is off by up to 2. OpenVINO's
    attribute ``DisablePrecisionConversion`` prevents that. Python cannot set it, but a model that is read may have it:
    what leads to the waves is written to a file, marked there, and read back in place of what was there.
    """
    ov = import_openvino()
    from openvino import opset13

    waves = [operator for operator in model.get_ops() if operator.get_type_name() in ("Sin", "Cos")]
    times = [p for p in model.get_parameters() if p.output(0).names == {"timestep"}]
    if not waves or not times:
        return
    for reader in times[0].output(0).get_target_inputs():
        operator = reader.get_node()
        if operator.get_type_name() == "Unsqueeze":  # OpenVINO makes a Reshape of it, which would lose the mark
            shape = opset13.constant(list(operator.output(0).shape), np.int64)
            column = opset13.reshape(times[0], shape, False).output(0)
            for behind in operator.output(0).get_target_inputs():
                behind.replace_source_output(column)
    with tempfile.TemporaryDirectory(prefix="moebius-edge-") as folder:
        xml, weights = Path(folder) / "part.xml", Path(folder) / "part.bin"
        ov.serialize(ov.Model([wave.output(0) for wave in waves], times), str(xml), str(weights))
        root = ElementTree.fromstring(xml.read_bytes())
        for layer in root.iter("layer"):
            if layer.get("type") not in ("Const", "Parameter", "Result"):
                marks = layer.find("rt_info")
                marks = ElementTree.SubElement(layer, "rt_info") if marks is None else marks
                mark = {"name": "DisablePrecisionConversion", "version": "0", "value": "dynamic:f16,bf16"}
                ElementTree.SubElement(marks, "attribute", mark)
        part = shared_core().read_model(ElementTree.tostring(root), weights.read_bytes())
    for reader in part.get_parameters()[0].output(0).get_target_inputs():
        reader.replace_source_output(times[0].output(0))
    for wave, result in zip(waves, part.get_results(), strict=True):
        for reader in wave.output(0).get_target_inputs():
            reader.replace_source_output(result.input_value(0))


def _reason(error: Exception) -> str:
    """What an error says, without the places in OpenVINO's sources."""
    lines = [line.strip() for line in str(error).splitlines()]
    return next((line for line in lines if line and not line.startswith(("Exception from", "Check '"))), str(error))


@cache
def shared_core() -> Any:
    """OpenVINO's core, one for the process and as long as it lives.

    Its plugin for CPUs gives the thread a stack for signals. Of two cores the one that goes last leaves the thread with
    the other's stack, which is freed by then, and the next signal ends the process.
    """
    return import_openvino().Core()


def import_openvino() -> ModuleType:
    """OpenVINO, or ``MachineError`` with the command that installs it."""
    try:
        import openvino
    except ImportError as error:
        problem = str(error).partition("\n")[0]
        raise MachineError(f"the package openvino is missing or broken ({problem})", str(install("openvino"))) from None
    return openvino
