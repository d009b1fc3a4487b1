"""The CUDA driver, as little of it as a runtime needs: memory, copies, one stream, graphs, facts of the GPU.

Called through ctypes in ``libcuda``, which the graphics driver brings with it: a Jetson and a desktop both have
it, its C interface is stable, and neither a CUDA toolkit nor a wheel that fits the toolkit's version and
Python's (cuda-python's newest is not made for JetPack 6's Python 3.10) has to be installed. TensorRT uses the
same primary context. This module knows no TensorRT.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from ctypes import byref, c_int, c_size_t, c_void_p
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import MachineError

_OUT_OF_MEMORY = 2
_MAJOR, _MINOR, _INTEGRATED = 75, 76, 18  # CUdevice_attribute
_THREAD_LOCAL = 1  # CUstreamCaptureMode: other threads may go on allocating
_NON_BLOCKING = 1  # CUstream_flags


@dataclass(frozen=True)
class Gpu:
    """The first GPU this process may use. ``integrated``: it shares the host's memory, as a Jetson's does."""

    name: str
    compute_capability: tuple[int, int]
    memory_bytes: int
    integrated: bool
    driver: str  # the newest CUDA it supports, such as 12.6


class CudaError(Exception):
    """A call failed. ``out_of_memory`` is the one cause that a caller tells apart."""

    def __init__(self, call: str, code: int, text: str) -> None:
        super().__init__(f"{call} failed: {text} (CUDA error {code})")
        self.out_of_memory = code == _OUT_OF_MEMORY


def find_gpu() -> Gpu | None:
    """The GPU's facts, or None where there is no driver or no GPU. Takes no GPU memory."""
    try:
        return Cuda().gpu()
    except (MachineError, CudaError):
        return None


class Cuda:
    """One device: addresses are ints, streams and graphs are opaque ints, sizes are bytes.

    Between ``open`` and ``close`` the device's primary context is held and current on this thread. Copies are queued
    on a stream and happen in order.

    Raises ``MachineError`` where no driver is installed, and ``CudaError`` for a call that fails.
    """

    def __init__(self) -> None:
        name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
        try:
            self._library: Any = ctypes.CDLL(name)
        except OSError as error:
            raise MachineError(f"no NVIDIA driver ({error})", "install it and check with `nvidia-smi`") from None
        self._device: c_int | None = None
        self._call("cuInit", 0)

    def gpu(self) -> Gpu:
        device, version, memory = c_int(), c_int(), c_size_t()
        name = ctypes.create_string_buffer(256)
        self._call("cuDeviceGet", byref(device), 0)
        self._call("cuDriverGetVersion", byref(version))
        self._call("cuDeviceGetName", name, len(name), device)
        self._call("cuDeviceTotalMem_v2", byref(memory), device)
        major, minor, integrated = (self._attribute(a, device) for a in (_MAJOR, _MINOR, _INTEGRATED))
        driver = f"{version.value // 1000}.{version.value % 1000 // 10}"
        return Gpu(name.value.decode(errors="replace"), (major, minor), memory.value, bool(integrated), driver)

    def open(self) -> None:
        device, context = c_int(), c_void_p()
        self._call("cuDeviceGet", byref(device), 0)
        self._call("cuDevicePrimaryCtxRetain", byref(context), device)
        self._device = device
        self._call("cuCtxSetCurrent", context)

    def close(self) -> None:
        """Let go of the context; what was allocated in it must be freed before."""
        if self._device is not None:
            device, self._device = self._device, None
            self._call("cuDevicePrimaryCtxRelease_v2", device)

    def allocate(self, size: int) -> int:
        return self._new("cuMemAlloc_v2", c_size_t(size))

    def free(self, address: int) -> None:
        self._call("cuMemFree_v2", c_void_p(address))

    def allocate_host(self, size: int) -> np.ndarray:
        """Page-locked host memory as bytes, so that copies need no staging; free with ``free_host``."""
        address = self._new("cuMemHostAlloc", c_size_t(size), 0)
        return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))

    def free_host(self, memory: np.ndarray) -> None:
        self._call("cuMemFreeHost", c_void_p(memory.ctypes.data))

    def upload(self, address: int, source: np.ndarray, size: int, stream: int) -> None:
        """Queue a copy of the first ``size`` bytes of ``source`` to the device."""
        self._copy("cuMemcpyHtoDAsync_v2", address, source.ctypes.data, size, stream)

    def download(self, target: np.ndarray, address: int, size: int, stream: int) -> None:
        """Queue a copy of ``size`` bytes from the device into ``target``."""
        self._copy("cuMemcpyDtoHAsync_v2", target.ctypes.data, address, size, stream)

    def copy(self, target: int, source: int, size: int, stream: int) -> None:
        """Queue a copy within the device; the two may not overlap."""
        self._copy("cuMemcpyDtoDAsync_v2", target, source, size, stream)

    def create_stream(self) -> int:
        return self._new("cuStreamCreate", _NON_BLOCKING)

    def destroy_stream(self, stream: int) -> None:
        self._call("cuStreamDestroy_v2", c_void_p(stream))

    def synchronise(self, stream: int) -> None:
        self._call("cuStreamSynchronize", c_void_p(stream))

    def begin_capture(self, stream: int) -> None:
        """From here on, what is queued on ``stream`` is recorded instead of executed."""
        self._call("cuStreamBeginCapture_v2", c_void_p(stream), _THREAD_LOCAL)

    def end_capture(self, stream: int) -> int:
        """Stop recording; the executable graph, to be destroyed with ``destroy_graph``."""
        graph = c_void_p()
        self._call("cuStreamEndCapture", c_void_p(stream), byref(graph))
        try:
            return self._new("cuGraphInstantiateWithFlags", graph, ctypes.c_ulonglong(0))
        finally:
            self._call("cuGraphDestroy", graph)

    def launch_graph(self, graph: int, stream: int) -> None:
        self._call("cuGraphLaunch", c_void_p(graph), c_void_p(stream))

    def destroy_graph(self, graph: int) -> None:
        self._call("cuGraphExecDestroy", c_void_p(graph))

    def load_kernel(self, ptx: bytes, name: str) -> int:
        """The function ``name`` of a module, compiled by the driver into the current context, which keeps it."""
        return self._new("cuModuleGetFunction", c_void_p(self._new("cuModuleLoadData", ptx)), name.encode())

    def launch_kernel(
        self, kernel: int, grid: tuple[int, int], threads: int, shared: int, addresses: Sequence[int], stream: int
    ) -> None:
        """Queue a kernel whose arguments are all addresses; ``shared`` is bytes for each block."""
        arguments = [c_void_p(address) for address in addresses]
        pointers = (c_void_p * len(arguments))(*(ctypes.addressof(a) for a in arguments))
        sizes = (*grid, 1, threads, 1, 1, shared)
        self._call("cuLaunchKernel", c_void_p(kernel), *sizes, c_void_p(stream), pointers, c_void_p())

    def _attribute(self, attribute: int, device: c_int) -> int:
        value = c_int()
        self._call("cuDeviceGetAttribute", byref(value), attribute, device)
        return value.value

    def _copy(self, name: str, target: int, source: int, size: int, stream: int) -> None:
        self._call(name, c_void_p(target), c_void_p(source), c_size_t(size), c_void_p(stream))

    def _new(self, name: str, *arguments: Any) -> int:
        """The handle or address that a call writes through its first argument."""
        handle = c_void_p()
        self._call(name, byref(handle), *arguments)
        return handle.value or 0

    def _call(self, name: str, *arguments: Any) -> None:
        code = int(getattr(self._library, name)(*arguments))
        if code:
            text = ctypes.c_char_p()
            self._library.cuGetErrorString(code, byref(text))
            raise CudaError(name, code, (text.value or b"unknown").decode(errors="replace"))
