"""IO binding: a session's inputs and outputs in fixed device buffers, allocated once for each batch size.

A plain ``session.run`` allocates on the device for every call and copies through pageable memory it also allocates;
here a step copies into the same addresses each time, and what comes back is the caller's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from ..spec import Component, Tensor
from .base import Arrays, batched


@dataclass(frozen=True)
class _Set:
    """The buffers of one batch size, and the binding that names them."""

    binding: Any
    inputs: dict[str, Any]
    outputs: dict[str, Any]


class BoundSession:
    """Runs ``session`` on buffers of ``device_type``, ``cuda`` or ``cpu``, one set of them for each batch size."""

    def __init__(self, ort: ModuleType, session: Any, component: Component, device_type: str) -> None:
        self._ort, self._session, self._component, self._device = ort, session, component, device_type
        self._sets: dict[int, _Set] = {}

    def run(self, feeds: Arrays, outputs: Sequence[str]) -> Arrays:
        """Those ``outputs`` by name, as arrays of their own: the next call overwrites the device's buffers only."""
        batch = len(next(iter(feeds.values())))
        if batch not in self._sets:
            self._sets[batch] = self._allocate(batch)
        chosen = self._sets[batch]
        for name, buffer in chosen.inputs.items():
            buffer.update_inplace(feeds[name])
        chosen.binding.synchronize_inputs()
        self._session.run_with_iobinding(chosen.binding)
        chosen.binding.synchronize_outputs()
        return {name: np.array(chosen.outputs[name].numpy()) for name in outputs}

    def _allocate(self, batch: int) -> _Set:
        binding = self._session.io_binding()
        inputs = {t.name: self._buffer(t, batch) for t in self._component.inputs}
        outputs = {t.name: self._buffer(t, batch) for t in self._component.outputs}
        for name, buffer in inputs.items():
            binding.bind_ortvalue_input(name, buffer)
        for name, buffer in outputs.items():
            binding.bind_ortvalue_output(name, buffer)
        return _Set(binding, inputs, outputs)

    def _buffer(self, tensor: Tensor, batch: int) -> Any:
        shape, kind = list(batched(tensor, batch)), np.dtype(tensor.dtype).type
        return self._ort.OrtValue.ortvalue_from_shape_and_type(shape, kind, self._device, 0)
