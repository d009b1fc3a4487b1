"""The back-ends that execute a bundle's graphs, behind one small interface.

``create_runtime`` picks one by name and imports it only then, so a machine needs no more than the
runtime it uses. What lies here: ``base.py`` the interface and its checks, ``ort.py`` ONNX Runtime, ``trt.py``
TensorRT with ``engine_files.py``, ``executor.py`` (buffers and launches), ``cuda.py`` and ``flavours.py``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import UsageError
from .base import Runtime

if TYPE_CHECKING:
    from ..bundle import Bundle

RUNTIMES = ("onnxruntime", "tensorrt", "tensorrt-rtx")

__all__ = ["RUNTIMES", "Runtime", "create_runtime"]


def create_runtime(name: str, bundle: Bundle, device: str | None = None, threads: int | None = None) -> Runtime:
    """The runtime called ``name`` for ``bundle``; nothing is loaded before ``with`` enters it.

    ``device`` None is the runtime's own: the CPU for ONNX Runtime, the GPU for TensorRT. ``threads`` is for ONNX
    Runtime alone.

    Raises ``UsageError`` for an unknown name or device and ``MachineError`` for a missing package
    or device.
    """
    if name == "onnxruntime":
        from .ort import OrtRuntime

        return OrtRuntime(bundle, device="cpu" if device is None else device, threads=threads)
    if name in ("tensorrt", "tensorrt-rtx"):
        from .trt import TrtRuntime

        return TrtRuntime(bundle, name, device)
    raise UsageError(f"unknown runtime {name!r}: choose one of {', '.join(RUNTIMES)}")
