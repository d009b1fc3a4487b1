"""A CUDA driver and a TensorRT package that need no GPU, for the host logic of ``runtimes/trt.py``. Not a test.

Device memory is bytes by address; what is queued on a stream happens when it is synchronised, as late as a real one
may be; a recorded graph is replayed call by call. An "engine" is a text that names an ONNX file, and executing one
runs ONNX Runtime on what lies at the addresses that were set; that of ``update`` runs ``define_update``'s own layers in
numpy. So only right addresses, sizes, order and waiting give right numbers. Whatever real hardware would leave
undefined is an ``AssertionError`` here.
"""

from __future__ import annotations

import json
import mmap
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime

from moebius_edge.bundle.bundle import Bundle
from moebius_edge.export.trt_builder import define_update
from moebius_edge.runtimes.cuda import CudaError, Gpu
from moebius_edge.runtimes.engine_files import Engine, EngineKey, engine_document
from moebius_edge.runtimes.latent_loop import UPDATE, update_component
from moebius_edge.runtimes.trt import TrtRuntime
from moebius_edge.spec import DENOISER, SHALLOW
from moebius_edge.system.files import sha256_file

ORIN = Gpu("Orin", (8, 7), 8_000_000_000, True, "12.6", 8)
VERSION = "10.3.0"
OUT_OF_MEMORY, NOT_PERMITTED = 2, 800

Work = Callable[[], None]


class FakeCuda:
    """Stands for ``cuda.Cuda``. ``calls`` counts by name; ``fail`` maps a name to the error code it answers.

    ``bytes_up`` and ``bytes_down`` count what was really copied, in a replayed graph too.
    """

    def __init__(self, gpu: Gpu = ORIN) -> None:
        self._gpu = gpu
        self.memory: dict[int, bytearray] = {}
        self.host: dict[int, np.ndarray] = {}
        self.streams: dict[int, list[Work]] = {}
        self.recording: list[Work] | None = None
        self.graphs: dict[int, list[Work]] = {}
        self.calls: dict[str, int] = {}
        self.fail: dict[str, int] = {}
        self.bytes_up = self.bytes_down = 0
        self.free_bytes = 4_000_000_000
        self.contexts: weakref.WeakSet[_Context] = weakref.WeakSet()  # those that are alive
        self.opened = False
        self._next = 0x1000

    def _enter(self, name: str) -> None:
        self.calls[name] = self.calls.get(name, 0) + 1
        if name in self.fail:
            raise CudaError(name, self.fail[name], "as the test wants")
        assert self.opened or name in ("gpu", "open"), f"{name} without a context"

    def _handle(self) -> int:
        self._next += 0x1000
        return self._next

    def gpu(self) -> Gpu:
        self._enter("gpu")
        return self._gpu

    def free_memory(self) -> int:
        self._enter("free_memory")
        return self.free_bytes

    def open(self) -> None:
        self._enter("open")
        self.opened = True

    def close(self) -> None:
        self._enter("close")
        self.opened = False

    def allocate(self, size: int) -> int:
        self._enter("allocate")
        address = self._handle()
        self._next += size  # so that no two allocations overlap
        self.memory[address] = bytearray(b"\xff" * size)  # NaN, as it may be
        return address

    def free(self, address: int) -> None:
        self._enter("free")
        del self.memory[address]

    def allocate_host(self, size: int) -> np.ndarray:
        self._enter("allocate_host")
        memory = np.full(size, 0xFF, np.uint8)  # NaN, as it may be
        self.host[memory.ctypes.data] = memory
        return memory

    def free_host(self, memory: np.ndarray) -> None:
        self._enter("free_host")
        del self.host[memory.ctypes.data]

    def upload(self, address: int, source: np.ndarray, size: int, stream: int) -> None:
        self._enter("upload")
        assert source.ctypes.data in self.host, "a copy from memory that is not page-locked"

        def copy() -> None:
            self.memory[address][:size] = source[:size].tobytes()
            self.bytes_up += size

        self.queue(stream, copy)

    def download(self, target: np.ndarray, address: int, size: int, stream: int) -> None:
        self._enter("download")
        assert target.ctypes.data in self.host

        def copy() -> None:
            target[:size] = np.frombuffer(bytes(self.memory[address][:size]), np.uint8)
            self.bytes_down += size

        self.queue(stream, copy)

    def copy(self, target: int, source: int, size: int, stream: int) -> None:
        self._enter("copy")
        there, here = self._bytes(target, size), self._bytes(source, size)
        assert target + size <= source or source + size <= target, "the two overlap"

        def copy() -> None:
            there[:] = here

        self.queue(stream, copy)

    def _bytes(self, address: int, size: int) -> memoryview:
        """What lies from ``address`` on, which may be within an allocation; all of it must be in one."""
        start = max(first for first in self.memory if first <= address)
        assert address + size <= start + len(self.memory[start]), "beyond the end of an allocation"
        return memoryview(self.memory[start])[address - start : address - start + size]

    def create_stream(self) -> int:
        self._enter("create_stream")
        stream = self._handle()
        self.streams[stream] = []
        return stream

    def destroy_stream(self, stream: int) -> None:
        self._enter("destroy_stream")
        del self.streams[stream]  # with the work that waits, which holds its context here
        assert not self.contexts, "a context outlives its stream"

    def synchronise(self, stream: int) -> None:
        self._enter("synchronise")
        assert self.recording is None, "waiting for a stream that is being recorded"
        work, self.streams[stream] = self.streams[stream], []
        for item in work:
            item()

    def begin_capture(self, stream: int) -> None:
        self._enter("begin_capture")
        assert self.recording is None and not self.streams[stream]
        self.recording = []

    def end_capture(self, stream: int) -> int:
        recorded, self.recording = self.recording, None
        self._enter("end_capture")
        assert recorded is not None
        graph = self._handle()
        self.graphs[graph] = recorded
        return graph

    def launch_graph(self, graph: int, stream: int) -> None:
        self._enter("launch_graph")
        for item in self.graphs[graph]:
            self.queue(stream, item)

    def destroy_graph(self, graph: int) -> None:
        self._enter("destroy_graph")
        del self.graphs[graph]

    def queue(self, stream: int, work: Work) -> None:
        assert stream in self.streams, "work for no stream"
        (self.streams[stream] if self.recording is None else self.recording).append(work)

    def left(self) -> list[Any]:
        """What was taken and not given back."""
        return [*self.memory, *self.host, *self.streams, *self.graphs, *(["context"] if self.opened else [])]


class FakeTensorRT:
    """Stands for the package ``tensorrt`` (with ``rtx`` for ``tensorrt_rtx``) on a ``FakeCuda``."""

    ILogger = type("ILogger", (), {})
    TensorIOMode = SimpleNamespace(INPUT="input", OUTPUT="output")
    DataType = SimpleNamespace(FLOAT="float32", INT32="int32")
    ElementWiseOperation = SimpleNamespace(SUM=np.add, SUB=np.subtract, PROD=np.multiply)
    UnaryOperation = SimpleNamespace(ABS=np.abs)
    ReduceOperation = SimpleNamespace(SUM=np.sum)
    CudaGraphStrategy = SimpleNamespace(WHOLE_GRAPH_CAPTURE="whole")
    DynamicShapesKernelSpecializationStrategy = SimpleNamespace(EAGER="eager")
    ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED="user")

    def __init__(self, cuda: FakeCuda, version: str = VERSION, rtx: bool = False) -> None:
        self.cuda, self.rtx = cuda, rtx
        self.__version__ = version
        self.refuse_launches = False
        self.refusal = ""  # what is logged when a launch or a plan is refused
        self.environment = "driver 580"  # which a runtime cache is bound to
        self.engines: list[_Engine] = []
        self.configs: list[_Config] = []
        self.Runtime = self._runtime

    def _runtime(self, logger: Any) -> Any:
        self._logger = logger
        return SimpleNamespace(deserialize_cuda_engine=self._engine)

    def log(self, message: str) -> None:
        self._logger.log("Severity.ERROR", message)

    def _engine(self, plan: mmap.mmap) -> _Engine | None:
        assert isinstance(plan, mmap.mmap), "a copy of the plan"
        try:
            engine = _Engine(self, json.loads(bytes(plan)))
        except ValueError:
            self.log(self.refusal or "[file.cpp::f::1] the plan is corrupt")
            return None
        self.engines.append(engine)
        return engine

    @staticmethod
    def nptype(dtype: str) -> type:
        return np.dtype(dtype).type


class _Network:
    """``INetworkDefinition`` that computes each layer in numpy as it is added; a tensor is its value."""

    class Layer:
        def __init__(self, compute: Callable[[], np.ndarray]) -> None:
            self._compute, self.axis = compute, 0

        def get_output(self, index: int) -> SimpleNamespace:
            assert index == 0
            return SimpleNamespace(value=self._compute(), name="")

    def __init__(self, feeds: dict[str, np.ndarray]) -> None:
        self._feeds = feeds
        self.outputs: dict[str, np.ndarray] = {}

    def add_input(self, name: str, dtype: str, shape: tuple[int, ...]) -> Any:
        value = self._feeds[name]
        assert value.dtype == dtype and value.shape[1:] == shape[1:] and shape[0] == -1
        return SimpleNamespace(value=value, name="")

    def add_constant(self, shape: tuple[int, ...], weights: np.ndarray) -> Layer:
        assert weights.shape == shape and weights.base is not None, "TensorRT needs it after this call too"
        return self.Layer(lambda: weights)

    def add_gather(self, data: Any, indices: Any, axis: int) -> Layer:
        return self.Layer(lambda: np.take(data.value, indices.value, axis))

    def add_elementwise(self, a: Any, b: Any, operation: Any) -> Layer:
        assert a.value.dtype == b.value.dtype
        return self.Layer(lambda: operation(a.value, b.value))

    def add_unary(self, a: Any, operation: Any) -> Layer:
        return self.Layer(lambda: operation(a.value))

    def add_reduce(self, a: Any, operation: Any, axes: int, keep_dims: bool) -> Layer:
        chosen = tuple(i for i in range(a.value.ndim) if axes >> i & 1)
        return self.Layer(lambda: operation(a.value, axis=chosen, keepdims=keep_dims))

    def add_concatenation(self, tensors: list[Any]) -> Layer:
        layer = self.Layer(lambda: np.concatenate([t.value for t in tensors], layer.axis))
        return layer

    def mark_output(self, tensor: Any) -> None:
        self.outputs[tensor.name] = tensor.value


class _Engine:
    def __init__(self, package: FakeTensorRT, plan: dict[str, Any]) -> None:
        self.package, self.rows = package, plan["rows"]
        self.device_memory_size_v2 = 1000 * self.rows[2] if "onnx" in plan else 0
        if "update" in plan:
            self._update = update_component(*plan["update"])
            self.inputs, self.outputs = (
                {t.name: (t.dtype, t.shape) for t in tensors} for tensors in (self._update.inputs, self._update.outputs)
            )
            self.compute = self._compute_update
        else:
            self._session = onnxruntime.InferenceSession(plan["onnx"])
            types = {"tensor(float)": "float32", "tensor(int64)": "int64"}
            self.inputs = {t.name: (types[t.type], tuple(t.shape)) for t in self._session.get_inputs()}
            self.outputs = {t.name: (types[t.type], tuple(t.shape)) for t in self._session.get_outputs()}
            self.compute = self._compute_onnx
        self.tensors = {**self.inputs, **self.outputs}
        self.num_io_tensors = len(self.tensors)

    def _compute_onnx(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        names = list(self.outputs)
        return dict(zip(names, self._session.run(names, feeds), strict=True))

    def _compute_update(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        network = _Network(feeds)
        with np.errstate(all="ignore"):  # a GPU does not warn
            define_update(FakeTensorRT, network, self._update)
        return network.outputs

    def get_tensor_name(self, index: int) -> str:
        return list(self.tensors)[index]

    def get_tensor_mode(self, name: str) -> str:
        return "input" if name in self.inputs else "output"

    def get_tensor_dtype(self, name: str) -> str:
        return self.tensors[name][0]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(-1 if isinstance(size, str) else size for size in self.tensors[name][1])

    def get_tensor_profile_shape(self, name: str, index: int) -> list[tuple[int, ...]]:
        assert index == 0
        return [(rows, *self.get_tensor_shape(name)[1:]) for rows in self.rows]

    def create_runtime_config(self) -> _Config:
        assert self.package.rtx, "TensorRT 10.3 has no such call"
        self.package.configs.append(_Config(self.package))
        return self.package.configs[-1]

    def create_execution_context(self, strategy: Any) -> _Context:
        if self.package.rtx:
            assert strategy.memory == "user" and strategy.dynamic_shapes_kernel_specialization_strategy == "eager"
        else:
            assert strategy == "user"
        return _Context(self, strategy)


class _Config:
    """``IRuntimeConfig``, and ``IRuntimeCache`` as text: where it was made, and what was compiled."""

    def __init__(self, package: FakeTensorRT) -> None:
        self._package = package
        self.cuda_graph_strategy = self.dynamic_shapes_kernel_specialization_strategy = self.memory = ""
        self.cache: Any = None

    def set_execution_context_allocation_strategy(self, strategy: str) -> None:
        self.memory = strategy

    def set_runtime_cache(self, cache: Any) -> bool:
        self.cache = cache
        return True

    def create_runtime_cache(self) -> Any:
        compiled: set[str] = set()

        def deserialize(content: bytes) -> bool:
            made, _, names = content.decode(errors="replace").partition(":")
            compiled.update(names.split(",") if made == self._package.environment else ())
            return made == self._package.environment

        def serialize() -> bytes:
            return f"{self._package.environment}:{','.join(sorted(compiled))}".encode()

        return SimpleNamespace(compiled=compiled, deserialize=deserialize, serialize=serialize)


class _Context:
    def __init__(self, engine: _Engine, config: Any) -> None:
        engine.package.cuda.contexts.add(self)
        self._engine, self._config = engine, config
        self._addresses: dict[str, int] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._generation = 0
        self._prepared = -1  # generation of the last launch that was no recording
        self._activations = (0, 0)

    def set_device_memory(self, address: int, size: int) -> None:
        self._activations = (address, size)

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._addresses[name] = address
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        least, _, most = self._engine.get_tensor_profile_shape(name, 0)
        if not (least[0] <= shape[0] <= most[0] and shape[1:] == most[1:]):
            return False
        self._shapes[name] = shape
        self._generation += 1
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        rows = {shape[0] for shape in self._shapes.values()}
        assert len(rows) == 1
        return (rows.pop(), *self._engine.get_tensor_shape(name)[1:])

    def execute_async_v3(self, stream: int) -> bool:
        cuda, engine = self._engine.package.cuda, self._engine
        if engine.package.refuse_launches:
            if engine.package.refusal:
                engine.package.log(engine.package.refusal)
            return False
        generation = self._generation
        assert set(self._shapes) == set(engine.inputs), "a shape is missing"
        assert len(set(self._addresses.values())) == len(engine.tensors), "a tensor is written where another is read"
        address, size = self._activations
        assert size >= engine.device_memory_size_v2, "too little memory for the activations"
        if engine.package.rtx:
            self._config.cache.compiled.add(f"{'+'.join(engine.outputs)} {next(iter(self._shapes.values()))[0]}")
        if cuda.recording is None:
            self._prepared = generation
        assert self._prepared == generation, "recorded before the first launch with these shapes"

        def compute() -> None:
            assert self._generation == generation, "a graph that was recorded for other shapes"
            if size:
                cuda.memory[address][:] = b"\xff" * size  # what another context has left there is gone
            feeds = {}
            for name, shape in self._shapes.items():
                dtype = np.dtype(engine.inputs[name][0])
                data = bytes(cuda.memory[self._addresses[name]])[: int(np.prod(shape)) * dtype.itemsize]
                feeds[name] = np.frombuffer(data, dtype).reshape(shape)
            for name, value in engine.compute(feeds).items():
                data = np.ascontiguousarray(value).tobytes()
                cuda.memory[self._addresses[name]][: len(data)] = data

        cuda.queue(stream, compute)
        return True


def trt_runtime(bundle: Bundle, cuda: FakeCuda, variant: str = "tensorrt") -> tuple[TrtRuntime, FakeTensorRT]:
    """A runtime on the fakes, and the package that it uses."""
    package = FakeTensorRT(cuda, rtx=variant == "tensorrt-rtx")
    return TrtRuntime(bundle, variant, cuda=cuda, package=package), package  # type: ignore[arg-type]


def write_engine(
    bundle: Bundle, max_batch: int = 1, figures: Mapping[str, dict[str, int]] = MappingProxyType({}), **changes: Any
) -> Engine:
    """Put an engine for ``FakeTensorRT`` into ``bundle``. ``changes`` are fields of ``EngineKey`` or of ``Engine``.

    ``figures`` are what the build of each component has measured.
    """
    key_fields = {"precision": bundle.precision, "variant": "tensorrt", "version": VERSION, "gpu": ORIN.model}
    key_fields |= {"compute_capabilities": ("8.7",)}
    key = EngineKey(**{name: changes.pop(name, value) for name, value in key_fields.items()})
    folder = bundle.path / "engines" / key.folder
    folder.mkdir(parents=True)
    plans, profiles = {}, {}
    for name in (*bundle.components, UPDATE):
        path = folder / f"{name}.plan"
        repeated = name in (DENOISER, SHALLOW, UPDATE)
        profiles[name] = [1, 2, 2 * max_batch] if repeated else [1, 1, max_batch]
        made = (
            {"update": [bundle.latent_size, bundle.latent_channels]}
            if name == UPDATE
            else {"onnx": str(bundle.component_path(name))}
        )
        path.write_text(json.dumps({**made, "rows": profiles[name]}))
        plans[name] = {"file": path.name, "sha256": sha256_file(path), "bytes": path.stat().st_size}
        plans[name] |= figures.get(name, {})
    fields: dict[str, Any] = {
        "onnx": {n: bundle.files[c.file]["sha256"] for n, c in bundle.components.items()},
        "plans": plans,
        "settings": {"max_batch": max_batch, "workspace_bytes": None, "opt_level": None},
        "profiles": profiles,
        "built": {},
    }
    engine = Engine(folder, 1, key, **{**fields, **changes})
    write_document(engine)
    return engine


def write_document(engine: Engine) -> Path:
    path = engine.path / "engine.json"
    path.write_text(json.dumps(engine_document(engine)))
    return path
