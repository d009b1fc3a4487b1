"""One engine's buffers and how it is launched: fixed addresses, one stream, a CUDA graph once shapes have settled.

Buffers hold the most rows the engine takes, so that an address never changes. The first call at a number of rows is
launched as it is, for TensorRT prepares itself then; the second is recorded with its copies, and from then on a call
is one launch. Another number of rows starts afresh: a recorded graph is void once its context's shapes have changed.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..spec import Component, Tensor
from .base import Arrays, batched
from .cuda import Cuda, CudaError


class LaunchError(Exception):
    """TensorRT refused a call; its log says why."""


class Executor:
    """Runs ``component`` on ``context`` with at most ``max_rows`` rows.

    ``context`` is TensorRT's ``IExecutionContext``, ``cuda`` is open and ``stream`` its stream. With ``record`` calls
    become a CUDA graph; where recording fails calls go on without, and ``graph_problem`` says why.
    """

    def __init__(
        self, cuda: Cuda, stream: int, context: Any, component: Component, max_rows: int, record: bool
    ) -> None:
        self._cuda, self._stream, self._context, self._component = cuda, stream, context, component
        self.max_rows = max_rows
        self._record = record
        self._rows = 0
        self._warm = False
        self._graph = 0
        self.graph_problem = ""
        self._device: dict[str, int] = {}
        self._host: dict[str, np.ndarray] = {}

    @property
    def recorded(self) -> bool:
        return bool(self._graph)

    def allocate(self) -> None:
        """Take the buffers; ``close`` frees them, also after a failure here."""
        for tensor in (*self._component.inputs, *self._component.outputs):
            size = _bytes(tensor, self.max_rows)
            self._device[tensor.name] = self._cuda.allocate(size)
            self._host[tensor.name] = self._cuda.allocate_host(size)
            if not self._context.set_tensor_address(tensor.name, self._device[tensor.name]):
                raise LaunchError(f"no address for {tensor.name}")

    def close(self) -> None:
        self._forget_graph()
        while self._device:
            self._cuda.free(self._device.popitem()[1])
        while self._host:
            self._cuda.free_host(self._host.popitem()[1])

    def run(self, feeds: Arrays) -> Arrays:
        """Outputs by name, in memory of the caller's own. At most ``max_rows`` rows.

        Raises ``LaunchError`` or ``CudaError`` for what TensorRT or CUDA refuses.
        """
        rows = len(next(iter(feeds.values())))
        if rows != self._rows:
            self._set_rows(rows)
        for tensor in self._component.inputs:
            np.copyto(self._view(tensor), feeds[tensor.name])
        if self._record and self._warm and not self._graph:
            self._record_graph()
        if self._graph:
            self._cuda.launch_graph(self._graph, self._stream)
        else:
            self._enqueue()
        self._cuda.synchronise(self._stream)
        self._warm = True
        return {tensor.name: self._view(tensor).copy() for tensor in self._component.outputs}

    def _set_rows(self, rows: int) -> None:
        self._forget_graph()
        self._rows, self._warm = 0, False  # until all of it is done
        for tensor in self._component.inputs:
            if not self._context.set_input_shape(tensor.name, batched(tensor, rows)):
                raise LaunchError(f"no {rows} rows of {tensor.name}")
        for tensor in self._component.outputs:
            made = tuple(self._context.get_tensor_shape(tensor.name))
            if made != batched(tensor, rows):
                raise LaunchError(f"{tensor.name} would have shape {made}, not {batched(tensor, rows)}")
        self._rows = rows

    def _enqueue(self) -> None:
        """Queue copies in, the network, and copies out."""
        for tensor in self._component.inputs:
            name, size = tensor.name, _bytes(tensor, self._rows)
            self._cuda.upload(self._device[name], self._host[name], size, self._stream)
        if not self._context.execute_async_v3(self._stream):
            raise LaunchError("the launch was refused")
        for tensor in self._component.outputs:
            name, size = tensor.name, _bytes(tensor, self._rows)
            self._cuda.download(self._host[name], self._device[name], size, self._stream)

    def _record_graph(self) -> None:
        self._cuda.begin_capture(self._stream)
        try:
            try:
                self._enqueue()
            finally:  # a stream that is left recording takes no more work
                self._graph = self._cuda.end_capture(self._stream)
        except (CudaError, LaunchError) as error:
            self._forget_graph()
            self._record = False
            self.graph_problem = str(error)

    def _forget_graph(self) -> None:
        if self._graph:
            graph, self._graph = self._graph, 0
            self._cuda.destroy_graph(graph)

    def _view(self, tensor: Tensor) -> np.ndarray:
        memory = self._host[tensor.name][: _bytes(tensor, self._rows)]
        return memory.view(tensor.dtype).reshape(batched(tensor, self._rows))


def _bytes(tensor: Tensor, rows: int) -> int:
    return int(np.prod(batched(tensor, rows))) * np.dtype(tensor.dtype).itemsize
