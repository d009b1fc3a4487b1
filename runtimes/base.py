"""The interface every back-end implements: build cheaply, ``with`` to touch the device, ``run`` a graph.

Inputs and outputs are checked here, once for all back-ends, so that a back-end holds nothing but its
own calls. It does not look at values: the pipeline says at which stage a network went non-finite.
A back-end may also sample with the latents on its device, see ``DeviceLatents``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from types import TracebackType
from typing import Any, Protocol, TypeVar

import numpy as np

from ..errors import BundleError
from ..sampling.scheduler import LinearStep
from ..spec import Component, Tensor

Arrays = dict[str, np.ndarray]
_Self = TypeVar("_Self", bound="Runtime")  # typing.Self needs Python 3.11


class DeviceLatents(Protocol):
    """One batch of latents that stays on the device while it is sampled."""

    def step(self, t: int, coefficients: LinearStep, whole: bool = True) -> np.ndarray:
        """Call the denoiser at timestep ``t``, apply guidance and the sampler's step.

        Unless ``whole`` is true ``denoiser_shallow`` is called, with the deep feature of the last whole call.

        Returns Σ|noise| of each row: NaN or infinite where the predicted noise is, before guidance.
        """

    def guide(self, branch: np.ndarray, guidance: float) -> None:
        """Call the denoiser with other rows from the next step on: 2B, or at guidance 1 B; as in ``keep_latents``."""

    def read(self) -> np.ndarray:
        """The latents (B, 4, h, w) after the last step, in memory of the caller's own."""


class Runtime(ABC):
    """Executes the components of one bundle.

    A subclass implements ``activate``, ``deactivate``, ``_run`` and ``info``. ``components`` maps each
    component's name to its tensors, every size fixed but the batch ``N``. ``notes`` are what a user should know
    before it is entered; ``selection`` says how it was chosen where that was left to ``auto``.
    """

    def __init__(self, components: Mapping[str, Component]) -> None:
        self.components = dict(components)
        self.notes: list[str] = []
        self.selection: dict[str, Any] | None = None
        self._active = False

    @property
    @abstractmethod
    def info(self) -> dict[str, Any]:
        """What executes: ``name``, ``version``, ``device``, ``provider`` and the back-end's own settings."""

    @property
    def pictures_per_call(self) -> int:
        """How many pictures are best sampled in one call; 1 where a call with more of them gains nothing."""
        return 1

    def report(self) -> dict[str, Any]:
        """``info``, and ``selection`` where there is one: what a figure's reader must know of the runtime."""
        return dict(self.info) if self.selection is None else {**self.info, "selection": self.selection}

    @abstractmethod
    def activate(self) -> None:
        """Load the graphs onto the device."""

    @abstractmethod
    def deactivate(self) -> None:
        """Free what ``activate`` took; called once after it, also after a failure inside ``with``."""

    @abstractmethod
    def _run(self, component: str, feeds: Arrays, outputs: Sequence[str]) -> Arrays:
        """Execute one graph on checked, contiguous inputs, for the ``outputs`` that are wanted."""

    def __enter__(self: _Self) -> _Self:
        if self._active:
            raise RuntimeError(f"{type(self).__name__} is already active: enter it once")
        try:
            self.activate()
        except BaseException:
            self.deactivate()
            raise
        self._active = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._active = False
        self.deactivate()

    @property
    def active(self) -> bool:
        return self._active

    def run(
        self, component: str, feeds: Mapping[str, np.ndarray], outputs: Collection[str] | None = None
    ) -> Arrays:
        """Execute ``component`` on ``feeds`` (tensor name -> array) and return its outputs by name.

        ``outputs`` are those that are wanted, absent all: what is not does not travel from a device.

        Raises ``ValueError`` for feeds that are not what the component declares (the caller's bug) and
        ``BundleError`` for outputs that are not (the graph's).
        """
        self._check_active("run")
        if component not in self.components:
            raise ValueError(f"no component {component!r}: this bundle has {', '.join(self.components)}")
        tensors = self.components[component]
        batch = check_arrays(component, "input", tensors.inputs, feeds)
        ordered = {t.name: np.ascontiguousarray(feeds[t.name]) for t in tensors.inputs}
        wanted = tuple(t for t in tensors.outputs if outputs is None or t.name in outputs)
        made = self._run(component, ordered, [t.name for t in wanted])
        try:
            check_arrays(component, "output", wanted, made, batch)
        except ValueError as error:
            raise BundleError(f"{error}: the graph is not what bundle.json says; export it again") from None
        return made

    def keep_latents(self, sample: np.ndarray, branch: np.ndarray, guidance: float) -> DeviceLatents | None:
        """Put a batch on the device for all its steps, or None where this back-end leaves the arithmetic to numpy.

        Args:
            sample: (N, 9, h, w), the denoiser's first: N = 2B, the unconditional rows first, or B at guidance 1.
            branch: (N,) int64.

        The batch is lost with the next call of this method or of ``run`` for the denoiser.
        """
        self._check_active("keep_latents")
        return None

    def _check_active(self, method: str) -> None:
        if not self._active:
            raise RuntimeError(f"{type(self).__name__} is not active: call {method} inside `with runtime:`")


def batched(tensor: Tensor, batch: int) -> tuple[int, ...]:
    """The shape of ``tensor`` for ``batch`` rows; a bundle has fixed every other size."""
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


def check_arrays(
    component: str,
    kind: str,
    tensors: tuple[Tensor, ...],
    arrays: Mapping[str, np.ndarray],
    batch: int | None = None,
) -> int:
    """Raise ``ValueError`` unless ``arrays`` has the declared names, types and shapes; return the batch.

    Every ``N`` must be the same number, ``batch`` where it is given.
    """
    declared = [t.name for t in tensors]
    if missing := [n for n in declared if n not in arrays]:
        raise ValueError(f"{component} lacks {kind} {', '.join(missing)}")
    if unknown := [n for n in arrays if n not in declared]:
        raise ValueError(f"{component} has no {kind} {', '.join(unknown)}: it has {', '.join(declared)}")
    for tensor in tensors:
        array = arrays[tensor.name]
        where = f"{component} {kind} {tensor.name!r}"
        if array.dtype != np.dtype(tensor.dtype):
            raise ValueError(f"{where} must be {tensor.dtype}, got {array.dtype}")
        sizes = dict(zip(tensor.shape, array.shape, strict=False))
        if batch is None and "N" in sizes:
            batch = sizes["N"]
        expected = tuple(batch if d == "N" else d for d in tensor.shape)
        if array.shape != expected:
            raise ValueError(f"{where} must have shape {_shape(expected)}, got {_shape(array.shape)}")
    if not batch:
        raise ValueError(f"{component} {kind} has an empty batch")
    return batch


def _shape(shape: tuple[int | str | None, ...]) -> str:
    return "(" + ", ".join(map(str, shape)) + ("," if len(shape) == 1 else "") + ")"
