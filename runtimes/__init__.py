"""The back-ends that execute a bundle's graphs, behind one small interface.

``create_runtime`` picks one by name, or the fastest that works, and imports it only then, so a machine needs no
more than the runtime it uses. What lies here: ``base.py`` the interface and its checks, ``auto.py`` the choice,
``ort.py`` ONNX Runtime with ``providers.py``, ``placement.py`` and ``binding.py`` for its GPU providers, ``trt.py``
TensorRT with ``engine_files.py``, ``executor.py`` (buffers and launches), ``cuda.py`` and ``flavours.py``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import UsageError
from ..options import AUTO, RUNTIMES
from .auto import select
from .base import Runtime

if TYPE_CHECKING:
    from ..bundle.bundle import Bundle

__all__ = ["AUTO", "RUNTIMES", "Runtime", "create_runtime"]


def create_runtime(name: str, bundle: Bundle, device: str = AUTO, threads: int | None = None) -> Runtime:
    """The runtime called ``name`` for ``bundle``; nothing is loaded before ``with`` enters it.

    ``auto`` as the name or the device leaves the choice to ``auto.select``; the runtime's ``selection`` and
    ``notes`` then say what was chosen and why. ``threads`` is for ONNX Runtime alone.

    Raises ``UsageError`` for an unknown name or device and ``MachineError`` for a missing package
    or device.
    """
    if name != AUTO and name not in RUNTIMES:
        raise UsageError(f"unknown runtime {name!r}: choose one of {', '.join(RUNTIMES)}, or {AUTO}")
    if AUTO in (name, device):
        selection = select(bundle, name, device)
        chosen = selection.candidate
        runtime = create_runtime(chosen.runtime, bundle, chosen.device, threads)
        runtime.selection = selection.to_dict() if selection.tried else None
        if selection.notable:
            runtime.notes.append(selection.reason)
        return runtime
    if name == "onnxruntime":
        from .ort import OrtRuntime

        return OrtRuntime(bundle, device=device, threads=threads)
    from .trt import TrtRuntime

    return TrtRuntime(bundle, name, device)
