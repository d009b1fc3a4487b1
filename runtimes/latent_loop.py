"""Sampling with the latents on a GPU: the denoiser's engine, then ``update``, which writes the denoiser's next input.

``update`` is guidance and the sampler's step as an engine of its own, which ``export.update_network`` defines. Both are
linear in what is on the device, so one small network serves every sampler: what differs from step to step is its input
``coefficients``. All its tensors have the denoiser's N rows. Row r belongs to picture r mod B; the two rows of a
picture carry the same latent. ``update`` may not write what it reads, so its results are copied within the device to
where they are read next. From the host comes the timestep and a row of coefficients, to the host goes one number a
row. In a cached call ``denoiser_shallow`` takes the denoiser's place; all its tensors lie in the denoiser's buffers.

The first step at a number of rows is launched piece by piece, for TensorRT prepares itself then; the second is recorded
with its copies as a CUDA graph, and from then on a step is one launch, also in the next picture. Full and cached
calls have a graph each. Another number of rows starts afresh, also where guidance begins or ends on the way: a
picture's rows are alike, so those that stay, stay where they are, and those that come are copied within the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from ..sampling.calls import Call
from ..sampling.scheduler import LinearStep, Scheduler
from ..spec import DENOISER, Component, Tensor, sample_channels
from .base import Arrays, LatentBatch, batched, branches, check_finite
from .cuda import Cuda, CudaError

UPDATE = "update"
COEFFICIENTS = ("guidance", *LinearStep._fields)
SHARED = ("sample", "noise")  # tensors of the denoiser that are the update's too


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
    """One engine's buffers and launches, for ``component`` on TensorRT's ``context`` with at most ``max_rows`` rows.

    Buffers hold the most rows, so that an address never changes. ``shared`` are tensors that lie in the buffers of
    another executor. Methods raise ``LaunchError`` or ``CudaError`` for what TensorRT or CUDA refuses.
    """

    def __init__(
        self,
        cuda: Cuda,
        stream: int,
        context: Any,
        component: Component,
        max_rows: int,
        shared: Mapping[str, Executor] | None = None,
    ) -> None:
        self._cuda, self._stream, self._context = cuda, stream, context
        self._inputs = {t.name: t for t in component.inputs}
        self._outputs = {t.name: t for t in component.outputs}
        self._tensors = {**self._inputs, **self._outputs}
        self._shared = dict(shared or {})
        self.max_rows = max_rows
        self.rows = 0
        self.shapes_set = 0  # how often: a recorded launch is void once its context's shapes have changed
        self.graph, self.graph_shapes = 0, (0, 0)  # of a network: its recorded step, and what that is good for
        self._device: dict[str, int] = {}
        self._host: dict[str, np.ndarray] = {}

    def allocate(self) -> None:
        """Take the buffers; ``close`` frees them, also after a failure here."""
        for name, tensor in self._tensors.items():
            if name not in self._shared:
                size = _bytes(tensor, self.max_rows)
                self._device[name] = self._cuda.allocate(size)
                self._host[name] = self._cuda.allocate_host(size)
            else:
                self._host[name] = self._shared[name]._host[name]
            if not self._context.set_tensor_address(name, self.address(name)):
                raise LaunchError(f"no address for {name}")

    def close(self) -> None:
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
        return _bytes(self._tensors[name], self.rows)

    def set_rows(self, rows: int) -> None:
        """Fix all shapes, if ``rows`` is another number than before."""
        if rows == self.rows:
            return
        self.rows = 0  # until all of it is done
        self.shapes_set += 1
        for name, tensor in self._inputs.items():
            if not self._context.set_input_shape(name, batched(tensor, rows)):
                raise LaunchError(f"no {rows} rows of {name}")
        for name, tensor in self._outputs.items():
            shape = tuple(self._context.get_tensor_shape(name))
            if shape != batched(tensor, rows):
                raise LaunchError(f"{name} would have shape {shape}, not {batched(tensor, rows)}")
        self.rows = rows

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
        if not self._context.execute_async_v3(self._stream):
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


def _bytes(tensor: Tensor, rows: int) -> int:
    return int(np.prod(batched(tensor, rows))) * np.dtype(tensor.dtype).itemsize


class LatentLoop:
    """Joins executors: ``networks``, which are the denoiser and where there is one its shallow part, all of whose
    buffers are the denoiser's; and ``update``, which shares those named in ``SHARED``.

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
        self._graph_problem = ""

    @property
    def graph_state(self) -> str:
        if self._graph_problem:
            return f"failed: {self._graph_problem}"
        return "recorded" if any(network.graph for network in self._networks) else "not recorded"

    def close(self) -> None:
        self.current = None
        for network in self._networks:
            self._destroy_graph(network)

    def load(self, sample: np.ndarray, batch: int) -> None:
        """Upload the first ``sample`` (N, 2C+1, h, w) of ``batch`` pictures, and what stays while they are sampled."""
        self._set_branches(len(sample), batch)
        self._denoiser.put({"sample": sample})
        self._update.put({"clean": np.float32(0)})
        self._denoiser.upload(("sample",))
        self._update.upload(("clean",))
        self._cuda.synchronise(self._stream)

    def change_rows(self, rows: int, batch: int) -> None:
        """Go on with 1 or 2 rows a picture; a second one is a copy of the first, but for the branch."""
        self._set_branches(rows, batch)
        if rows > batch:
            for executor, name in ((self._denoiser, "sample"), (self._update, "clean")):
                first, half = executor.address(name), executor.size(name) // 2
                self._cuda.copy(first + half, first, half, self._stream)
        self._cuda.synchronise(self._stream)

    def _set_branches(self, rows: int, batch: int) -> None:
        self._check_rows(rows)
        for executor in (*self._networks, self._update):
            executor.set_rows(rows)
        self._denoiser.put({"branch": branches(rows // batch, batch)})
        self._update.put(guidance_rows(rows, batch))
        self._denoiser.upload(("branch",))
        self._update.upload(("unconditional", "conditional"))

    def step(self, t: int, coefficients: np.ndarray, full: bool) -> np.ndarray:
        """Σ|noise| of each row: NaN or infinite where the predicted noise is, before guidance."""
        network = self._networks[0 if full else 1]
        self._denoiser.put({"timestep": np.float32(t)})
        self._update.put({"coefficients": coefficients[:, None, None]})
        shapes = (network.shapes_set, self._update.shapes_set)
        if shapes != network.graph_shapes:
            self._destroy_graph(network)
        elif self._record and not network.graph:
            self._record_graph(network)
        if network.graph:
            self._cuda.launch_graph(network.graph, self._stream)
        else:
            self._enqueue(network)
        self._cuda.synchronise(self._stream)
        network.graph_shapes = shapes
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
        self._cuda.begin_capture(self._stream)
        try:
            try:
                self._enqueue(network)
            finally:  # a stream that is left recording takes no more work
                network.graph = self._cuda.end_capture(self._stream)
        except (CudaError, LaunchError) as error:
            self._destroy_graph(network)
            self._record = False
            self._graph_problem = str(error)

    def _destroy_graph(self, network: Executor) -> None:
        if network.graph:
            graph, network.graph = network.graph, 0
            self._cuda.destroy_graph(graph)


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
