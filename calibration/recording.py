"""Runs the product's own pipeline over pictures and keeps running statistics of the denoiser's activations.

Every call of every trajectory is recorded, as ``run`` would execute it: preprocessing, starts, guidance and sampler
are ``pipeline``'s, and only the component's graph is ``recorder``'s.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import onnx

from ..bundle.bundle import Bundle
from ..data.calibration_pictures import CalibrationPictures, check_number, picture_and_hole
from ..errors import MachineError, UsageError
from ..pipeline.inpainter import STRENGTH, Inpainter, Step
from ..sampling.guidance import choose_guidance
from ..sampling.scheduler import SCHEDULERS
from .activations import find_activations, load_inlined
from .quantise import check_target
from .recorder import RecordingRuntime
from .statistics import Statistics, TensorStatistics

GROUP_BYTES = 4 << 30  # the published size has 3.1 GiB of them a call: one group, 6.5 GiB for the process at its peak
Progress = Callable[[str, int, int], None]  # label, done, total


@dataclass(frozen=True)
class Settings:
    """How to record. Absent ``steps`` and ``start`` are the bundle's own.

    The others are by default those of the export's gate: strength 0.99, for a shorter trajectory would leave out the
    noisiest timesteps, and guidance 2 (or the distilled one), for 1 would leave out a branch. ``group_bytes`` bounds
    the activations that one run of the network returns.
    """

    steps: int | None = None
    guidance: float | None = None
    start: str | None = None
    strength: float | None = None
    scheduler: str = "ddim"
    seed: int = 0
    component: str = "denoiser"
    target: str = "tensorrt"
    group_bytes: int = GROUP_BYTES

    def resolved(self, bundle: Bundle) -> Settings:
        """Every value filled in.

        Raises UsageError for a component, a scheduler or a target that does not exist.
        """
        if self.component not in bundle.components:
            raise UsageError(f"there is no component {self.component!r}: choose one of {', '.join(bundle.components)}")
        if self.scheduler not in SCHEDULERS:
            raise UsageError(f"unknown scheduler {self.scheduler!r}: choose one of {', '.join(SCHEDULERS)}")
        check_target(self.target)
        if self.group_bytes < 1:
            raise UsageError(f"group size is {self.group_bytes} bytes: give 1 or more")
        start = bundle.defaults["start"] if self.start is None else self.start
        default = 1.0 if start == "noise" else STRENGTH
        return replace(
            self,
            steps=bundle.defaults["steps"] if self.steps is None else self.steps,
            guidance=choose_guidance(self.guidance, bundle.distilled_guidance).scale,
            start=start,
            strength=default if self.strength is None else self.strength,
        )


def record(
    bundle: Bundle,
    pictures: CalibrationPictures,
    settings: Settings,
    folder: Path,
    progress: Progress | None = None,
) -> Statistics:
    """Statistics of ``bundle``'s activations over ``pictures``, kept in ``folder`` after each picture.

    A recording in ``folder`` that was interrupted goes on with the first picture that is not in it, and ends with the
    same numbers; one that is complete is returned at once. ``progress`` is told the calls done, of all.

    Raises:
        UsageError: too few pictures, one that cannot be read, a setting out of range, or ``folder`` holds a recording
            from something else.
        MachineError: ONNX Runtime or memory is missing, or ``folder`` cannot be written.
        BundleError: an activation is not finite (the message names it), or a file is damaged.
    """
    check_number(pictures)
    chosen = settings.resolved(bundle)
    assert chosen.steps is not None and chosen.strength is not None and chosen.start is not None
    timesteps = tuple(int(t) for t in SCHEDULERS[chosen.scheduler](chosen.steps, chosen.strength).timesteps)
    key = _key(bundle, pictures, chosen)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MachineError(f"cannot make {folder} ({error.strerror}): name another folder") from error
    statistics = Statistics.load(folder, key)
    if statistics is not None and statistics.done == len(pictures):
        return statistics
    rows = 1 if chosen.component != "denoiser" or chosen.guidance == 1 else bundle.branches
    activations = find_activations(load_inlined(bundle.component_path(chosen.component)), rows, chosen.target)
    if statistics is None:
        tensors = {a.name: TensorStatistics(a.axis, len(timesteps)) for a in activations}
        statistics = Statistics(key, timesteps, tensors)
    runtime = RecordingRuntime(bundle, chosen.component, activations, chosen.group_bytes, statistics)
    slowness = f", {runtime.passes} runs a call" if runtime.passes > 1 else ""
    calls, number = len(timesteps), len(pictures)
    with Inpainter(bundle, runtime) as inpainter:
        for i in range(statistics.done, number):
            label = f"record {pictures.name(i)}, {i + 1} of {number}{slowness}"

            def report(step: Step, label: str = label, before: int = i * calls) -> None:
                if progress is not None:
                    progress(label, before + step.index * calls // step.total, number * calls)

            picture, hole = picture_and_hole(pictures, i, bundle.resolution, chosen.seed)
            inpainter.inpaint(
                picture,
                hole,
                steps=chosen.steps,
                guidance=chosen.guidance,
                start=chosen.start,
                seed=chosen.seed + i,
                strength=chosen.strength,
                scheduler=chosen.scheduler,
                on_step=report,
            )
            statistics.done = i + 1
            statistics.save(folder)
    return statistics


def _key(bundle: Bundle, pictures: CalibrationPictures, settings: Settings) -> dict[str, Any]:
    """What the numbers depend on: not the size of a group, but for rounding; but onnx, which names inlined tensors."""
    sampler = {name: value for name, value in asdict(settings).items() if name != "group_bytes"}
    files = {component.file: bundle.files[component.file]["sha256"] for component in bundle.components.values()}
    fingerprint = f"{len(pictures)}:{pictures.fingerprint()}"
    return {"model": files, "pictures": fingerprint, **sampler, "onnx": onnx.__version__}
