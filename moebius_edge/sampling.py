"""The sampling loop, latents in and latents out, and the noise it starts from.

It knows nothing of pictures. The loop is a generator: progress, timing and stopping early belong to the
caller, so that one loop serves ``run``, the export's gate and the report.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from .errors import BundleError
from .runtimes import Runtime
from .scheduler import Scheduler
from .spec import NOISE_OFFSET

if TYPE_CHECKING:
    from .latency import StageTimer

Floats = npt.NDArray[np.float32]

_CONDITIONAL, _UNCONDITIONAL = 0, 1  # values of the denoiser's ``branch``


@dataclass(frozen=True, eq=False)
class Step:
    """One network call done: ``index`` counts from 1 to ``total``, ``latent`` (B, 4, h, w) is its outcome."""

    index: int
    total: int
    timestep: int
    latent: Floats


def denoise(
    runtime: Runtime,
    latents: Floats,
    mask: Floats,
    masked: Floats,
    scheduler: Scheduler,
    guidance: float,
    timer: StageTimer | None = None,
) -> Iterator[Step]:
    """The sampling loop: yield a ``Step`` after each call of the denoiser on an active ``runtime``.

    A call has 2B rows, the unconditional branch of all B first, then the conditional: e = eu + g (ec - eu).
    At guidance 1, where that is ec, it has the B conditional rows alone.

    Args:
        latents: (B, 4, h, w), noised for the scheduler's first timestep.
        mask: (B, 1, h, w), 1 in the hole.
        masked: (B, 4, h, w), latents of the images without their holes.

    Raises:
        BundleError: the predicted noise is not finite.
    """
    batch = len(latents)
    branches = [_CONDITIONAL] if guidance == 1 else [_UNCONDITIONAL, _CONDITIONAL]
    branch = np.repeat(np.array(branches, np.int64), batch)
    rows = len(branches)
    total = len(scheduler.timesteps)
    for index, t in enumerate(scheduler.timesteps, start=1):
        with measured(timer, "denoise"):
            sample = np.concatenate([latents, mask, masked], axis=1)
            feeds = {
                "sample": np.tile(sample, (rows, 1, 1, 1)),
                "timestep": np.full(rows * batch, t, np.float32),
                "branch": branch,
            }
            noise = runtime.run("denoiser", feeds)["noise"]
            check_finite(noise, "denoiser", f" at step {index} of {total} (t={t})")
            if rows == 2:
                noise = noise[:batch] + np.float32(guidance) * (noise[batch:] - noise[:batch])
            latents = scheduler.step(noise, t, latents)
        yield Step(index, total, t, latents)


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
