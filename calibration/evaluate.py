"""How good and how fast a quantised denoiser is, beside the float32 bundle.

A case is one trajectory: a picture at the network's size with its hole. The float32 bundle samples each case once;
every candidate then samples the same cases from the same noise, and the decoded pictures are compared in the hole.
"""

from __future__ import annotations

import hashlib
import math
import shutil
import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..bundle.bundle import Bundle
from ..data.calibration_pictures import draw_hole, square
from ..data.pictures import Pictures
from ..export.precision import to_float16
from ..metrics.fidelity import PEAK, compare, fill_figures
from ..metrics.trajectory import Scene, Trajectory, cut_scene, run_trajectory
from ..progress import Progress
from ..runtimes import Runtime, create_runtime
from ..runtimes.base import Arrays, drawn_feeds
from ..runtimes.providers import absence, import_onnxruntime, start_problem
from ..sampling.guidance import choose_guidance
from ..spec import DENOISER
from ..system.files import scratch_directory

AUTOENCODER = ("vae_encoder", "vae_decoder")
ROUNDS, WARM_UPS = 9, 2  # of the measurement of speed
Case = tuple[str, Scene]  # the name, and the picture (1, 3, R, R) float32 in [-1, 1] with its hole, bool (R, R)
Metrics = dict[str, Any]  # of a case: its ``name``, what ``fill_figures`` returns, and ``latent_rms_drift``


def make_cases(pictures: Pictures, number: int, resolution: int, seed: int) -> list[Case]:
    """``number`` cases of the pictures in turn; in the first round with their own masks, if they have any."""
    cases = []
    for k in range(number):
        turn, i = divmod(k, len(pictures))
        pixels, hole = pictures.read(i)
        if hole is None or turn:
            pixels, hole = square(pixels, resolution), draw_hole(seed, k, resolution)
        name = f"{pictures.name(i)}, hole {turn + 1}" if turn else pictures.name(i)
        cases.append((name, cut_scene(pixels, hole, resolution)[0]))
    return cases


def mean_hole_psnr_db(metrics: Sequence[Metrics]) -> float:
    """The PSNR of the mean squared error over the cases: what adds up if errors are independent."""
    error = float(np.mean([PEAK**2 / 10 ** (m["hole_psnr_db"] / 10) for m in metrics]))
    return round(10 * math.log10(PEAK**2 / error), 2)


class CandidateEvaluator:
    """Measures candidates on ``cases`` beside the float32 ``bundle``, by trajectories of so many ``steps``."""

    def __init__(self, bundle: Bundle, cases: Sequence[Case], guidance: float | None, steps: int) -> None:
        self.guidance = choose_guidance(guidance, bundle.distilled_guidance)
        self.cases, self.steps, self._bundle = cases, steps, bundle
        self._encoded: dict[bytes, Arrays] = {}
        self._references: list[Trajectory] = []

    def references(self, what: str, progress: Progress) -> list[Trajectory]:
        """The trajectories of the float32 bundle, sampled when they are first asked for."""
        if not self._references:
            self._references = self._sample(self._bundle.path, f"{what}: float32", progress)
        return self._references

    def evaluate(self, candidate: Path | Runtime, what: str, progress: Progress) -> list[Metrics]:
        """The metrics of a runtime, or of the denoiser in a folder with the float32 autoencoder, on all cases.

        Raises BundleError if what it computes is not finite.
        """
        references, results = self.references(what, progress), []
        trajectories = self._sample(candidate, what, progress)
        for (name, scene), trajectory, reference in zip(self.cases, trajectories, references, strict=True):
            metrics = fill_figures(trajectory.image[0], reference.image[0], scene[1])
            rounded = {k: round(v, 2 if k.endswith("db") else 4) for k, v in metrics.items() if v is not None}
            drift = compare(trajectory, reference)["latent_rms_drift"]
            results.append({"name": name, **rounded, "latent_rms_drift": drift})
        return results

    def _sample(self, candidate: Path | Runtime, what: str, progress: Progress) -> list[Trajectory]:
        if isinstance(candidate, Path):
            denoiser = ort_runtime(replace(self._bundle, path=candidate), DENOISER)
            candidate = CombinedRuntime(denoiser, ort_runtime(self._bundle, *AUTOENCODER), self._encoded)
        trajectories: list[Trajectory] = []

        def on_step(done: int, total: int) -> None:
            progress(what, len(trajectories) * total + done, len(self.cases) * total)

        settings: dict[str, Any] = {"steps": self.steps, "guidance": self.guidance.sampled, "on_step": on_step}
        with nullcontext(candidate) if candidate.active else candidate as runtime:
            for _, scene in self.cases:
                trajectories.append(run_trajectory(runtime, scene=scene, **settings))
        return trajectories


def ort_runtime(bundle: Bundle, *names: str) -> Runtime:
    """ONNX Runtime on the CPU for the components ``names`` of ``bundle`` alone."""
    part = replace(bundle, components={name: bundle.components[name] for name in names})
    return create_runtime("onnxruntime", part, "cpu")


class CombinedRuntime(Runtime):
    """A denoiser's runtime and an autoencoder's as one; those that share ``encoded`` encode each picture once."""

    def __init__(self, denoiser: Runtime, autoencoder: Runtime, encoded: dict[bytes, Arrays]) -> None:
        super().__init__(denoiser.components | autoencoder.components)
        self._denoiser, self._autoencoder, self._encoded = denoiser, autoencoder, encoded
        self._opened = ExitStack()

    @property
    def info(self) -> dict[str, Any]:
        return self._denoiser.info

    def activate(self) -> None:
        self._opened.enter_context(self._denoiser)
        self._opened.enter_context(self._autoencoder)

    def deactivate(self) -> None:
        self._opened.close()

    def _run(self, component: str, feeds: Arrays, outputs: Sequence[str]) -> Arrays:
        if component != "vae_encoder":
            runtime = self._denoiser if component == DENOISER else self._autoencoder
            return runtime.run(component, feeds, outputs)
        key = hashlib.sha256(feeds["image"].tobytes()).digest()
        if key not in self._encoded:
            self._encoded[key] = self._autoencoder.run(component, feeds, outputs)
        return self._encoded[key]


def gate_device(runtime: str) -> str:
    """Where ``runtime`` judges an INT8 bundle on this machine: ``cuda`` if ONNX Runtime has it, else ``cpu``."""
    if runtime != "onnxruntime":
        return "cpu"
    ort = import_onnxruntime()
    return "cpu" if absence(ort, "cuda") or start_problem(ort, "cuda") else "cuda"


def measure_speed(reference: Bundle, candidate: Bundle, runtime: str, progress: Progress) -> dict[str, Any]:
    """INT8 beside what one would run instead in ``runtime``, in turns: FP16, but float32 in ONNX Runtime on a CPU.

    ``int8_ms`` and ``other_ms`` are median milliseconds of a call with ``rows`` rows; ``speedup`` is the other's time
    over INT8's, so that INT8 pays above 1. Both slow down alike on a noisy machine.
    """
    device, rounds = gate_device(runtime), WARM_UPS + ROUNDS
    precision: Literal["float32", "float16"] = "float32" if (runtime, device) == ("onnxruntime", "cpu") else "float16"
    feeds = drawn_feeds(reference.components[DENOISER], reference.branches)
    times: tuple[list[float], list[float]] = ([], [])
    with scratch_directory(candidate.path) as folder:
        other = reference
        if precision == "float16":
            other = replace(reference, path=folder, precision=precision)
            shutil.copyfile(reference.component_path(DENOISER), other.component_path(DENOISER))
            to_float16(other.component_path(DENOISER))
        parts = (replace(b, components={DENOISER: b.components[DENOISER]}) for b in (candidate, other))
        int8, plain = (create_runtime(runtime, part, device) for part in parts)
        with int8, plain:
            for turn in range(rounds):
                for opened, milliseconds in zip((int8, plain), times, strict=True):
                    start = time.perf_counter()
                    opened.run(DENOISER, feeds)
                    milliseconds.append((time.perf_counter() - start) * 1e3)
                progress("speed beside INT8", turn + 1, rounds)
            info = int8.info
    int8_ms, other_ms = (statistics.median(milliseconds[WARM_UPS:]) for milliseconds in times)
    where = {"device": device, "runtime": f"{runtime} {info['version']}", "threads": info["threads"]}
    speed = {"int8_ms": round(int8_ms, 2), "other_ms": round(other_ms, 2), "speedup": round(other_ms / int8_ms, 3)}
    return {"other": precision, **where, **speed, "rows": reference.branches}
