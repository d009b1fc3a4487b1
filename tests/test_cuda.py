"""The CUDA driver through ctypes, on a library that records how it is called. No GPU is needed.

What the calls do is the driver's affair: ``test_trt`` tries them on a real one with ``-m gpu``.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest

from moebius_edge.errors import MachineError
from moebius_edge.runtimes import cuda as module
from moebius_edge.runtimes.cuda import Cuda, CudaError, Gpu, find_gpu


class Library:
    """Answers like libcuda: results through pointers, 0 for success."""

    def __init__(self, name: str = "") -> None:
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.fail: dict[str, int] = {}
        self.memory = (ctypes.c_uint8 * 64)()

    def __getattr__(self, name: str) -> Any:
        def function(*arguments: Any) -> int:
            self.calls.append((name, arguments))
            self.answer(name, arguments)
            return self.fail.get(name, 0)

        return function

    def answer(self, name: str, arguments: tuple[Any, ...]) -> None:
        numbers = {"cuDriverGetVersion": 12060, "cuDeviceTotalMem_v2": 7_800_000_000}
        numbers |= {"cuMemHostAlloc": ctypes.addressof(self.memory)}
        handles = ("cuMemAlloc_v2", "cuStreamCreate", "cuGraphInstantiateWithFlags")
        numbers |= dict.fromkeys(handles, 0x7F00_0000_1000)  # beyond 32 bits, as addresses are
        if name == "cuDeviceGetName":
            arguments[0].value = b"Orin"
        elif name == "cuDeviceGetAttribute":
            arguments[0]._obj.value = {75: 8, 76: 7, 18: 1}[arguments[1]]
        elif name == "cuGetErrorString":
            arguments[1]._obj.value = b"out of memory"
        elif name == "cuStreamEndCapture":
            arguments[1]._obj.value = 0x7F00_0000_1000
        elif name in numbers:
            arguments[0]._obj.value = numbers[name]

    def named(self, name: str) -> list[tuple[Any, ...]]:
        return [arguments for called, arguments in self.calls if called == name]


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    made = Library()
    monkeypatch.setattr(module.ctypes, "CDLL", lambda name: made)
    return made


def test_the_gpus_facts(library: Library) -> None:
    assert find_gpu() == Gpu("Orin", (8, 7), 7_800_000_000, True, "12.6")
    assert library.named("cuDevicePrimaryCtxRetain") == [], "asking takes no GPU memory"


def test_no_driver_and_no_gpu(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    library.fail["cuInit"] = 100
    assert find_gpu() is None
    with pytest.raises(CudaError, match=r"cuInit failed: out of memory \(CUDA error 100\)"):
        Cuda()

    def absent(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(module.ctypes, "CDLL", absent)
    assert find_gpu() is None
    with pytest.raises(MachineError, match=r"no NVIDIA driver \(libcuda\.so\.1: cannot open"):
        Cuda()


def test_addresses_are_passed_whole(library: Library) -> None:
    """ctypes would cut a bare int to 32 bits."""
    cuda = Cuda()
    cuda.open()
    stream, device = cuda.create_stream(), cuda.allocate(64)
    assert stream == device == 0x7F00_0000_1000
    host = cuda.allocate_host(64)
    assert host.dtype == np.uint8 and host.shape == (64,)
    host[:] = 7
    assert bytes(library.memory) == b"\x07" * 64
    cuda.upload(device, host, 48, stream)
    cuda.download(host, device, 16, stream)
    for name, first, second in (
        ("cuMemcpyHtoDAsync_v2", device, ctypes.addressof(library.memory)),
        ("cuMemcpyDtoHAsync_v2", ctypes.addressof(library.memory), device),
    ):
        ((a, b, size, on),) = library.named(name)
        assert (a.value, b.value, on.value) == (first, second, stream)
        assert isinstance(size, ctypes.c_size_t) and size.value in (48, 16)
    cuda.free(device)
    cuda.free_host(host)
    cuda.synchronise(stream)
    cuda.destroy_stream(stream)
    for name in ("cuMemFree_v2", "cuStreamSynchronize", "cuStreamDestroy_v2"):
        ((argument,),) = library.named(name)
        assert argument.value == stream
    ((freed,),) = library.named("cuMemFreeHost")
    assert freed.value == ctypes.addressof(library.memory)


def test_a_recorded_graph(library: Library) -> None:
    cuda = Cuda()
    stream = cuda.create_stream()
    cuda.begin_capture(stream)
    graph = cuda.end_capture(stream)
    cuda.launch_graph(graph, stream)
    cuda.destroy_graph(graph)
    order = [name for name, _ in library.calls if "Graph" in name or "Capture" in name]
    assert order == [
        "cuStreamBeginCapture_v2",
        "cuStreamEndCapture",
        "cuGraphInstantiateWithFlags",
        "cuGraphDestroy",
        "cuGraphLaunch",
        "cuGraphExecDestroy",
    ]
    library.fail["cuGraphInstantiateWithFlags"] = 801
    with pytest.raises(CudaError):
        cuda.end_capture(stream)
    assert len(library.named("cuGraphDestroy")) == 2, "the graph is freed although it could not be made executable"


def test_the_context_is_let_go_once_and_memory_that_runs_out_is_told_apart(library: Library) -> None:
    cuda = Cuda()
    for code, out in ((2, True), (700, False)):
        library.fail["cuMemAlloc_v2"] = code
        with pytest.raises(CudaError) as caught:
            cuda.allocate(1)
        assert caught.value.out_of_memory is out
    cuda.close()
    cuda.open()
    cuda.close()
    cuda.close()
    assert len(library.named("cuDevicePrimaryCtxRetain")) == len(library.named("cuDevicePrimaryCtxRelease_v2")) == 1


def test_a_kernel_gets_its_arguments_by_reference(library: Library) -> None:
    def answer(name: str, arguments: tuple[Any, ...]) -> None:
        if name == "cuLaunchKernel":
            places = arguments[9]
            read.extend(ctypes.c_void_p.from_address(places[i]).value for i in range(3))
        elif name in ("cuModuleLoadData", "cuModuleGetFunction"):
            arguments[0]._obj.value = {"cuModuleLoadData": 5, "cuModuleGetFunction": 6}[name]

    read: list[int | None] = []
    library.answer = answer  # type: ignore[method-assign]
    cuda = Cuda()
    kernel = cuda.load_kernel(b".version 8.0", "local_window")
    assert kernel == 6 and library.named("cuModuleGetFunction")[0][1].value == 5
    addresses = [0x7F00_0000_1000, 2, 3]
    cuda.launch_kernel(kernel, (256, 2), 128, 25088, addresses, 77)
    (arguments,) = library.named("cuLaunchKernel")
    assert arguments[0].value == 6 and arguments[1:8] == (256, 2, 1, 128, 1, 1, 25088) and arguments[8].value == 77
    assert read == addresses
