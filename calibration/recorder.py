"""ONNX Runtime with one component that returns its activations beside its result.

Where they are too many for memory they come in groups, each by a graph of its own: a call of the component is then as
many runs. Only one group's arrays exist at a time; each becomes running figures at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..bundle.bundle import Bundle
from ..data.calibration_pictures import MASK_SIZES
from ..errors import BundleError
from ..runtimes.base import Arrays
from ..runtimes.ort import OrtRuntime
from ..runtimes.providers import quiet_options
from .activations import Activation, graphs, group, load_inlined
from .statistics import Statistics, Strata

_MASK_CHANNEL = 4  # of the denoiser's input ``sample``


class RecordingRuntime(OrtRuntime):
    """ONNX Runtime on the CPU, with one component that hands its activations to ``statistics``."""

    def __init__(
        self, bundle: Bundle, component: str, activations: list[Activation], group_bytes: int, statistics: Statistics
    ) -> None:
        super().__init__(bundle.components, bundle.paths)
        self._recorded, self._statistics = component, statistics
        self._path = self.paths.pop(component)
        self._groups = group(activations, group_bytes)
        self._parts: list[tuple[Any, list[str]]] = []

    @property
    def passes(self) -> int:
        """How many runs one call of the component takes."""
        return len(self._groups)

    def activate(self) -> None:
        super().activate()
        model = load_inlined(self._path)
        for contents, names in graphs(model, self._groups):
            options = quiet_options(self._ort, self._threads)
            options.enable_cpu_mem_arena = False  # it would keep room for the outputs, which are copied
            try:
                session = self._ort.InferenceSession(contents, options, providers=[self._provider])
            except Exception as error:  # onnxruntime raises a class of its own for every cause
                raise self._problem(f"cannot load {self._path} for recording", error) from error
            self._parts.append((session, names))

    def deactivate(self) -> None:
        self._parts.clear()
        super().deactivate()

    def _run(self, component: str, feeds: Arrays, outputs: Sequence[str]) -> Arrays:
        if component != self._recorded:
            return super()._run(component, feeds, outputs)
        strata = self._strata(feeds)
        for where in strata:
            self._statistics.rows[where] += 1
        for name in self._statistics.tensors.keys() & feeds.keys():
            self._take(name, feeds[name], strata)
        made: Arrays = {}
        for session, names in self._parts:
            made.clear()  # before the next group's arrays are made
            if not (wanted := [output.name for output in session.get_outputs()]):
                continue  # a group of inputs alone
            known = {value.name for value in session.get_inputs()}
            try:
                used = {name: value for name, value in feeds.items() if name in known}
                made.update(zip(wanted, session.run(wanted, used), strict=True))
            except Exception as error:
                raise self._problem(f"{component} failed while it was recorded", error) from error
            for name in names:
                self._take(name, made[name], strata)
        return {name: made[name] for name in outputs}

    def _take(self, name: str, values: np.ndarray, strata: Strata) -> None:
        if not self._statistics.tensors[name].update(values, strata):
            raise BundleError(
                f"activation {name} of the {self._recorded} is not finite: its weights are damaged or its precision "
                "overflows; calibrate a float32 bundle, or export it again"
            )

    def _strata(self, feeds: Arrays) -> Strata:
        """Which timestep, branch and size of hole each row is of; the autoencoder's rows count as the first of each."""
        if self._recorded != "denoiser":
            return [(0, 0, 0)] * len(next(iter(feeds.values())))
        shares = feeds["sample"][:, _MASK_CHANNEL].mean(axis=(1, 2))
        return [
            (self._statistics.timesteps.index(int(t)), int(branch), int(np.searchsorted(MASK_SIZES[:-1], share)))
            for t, branch, share in zip(feeds["timestep"], feeds["branch"], shares, strict=True)
        ]
