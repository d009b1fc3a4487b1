"""What is to be measured: every bundle with every runtime, step count and setting.

A configuration is data: it can be written down, compared, and handed to another process. One that cannot be run here
says so, and becomes a row with that reason.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

from ..bundle.bundle import Bundle
from ..errors import MachineError, UsageError
from ..pipeline.inpainter import STARTS, STRENGTH
from ..pipeline.loop import check_cache_interval
from ..pipeline.presets import PRESETS, preset_settings
from ..runtimes import AUTO, RUNTIMES
from ..runtimes.auto import CANDIDATES, select
from ..sampling.guidance import choose_guidance
from ..sampling.scheduler import SCHEDULERS

FLOAT32 = "float32"
TORCH = "torch"
_TITLES = {"onnxruntime": "ONNX Runtime", "tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT for RTX", TORCH: "PyTorch"}


@dataclass(frozen=True)
class Configuration:
    """One row of a report before it is measured.

    Attributes:
        source: what the measuring process opens; file paths among it are not part of what the figures depend on.
        depends: SHA-256 of every file that the figures depend on, by name.
        settings: as ``results.json`` has them, None for a baseline.
        problem: (status, reason) of one that is not run.
        reference: the id of what its accuracy is measured against; of itself, where it is a reference.
    """

    id: str
    label: str
    kind: str
    source: dict[str, Any]
    runtime: dict[str, Any]
    bundle: dict[str, Any] | None = None
    settings: dict[str, Any] | None = None
    depends: dict[str, str] = field(default_factory=dict)
    problem: tuple[str, str] | None = None
    reference: str | None = None


@dataclass(frozen=True)
class Choices:
    """The grid's axes; an empty one means each bundle's own value, and for the rest ``auto``, DDIM and no reuse."""

    runtimes: tuple[str, ...] = ()
    devices: tuple[str, ...] = ()
    steps: tuple[int, ...] = ()
    schedulers: tuple[str, ...] = ()
    guidances: tuple[float, ...] = ()
    cache_intervals: tuple[int, ...] = ()
    starts: tuple[str, ...] = ()
    presets: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        known = {
            "runtime": (self.runtimes, (*RUNTIMES, AUTO)),
            "scheduler": (self.schedulers, tuple(SCHEDULERS)),
            "start": (self.starts, STARTS),
            "preset": (self.presets, tuple(PRESETS)),
            "device": (self.devices, (*dict.fromkeys(c.device for c in CANDIDATES), AUTO)),
        }
        for name, (values, allowed) in known.items():
            if wrong := [v for v in values if v not in allowed]:
                raise UsageError(f"unknown {name} {wrong[0]!r}: choose one of {', '.join(allowed)}")
        if wrong_steps := [n for n in self.steps if not 1 <= n <= 1000]:
            raise UsageError(f"steps is {wrong_steps[0]}: give a whole number from 1 to 1000")
        if wrong_intervals := [n for n in self.cache_intervals if n < 1]:
            raise UsageError(
                f"cache interval is {wrong_intervals[0]}: give whole numbers of 1 (nothing is reused) or more"
            )
        if self.seed < 0:
            raise UsageError(f"seed is {self.seed}: give a whole number of 0 or more")

    def settings(self, bundle: Bundle) -> Iterator[dict[str, Any]]:
        """Every combination for ``bundle``, with its own values where none were chosen, and each preset beside them."""
        axes: dict[str, tuple[Any, ...]] = {
            "start": self.starts,
            "scheduler": self.schedulers or ("ddim",),
            "guidance": self.guidances,
            "steps": self.steps,
            "cache_interval": self.cache_intervals,
        }
        chosen = {name: values for name, values in axes.items() if values}
        for values in product(*chosen.values()):
            yield {**bundle.settings(**dict(zip(chosen, values, strict=True))), "seed": self.seed}
        for name, start, guidance in product(self.presets, self.starts or (None,), self.guidances or (None,)):
            given = {k: v for k, v in (("start", start), ("guidance", guidance)) if v is not None}
            preset = preset_settings(name, given, bundle)
            yield {"scheduler": "ddim", **bundle.settings(**given, **preset), "seed": self.seed, "preset": name}


def grid(bundles: Sequence[Bundle], choices: Choices) -> list[Configuration]:
    """Every bundle with every place it may run and all settings; what exists twice is there once.

    Raises:
        UsageError: no runtime has any of the devices, or no combination can be run for what was asked.
    """
    found: dict[str, Configuration] = {}
    for bundle, name in zip(bundles, _names(bundles), strict=True):
        for runtime, device, missing in _places(bundle, choices):
            for settings in choices.settings(bundle):
                made = configuration(bundle, name, runtime, device, settings)
                if missing and made.problem is None:
                    made = replace(made, problem=("missing", missing))
                found.setdefault(made.id, made)
    rows = list(found.values())
    if rows and all(row.problem and row.problem[0] == "gated" for row in rows):
        raise UsageError(rows[0].problem[1] if rows[0].problem else "")
    return rows


def configuration(
    bundle: Bundle, name: str, runtime: str, device: str, settings: Mapping[str, Any], kind: str = "bundle"
) -> Configuration:
    start, steps, scheduler = settings["start"], settings["steps"], settings["scheduler"]
    strength = settings.get("strength", 1.0 if start == "noise" else STRENGTH)
    interval = None if settings.get("guidance_interval") is None else list(settings["guidance_interval"])
    cache = settings.get("cache_interval", 1)
    problem, executed = None, 0
    try:
        executed = len(SCHEDULERS[scheduler](steps, strength).timesteps)
        choose_guidance(settings["guidance"], bundle.distilled_guidance)
        check_cache_interval(cache, bundle)
    except UsageError as error:
        problem = ("gated", str(error))
    full = {
        "start": start,
        "steps": steps,
        "steps_executed": executed,
        "guidance": float(settings["guidance"]),
        "distilled_guidance": bundle.distilled_guidance,
        "strength": strength,
        "scheduler": scheduler,
        "guidance_interval": interval,
        "cache_interval": cache,
        "preset": settings.get("preset"),
        "seed": settings["seed"],
    }
    guidance = f"{full['guidance']:g}"
    limited = "" if interval is None else "-{}-{}".format(*interval)
    said = "" if interval is None else " from t {} to {}".format(*interval)
    reused, saying = (f"-c{cache}", f", deep features every {cache}") if cache > 1 else ("", "")
    named = f", preset {full['preset']}" if full["preset"] else ""
    title = name.replace(f"-{bundle.precision}", "", 1)
    distilled = " (distilled)" if bundle.distilled_guidance is not None else ""
    return Configuration(
        id=slug(f"{name}_{runtime}-{device}_{scheduler}-{steps}{reused}_g{guidance}{limited}_{start}"),
        label=(
            f"{title} {bundle.precision}, {_TITLES[runtime]} {device.upper()}, {steps} steps {scheduler.upper()}"
            f"{saying}, guidance {guidance}{distilled}{said}, start {start}{named}"
        ),
        kind=kind,
        source={"bundle": str(bundle.path), "origin": bundle.source},
        runtime={"name": runtime, "version": None, "device": device},
        bundle={
            "name": bundle.name,
            "path": str(bundle.path),
            "precision": bundle.precision,
            "resolution": bundle.resolution,
            "denoiser_sha256": bundle.files["denoiser.onnx"]["sha256"],
            "bytes": sum(record["bytes"] for record in bundle.files.values()),
            "engine_bytes": None,
        },
        settings=full,
        depends=_depends(bundle),
        problem=problem,
    )


def _places(bundle: Bundle, choices: Choices) -> Iterator[tuple[str, str, str]]:
    """(runtime, device, why it is missing here or nothing); ``auto`` is settled here, where it is named."""
    places = 0
    problem = ""
    for runtime, device in product(choices.runtimes or (AUTO,), choices.devices or (AUTO,)):
        pairs = [c for c in CANDIDATES if runtime in (AUTO, c.runtime) and device in (AUTO, c.device)]
        if not pairs:  # of several runtimes and devices not every pair exists
            problem = problem or f"runtime {runtime} has no device {device}: see `moebius-edge run --help`"
            continue
        places += 1
        try:
            chosen = select(bundle, runtime, device).candidate
            yield chosen.runtime, chosen.device, ""
        except MachineError as error:
            yield pairs[0].runtime, pairs[0].device, str(error)
    if not places:
        raise UsageError(problem)


def _names(bundles: Sequence[Bundle]) -> list[str]:
    """A name for each: the bundle's and its precision, with a few digits of its denoiser where that is not enough."""
    names = [f"{b.name}-{b.precision}" for b in bundles]
    counts = Counter(names)
    return [
        f"{name}-{bundle.files['denoiser.onnx']['sha256'][:6]}" if counts[name] > 1 else name
        for name, bundle in zip(names, bundles, strict=True)
    ]


def _depends(bundle: Bundle) -> dict[str, str]:
    return {name: record["sha256"] for name, record in bundle.files.items()}


def slug(text: str) -> str:
    """A name that is good for a file and an address."""
    return re.sub(r"[^A-Za-z0-9._]+", "-", text).strip("-.")
