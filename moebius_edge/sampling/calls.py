"""Which calls of the denoiser a trajectory takes: at which timestep, with how much guidance, how much of the network.

Two approximations save work. Guidance may be limited to an interval of timesteps (see ``guidance``); a call outside of
it has the conditional branch alone. And deep features may be reused (DeepCache: Ma et al., arXiv 2312.00858, section
3): what the coarse levels of the U-Net compute changes little from step to step, so a cached call computes the finest
level alone and takes what enters its way up from the last full call. docs/few-steps.md has their cost and gain.
"""

from __future__ import annotations

from dataclasses import dataclass

from .guidance import Interval, guidance_at
from .scheduler import Scheduler


@dataclass(frozen=True)
class Call:
    """One call of the denoiser; ``index`` counts from 1 to ``total``."""

    index: int
    total: int
    timestep: int
    guidance: float
    rows: int  # of a picture: 2, or 1 where guidance is 1, which is the conditional branch alone
    full: bool  # whether the whole network is computed, or its finest level from the deep feature of the last full call
    reused: bool = False  # whether the next call is cached, and so needs the deep feature of this one

    @property
    def where(self) -> str:
        return f" at step {self.index} of {self.total} (t={self.timestep})"


@dataclass(frozen=True)
class Sampling:
    """How a trajectory is sampled.

    Attributes:
        guidance: e = eu + guidance (ec - eu); 1 computes the conditional branch alone.
        interval: the timesteps that are guided; None, all of them.
        cache_interval: one call in so many is full, the others are cached; 1, all are full.
    """

    scheduler: Scheduler
    guidance: float
    interval: Interval | None = None
    cache_interval: int = 1

    def calls(self) -> list[Call]:
        """The calls in order. A call with another number of rows than the last one cannot reuse its deep feature."""
        timesteps = self.scheduler.timesteps
        scales = [guidance_at(t, self.guidance, self.interval) for t in timesteps]
        rows = [1 if scale == 1 else 2 for scale in scales]
        full: list[bool] = []
        age = 0  # the number of calls since the last full one
        for index, count in enumerate(rows):
            full.append(index == 0 or count != rows[index - 1] or age + 1 >= self.cache_interval)
            age = 0 if full[-1] else age + 1
        reused = [not following for following in full[1:]] + [False]
        numbers, totals = range(1, len(rows) + 1), [len(rows)] * len(rows)
        return [Call(*call) for call in zip(numbers, totals, timesteps, scales, rows, full, reused, strict=True)]
