"""One engine's buffers and launches: fixed addresses, one stream. ``latent_loop`` joins two of them.

Buffers hold the most rows the engine takes, so that an address never changes, and a tensor may lie in another
executor's buffers. Whatever is queued happens in order; ``run`` and ``latent_loop`` wait for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ..spec import Component, Tensor
from .base import Arrays, batched
from .cuda import Cuda


class LaunchError(Exception):
    """TensorRT refused a call; its log says why."""


class Executor:
    """Runs ``component`` on ``context`` with at most ``max_rows`` rows.

    ``context`` is TensorRT's ``IExecutionContext``, ``cuda`` is open and ``stream`` its stream. ``shared`` are tensors
    that lie in the buffers of another executor with ``max_rows`` or more, on the device and on the host.

    Methods raise ``LaunchError`` or ``CudaError`` for what TensorRT or CUDA refuses.
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
            made = tuple(self._context.get_tensor_shape(name))
            if made != batched(tensor, rows):
                raise LaunchError(f"{name} would have shape {made}, not {batched(tensor, rows)}")
        self.rows = rows

    def put(self, feeds: Arrays) -> None:
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
