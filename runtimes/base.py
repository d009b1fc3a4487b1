"""The interface of every runtime: building one is cheap, ``with`` loads the graphs, ``run`` executes one of them.

Inputs and outputs are checked here, once for all runtimes. For sampling a runtime gives the loop a ``LatentBatch``,
which takes the steps: in host memory unless the runtime keeps the latents on its device.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from ..errors import BundleError, UsageError
from ..options import VERBOSE
from ..sampling.calls import Call
from ..sampling.scheduler import Scheduler
from ..spec import DEEP, DENOISER, SHALLOW, Component, Tensor
from ..system.machine import available_cores

Arrays = dict[str, np.ndarray]
_Self = TypeVar("_Self", bound="Runtime")  # typing.Self needs Python 3.11
CONDITIONAL, UNCONDITIONAL = 0, 1  # the values of the denoiser's ``branch``


def choose_threads(threads: int | None) -> int:
    """``threads``, by default as many as the cores this process may run on, which in a container may be few.

    Raises UsageError for a number below 1.
    """
    if threads is not None and threads < 1:
        raise UsageError(f"threads must be 1 or more, got {threads}")
    return available_cores() if threads is None else threads


def is_verbose() -> bool:
    """Whether what runtimes log is shown on standard error."""
    return os.environ.get(VERBOSE) == "1"


class LatentBatch(ABC):
    """The latents of B pictures that are sampled together, wherever the runtime keeps them."""

    @abstractmethod
    def step(self, call: Call) -> None:
        """Call the denoiser, apply guidance and take the sampler's step.

        Raises BundleError if the predicted noise is not finite.
        """

    @abstractmethod
    def read(self) -> np.ndarray:
        """The latents (B, 4, h, w) after the last step, in memory that no later step changes."""


class Runtime(ABC):
    """Executes ONNX components. A subclass implements ``activate``, ``deactivate``, ``_run`` and ``info``.

    Attributes:
        executes_onnx: whether it reads the bundle's ONNX files, which its caller then verifies.
        components: the tensors of each component by name, every size fixed but the batch ``N``.
        notes: what a user should know; entering the runtime may add to them.
        selection: how it was chosen, where that was left to ``auto``.
    """

    executes_onnx = True

    def __init__(self, components: Mapping[str, Component]) -> None:
        self.components = dict(components)
        self.notes: list[str] = []
        self.selection: dict[str, Any] | None = None
        self.active = False

    @property
    @abstractmethod
    def info(self) -> dict[str, Any]:
        """What executes: ``name``, ``version``, ``device``, ``provider`` and the runtime's own settings."""

    @property
    def pictures_per_call(self) -> int:
        """How many pictures are best sampled in one call; 1 where more of them gain nothing."""
        return 1

    def report(self) -> dict[str, Any]:
        """``info``, and ``selection`` where there is one, for the JSON output of a command."""
        return dict(self.info) if self.selection is None else {**self.info, "selection": self.selection}

    @abstractmethod
    def activate(self) -> None:
        """Load the graphs onto the device."""

    @abstractmethod
    def deactivate(self) -> None:
        """Free what ``activate`` has taken; called once after it, also after a failure in it."""

    @abstractmethod
    def _run(self, component: str, feeds: Arrays, outputs: Sequence[str]) -> Arrays:
        """Execute one graph on checked, contiguous inputs and return the named ``outputs``."""

    def __enter__(self: _Self) -> _Self:
        if self.active:
            raise RuntimeError(f"{type(self).__name__} is already active: enter it once")
        try:
            self.activate()
        except BaseException:
            self.deactivate()
            raise
        self.active = True
        return self

    def __exit__(self, *error: object) -> None:
        self.active = False
        self.deactivate()

    def run(self, component: str, feeds: Mapping[str, np.ndarray], outputs: Collection[str] | None = None) -> Arrays:
        """Execute ``component`` on ``feeds`` (tensor name -> array) and return its outputs by name.

        Only the named ``outputs`` are copied from the device, by default all.

        Raises:
            ValueError: the feeds are not what the component declares, a bug of the caller's.
            BundleError: the outputs are not what the component declares.
        """
        self._check_active()
        if component not in self.components:
            raise ValueError(f"no component {component!r}: there are {', '.join(self.components)}")
        declared = self.components[component]
        batch = check_arrays(component, "input", declared.inputs, feeds)
        ordered = {t.name: np.ascontiguousarray(feeds[t.name]) for t in declared.inputs}
        tensors = tuple(t for t in declared.outputs if outputs is None or t.name in outputs)
        results = self._run(component, ordered, [t.name for t in tensors])
        try:
            check_arrays(component, "output", tensors, results, batch)
        except ValueError as error:
            raise BundleError(f"{error}", "the graph is not what bundle.json says; export it again") from None
        return results

    def start_sampling(self, latents: np.ndarray, condition: np.ndarray, scheduler: Scheduler) -> LatentBatch:
        """Take a batch of latents for all its steps; the next batch, or ``run`` of the denoiser, may replace it.

        Args:
            latents: (B, 4, h, w), noised for the scheduler's first timestep.
            condition: (B, 5, h, w): the mask, and the latents of the masked images.
        """
        self._check_active()
        return HostLatents(self, latents, condition, scheduler)

    def _check_active(self) -> None:
        if not self.active:
            raise RuntimeError(f"{type(self).__name__} is not active: use it inside `with runtime:`")


class HostLatents(LatentBatch):
    """Latents in host memory: the runtime predicts the noise, numpy does the rest."""

    def __init__(self, runtime: Runtime, latents: np.ndarray, condition: np.ndarray, scheduler: Scheduler) -> None:
        self._runtime, self._latents, self._condition, self._scheduler = runtime, latents, condition, scheduler
        self._deep = np.zeros(0, np.float32)

    def step(self, call: Call) -> None:
        batch = len(self._latents)
        branch = branches(call.rows, batch)
        sample = np.tile(np.concatenate([self._latents, self._condition], axis=1), (call.rows, 1, 1, 1))
        timestep = np.full(len(branch), call.timestep, np.float32)
        feeds: Arrays = {"sample": sample, "timestep": timestep, "branch": branch}
        noise = self._predict(call, feeds)
        check_finite(noise, DENOISER, call.where)
        if call.rows == 2:
            noise = noise[:batch] + np.float32(call.guidance) * (noise[batch:] - noise[:batch])
        self._latents = self._scheduler.step(noise, call.timestep, self._latents)

    def _predict(self, call: Call, feeds: Arrays) -> np.ndarray:
        """The noise of all rows; the deep feature is kept for the calls that reuse it."""
        if not call.full:
            return self._runtime.run(SHALLOW, {**feeds, DEEP: self._deep})["noise"]
        results = self._runtime.run(DENOISER, feeds, ("noise", DEEP) if call.reused else ("noise",))
        self._deep = results.get(DEEP, self._deep)
        return results["noise"]

    def read(self) -> np.ndarray:
        return self._latents


def branches(rows: int, batch: int) -> np.ndarray:
    """The denoiser's ``branch`` for ``batch`` pictures of 1 or 2 rows: the unconditional rows come first."""
    return np.repeat(np.array([UNCONDITIONAL, CONDITIONAL][-rows:], np.int64), batch)


def batched(tensor: Tensor, batch: int) -> tuple[int, ...]:
    """The shape of ``tensor`` for ``batch`` rows; every other size is fixed."""
    return tuple(d if isinstance(d, int) else batch for d in tensor.shape)


def drawn_feeds(component: Component, rows: int) -> Arrays:
    """Inputs of a denoiser for one call: standard normal, halfway along the trajectory, the branches in turn."""
    generator = np.random.default_rng(0)
    feeds: Arrays = {}
    for tensor in component.inputs:
        shape = batched(tensor, rows)
        values = {"timestep": np.full(shape, 500), "branch": np.arange(rows) % 2}.get(tensor.name)
        feeds[tensor.name] = (generator.standard_normal(shape) if values is None else values).astype(tensor.dtype)
    return feeds


def check_finite(values: np.ndarray, component: str, where: str = "") -> None:
    """Raise ``BundleError`` naming the stage unless every value is finite; none is ever replaced."""
    if np.isfinite(values).all():
        return
    what = "NaN" if np.isnan(values).any() else "an infinite value"
    remedy = "its weights are damaged or its precision overflows; export or download the bundle again"
    raise BundleError(f"{component} returned {what}{where}", remedy)


def check_arrays(
    component: str, kind: str, tensors: tuple[Tensor, ...], arrays: Mapping[str, np.ndarray], batch: int = 0
) -> int:
    """Raise ``ValueError`` unless ``arrays`` has the declared names, types and shapes; return the batch.

    Every ``N``, the first size of each tensor, must be the same number, ``batch`` where it is given.
    """
    names = [t.name for t in tensors]
    if sorted(arrays) != sorted(names):
        raise ValueError(f"{component} must have the {kind} {', '.join(names)}, got {', '.join(arrays) or 'none'}")
    batch = batch or len(np.atleast_1d(arrays[names[0]]))
    if not batch:
        raise ValueError(f"{component} {kind} has an empty batch")
    for tensor in tensors:
        array, expected = arrays[tensor.name], batched(tensor, batch)
        if array.dtype != np.dtype(tensor.dtype) or array.shape != expected:
            raise ValueError(
                f"{component} {kind} {tensor.name!r} must be {tensor.dtype} of shape {expected}, "
                f"got {array.dtype} of shape {array.shape}"
            )
    return batch
