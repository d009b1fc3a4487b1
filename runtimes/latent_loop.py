"""Sampling with the latents on the device: the denoiser, then ``update``, which writes the denoiser's next input.

In a call that reuses the deep feature of an earlier one ``denoiser_shallow`` takes the denoiser's place. All its
tensors lie in the denoiser's buffers, the feature too, which stays where the last whole call has written it.

The denoiser's ``noise`` is read where it lies. ``update`` may not write what it reads, so its results are copied within
the device to where they are read next. From the host comes the timestep and a row of coefficients, to the host goes
one number a row.

The first step at a number of rows is launched piece by piece, for TensorRT prepares itself then; the second is recorded
with its copies as a CUDA graph, and from then on a step is one launch, also in the next picture. Whole and shallow
calls have a graph each. Another number of rows starts afresh, also where guidance begins or ends on the way: a
picture's rows are alike, so those that stay, stay where they are, and those that come are copied within the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import numpy as np

from ..sampling.scheduler import LinearStep
from ..spec import LATENT_CHANNELS
from .cuda import Cuda, CudaError
from .executor import Executor, LaunchError
from .update import guidance_rows

SHARED = ("sample", "noise")  # tensors of the denoiser that are the update's too
_MOVES = {"next_sample": "sample", "next_clean": "clean"}


class LatentLoop:
    """Joins executors: ``networks``, which are the denoiser and where there is one its shallow part, all of whose
    buffers are the denoiser's; and ``update``, which shares those named in ``SHARED``.

    With ``record`` steps become a CUDA graph; where recording fails they go on without, and ``graph_problem`` says why.
    ``told(what)`` is a context that turns a ``LaunchError`` or ``CudaError`` into the user's; ``check_rows(rows)``
    raises an error of the user's where that many are too many.
    """

    def __init__(
        self,
        cuda: Cuda,
        stream: int,
        networks: Sequence[Executor],
        update: Executor,
        record: bool,
        told: Callable[[str], AbstractContextManager[None]],
        check_rows: Callable[[int], None],
    ) -> None:
        self._cuda, self._stream = cuda, stream
        self._denoiser, self._networks, self._update = networks[0], list(networks), update
        self._record = record
        self.told, self._check_rows = told, check_rows
        self.current: LoopLatents | None = None  # whose batch lies in the buffers
        # By network: ``shapes_set`` of it and of the update at its first step, and its recorded step.
        self._shapes: dict[Executor, tuple[int, int]] = {}
        self._graphs: dict[Executor, int] = {}
        self.graph_problem = ""

    @property
    def recorded(self) -> bool:
        return bool(self._graphs)

    def forget(self) -> None:
        """Something else is about to use the denoiser's buffers."""
        self.current = None

    def close(self) -> None:
        self.forget()
        for network in self._networks:
            self._destroy_graph(network)

    def start(self, sample: np.ndarray, branch: np.ndarray, guidance: float) -> LoopLatents:
        """Upload what stays as long as a batch is sampled; see ``Runtime.keep_latents``."""
        batch = len(sample) if guidance == 1 else len(sample) // 2
        self._check_rows(len(sample))
        self.forget()
        with self.told("start sampling"):
            self._set_branches(branch, batch)
            self._denoiser.put({"sample": sample})
            self._update.put({"clean": np.float32(0)})
            self._denoiser.upload(("sample",))
            self._update.upload(("clean",))
            self._cuda.synchronise(self._stream)
        self.current = LoopLatents(self, batch, guidance)
        return self.current

    def change_branches(self, branch: np.ndarray, batch: int) -> None:
        """Go on with a row or two a picture; a second one is a copy of the first, but for the branch."""
        self._check_rows(len(branch))
        self._set_branches(branch, batch)
        if len(branch) > batch:
            for executor, name in ((self._denoiser, "sample"), (self._update, "clean")):
                first, half = executor.address(name), executor.size(name) // 2
                self._cuda.copy(first + half, first, half, self._stream)
        self._cuda.synchronise(self._stream)

    def _set_branches(self, branch: np.ndarray, batch: int) -> None:
        rows = len(branch)
        for executor in (*self._networks, self._update):
            executor.set_rows(rows)
        self._denoiser.put({"branch": branch})
        self._update.put(guidance_rows(rows, batch))
        self._denoiser.upload(("branch",))
        self._update.upload(("unconditional", "conditional"))

    def step(self, t: int, coefficients: np.ndarray, whole: bool) -> np.ndarray:
        network = self._networks[0 if whole else 1]
        self._denoiser.put({"timestep": np.float32(t)})
        self._update.put({"coefficients": coefficients[:, None, None]})
        shapes = (network.shapes_set, self._update.shapes_set)
        if shapes != self._shapes.get(network):
            self._destroy_graph(network)
        elif self._record and network not in self._graphs:
            self._record_graph(network)
        if network in self._graphs:
            self._cuda.launch_graph(self._graphs[network], self._stream)
        else:
            self._enqueue(network)
        self._cuda.synchronise(self._stream)
        self._shapes[network] = shapes
        return self._update.get("magnitude").reshape(-1)

    def sample(self) -> np.ndarray:
        """(N, 9, h, w): what the next call of the denoiser would be fed."""
        self._denoiser.download(("sample",))
        self._cuda.synchronise(self._stream)
        return self._denoiser.get("sample")

    def _enqueue(self, network: Executor) -> None:
        self._denoiser.upload(("timestep",))
        self._update.upload(("coefficients",))
        network.launch()
        self._update.launch()
        for made, read in _MOVES.items():
            update = self._update
            self._cuda.copy(update.address(read), update.address(made), update.size(made), self._stream)
        self._update.download(("magnitude",))

    def _record_graph(self, network: Executor) -> None:
        self._cuda.begin_capture(self._stream)
        try:
            try:
                self._enqueue(network)
            finally:  # a stream that is left recording takes no more work
                self._graphs[network] = self._cuda.end_capture(self._stream)
        except (CudaError, LaunchError) as error:
            self._destroy_graph(network)
            self._record = False
            self.graph_problem = str(error)

    def _destroy_graph(self, network: Executor) -> None:
        if (graph := self._graphs.pop(network, 0)) != 0:
            self._cuda.destroy_graph(graph)


class LoopLatents:
    """``DeviceLatents`` in a loop's buffers, until something else uses them."""

    def __init__(self, loop: LatentLoop, batch: int, guidance: float) -> None:
        self._loop, self._batch, self._guidance = loop, batch, guidance

    def step(self, t: int, coefficients: LinearStep, whole: bool = True) -> np.ndarray:
        self._check()
        with self._loop.told("run denoiser"):
            return self._loop.step(t, np.array([self._guidance, *coefficients], np.float32), whole)

    def guide(self, branch: np.ndarray, guidance: float) -> None:
        self._check()
        with self._loop.told("run denoiser"):
            self._loop.change_branches(branch, self._batch)
        self._guidance = guidance

    def read(self) -> np.ndarray:
        self._check()
        with self._loop.told("read the latents"):
            return np.ascontiguousarray(self._loop.sample()[: self._batch, :LATENT_CHANNELS])

    def _check(self) -> None:
        if self._loop.current is not self:
            raise RuntimeError("these latents are gone: another call has used the denoiser's buffers")
