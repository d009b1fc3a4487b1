"""What a denoiser's quantisation does to pictures: whole trajectories against the float32 bundle's, in the hole.

A case is one trajectory: a picture at the network's size with its hole. The float32 bundle samples each case once;
every candidate then samples the same cases from the same noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..bundle.bundle import Bundle
from ..data.calibration_pictures import draw_hole, square
from ..data.pictures import Pictures
from ..metrics.fidelity import PEAK, compare
from ..metrics.quality import fill_figures
from ..metrics.trajectory import Scene, Trajectory, cut_scene, run_trajectory
from ..progress import Progress
from ..runtimes.base import Runtime
from ..runtimes.ort import OrtRuntime
from ..sampling.guidance import choose_guidance
from ..spec import DENOISER
from .components import CachedAutoencoder, CombinedRuntime, partial_bundle


@dataclass(frozen=True, eq=False)
class Case:
    """``scene`` is the picture, (1, 3, R, R) float32 in [-1, 1], and the hole, bool (R, R)."""

    name: str
    scene: Scene


@dataclass(frozen=True)
class CaseMetrics:
    """One case's ``psnr_db`` and ``ssim`` of the decoded picture, the same in the hole, and the latent's RMS drift."""

    name: str
    hole_psnr_db: float
    hole_ssim: float
    psnr_db: float
    ssim: float
    latent_rms_drift: list[float]


def make_cases(pictures: Pictures, number: int, resolution: int, seed: int) -> list[Case]:
    """``number`` cases of the pictures in turn; in the first round with the masks of their own, if they have one.

    Raises:
        UsageError, MachineError: as ``Pictures.read``.
    """
    cases = []
    for k in range(number):
        turn, i = divmod(k, len(pictures))
        pixels, hole = pictures.read(i)
        if hole is None or turn:
            pixels, hole = square(pixels, resolution), draw_hole(seed, k, resolution)
        name = f"{pictures.name(i)}, hole {turn + 1}" if turn else pictures.name(i)
        cases.append(Case(name, cut_scene(pixels, hole, resolution)[0]))
    return cases


class CandidateEvaluator:
    """Measures candidates on ``cases`` beside the float32 ``bundle``; it is used inside ``with``.

    ``steps`` and ``guidance`` are those of the trajectories; without ``guidance`` it is the bundle's gate's.
    """

    def __init__(self, bundle: Bundle, cases: Sequence[Case], steps: int, guidance: float | None) -> None:
        self._bundle, self._cases, self._steps = bundle, cases, steps
        self._guidance = choose_guidance(guidance, bundle.distilled_guidance).sampled
        self._autoencoder = CachedAutoencoder(bundle)
        self._references: list[Trajectory] = []

    def __enter__(self) -> CandidateEvaluator:
        self._autoencoder.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._autoencoder.__exit__(None, None, None)

    def evaluate_denoiser(self, folder: Path, what: str, progress: Progress) -> list[CaseMetrics]:
        """The metrics of the denoiser in ``folder`` with the reference's autoencoder."""
        with self._with_autoencoder(folder) as runtime:
            return self.evaluate(runtime, what, progress)

    def evaluate(self, runtime: Runtime, what: str, progress: Progress) -> list[CaseMetrics]:
        """The metrics of an active runtime on all cases.

        Raises:
            BundleError: what it computes is not finite.
        """
        if not self._references:
            with self._with_autoencoder(self._bundle.path) as runtime_in_float32:
                self._references = self._sample(runtime_in_float32, f"{what}: float32", progress)
        results = []
        trajectories = self._sample(runtime, what, progress)
        for case, trajectory, reference in zip(self._cases, trajectories, self._references, strict=True):
            metrics = fill_figures(trajectory.image[0], reference.image[0], case.scene[1])
            rounded = {k: round(v, 2 if k.endswith("db") else 4) for k, v in metrics.items() if v is not None}
            drift = compare(trajectory, reference)["latent_rms_drift"]
            results.append(CaseMetrics(case.name, **rounded, latent_rms_drift=drift))
        return results

    def _with_autoencoder(self, folder: Path) -> Runtime:
        """The denoiser in ``folder`` and the reference's autoencoder."""
        return CombinedRuntime(OrtRuntime(partial_bundle(self._bundle, DENOISER, folder=folder)), self._autoencoder)

    def _sample(self, runtime: Runtime, what: str, progress: Progress) -> list[Trajectory]:
        """The trajectories of all cases; ``progress`` counts the steps of all of them."""
        trajectories: list[Trajectory] = []

        def on_step(done: int, total: int) -> None:
            progress(what, len(trajectories) * total + done, len(self._cases) * total)

        for case in self._cases:
            settings: dict[str, Any] = {"steps": self._steps, "guidance": self._guidance, "scene": case.scene}
            trajectories.append(run_trajectory(runtime, on_step=on_step, **settings))
        return trajectories


def mean_hole_psnr_db(metrics: Sequence[CaseMetrics]) -> float:
    """The PSNR of the mean squared error over the cases: what adds up if errors are independent."""
    error = float(np.mean([PEAK**2 / 10 ** (m.hole_psnr_db / 10) for m in metrics]))
    return round(10 * math.log10(PEAK**2 / error), 2)
