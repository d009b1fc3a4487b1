"""Sampling with the latents on a GPU: the denoiser's engine, then ``update``, which writes the denoiser's next input.

``update`` is guidance and the sampler's step as an engine of its own, which ``export.update_network`` defines. Both are
linear in what is on the device, so one small network serves every sampler: what differs from step to step is its input
``coefficients``. All its tensors have the denoiser's N rows. Row r belongs to picture r mod B; the two rows of a
picture carry the same latent. ``update`` may not write what it reads, so its results are copied within the device to
where they are read next. From the host comes the timestep and a row of coefficients, to the host goes one number a
row. In a cached call ``denoiser_shallow`` takes the denoiser's place; all its tensors lie in the denoiser's buffers.

Every network has a context of TensorRT's for each number of rows, whose shapes are set once: a recorded launch is void
when they change. ``LatentLoop.prepare`` launches what a step consists of once, for TensorRT prepares itself then, and
records it as a CUDA graph, for full and cached calls; from then on every step is one launch. Where guidance begins or
ends on the way, rows come or go: a picture's rows are alike, so those that stay, stay where they are, and those that
come are copied within the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from ..sampling.calls import Call
from ..sampling.scheduler import LinearStep, Scheduler
from ..spec import DENOISER, SHALLOW, Component, Tensor, sample_channels
from .base import Arrays, LatentBatch, batched, branches, check_finite
from .cuda import Cuda, CudaError

UPDATE = "update"
COEFFICIENTS = ("guidance", *LinearStep._fields)


def shared_tensors(component: Component) -> tuple[str, ...]:
    """The tensors of ``component`` that lie in the denoiser's buffers: of its shallow part, all that it has."""
    if component.name == SHALLOW:
        return tuple(t.name for t in (*component.inputs, *component.outputs))
    return ("sample", "noise") if component.name == UPDATE else ()


def update_component(latent_size: int, latent_channels: int) -> Component:
    """The tensors of ``update``. An engine with others is refused, so new arithmetic needs a new name here.

    With e = eu + guidance (ec - eu), x and m the latent and the rest of ``sample``, p ``clean``, and the coefficients:
    ``next_sample`` is x' = latent·x + noise·e + previous·p, then m; ``next_clean`` is clean_latent·x + clean_noise·e;
    ``magnitude`` is Σ|noise|, which is finite where all of the noise is (unless that lies beyond 1e33).
    """

    def latents(name: str) -> Tensor:
        return Tensor(name, "float32", ("N", latent_channels, latent_size, latent_size))

    def sample(name: str) -> Tensor:
        return Tensor(name, "float32", ("N", sample_channels(latent_channels), latent_size, latent_size))

    # ``unconditional`` is the row of ``noise`` that is this row's eu, ``conditional`` its ec.
    rows = [Tensor(name, "int32", ("N",)) for name in ("unconditional", "conditional")]
    coefficients = Tensor("coefficients", "float32", ("N", len(COEFFICIENTS), 1, 1))
    inputs = (sample("sample"), latents("noise"), latents("clean"), *rows, coefficients)
    magnitude = Tensor("magnitude", "float32", ("N", 1, 1, 1))
    return Component(UPDATE, inputs, (sample("next_sample"), latents("next_clean"), magnitude))


def guidance_rows(rows: int, batch: int) -> Arrays:
    """``unconditional`` and ``conditional`` for a denoiser that has the ``batch`` unconditional rows first.

    With ``rows`` equal to ``batch`` both are the row itself, and e is the noise as it is.
    """
    first = np.arange(rows, dtype=np.int32) % batch
    return {"unconditional": first, "conditional": first + np.int32(rows - batch)}


class LaunchError(Exception):
    """TensorRT refused a call; its log says why."""


class Executor:
    """One engine's buffers and launches, for ``component`` with at most ``max_rows`` rows.

    Buffers hold the most rows, so that an address never changes. ``create_context`` makes a context of TensorRT's, one
    for each number of rows; all of them use the buffers. ``shared`` are tensors that lie in the buffers of another
    executor. Methods raise ``LaunchError`` or ``CudaError`` for what TensorRT or CUDA refuses.
    """

    def __init__(
        self,
        cuda: Cuda,
        stream: int,
        create_context: Callable[[], Any],
        component: Component,
        max_rows: int,
        shared: Mapping[str, Executor] | None = None,
    ) -> None:
        self._cuda, self._stream, self._create_context = cuda, stream, create_context
        self._inputs = {t.name: t for t in component.inputs}
        self._outputs = {t.name: t for t in component.outputs}
        self._tensors = {**self._inputs, **self._outputs}
        self._shared = dict(shared or {})
        self.name, self.max_rows = component.name, max_rows
        self.rows = 0
        self._contexts: dict[int, Any] = {}  # by rows
        self._device: dict[str, int] = {}
        self._host: dict[str, np.ndarray] = {}

    def allocate(self) -> None:
        """Take the buffers; ``free`` frees them, also after a failure here."""
        for name, tensor in self._tensors.items():
            if name not in self._shared:
                size = tensor_bytes(tensor, self.max_rows)
                self._device[name] = self._cuda.allocate(size)
                self._host[name] = self._cuda.allocate_host(size)
            else:
                self._host[name] = self._shared[name]._host[name]

    def destroy_contexts(self) -> None:
        """Let go of the contexts, which must go before the stream, the buffers and the engine do."""
        self.rows = 0
        self._contexts.clear()

    def free(self) -> None:
        while self._device:
            self._cuda.free(self._device.popitem()[1])
        while self._host:
            name, memory = self._host.popitem()
            if name not in self._shared:
                self._cuda.free_host(memory)

    def run(self, feeds: Arrays, outputs: Sequence[str]) -> Arrays:
        """Those ``outputs`` by name, in memory of the caller's own."""
        self.set_rows(len(next(iter(feeds.values()))))
        self.put(feeds)
        self.upload(self._inputs)
        self.launch()
        self.download(outputs)
        self._cuda.synchronise(self._stream)
        return {name: self.get(name) for name in outputs}

    def address(self, name: str) -> int:
        return self._shared[name].address(name) if name in self._shared else self._device[name]

    def size(self, name: str) -> int:
        """Bytes of a tensor at the present number of rows."""
        return tensor_bytes(self._tensors[name], self.rows)

    def set_rows(self, rows: int) -> None:
        """Take the context for ``rows`` rows, which is made the first time."""
        if rows not in self._contexts:
            self.rows = 0  # until all of it is done
            # It is held here alone: the frame of a function that fails would hold it longer than the stream lives.
            self._contexts[rows] = self._create_context()
            try:
                self._configure(rows)
            except BaseException:
                del self._contexts[rows]
                raise
        self.rows = rows

    def _configure(self, rows: int) -> None:
        for name in self._tensors:
            if not self._contexts[rows].set_tensor_address(name, self.address(name)):
                raise LaunchError(f"no address for {name}")
        for name, tensor in self._inputs.items():
            if not self._contexts[rows].set_input_shape(name, batched(tensor, rows)):
                raise LaunchError(f"no {rows} rows of {name}")
        for name, tensor in self._outputs.items():
            shape = tuple(self._contexts[rows].get_tensor_shape(name))
            if shape != batched(tensor, rows):
                raise LaunchError(f"{name} would have shape {shape}, not {batched(tensor, rows)}")

    def put(self, feeds: Mapping[str, Any]) -> None:
        """Write inputs into page-locked host memory, from where ``upload`` takes them."""
        for name, value in feeds.items():
            np.copyto(self._view(name), value)

    def upload(self, names: Iterable[str]) -> None:
        """Queue copies to the device."""
        for name in names:
            self._cuda.upload(self.address(name), self._host[name], self.size(name), self._stream)

    def launch(self) -> None:
        """Queue the network."""
        if not self._contexts[self.rows].execute_async_v3(self._stream):
            raise LaunchError("the launch was refused")

    def download(self, names: Iterable[str]) -> None:
        """Queue copies to page-locked host memory, where ``get`` finds them once the stream was waited for."""
        for name in names:
            self._cuda.download(self._host[name], self.address(name), self.size(name), self._stream)

    def get(self, name: str) -> np.ndarray:
        return self._view(name).copy()

    def _view(self, name: str) -> np.ndarray:
        tensor = self._tensors[name]
        return self._host[name][: self.size(name)].view(tensor.dtype).reshape(batched(tensor, self.rows))


def tensor_bytes(tensor: Tensor, rows: int) -> int:
    """The size of ``tensor`` at that many rows."""
    return math.prod(batched(tensor, rows)) * np.dtype(tensor.dtype).itemsize


class LatentLoop:
    """Joins executors: ``networks``, which are the denoiser and where there is one its shallow part, all of whose
    buffers are the denoiser's; and ``update``, which shares some (``shared_tensors``).

    With ``record`` steps become a CUDA graph; where recording fails they go on without, and ``graph_state`` says why.
    ``errors(what)`` is a context that turns a ``LaunchError`` or ``CudaError`` into the user's; ``check_rows(rows)``
    raises an error of the user's where that many are too many.
    """

    def __init__(
        self,
        cuda: Cuda,
        stream: int,
        networks: Sequence[Executor],
        update: Executor,
        record: bool,
        errors: Callable[[str], AbstractContextManager[None]],
        check_rows: Callable[[int], None],
    ) -> None:
        self._cuda, self._stream = cuda, stream
        self._denoiser, self._networks, self._update = networks[0], list(networks), update
        self._record = record
        self.errors, self._check_rows = errors, check_rows
        self.current: DeviceLatents | None = None  # the batch that the buffers belong to
        self._prepared: set[int] = set()  # numbers of rows
        self._graphs: dict[tuple[str, int], int] = {}  # by network and rows
        self._graph_problem = ""

    @property
    def graph_state(self) -> str:
        if self._graph_problem:
            return f"failed: {self._graph_problem}"
        return "recorded" if self._graphs else "not recorded"

    def close(self) -> None:
        self.current = None
        while self._graphs:
            self._cuda.destroy_graph(self._graphs.popitem()[1])

    def load(self, sample: np.ndarray, batch: int) -> None:
        """Upload the first ``sample`` (N, 2C+1, h, w) of ``batch`` pictures, and what stays while they are sampled."""
        self.prepare(len(sample), batch)
        self._denoiser.put({"sample": sample})
        self._update.put({"clean": np.float32(0)})
        self._denoiser.upload(("sample",))
        self._update.upload(("clean",))
        self._cuda.synchronise(self._stream)

    def change_rows(self, rows: int, batch: int) -> None:
        """Go on with 1 or 2 rows a picture; a second one is a copy of the first, but for the branch."""
        self.prepare(rows, batch)
        if rows > batch:
            for executor, name in ((self._denoiser, "sample"), (self._update, "clean")):
                first, half = executor.address(name), executor.size(name) // 2
                self._cuda.copy(first + half, first, half, self._stream)
        self._cuda.synchronise(self._stream)

    def prepare(self, rows: int, batch: int) -> None:
        """Take the contexts and the branches for ``rows`` rows of ``batch`` pictures.

        The first time each network is launched, and a step with it recorded. That spoils what a step computes, but
        neither the latents nor the clean prediction, so it can come in the middle of a trajectory.
        """
        self._check_rows(rows)
        for executor in (*self._networks, self._update):
            executor.set_rows(rows)
        self._denoiser.put({"branch": branches(rows // batch, batch)})
        self._update.put(guidance_rows(rows, batch))
        self._denoiser.upload(("branch",))
        self._update.upload(("unconditional", "conditional"))
        if rows in self._prepared:
            return
        self._denoiser.put({"timestep": np.float32(0)})  # a graph may use it as an index
        self._denoiser.upload(("timestep",))
        for network in self._networks:
            network.launch()
        self._update.launch()
        self._cuda.synchronise(self._stream)
        for network in self._networks:
            self._record_graph(network)
        self._prepared.add(rows)

    def step(self, t: int, coefficients: np.ndarray, full: bool) -> np.ndarray:
        """Σ|noise| of each row: NaN or infinite where the predicted noise is, before guidance."""
        network = self._networks[0 if full else 1]
        self._denoiser.put({"timestep": np.float32(t)})
        self._update.put({"coefficients": coefficients[:, None, None]})
        if graph := self._graphs.get((network.name, network.rows)):
            self._cuda.launch_graph(graph, self._stream)
        else:
            self._enqueue(network)
        self._cuda.synchronise(self._stream)
        return self._update.get("magnitude").reshape(-1)

    def sample(self) -> np.ndarray:
        """(N, 2C+1, h, w): what the next call of the denoiser would be fed."""
        self._denoiser.download(("sample",))
        self._cuda.synchronise(self._stream)
        return self._denoiser.get("sample")

    def _enqueue(self, network: Executor) -> None:
        self._denoiser.upload(("timestep",))
        self._update.upload(("coefficients",))
        network.launch()
        self._update.launch()
        update = self._update
        for written, read in (("next_sample", "sample"), ("next_clean", "clean")):
            self._cuda.copy(update.address(read), update.address(written), update.size(written), self._stream)
        self._update.download(("magnitude",))

    def _record_graph(self, network: Executor) -> None:
        if not self._record:
            return
        graph = 0
        try:
            self._cuda.begin_capture(self._stream)
            try:
                self._enqueue(network)
            finally:  # a stream that is left recording takes no more work
                graph = self._cuda.end_capture(self._stream)
            self._graphs[network.name, network.rows] = graph
        except (CudaError, LaunchError) as error:
            if graph:
                self._cuda.destroy_graph(graph)
            self._record = False
            self._graph_problem = str(error)


class DeviceLatents(LatentBatch):
    """Latents in a loop's buffers, until something else uses them."""

    def __init__(self, loop: LatentLoop, latents: np.ndarray, condition: np.ndarray, scheduler: Scheduler) -> None:
        self._loop, self._batch, self._scheduler = loop, len(latents), scheduler
        self._channels = latents.shape[1]
        self._sample = np.concatenate([latents, condition], axis=1)
        self._guidance: float | None = None  # of the last call
        self._latents: np.ndarray | None = None  # once they were read
        loop.current = self

    def step(self, call: Call) -> None:
        self._check()
        self._latents = None
        rows = call.rows * self._batch
        if self._guidance is None:
            with self._loop.errors("start sampling"):
                self._loop.load(np.tile(self._sample, (call.rows, 1, 1, 1)), self._batch)
        with self._loop.errors("run denoiser"):
            if self._guidance not in (None, call.guidance):
                self._loop.change_rows(rows, self._batch)
            self._guidance = call.guidance
            coefficients = [call.guidance, *self._scheduler.linear_step(call.index - 1)]
            magnitude = self._loop.step(call.timestep, np.array(coefficients, np.float32), call.full)
        check_finite(magnitude, DENOISER, call.where)

    def read(self) -> np.ndarray:
        self._check()
        if self._latents is None:
            with self._loop.errors("read the latents"):
                self._latents = np.ascontiguousarray(self._loop.sample()[: self._batch, : self._channels])
        return self._latents

    def _check(self) -> None:
        if self._loop.current is not self:
            raise RuntimeError("these latents are gone: another call has used the denoiser's buffers")
