"""ONNX Runtime's execution providers: which a device needs, with what options, and whether one really starts.

Precision is the file's, so no option here lowers it. That a provider is listed says only that it was compiled
in: its libraries may be missing, and ONNX Runtime would then run on the CPU. So a graph of one node is run on it.
"""

from __future__ import annotations

import io
import os
import platform
import re
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from ..bundle.bundle import ASSETS, ENGINES_FOLDER
from ..errors import MachineError
from ..spec import DENOISER, SHALLOW, Component
from ..system.machine import cache_directory, gpu_name, package_version
from .base import batched

if TYPE_CHECKING:
    from ..bundle.bundle import Bundle

CPU, CUDA, TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"
# Rows an engine is built for: guidance needs two; the autoencoder sees one picture.
MAX_BATCH = {DENOISER: 2, SHALLOW: 2}

# y = x + x on two floats, opset 13: the least graph a device has to execute. tests/test_providers.py reads it.
PROBE = bytes.fromhex(
    "08083a390a0e0a01780a01781201792203416464120570726f62655a0f0a0178120a0a08080112040a020802620f0a0179120a0a08"
    "080112040a02080242040a00100d"
)


@dataclass(frozen=True)
class Provider:
    """``chain`` is what a session is given, best first: a node goes to the first that can execute it."""

    chain: tuple[str, ...]
    install: str

    @property
    def name(self) -> str:
        return self.chain[0]


# The builds of ONNX Runtime share an import name: with two installed, whichever came last wins.
_GPU_BUILD = 'pip uninstall -y onnxruntime && pip install "moebius-edge[gpu]"'
PROVIDERS = {
    "cpu": Provider((CPU,), 'pip install "moebius-edge[cpu]"'),
    "cuda": Provider((CUDA, CPU), _GPU_BUILD),
    "tensorrt": Provider((TENSORRT, CUDA, CPU), f'{_GPU_BUILD} "tensorrt<11"'),
}


def import_onnxruntime() -> ModuleType:
    """ONNX Runtime, or ``MachineError`` with the command that installs it."""
    try:
        import onnxruntime
    except ImportError as error:
        raise MachineError(
            f"the package onnxruntime is missing or broken ({error})",
            'run `pip install "moebius-edge[cpu]"`, or `"moebius-edge[gpu]"` on an NVIDIA GPU',
        ) from None
    return onnxruntime


def absence(ort: ModuleType, device: str) -> str:
    """Why this build of ONNX Runtime has no provider for ``device``, and what brings it; empty where it has."""
    name, available = PROVIDERS[device].name, ort.get_available_providers()
    if name in available:
        return ""
    remedy = f"run `{PROVIDERS[device].install}`"
    if device != "cpu" and platform.machine() == "aarch64":  # which wheels there are depends on the JetPack
        remedy = "docs/jetson.md says which build a Jetson needs"
    return f"this onnxruntime {ort.__version__} has no {name} (it has {', '.join(available)}): {remedy}"


def start_problem(ort: ModuleType, device: str) -> str:
    """Why the provider of ``device`` does not execute a graph of one node here; empty where it does."""
    name = PROVIDERS[device].name
    if device == "cpu":
        return ""
    ort.set_default_logger_severity(4)  # it would print what is said here, in colours
    if hasattr(ort, "preload_dlls"):  # since onnxruntime 1.21: loads libraries that came as Python packages
        with suppress(Exception), redirect_stdout(io.StringIO()):  # it prints what it does not find
            ort.preload_dlls(msvc=False)
    if device == "tensorrt":
        with suppress(ImportError):
            import tensorrt  # noqa: F401  loads libnvinfer into the process
    chain = [p for p in PROVIDERS[device].chain if p in ort.get_available_providers()]
    try:
        session = ort.InferenceSession(PROBE, quiet_options(ort), providers=chain, enable_fallback=0)
        if name not in session.get_providers():
            raise RuntimeError(f"it took {', '.join(session.get_providers())} instead")
        session.run(None, {"x": np.array([1, 2], np.float32)})
    except Exception as error:  # onnxruntime raises a class of its own for every cause
        libraries = '"onnxruntime-gpu[cuda,cudnn]"' + (' "tensorrt<11"' if device == "tensorrt" else "")
        remedy = f"check the driver with `nvidia-smi`, then run `pip install {libraries}`"
        return f"onnxruntime could not start {name} ({first_line(error)}): {remedy}"
    return ""


def session_providers(
    ort: ModuleType, device: str, component: Component, engines: Path | None = None
) -> list[str | tuple[str, dict[str, str]]]:
    """The providers of one component's session with their options. ``engines`` is TensorRT's cache folder."""

    def shapes(rows: int) -> str:
        """``name:1x9x64x64,...`` for a batch of ``rows``."""
        return ",".join(f"{t.name}:{'x'.join(map(str, batched(t, rows)))}" for t in component.inputs)

    most = shapes(MAX_BATCH.get(component.name, 1))
    cuda = {
        "device_id": "0",
        "use_tf32": "0",  # on by default, it would round the factors of float32 products to ten bits
        "arena_extend_strategy": "kSameAsRequested",  # not the next power of two: a Jetson shares its memory
    }
    tensorrt = {
        "device_id": "0",
        "trt_fp16_enable": "0",  # types are the file's
        "trt_int8_enable": "0",
        # One range for all calls: without it an engine is built for the first shape and again for the second.
        "trt_profile_min_shapes": shapes(1),
        "trt_profile_opt_shapes": most,
        "trt_profile_max_shapes": most,
    }
    for cache in ("engine", "timing") if engines is not None else ():
        tensorrt |= {f"trt_{cache}_cache_enable": "1", f"trt_{cache}_cache_path": str(engines)}
    options: dict[str, dict[str, str]] = {CUDA: cuda, TENSORRT: tensorrt}
    chain = [name for name in PROVIDERS[device].chain if name in ort.get_available_providers()]
    return [(name, options[name]) if name in options else name for name in chain]


def engine_folder(bundle: Bundle, component: str, version: str) -> Path:
    """Where ONNX Runtime ``version`` keeps the TensorRT engines of a component: beside the bundle, or in the cache.

    ONNX Runtime names an engine by the graph's structure, so that other weights would find a stale one: the
    folder's name has the file's SHA-256. It also has what an engine is bound to, versions and GPU. A bundle that
    cannot be written to, as one installed with the package, has its engines in the user's cache.
    """
    gpu = re.sub(r"[^a-z0-9]+", "-", (gpu_name() or "gpu").lower()).strip("-")
    tensorrt = package_version("tensorrt", "tensorrt-cu13", "tensorrt-cu12")  # unknown where it is the system's
    parts = ["onnxruntime", version, *(["tensorrt", tensorrt[1]] if tensorrt else []), gpu]
    digest = bundle.files[bundle.components[component].file]["sha256"][:12]
    inner = Path("-".join(parts)) / f"{component}-{digest}"
    installed = ASSETS in bundle.path.parents
    if not installed and os.access(bundle.path, os.W_OK):
        return bundle.path / ENGINES_FOLDER / inner
    return cache_directory() / "moebius-edge" / ENGINES_FOLDER / inner


def engines_missing(bundle: Bundle, version: str) -> list[str]:
    """The components for which TensorRT would have to build an engine first, which takes minutes."""
    return [name for name in bundle.components if not any(engine_folder(bundle, name, version).glob("*.engine"))]


def quiet_options(ort: ModuleType, threads: int = 0) -> Any:
    """Session options that print nothing: errors arrive as exceptions and must not print twice."""
    options = ort.SessionOptions()
    options.log_severity_level = 4  # fatal only
    options.intra_op_num_threads = threads
    return options


def first_line(error: Exception) -> str:
    """What an error of ONNX Runtime's says; the rest is a stack of C++ files."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    line = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", lines[0])
    return re.sub(r"^/\S+\.(?:cc|h):\d+ .*?\) ", "", line)  # where in its sources, and in which function
