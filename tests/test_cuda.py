"""The CUDA driver through ctypes, on a library that records how it is called. No GPU is needed.

What the calls do is the driver's affair: ``test_trt`` tries them on a real one with ``-m gpu``.
"""

from __future__ import annotations

import ctypes
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from commanding import Captured, refused

from moebius_edge.errors import MachineError
from moebius_edge.runtimes import cuda as module
from moebius_edge.runtimes.cuda import Cuda, CudaError, Gpu, find_gpu


class Library:
    """Answers like libcuda: results through pointers, 0 for success."""

    def __init__(self, name: str = "") -> None:
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.fail: dict[str, int] = {}
        self.lacks: set[str] = set()
        self.memory = (ctypes.c_uint8 * 64)()

    def __getattr__(self, name: str) -> Any:
        if name in self.lacks:
            raise AttributeError(name)

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
            arguments[0]._obj.value = {75: 8, 76: 7, 18: 1, 16: 8}[arguments[1]]
        elif name == "cuMemGetInfo_v2":
            arguments[0]._obj.value, arguments[1]._obj.value = 5_000_000_000, 7_800_000_000
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
    assert find_gpu() == Gpu("Orin", (8, 7), 7_800_000_000, True, "12.6", 8)
    assert library.named("cuDevicePrimaryCtxRetain") == [], "asking takes no GPU memory"
    assert Cuda().free_memory() == 5_000_000_000


@pytest.mark.parametrize(
    ("memory", "processors", "model"),
    [
        (3_300_000_000, 4, "Orin 4 SM 4 GB"),
        (7_620_000_000, 8, "Orin 8 SM 8 GB"),
        (16_300_000_000, 8, "Orin 8 SM 16 GB"),
        (32_200_000_000, 14, "Orin 14 SM 32 GB"),
        (65_900_000_000, 16, "Orin 16 SM 64 GB"),
    ],
)
def test_modules_that_the_driver_calls_alike_are_told_apart(memory: int, processors: int, model: str) -> None:
    gpu = Gpu("Orin", (8, 7), memory, True, "12.6", processors)
    assert gpu.model == model and replace(gpu, integrated=False).model == "Orin"


@pytest.mark.parametrize(
    ("code", "visible", "container", "remedy"),
    [
        (100, None, False, "check the GPU with `nvidia-smi`"),
        (100, "", True, "CUDA_VISIBLE_DEVICES is '': unset it, or name a GPU such as 0"),
        (101, "7", False, "CUDA_VISIBLE_DEVICES is '7': unset it, or name a GPU such as 0"),
        (100, None, True, "start the container with `--gpus all`, on a Jetson with `--runtime nvidia`"),
        (35, None, False, "update NVIDIA's driver (580 or newer knows CUDA 13), or install packages for its CUDA"),
        (803, None, True, "the driver was updated while it was loaded, or a container brings another one: reboot, or"),
        (804, None, True, "this container needs a newer driver"),
        (999, None, False, "load the driver's module again, `sudo modprobe -r nvidia_uvm && sudo modprobe nvidia_uvm`"),
        (1, None, False, "check the GPU with `nvidia-smi`"),
    ],
)
@pytest.mark.parametrize("call", ["cuInit", "cuDeviceGet", "cuDeviceGetName", "cuDevicePrimaryCtxRetain"])
def test_a_gpu_that_cannot_be_used_is_one_line_with_the_reason(
    library: Library,
    monkeypatch: pytest.MonkeyPatch,
    call: str,
    code: int,
    visible: str | None,
    container: bool,
    remedy: str,
) -> None:
    monkeypatch.setattr(module, "in_container", lambda: container)
    monkeypatch.setattr(module, "has_nvidia_gpu", lambda: True)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    library.fail[call] = code
    with pytest.raises(MachineError) as caught:
        cuda = Cuda()
        cuda.gpu()
        cuda.open()
    assert caught.value.problem == f"CUDA cannot use a GPU here: {call} failed: out of memory (CUDA error {code})"
    assert caught.value.remedy.startswith(remedy) and "\n" not in str(caught.value) and caught.value.exit_code == 3
    assert (find_gpu() is None) == (call != "cuDevicePrimaryCtxRetain")


def test_no_driver_and_no_gpu(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "in_container", lambda: False)
    library.lacks.add("cuGraphLaunch")
    with pytest.raises(MachineError, match=r"cuGraphLaunch failed: the driver is too old to have it \(CUDA error 36\)"):
        Cuda().launch_graph(1, 1)

    def absent(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(module.ctypes, "CDLL", absent)
    assert find_gpu() is None
    with pytest.raises(MachineError, match=r"no NVIDIA driver \(libcuda\.so\.1: cannot open.*: install it and check"):
        Cuda()
    monkeypatch.setattr(module, "in_container", lambda: True)
    for there, remedy in ((True, "start the container with `--gpus all`"), (False, "install it")):
        monkeypatch.setattr(module, "has_nvidia_gpu", lambda there=there: there)
        with pytest.raises(MachineError, match=f"no NVIDIA driver .*: {remedy}"):
            Cuda()


@pytest.mark.parametrize("command", ["run IMAGE MASK --device cuda", "export tiny --engine tensorrt -o out"])
def test_a_command_ends_with_the_reason(
    library: Library, monkeypatch: pytest.MonkeyPatch, capsys: Captured, tmp_path: Path, command: str
) -> None:
    """Also with a package that is there: the GPU is asked first, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__="10.3.0"))
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    library.fail["cuInit"] = 100
    examples = Path(__file__).resolve().parents[1] / "examples"
    words = {"IMAGE": examples / "coffee.png", "MASK": examples / "coffee_mask.png"}
    error = refused(capsys, 3, "CUDA cannot use a GPU here", *(words.get(word, word) for word in command.split()))
    assert "CUDA_VISIBLE_DEVICES is ''" in error and list(tmp_path.iterdir()) == []


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
