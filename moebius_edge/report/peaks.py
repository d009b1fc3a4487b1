"""What this machine reaches at best, measured in the same run as the networks: the roofline's two numbers.

Multiplications a second: the fastest of a few runs of square matrix products in a row, in the runtime, on the device
and in the precision under test. A multiplication is a multiply-add, so these are half of what is sold as FLOP/s.
Bytes a second: the fastest of a few copies of more than a cache holds, read and written bytes both counted, the ones a
cache fetches to write into not.

What the runtime is given are the models of ``onnx_bytes.py``.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..errors import MachineError
from ..spec import Component, Tensor
from ..system.machine import available_memory_bytes
from .onnx_bytes import TYPES, matrix_products, negations

SIDE = 2048  # of the matrices
COPIED_BYTES = 2**28
_REPEATS = 3
_PRODUCTS = {"cpu": 4, "cuda": 256}  # in a row: enough that handing over one matrix does not show


@dataclass(frozen=True)
class Peaks:
    """Multiply-adds and bytes a second; a figure that could not be measured is None, with the ``reason``."""

    multiplications_per_second: float | None
    bytes_per_second: float | None
    runtime: str
    precision: str
    reason: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure_peaks(runtime: Mapping[str, Any], precision: str, side: int = SIDE, copied: int = COPIED_BYTES) -> Peaks:
    """The peaks for ``runtime`` (as ``Runtime.info``) and a bundle's ``precision``; takes seconds.

    With TensorRT nothing is measured: its engines are built, in minutes, and what they reach is the builder's choice.
    """
    name, device = str(runtime["name"]), str(runtime["device"])
    title = f"{name} on {device}"
    reason = _obstacle(name, device, precision, 6 * max(copied, 4 * side * side))
    if reason:
        return Peaks(None, None, title, precision, reason)
    threads = int(runtime.get("threads") or 1)
    try:
        products = _products(device, threads, precision, side)
        moved = _copied(threads, copied) if device == "cpu" else _copied_on_gpu(copied)
    except MachineError as error:
        return Peaks(None, None, title, precision, str(error))
    return Peaks(products, moved, title, precision)


def _obstacle(name: str, device: str, precision: str, needed_bytes: int) -> str:
    """Why nothing is measured; empty where it is."""
    if name != "onnxruntime" or device not in _PRODUCTS:
        return f"no peak is measured with {name} on {device}, only with ONNX Runtime on cpu or cuda"
    if precision not in TYPES:
        return f"no peak is measured in {precision}, only in {', '.join(TYPES)}"
    if precision == "int8" and device != "cpu":
        return f"{name} on {device} has no integer matrix product of its own"
    free = available_memory_bytes()
    if free is not None and free < needed_bytes:
        return f"{free / 1e9:.1f} GB of free memory are too little to measure peaks in: close other programs"
    return ""


def _products(device: str, threads: int, precision: str, side: int) -> float:
    count = _PRODUCTS[device]
    model = matrix_products(precision, side, count)
    rng = np.random.default_rng(0)
    given = (128 + 8 * rng.standard_normal((side, side))).astype(np.uint8)
    if precision != "int8":
        given = rng.standard_normal((side, side)).astype(precision)
    return count * side**3 / _fastest(_session(model, device, threads), {"x": given})


def _copied(threads: int, size: int) -> float:
    """A copy of ``size`` bytes, split among ``threads``: NumPy lets go of the interpreter while it copies."""
    source, target = np.ones(size, np.uint8), np.zeros(size, np.uint8)
    pieces = list(zip(np.array_split(source, threads), np.array_split(target, threads), strict=True))

    def run() -> None:
        workers = [threading.Thread(target=np.copyto, args=(to, piece)) for piece, to in pieces]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()

    return 2 * size / _best(run)


def _copied_on_gpu(size: int) -> float:
    """Negations of ``size`` bytes one after the other, each of which reads all and writes all."""
    count = 64
    session = _session(negations(size // 4, count), "cuda", 0, optimise=False)
    return 2 * size * count / _fastest(session, {"x": np.ones(size // 4, np.float32)})


def _session(model: bytes, device: str, threads: int, optimise: bool = True) -> Any:
    from ..runtimes.providers import PROVIDERS, first_line, import_onnxruntime, quiet_options, session_providers

    ort = import_onnxruntime()
    options = quiet_options(ort, threads)
    if not optimise:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    # With the options that networks get: with TF32, say, a peak would be another precision's.
    providers = session_providers(ort, device, Component("peak", (Tensor("x", "float32", ("N", 1)),), ()))
    provider = PROVIDERS[device]
    try:
        session = ort.InferenceSession(model, options, providers=providers, enable_fallback=0)
    except Exception as error:  # onnxruntime raises a class of its own for every cause
        raise MachineError(f"onnxruntime cannot load the matrix products ({first_line(error)})") from error
    if provider.name not in session.get_providers():
        raise MachineError(f"onnxruntime could not start {provider.name}: check the driver with `nvidia-smi`")
    return session


def _fastest(session: Any, feeds: dict[str, np.ndarray]) -> float:
    from ..runtimes.providers import first_line

    try:
        return _best(lambda: session.run(None, feeds))
    except Exception as error:  # as above
        raise MachineError(f"onnxruntime cannot run the matrix products ({first_line(error)})") from error


def _best(run: Callable[[], Any]) -> float:
    """Seconds of the fastest of a few runs after one that warms up."""
    times = []
    for _ in range(_REPEATS + 1):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return min(times[1:])
