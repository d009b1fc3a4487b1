"""The CUDA driver, as little of it as a runtime needs: memory, copies, one stream, graphs, facts of the GPU.

Called through ctypes in ``libcuda``, which the graphics driver brings with it: a Jetson and a desktop both have
it, its C interface is stable, and neither a CUDA toolkit nor a wheel that fits the toolkit's version and
Python's (cuda-python's newest is not made for JetPack 6's Python 3.10) has to be installed. TensorRT uses the
same primary context. This module knows no TensorRT.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from ctypes import byref, c_int, c_size_t, c_void_p
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import MachineError
from ..system.machine import has_nvidia_gpu
from ..system.packages import CUDA_13_DRIVER, in_container

_OUT_OF_MEMORY = 2
_NO_DEVICE = (100, 101)  # none, and none of that number
_VISIBLE = "CUDA_VISIBLE_DEVICES"
_IN_CONTAINER = "start the container with `--gpus all`, on a Jetson with `--runtime nvidia`"
# Codes of CUresult, and cudaErrorInsufficientDriver, which libraries report: what is wrong, what mends it.
_UPDATE = f"update NVIDIA's driver ({CUDA_13_DRIVER} or newer knows CUDA 13), or install packages for its CUDA"
_REMEDIES = {
    34: "take the toolkit's folder of stubs out of LD_LIBRARY_PATH",
    **dict.fromkeys((35, 36), _UPDATE),
    46: "end the process that has the GPU for itself",
    802: "start the machine's fabric manager: `sudo systemctl start nvidia-fabricmanager`",
    803: "the driver was updated while it was loaded, or a container brings another one: reboot, or mend the container",
    804: "this container needs a newer driver: update the host's, or take an older container",
    999: "load the driver's module again, `sudo modprobe -r nvidia_uvm && sudo modprobe nvidia_uvm`, or reboot",
}
_MAJOR, _MINOR, _INTEGRATED = 75, 76, 18  # CUdevice_attribute
_THREAD_LOCAL = 1  # CUstreamCaptureMode: other threads may go on allocating
_NON_BLOCKING = 1  # CUstream_flags
_MULTIPROCESSORS = 16  # CUdevice_attribute


@dataclass(frozen=True)
class Gpu:
    """The first GPU this process may use. ``integrated``: it shares the host's memory, as a Jetson's does."""

    name: str
    compute_capability: tuple[int, int]
    memory_bytes: int
    integrated: bool
    driver: str  # the newest CUDA it supports, such as 12.6
    multiprocessors: int = 0

    @property
    def model(self) -> str:
        """What an engine is built for: the name, and for an integrated GPU its multiprocessors and the board's memory.

        The driver calls every module of a generation "Orin", though they have 4 to 16 multiprocessors and 4 to 64 GB.
        The memory is the next power of two, for the system reserves some of it.
        """
        if not self.integrated:
            return self.name
        gigabytes = 1 << ((self.memory_bytes - 1) >> 30).bit_length()
        return f"{self.name} {self.multiprocessors} SM {gigabytes} GB"


class CudaError(MachineError):
    """A call failed. ``out_of_memory`` is the one cause that a caller tells apart."""

    def __init__(self, call: str, code: int, text: str) -> None:
        super().__init__(f"{call} failed: {text} (CUDA error {code})")
        self.code, self.out_of_memory = code, code == _OUT_OF_MEMORY


def require_gpu() -> Gpu:
    """The GPU's facts. Takes no GPU memory.

    Raises:
        MachineError: there is no driver or no GPU, or it cannot be used; the message says why.
    """
    return Cuda().gpu()


def find_gpu() -> Gpu | None:
    """The GPU's facts, or None where ``require_gpu`` raises."""
    try:
        return require_gpu()
    except MachineError:
        return None


@contextmanager
def _starting() -> Iterator[None]:
    """Say of a call that fails before any work was given to the GPU what keeps this process from it."""
    try:
        yield
    except CudaError as error:
        if error.out_of_memory:
            raise
        raise MachineError(f"CUDA cannot use a GPU here: {error}", _remedy(error.code)) from None


def _remedy(code: int) -> str:
    visible = os.environ.get(_VISIBLE)
    if code in _NO_DEVICE and visible is not None:
        return f"{_VISIBLE} is {visible!r}: unset it, or name a GPU such as 0"
    if code in _NO_DEVICE and in_container() and has_nvidia_gpu():
        return _IN_CONTAINER
    return _REMEDIES.get(code, "check the GPU with `nvidia-smi`")


class Cuda:
    """One device: addresses are ints, streams and graphs are opaque ints, sizes are bytes.

    Between ``open`` and ``close`` the device's primary context is held and current on this thread. Copies are queued
    on a stream and happen in order.

    Raises ``MachineError`` where there is no driver or it gives this process no GPU, and ``CudaError``, one too, for a
    later call that fails.
    """

    def __init__(self) -> None:
        name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
        try:
            self._library: Any = ctypes.CDLL(name)
        except OSError as error:
            hidden = in_container() and has_nvidia_gpu()
            remedy = _IN_CONTAINER if hidden else "install it and check with `nvidia-smi`"
            raise MachineError(f"no NVIDIA driver ({error})", remedy) from None
        self._device: c_int | None = None
        with _starting():
            self._call("cuInit", 0)

    @_starting()
    def gpu(self) -> Gpu:
        device, version, memory = c_int(), c_int(), c_size_t()
        name = ctypes.create_string_buffer(256)
        self._call("cuDeviceGet", byref(device), 0)
        self._call("cuDriverGetVersion", byref(version))
        self._call("cuDeviceGetName", name, len(name), device)
        self._call("cuDeviceTotalMem_v2", byref(memory), device)
        attributes = (_MAJOR, _MINOR, _INTEGRATED, _MULTIPROCESSORS)
        major, minor, integrated, count = (self._attribute(a, device) for a in attributes)
        driver = f"{version.value // 1000}.{version.value % 1000 // 10}"
        text = name.value.decode(errors="replace")
        return Gpu(text, (major, minor), memory.value, bool(integrated), driver, count)

    def free_memory(self) -> int:
        """Bytes that can still be allocated on the device. On an integrated GPU this leaves out what the system would
        give back, such as cached files."""
        free, total = c_size_t(), c_size_t()
        self._call("cuMemGetInfo_v2", byref(free), byref(total))
        return free.value

    @_starting()
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
        function = getattr(self._library, name, None)
        if function is None:
            raise CudaError(name, 36, "the driver is too old to have it")
        if code := int(function(*arguments)):
            text = ctypes.c_char_p()
            self._library.cuGetErrorString(code, byref(text))
            raise CudaError(name, code, (text.value or b"unknown").decode(errors="replace"))
