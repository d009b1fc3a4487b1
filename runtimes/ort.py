"""ONNX Runtime back-end: the CPU by default, CUDA where the GPU build of ONNX Runtime is installed.

A requested provider that is not really in use is an error; ONNX Runtime alone would run on the CPU
and say nothing. Precision is the file's: no option here changes a number's type.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ..errors import BundleError, MachineError, UsageError
from ..machine import available_cores
from .base import Arrays, Runtime

if TYPE_CHECKING:
    from ..bundle import Bundle

# device -> (provider, the command that brings it)
PROVIDERS = {
    "cpu": ("CPUExecutionProvider", 'pip install "moebius-edge[cpu]"'),
    # The two builds share an import name: with both installed, whichever came last wins.
    "cuda": (
        "CUDAExecutionProvider",
        'pip uninstall -y onnxruntime && pip install "moebius-edge[gpu]"',
    ),
}
_OUT_OF_MEMORY = re.compile(r"bad.?alloc|failed to allocate|out of memory", re.IGNORECASE)


class OrtRuntime(Runtime):
    """One inference session a component.

    ``threads`` is how many CPU threads one operator may use; by default as many as the cores this
    process may run on, which in a container is fewer than the machine has.
    """

    def __init__(self, bundle: Bundle, device: str = "cpu", threads: int | None = None) -> None:
        super().__init__(bundle.components)
        if device not in PROVIDERS:
            known = ", ".join(PROVIDERS)
            raise UsageError(f"runtime onnxruntime has no device {device!r}: choose one of {known}")
        if threads is not None and threads < 1:
            raise UsageError(f"threads must be 1 or more, got {threads}")
        self._paths = {name: bundle.component_path(name) for name in bundle.components}
        self._device = device
        self._threads = available_cores() if threads is None else threads
        self._ort = _import_onnxruntime()
        self._provider, remedy = PROVIDERS[device]
        if self._provider not in self._ort.get_available_providers():
            raise MachineError(
                f"this onnxruntime {self._ort.__version__} has no {self._provider} (it has "
                f"{', '.join(self._ort.get_available_providers())}): run `{remedy}`, or use the device cpu"
            )
        self._sessions: dict[str, Any] = {}

    @property
    def info(self) -> dict[str, Any]:
        return {
            "name": "onnxruntime",
            "version": self._ort.__version__,
            "device": self._device,
            "provider": self._provider,
            "threads": self._threads,
        }

    def activate(self) -> None:
        for name, path in self._paths.items():
            self._sessions[name] = self._open(name, path)

    def deactivate(self) -> None:
        self._sessions.clear()

    def _open(self, name: str, path: Path) -> Any:
        options = self._ort.SessionOptions()
        options.log_severity_level = 4  # fatal only: errors arrive as exceptions and must not print twice
        options.intra_op_num_threads = self._threads
        try:
            session = self._ort.InferenceSession(os.fspath(path), options, providers=[self._provider])
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

    def _run(self, component: str, feeds: Arrays) -> Arrays:
        names = [t.name for t in self.components[component].outputs]
        try:
            outputs = self._sessions[component].run(names, feeds)
        except Exception as error:
            raise self._problem(f"{component} failed", error) from error
        return dict(zip(names, outputs, strict=True))

    def _problem(self, what: str, error: Exception) -> BundleError | MachineError:
        """Our error for one of ONNX Runtime's, its first line kept: the rest is a stack of C++ files."""
        lines = str(error).strip().splitlines() or [type(error).__name__]
        reason = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", lines[0])
        if isinstance(error, MemoryError) or _OUT_OF_MEMORY.search(str(error)):
            return MachineError(
                f"{what}: not enough memory on {self._device} ({reason}): close other programs"
            )
        return BundleError(
            f"{what} in onnxruntime {self._ort.__version__} ({reason}): run `pip install -U onnxruntime` "
            "or export the bundle again"
        )


def _import_onnxruntime() -> ModuleType:
    try:
        import onnxruntime
    except ImportError as error:
        raise MachineError(
            f"the package onnxruntime is missing or broken ({error}): run "
            '`pip install "moebius-edge[cpu]"`, or `"moebius-edge[gpu]"` on an NVIDIA GPU'
        ) from None
    return onnxruntime
