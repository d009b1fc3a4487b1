"""What executes ONNX components, behind one small interface.

``create_runtime`` picks a runtime by name, or the fastest that works, and imports it only then, so a machine needs no
more than the runtime it uses. ``base`` has the interface and its checks, ``auto`` the choice, ``ort`` and ``providers``
ONNX Runtime, ``openvino`` and ``onnx_inline`` OpenVINO, ``trt`` TensorRT with ``latent_loop`` (buffers, launches,
sampling on the GPU), ``cuda``, ``engine_files`` and ``engine_memory``; ``pytorch`` runs the networks themselves, as the
reference.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import UsageError
from ..options import AUTO, RUNTIMES
from ..spec import DENOISER, SHALLOW
from .auto import select
from .base import Runtime

if TYPE_CHECKING:
    from ..bundle.bundle import Bundle

__all__ = ["AUTO", "RUNTIMES", "Runtime", "create_runtime"]


def create_runtime(name: str, bundle: Bundle, device: str = AUTO, threads: int | None = None) -> Runtime:
    """The runtime called ``name`` for the components of ``bundle``; nothing is loaded before ``with`` enters it.

    ``auto`` as the name or the device leaves the choice to ``auto.select``; the runtime's ``selection`` and
    ``notes`` then say what was chosen and why. ``threads`` is for ONNX Runtime and OpenVINO.

    Raises:
        UsageError: an unknown name or device.
        MachineError: a package or a device is missing.
    """
    if name != AUTO and name not in RUNTIMES:
        raise UsageError(f"unknown runtime {name!r}", f"choose one of {', '.join(RUNTIMES)}, or {AUTO}")
    if AUTO in (name, device):
        selection = select(bundle, name, device)
        runtime = create_runtime(selection.candidate.runtime, bundle, selection.candidate.device, threads)
        runtime.selection = selection.to_dict() if selection.tried else None
        runtime.notes += [selection.note] if selection.note else []
        return runtime
    if name == "onnxruntime":
        return _onnxruntime(bundle, device, threads)
    if name == "openvino":
        return _openvino(bundle, device, threads)
    from .trt import TrtRuntime

    return TrtRuntime(bundle, name, device)


def _onnxruntime(bundle: Bundle, device: str, threads: int | None) -> Runtime:
    from .ort import OrtRuntime

    runtime = OrtRuntime(bundle.components, bundle.paths, device, threads, bundle.branches)
    if bundle.int8 is not None:
        slow = (
            f"this bundle is INT8, for which onnxruntime has no kernels on {device}: it gives the same pictures slowly"
        )
        faster = "use --runtime openvino" if device == "cpu" else "build engines with --engine tensorrt"
        runtime.notes.append(f"{slow}; {faster}, or export with --precision fp{32 if device == 'cpu' else 16}")
    return runtime


def _openvino(bundle: Bundle, device: str, threads: int | None) -> Runtime:
    from .openvino import OpenVinoRuntime

    half = bundle.precision == "float16" or (bundle.int8 is not None and bundle.int8["rest"] == "float16")
    halved = [name for name in bundle.components if half and bundle.float32_islands.get(name) != "all"]
    digests = {name: bundle.files[component.file]["sha256"] for name, component in bundle.components.items()}
    # What a run with the bundle's own settings calls; the rest is compiled if it comes to that.
    guided = bundle.branches == 2 and bundle.defaults["guidance"] != 1
    rows = {name: 2 if guided and name == DENOISER else 1 for name in bundle.components if name != SHALLOW}
    return OpenVinoRuntime(bundle.components, bundle.paths, device, threads, digests, halved, rows)
