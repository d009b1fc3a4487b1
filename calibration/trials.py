"""What a denoiser's quantisation does to pictures: whole trajectories against the float32 bundle's, in the hole.

The float32 bundle samples each case once; every candidate then samples the same cases from the same noise. Candidates
are ONNX files of the denoiser alone: the autoencoder is the float32 bundle's, loaded once, and encodes a case once.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..bundle.bundle import Bundle
from ..metrics.fidelity import PEAK, compare, fill_figures
from ..metrics.trajectory import Trajectory, run_trajectory
from ..runtimes import Runtime
from ..runtimes.base import Arrays
from ..runtimes.ort import OrtRuntime
from ..sampling.guidance import choose_guidance
from .cases import Case

Progress = Callable[[str, int, int], None]  # label, done, total


@dataclass(frozen=True)
class Figures:
    """One case's: ``psnr_db`` and ``ssim`` of the decoded picture, the same in the hole, the latent's RMS drift."""

    name: str
    hole_psnr_db: float
    hole_ssim: float
    psnr_db: float
    ssim: float
    latent_rms_drift: list[float]


class Trials:
    """Cases that candidates are measured on; inside ``with``.

    Args:
        bundle: the reference, in float32.
        steps, guidance: of the trajectories; absent, the bundle's gate's.
    """

    def __init__(self, bundle: Bundle, cases: Sequence[Case], steps: int, guidance: float | None) -> None:
        self.cases = list(cases)
        self._bundle, self._steps = bundle, steps
        self._guidance = choose_guidance(guidance, bundle.distilled_guidance).sampled
        self._reference = _Memo(bundle)
        self._trajectories: list[Trajectory] = []

    def __enter__(self) -> Trials:
        self._reference.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._reference.__exit__(None, None, None)

    def prepare(self, label: str, progress: Progress) -> None:
        """Sample the reference's trajectories, where that has not been done."""
        for i in range(len(self._trajectories), len(self.cases)):
            self._trajectories.append(self._run(self._reference, i, label, progress))

    def denoiser(self, file: Path, label: str, progress: Progress) -> list[Figures]:
        """The figures of a denoiser in ``file`` with the reference's autoencoder."""
        with _Candidate(self._bundle, file, self._reference) as runtime:
            return self.runtime(runtime, label, progress)

    def runtime(self, runtime: Runtime, label: str, progress: Progress) -> list[Figures]:
        """The figures of an active runtime on all cases.

        Raises:
            BundleError: what it computes is not finite.
        """
        self.prepare(f"{label}: float32", progress)
        found = []
        for i, case in enumerate(self.cases):
            made, wanted = self._run(runtime, i, label, progress), self._trajectories[i]
            figures = fill_figures(made.image[0], wanted.image[0], case.scene[1])
            rounded = {k: round(v, 2 if k.endswith("db") else 4) for k, v in figures.items() if v is not None}
            found.append(Figures(case.name, **rounded, latent_rms_drift=compare(made, wanted)["latent_rms_drift"]))
        return found

    def _run(self, runtime: Runtime, i: int, label: str, progress: Progress) -> Trajectory:
        def on_step(done: int, total: int) -> None:
            progress(label, i * total + done, len(self.cases) * total)

        return run_trajectory(
            runtime, steps=self._steps, guidance=self._guidance, scene=self.cases[i].scene, on_step=on_step
        )


def mean_hole_psnr_db(figures: Sequence[Figures]) -> float:
    """The PSNR of the mean squared error over the cases: what adds up when errors are independent."""
    error = float(np.mean([PEAK**2 / 10 ** (f.hole_psnr_db / 10) for f in figures]))
    return round(10 * math.log10(PEAK**2 / error), 2)


class _Memo(OrtRuntime):
    """The float32 bundle; what was encoded once is not encoded again."""

    def __init__(self, bundle: Bundle) -> None:
        super().__init__(bundle.components, bundle.paths)
        self._encoded: dict[bytes, Arrays] = {}

    def _run(self, component: str, feeds: Arrays, outputs: Sequence[str]) -> Arrays:
        if component != "vae_encoder":
            return super()._run(component, feeds, outputs)
        key = hashlib.sha256(feeds["image"].tobytes()).digest()
        if key not in self._encoded:
            self._encoded[key] = super()._run(component, feeds, outputs)
        return self._encoded[key]


class _Candidate(OrtRuntime):
    """The denoiser in a file, with another runtime's autoencoder."""

    def __init__(self, bundle: Bundle, denoiser: Path, autoencoder: OrtRuntime) -> None:
        super().__init__(bundle.components, {"denoiser": denoiser})
        self._autoencoder = autoencoder

    def _run(self, component: str, feeds: Arrays, outputs: Sequence[str]) -> Arrays:
        if component in self.paths:
            return super()._run(component, feeds, outputs)
        return self._autoencoder.run(component, feeds)
