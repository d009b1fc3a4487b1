"""The samplers: which timesteps are visited, and how a predicted noise moves the latent to the next one.

There are no random numbers here: the noise is passed in, so a run repeats on every runtime. Coefficients are worked
out in float64 and applied in the arrays' own type. Only what the bundles declare is offered: scaled-linear betas,
noise prediction, leading spacing, no clipping, no noise added on the way.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..errors import UsageError
from ..spec import BETA_END, BETA_START, NUM_TRAIN_TIMESTEPS

Array = npt.NDArray[np.floating[Any]]

_BETAS = np.linspace(math.sqrt(BETA_START), math.sqrt(BETA_END), NUM_TRAIN_TIMESTEPS) ** 2
_ALPHA_BARS: list[float] = np.cumprod(1.0 - _BETAS).tolist()


class LinearStep(NamedTuple):
    """One step of a sampler as numbers, for a device that does the arithmetic itself.

    With x the latent, e the predicted noise and p the last step's clean prediction, which is 0 before the first:
    x' = latent·x + noise·e + previous·p, and p' = clean_latent·x + clean_noise·e.
    """

    latent: float
    noise: float
    previous: float = 0.0
    clean_latent: float = 0.0
    clean_noise: float = 0.0


class Scheduler(ABC):
    """What all samplers share: the visited timesteps and the noising of the starting latent.

    Args:
        steps: length of the full schedule.
        strength: in (0, 1]; only the last ``int(steps * strength)`` timesteps are visited, so 0.99 of 20
            steps are 19 network calls.

    Raises:
        UsageError: ``steps`` or ``strength`` out of range, or no timestep is left.
    """

    max_steps = NUM_TRAIN_TIMESTEPS

    def __init__(self, steps: int, strength: float = 1.0) -> None:
        if not 1 <= steps <= self.max_steps:
            raise UsageError(f"steps is {steps}", f"give a whole number from 1 to {self.max_steps}")
        if not 0.0 < strength <= 1.0:  # NaN fails too
            raise UsageError(f"strength is {strength}", "give a number above 0 and at most 1")
        kept = int(steps * strength)
        if kept == 0:
            least = math.ceil(1000 / steps) / 1000
            raise UsageError(f"strength {strength} leaves no step of {steps}", f"raise it to {least:g}, or the steps")
        self.strength = strength
        self.timesteps: list[int] = self._schedule(steps)[steps - kept :]

    @abstractmethod
    def _schedule(self, steps: int) -> list[int]:
        """All ``steps`` timesteps, descending."""

    @abstractmethod
    def step(self, noise_pred: Array, t: int, sample: Array) -> Array:
        """The latent after timestep ``t``. ``noise_pred`` and ``sample`` share a shape, say (N, 4, h, w)."""

    @abstractmethod
    def linear_step(self, index: int) -> LinearStep:
        """What ``step`` does at ``timesteps[index]``, as numbers; it depends on no earlier call."""

    def alpha_bar(self, t: int) -> float:
        """Share of the signal's variance at timestep ``t``; 1 below timestep 0, where all noise is gone."""
        if t >= NUM_TRAIN_TIMESTEPS:
            raise ValueError(f"timestep {t} is beyond the last one, {NUM_TRAIN_TIMESTEPS - 1}")
        return 1.0 if t < 0 else _ALPHA_BARS[t]

    def add_noise(self, latent: Array, noise: Array, t: int | None = None) -> Array:
        """√ᾱ·latent + √(1-ᾱ)·noise at ``t``, by default the first timestep.

        At strength 1 the default is ``noise`` itself: a start that knows nothing of ``latent``.
        """
        if t is None:
            if self.strength == 1.0:
                return noise
            t = self.timesteps[0]
        alpha_bar = self.alpha_bar(t)
        return math.sqrt(alpha_bar) * latent + math.sqrt(1.0 - alpha_bar) * noise


class DDIM(Scheduler):
    """Deterministic DDIM (arXiv 2010.02502, eq. 12 with σ = 0): t = (steps - 1)·stride, .., stride, 0."""

    def _schedule(self, steps: int) -> list[int]:
        self.stride = NUM_TRAIN_TIMESTEPS // steps
        return [i * self.stride for i in reversed(range(steps))]

    def step(self, noise_pred: Array, t: int, sample: Array) -> Array:
        latent, noise = self._factors(t)
        return latent * sample + noise * noise_pred

    def linear_step(self, index: int) -> LinearStep:
        return LinearStep(*self._factors(self.timesteps[index]))

    def _factors(self, t: int) -> tuple[float, float]:
        """x' = √ᾱ'·(x - √(1-ᾱ)·e)/√ᾱ + √(1-ᾱ')·e, gathered by x and e so that nothing large cancels."""
        now, after = self.alpha_bar(t), self.alpha_bar(t - self.stride)
        scale = math.sqrt(after / now)
        return scale, math.sqrt(1.0 - after) - scale * math.sqrt(1.0 - now)


class DPMSolverPP2M(Scheduler):
    """DPM-Solver++(2M), midpoint form (arXiv 2211.01095, algorithm 2): second order from one call a step.

    Leading spacing as diffusers' ``DPMSolverMultistepScheduler`` means it: steps·stride, .., stride with
    stride = 1000 // (steps + 1), then straight to zero noise. The first step and, because the last one ends
    at zero noise where log-SNR is infinite, the last step are of first order.

    It remembers the previous step, so timesteps must come in order; the first one starts it afresh.
    """

    max_steps = NUM_TRAIN_TIMESTEPS - 1  # with one more the stride would be 0

    def __init__(self, steps: int, strength: float = 1.0) -> None:
        super().__init__(steps, strength)
        self._next = 0  # index of the timestep expected next
        self._previous: Array | None = None  # its clean prediction

    def _schedule(self, steps: int) -> list[int]:
        stride = NUM_TRAIN_TIMESTEPS // (steps + 1)
        return [i * stride for i in range(steps, 0, -1)]

    def step(self, noise_pred: Array, t: int, sample: Array) -> Array:
        """x' = (σ'/σ)·x - √ᾱ'·(e^-h - 1)·D with D extrapolated from this and the last clean prediction."""
        if t == self.timesteps[0]:
            self._next, self._previous = 0, None
        if self._next >= len(self.timesteps) or t != self.timesteps[self._next]:
            raise ValueError(f"timestep {t} is out of order: start at {self.timesteps[0]}, take each in turn")
        alpha, sigma, keep, move, beyond = self._factors(self._next)
        self._next += 1
        clean = (sample - sigma * noise_pred) / alpha
        if self._next == len(self.timesteps):
            return clean
        direction = clean if self._previous is None else clean + beyond * (clean - self._previous)
        self._previous = clean
        return keep * sample - move * direction

    def linear_step(self, index: int) -> LinearStep:
        alpha, sigma, keep, move, beyond = self._factors(index)
        weight = -move * (1.0 + beyond)  # of this step's clean prediction, (x - σ·e)/α
        return LinearStep(keep + weight / alpha, -weight * sigma / alpha, move * beyond, 1.0 / alpha, -sigma / alpha)

    def _factors(self, index: int) -> tuple[float, float, float, float, float]:
        """α, σ, σ'/σ, √ᾱ'·(e^-h - 1), and how far beyond this clean prediction D lies, in steps from the last one.

        The last step's are 0, -1 and 0: x' is the clean prediction.
        """
        alpha, sigma, log_snr = _at(self.alpha_bar(self.timesteps[index]))
        if index == len(self.timesteps) - 1:
            return alpha, sigma, 0.0, -1.0, 0.0
        alpha_after, sigma_after, log_snr_after = _at(self.alpha_bar(self.timesteps[index + 1]))
        h = log_snr_after - log_snr
        beyond = 0.0
        if index > 0:
            log_snr_before = _at(self.alpha_bar(self.timesteps[index - 1]))[2]
            beyond = 0.5 * h / (log_snr - log_snr_before)
        return alpha, sigma, sigma_after / sigma, alpha_after * math.expm1(-h), beyond


def _at(alpha_bar: float) -> tuple[float, float, float]:
    """Signal scale α = √ᾱ, noise scale σ = √(1-ᾱ) and log-SNR λ = log(α/σ)."""
    alpha, sigma = math.sqrt(alpha_bar), math.sqrt(1.0 - alpha_bar)
    return alpha, sigma, math.log(alpha / sigma)


SCHEDULERS: dict[str, type[Scheduler]] = {"ddim": DDIM, "dpm++2m": DPMSolverPP2M}
