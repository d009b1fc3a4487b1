"""What is to be measured: every bundle with every runtime, step count and setting, and what each is compared with.

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
from ..pipeline.inpainter import STRENGTH
from ..pipeline.loop import check_cache_interval
from ..pipeline.presets import preset_settings
from ..runtimes import AUTO
from ..runtimes.auto import CANDIDATES, select
from ..sampling.guidance import choose_guidance
from ..sampling.scheduler import SCHEDULERS

FLOAT32 = "float32"
_TITLES = {
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
    "tensorrt": "TensorRT",
    "tensorrt-rtx": "TensorRT for RTX",
}
# Two configurations whose network outputs are compared have these settings in common.
_COMPARED = ("start", "steps", "guidance", "guidance_interval", "strength", "scheduler", "seed")


@dataclass(frozen=True)
class Configuration:
    """One row of a report before it is measured.

    Attributes:
        bundle, settings: as ``results.json`` has them, None for a baseline.
        files: SHA-256 of every file of the bundle, by name.
        origin: what the bundle was made from.
        problem: (status, reason) of one that is not run.
        reference: the id of what its accuracy is measured against; its own, where it is a reference.
    """

    id: str
    label: str
    kind: str
    runtime: dict[str, Any]
    bundle: dict[str, Any] | None = None
    settings: dict[str, Any] | None = None
    files: dict[str, str] = field(default_factory=dict)
    origin: dict[str, Any] = field(default_factory=dict)
    problem: tuple[str, str] | None = None
    reference: str | None = None

    @property
    def cache_interval(self) -> int:
        return int(self.settings["cache_interval"]) if self.settings else 1


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

    def settings(self, bundle: Bundle) -> Iterator[dict[str, Any]]:
        """Every combination for ``bundle``, with its own values where none were chosen, then every preset."""
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
    """Every bundle in every place it may run and with all settings; equal configurations are there once.

    Raises:
        UsageError: no runtime has any of the devices, or no combination can be run for what was asked.
    """
    rows: dict[str, Configuration] = {}
    for bundle, name in zip(bundles, _names(bundles), strict=True):
        for runtime, device, missing in _places(bundle, choices):
            for settings in choices.settings(bundle):
                row = _configuration(bundle, name, runtime, device, settings)
                if missing and row.problem is None:
                    row = replace(row, problem=("missing", missing))
                rows.setdefault(row.id, row)
    problems = [row.problem for row in rows.values()]
    if problems and problems[0] and all(problem and problem[0] == "gated" for problem in problems):
        raise UsageError(problems[0][1])
    return list(rows.values())


def baseline_rows(names: Sequence[str]) -> list[Configuration]:
    """The rows of classical methods, of ``options.BASELINES``."""
    runtime = {"name": "opencv", "version": None, "device": "cpu"}
    return [Configuration(name, f"{name.title()}, OpenCV", "baseline", runtime) for name in names]


def _configuration(bundle: Bundle, name: str, runtime: str, device: str, settings: Mapping[str, Any]) -> Configuration:
    """The row of ``bundle``, which ids call ``name``, with one combination of ``settings``."""
    full = {
        "distilled_guidance": bundle.distilled_guidance,
        "strength": 1.0 if settings["start"] == "noise" else STRENGTH,
        "guidance_interval": None,
        "cache_interval": 1,
        "preset": None,
        "steps_executed": 0,
        **settings,
    }
    full["guidance"] = float(full["guidance"])
    if full["guidance_interval"] is not None:
        full["guidance_interval"] = list(full["guidance_interval"])
    problem = None
    try:
        full["steps_executed"] = len(SCHEDULERS[full["scheduler"]](full["steps"], full["strength"]).timesteps)
        choose_guidance(full["guidance"], bundle.distilled_guidance)
        check_cache_interval(full["cache_interval"], bundle)
    except UsageError as error:
        problem = ("gated", str(error))
    identity, label = _title(name, bundle, runtime, device, full)
    hashes = {name: record["sha256"] for name, record in bundle.files.items()}
    facts = {
        **{key: getattr(bundle, key) for key in ("name", "precision", "resolution")},
        "path": str(bundle.path),
        "denoiser_sha256": hashes["denoiser.onnx"],
        "bytes": sum(record["bytes"] for record in bundle.files.values()),
    }
    place = {"name": runtime, "version": None, "device": device}
    return Configuration(identity, label, "bundle", place, facts, full, hashes, bundle.source, problem)


def _title(name: str, bundle: Bundle, runtime: str, device: str, settings: Mapping[str, Any]) -> tuple[str, str]:
    """The id, which is good for a file and an address, and the label, which people read."""
    steps, scheduler, start, cache = (settings[key] for key in ("steps", "scheduler", "start", "cache_interval"))
    guidance, interval = f"{settings['guidance']:g}", settings["guidance_interval"]
    short = f"{name}_{runtime}-{device}_{scheduler}-{steps}"
    label = f"{name.replace(f'-{bundle.precision}', '', 1)} {bundle.precision}, {_TITLES[runtime]} {device.upper()}"
    label += f", {steps} steps {scheduler.upper()}"
    if cache > 1:
        short, label = f"{short}-c{cache}", f"{label}, deep features every {cache}"
    short, label = f"{short}_g{guidance}", f"{label}, guidance {guidance}"
    if bundle.distilled_guidance is not None:
        label += " (distilled)"
    if interval is not None:
        short, label = f"{short}-{interval[0]}-{interval[1]}", f"{label} from t {interval[0]} to {interval[1]}"
    label += f", start {start}" + (f", preset {settings['preset']}" if settings["preset"] else "")
    return re.sub(r"[^A-Za-z0-9._]+", "-", f"{short}_{start}").strip("-."), label


def _places(bundle: Bundle, choices: Choices) -> Iterator[tuple[str, str, str]]:
    """(runtime, device, why it is missing here or nothing); what ``auto`` stands for is decided here."""
    nowhere = []
    pairs = list(product(choices.runtimes or (AUTO,), choices.devices or (AUTO,)))
    for runtime, device in pairs:
        known = [c for c in CANDIDATES if runtime in (AUTO, c.runtime) and device in (AUTO, c.device)]
        if not known:  # of several runtimes and devices not every pair exists
            nowhere.append(f"runtime {runtime} has no device {device}: see `moebius-edge run --help`")
            continue
        try:
            chosen = select(bundle, runtime, device).candidate
            yield chosen.runtime, chosen.device, ""
        except MachineError as error:
            yield known[0].runtime, known[0].device, str(error)
    if len(nowhere) == len(pairs):
        raise UsageError(nowhere[0])


def _names(bundles: Sequence[Bundle]) -> list[str]:
    """A name for each: the bundle's and its precision, with a few digits of its denoiser where that is not enough."""
    names = [f"{b.name}-{b.precision}" for b in bundles]
    counts = Counter(names)
    return [
        f"{name}-{bundle.files['denoiser.onnx']['sha256'][:6]}" if counts[name] > 1 else name
        for name, bundle in zip(names, bundles, strict=True)
    ]


def with_references(rows: Sequence[Configuration], reference: Bundle | None) -> list[Configuration]:
    """``rows``, each with the configuration that its accuracy is measured against.

    That is the first row of the reference with the same settings and resolution, on the CPU if it is there, where
    float32 means just that. Reuse of deep features approximates the computation, as a lower precision does: so the
    reference is one that reuses nothing, or reuses as much as the row where no such one is measured. Without a
    ``reference`` it is the float32 bundle made from the same checkpoint, else the first float32 bundle.
    """
    ordered = sorted(rows, key=lambda r: (r.cache_interval != 1, r.runtime["device"] != "cpu"))
    candidates = [row for row in ordered if row.bundle and row.problem is None]
    if reference is None:
        candidates = [row for row in candidates if row.bundle and row.bundle["precision"] == FLOAT32]
    else:
        candidates = [row for row in candidates if row.bundle and row.bundle["path"] == str(reference.path)]

    def is_alike(row: Configuration, other: Configuration) -> bool:
        if not (row.bundle and row.settings and other.bundle and other.settings):
            return False
        same = all(row.settings[key] == other.settings[key] for key in _COMPARED)
        same = same and other.cache_interval in (1, row.cache_interval)
        return same and row.bundle["resolution"] == other.bundle["resolution"]

    result = []
    for row in rows:
        alike = [other for other in candidates if is_alike(row, other)]
        alike.sort(key=lambda other: other.origin != row.origin)
        result.append(replace(row, reference=alike[0].id if alike else None))
    return result
