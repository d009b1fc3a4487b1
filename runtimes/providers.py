"""ONNX Runtime's execution providers: which a device needs, with what options, and whether one really starts.

Precision is the file's, so no option here lowers it. That a provider is listed says only that it was compiled in: its
libraries may be missing, and ONNX Runtime would then run on the CPU. So a graph of two nodes is run on it.

TensorRT's provider is not used. It takes precision from flags where the files state it, and PyPI has it for x86-64
alone; ``trt`` runs the same files on the same machines, as they are.
"""

from __future__ import annotations

import io
import re
from contextlib import redirect_stdout, suppress
from types import ModuleType
from typing import Any

import numpy as np

from ..errors import MachineError
from ..system.machine import has_nvidia_gpu, package_version
from ..system.packages import install, mend_onnxruntime
from .base import is_verbose
from .cuda import require_gpu

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
PROVIDERS = {
    "cpu": (CPU,),
    "cuda": (CUDA, CPU),
}  # device -> its providers: a node goes to the first that can execute it
_BUILDS = {"cpu": "cpu", "cuda": "gpu"}  # device -> the extra that brings its provider

_OUT_OF_MEMORY = re.compile(
    r"bad.?alloc|failed to allocate|out of memory|alloc_failed|smaller than requested bytes", re.IGNORECASE
)

# y = Conv(x, x) @ x with x (1, 1, 2, 2), opset 13. CUDA's provider loads cuDNN for the one and cuBLAS for the other,
# at the first use of each. tests/test_ort.py reads it.
PROBE = bytes.fromhex(
    "08083a780a220a01780a01781201632204436f6e762a110a04706164734000400040014001a001070a110a01630a017812017922"
    "064d61744d756c120570726f62655a1b0a017812160a14080112100a0208010a0208010a0208020a020802621b0a017912160a14"
    "080112100a0208010a0208010a0208020a02080242040a00100d"
)


def import_onnxruntime() -> ModuleType:
    """ONNX Runtime, or ``MachineError`` with the command that installs it."""
    try:
        import onnxruntime
    except ImportError as error:
        there = package_version("onnxruntime-gpu", "onnxruntime")
        remedy = str(mend_onnxruntime("--force-reinstall") if there else install("cpu"))
        if not there and has_nvidia_gpu() and (gpu := install("gpu").command):
            remedy += f", or for its GPU `{gpu}`"
        problem = str(error).partition("\n")[0]
        raise MachineError(f"the package onnxruntime is missing or broken ({problem})", remedy) from None
    return onnxruntime


def absence(ort: ModuleType, device: str) -> str:
    """Why this build of ONNX Runtime has no provider for ``device``, and what brings it; empty where it has."""
    name, available = PROVIDERS[device][0], ort.get_available_providers()
    if name in available:
        return ""
    has = ", ".join(available)
    return f"this onnxruntime {ort.__version__} has no {name} (it has {has}): {install(_BUILDS[device])}"


def start_problem(ort: ModuleType, device: str) -> str:
    """Why the provider of ``device`` does not execute the probe here; empty where it does."""
    name = PROVIDERS[device][0]
    if device == "cpu":
        return ""
    try:
        require_gpu()
    except MachineError as error:
        return str(error)
    ort.set_default_logger_severity(log_severity())  # it would print what is said here, in colours
    if hasattr(ort, "preload_dlls"):  # since onnxruntime 1.21: loads libraries that came as Python packages
        with suppress(Exception), redirect_stdout(io.StringIO()):  # it prints what it does not find
            ort.preload_dlls(msvc=False)
    try:
        providers = session_providers(ort, device)
        session = ort.InferenceSession(PROBE, quiet_options(ort), providers=providers, enable_fallback=0)
        if name not in session.get_providers():
            raise RuntimeError(f"it took {', '.join(session.get_providers())} instead")
        session.run(None, {"x": np.ones((1, 1, 2, 2), np.float32)})
    except Exception as error:  # onnxruntime raises a class of its own for every cause
        remedy = "close other programs" if is_out_of_memory(error) else mend_onnxruntime("-U")
        return f"onnxruntime could not start {name} ({first_line(error)}): {remedy}"
    return ""


def session_providers(ort: ModuleType, device: str, graphs: bool = False) -> list[str | tuple[str, dict[str, str]]]:
    """The providers of a session with their options; with ``graphs`` CUDA records its calls as CUDA graphs.

    CUDA's provider takes types from the file, whatever the bundle's precision: it has no switch for FP16 or INT8.
    """
    cuda = {
        "device_id": "0",
        "use_tf32": "0",  # on by default, it would round the factors of float32 products to ten bits
        "arena_extend_strategy": "kSameAsRequested",  # not the next power of two: a Jetson shares its memory
        "enable_cuda_graph": "1" if graphs else "0",
    }
    chain = [name for name in PROVIDERS[device] if name in ort.get_available_providers()]
    return [(name, cuda) if name == CUDA else name for name in chain]


def log_severity() -> int:
    """What ONNX Runtime prints: fatal errors alone, for others arrive as exceptions; information too for --verbose."""
    return 1 if is_verbose() else 4


def quiet_options(ort: ModuleType, threads: int = 0) -> Any:
    """Session options with which ONNX Runtime prints nothing unless ``--verbose`` asks for it."""
    options = ort.SessionOptions()
    options.log_severity_level = log_severity()
    options.intra_op_num_threads = threads
    return options


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out, the host's or the GPU's."""
    return isinstance(error, MemoryError) or _OUT_OF_MEMORY.search(str(error)) is not None


def first_line(error: Exception) -> str:
    """What an error of ONNX Runtime's says; the rest is a stack of C++ files."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    line = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", lines[0])
    line = re.sub(r" ; GPU=.*", "", line)  # and the name of this machine, and where in the sources
    return re.sub(r"^/\S+\.(?:cc|h):\d+ .*?\) ", "", line)  # where in its sources, and in which function
