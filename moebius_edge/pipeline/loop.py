"""The sampling loop, latents in and latents out, and the noise it starts from.

It knows nothing of pictures. The loop is a generator: progress, timing and stopping early belong to the
caller, so that one loop serves ``run``, the export's gate and the report. Guidance and the sampler's step are
numpy's here, unless the runtime keeps the latents on its device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from ..errors import BundleError
from ..runtimes import Runtime
from ..runtimes.base import DeviceLatents
from ..sampling.guidance import Interval, guidance_at
from ..sampling.scheduler import Scheduler
from ..spec import DEEP, DENOISER, NOISE_OFFSET, SHALLOW
from .deep_cache import whole_calls

if TYPE_CHECKING:
    from .latency import StageTimer

Floats = npt.NDArray[np.float32]

_CONDITIONAL, _UNCONDITIONAL = 0, 1  # values of the denoiser's ``branch``


@dataclass(frozen=True, eq=False)
class Step:
    """One network call done: ``index`` counts from 1 to ``total``."""

    index: int
    total: int
    timestep: int
    read: Callable[[], Floats]

    @property
    def latent(self) -> Floats:
        """(B, 4, h, w), the call's outcome. Reading it may be a copy from the device, which still has it only until
        the next call; then it is a ``RuntimeError``. The last step's can be read for ever.
        """
        return self.read()


class Call(NamedTuple):
    """One call of the denoiser: its guidance, its rows a picture, and whether it computes the whole network."""

    timestep: int
    guidance: float
    rows: int  # 1, the conditional branch alone, where guidance is 1
    whole: bool


def plan_calls(
    timesteps: Sequence[int], guidance: float, interval: Interval | None, cache_interval: int
) -> list[Call]:
    """The calls that ``denoise`` makes with these arguments."""
    scales = [guidance_at(t, guidance, interval) for t in timesteps]
    rows = [1 if scale == 1 else 2 for scale in scales]
    return [Call(*call) for call in zip(timesteps, scales, rows, whole_calls(rows, cache_interval), strict=True)]


def denoise(
    runtime: Runtime,
    latents: Floats,
    mask: Floats,
    masked: Floats,
    scheduler: Scheduler,
    guidance: float,
    timer: StageTimer | None = None,
    interval: Interval | None = None,
    cache_interval: int = 1,
) -> Iterator[Step]:
    """The sampling loop: yield a ``Step`` after each call of the denoiser on an active ``runtime``.

    A call has 2B rows, the unconditional branch of all B first, then the conditional: e = eu + g (ec - eu).
    At guidance 1, where that is ec, and at timesteps outside of ``interval``, it has the B conditional rows alone.

    Args:
        latents: (B, 4, h, w), noised for the scheduler's first timestep.
        mask: (B, 1, h, w), 1 in the hole.
        masked: (B, 4, h, w), latents of the images without their holes.
        interval: the timesteps with guidance; absent, all.
        cache_interval: one call in so many computes the whole denoiser (``deep_cache``); 1, each does.

    Raises:
        BundleError: the predicted noise is not finite.
    """
    batch = len(latents)
    calls = plan_calls(scheduler.timesteps, guidance, interval, cache_interval)
    total = len(calls)

    def joined(rows: int) -> Floats:
        return np.tile(np.concatenate([latents, mask, masked], axis=1), (rows // batch, 1, 1, 1))

    kept: DeviceLatents | None = None
    reached = 0  # the step whose latents the device has
    deep = np.zeros(0, np.float32)

    def read_from(device: DeviceLatents, index: int) -> Floats:
        if index != reached:
            raise RuntimeError(f"the latent of step {index} is gone: read it before the next step")
        return device.read()

    for index, (t, scale, rows, whole) in enumerate(calls, start=1):
        where = f" at step {index} of {total} (t={t})"
        read: Callable[[], Floats]
        with measured(timer, "denoise"):
            branch = np.repeat(np.array([_UNCONDITIONAL, _CONDITIONAL][-rows:], np.int64), batch)
            if index == 1:
                kept = runtime.keep_latents(joined(len(branch)), branch, scale)
            elif kept is not None and scale != calls[index - 2].guidance:
                kept.guide(branch, scale)
            if kept is None:
                timesteps = np.full(len(branch), t, np.float32)
                feeds: dict[str, np.ndarray] = {"sample": joined(len(branch)), "timestep": timesteps, "branch": branch}
                if whole:
                    kept_on = index < total and not calls[index].whole  # the next call reuses what this one makes
                    made = runtime.run(DENOISER, feeds, ("noise", DEEP) if kept_on else ("noise",))
                    deep = made.get(DEEP, deep)
                else:
                    made = runtime.run(SHALLOW, {**feeds, DEEP: deep})
                noise = made["noise"]
                check_finite(noise, "denoiser", where)
                if len(branch) > batch:
                    noise = noise[:batch] + np.float32(scale) * (noise[batch:] - noise[:batch])
                latents = scheduler.step(noise, t, latents)
                read = partial(np.asarray, latents)
            else:
                reached = index
                check_finite(kept.step(t, scheduler.linear_step(index - 1), whole), "denoiser", where)
                read = partial(read_from, kept, index)
                if index == total:
                    read = partial(np.asarray, kept.read())
        yield Step(index, total, t, read)


def initial_noise(seed: int, region_index: int, shape: tuple[int, int, int, int]) -> Floats:
    """The noise a region starts from, (N, 4, h, w), the same on every machine and runtime.

    numpy's PCG64 seeded with ``SeedSequence([seed, region_index])`` draws float64 normals of ``shape``, then
    (N, 4, 1, 1) more, which times ``NOISE_OFFSET`` are added (upstream's offset, one an image and channel).
    """
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, region_index])))
    noise = generator.standard_normal(shape)
    offset = generator.standard_normal((*shape[:2], 1, 1))
    return (noise + NOISE_OFFSET * offset).astype(np.float32)


def check_finite(values: np.ndarray, component: str, where: str = "") -> None:
    """Raise ``BundleError`` naming the stage unless every value is finite; none is ever replaced."""
    if np.isfinite(values).all():
        return
    what = "NaN" if np.isnan(values).any() else "an infinite value"
    raise BundleError(
        f"{component} returned {what}{where}: its weights are damaged or its precision overflows; "
        "export or download the bundle again"
    )


def measured(timer: StageTimer | None, stage: str) -> AbstractContextManager[None]:
    """Time a block as ``stage``, or do not."""
    return nullcontext() if timer is None else timer.measure(stage)
