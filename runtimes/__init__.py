"""The back-ends that execute a bundle's graphs, behind one small interface.

``create_runtime`` picks one by name and imports it only then, so a machine needs no more than the
runtime it uses. What lies here: ``base.py`` the interface and its checks, ``ort.py`` ONNX Runtime.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import UsageError
from .base import Runtime

if TYPE_CHECKING:
    from ..bundle import Bundle

RUNTIMES = ("onnxruntime",)

__all__ = ["RUNTIMES", "Runtime", "create_runtime"]


def create_runtime(name: str, bundle: Bundle, device: str = "cpu", threads: int | None = None) -> Runtime:
    """The runtime called ``name`` for ``bundle``; nothing is loaded before ``with`` enters it.

    Raises ``UsageError`` for an unknown name or device and ``MachineError`` for a missing package
    or device.
    """
    if name == "onnxruntime":
        from .ort import OrtRuntime

        return OrtRuntime(bundle, device=device, threads=threads)
    raise UsageError(f"unknown runtime {name!r}: choose one of {', '.join(RUNTIMES)}")
