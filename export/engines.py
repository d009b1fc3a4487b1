"""``build_engines``: a bundle's ONNX files, and ``update`` -> ``BUNDLE/engines/<key>/``, or nothing at all.

What to build, for which machine, whether it is there already, and whether memory and disk allow it. TensorRT works in
a process a component (``engine_process``); neither PyTorch nor the onnx package is needed.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

from ..bundle.bundle import ASSETS, BUNDLE_FILE, BUNDLED, ENGINES_FOLDER, Bundle
from ..errors import BundleError, MachineError, UsageError
from ..runtimes.engine_files import (
    ENGINE_FILE,
    ENGINE_SCHEMA_VERSION,
    FLAVOURS,
    Engine,
    EngineKey,
    engine_document,
    read_engine,
    staleness,
)
from ..runtimes.latent_loop import UPDATE, update_component
from ..spec import DENOISER, SHALLOW, Component
from ..system.files import atomic_directory
from ..system.machine import available_memory_bytes
from .engine_process import run_build
from .engine_target import EngineOptions, Target

Progress = Callable[[str, float | None], None]

TIMING_CACHE = "timing.cache"  # in the bundle's engines folder
_QUANTISED = {DENOISER: "nodes", SHALLOW: "shallow_nodes"}  # of ``int8`` in bundle.json
# Bytes needed for each byte of ONNX, and besides; docs/engines.md has the measurements.
MEMORY_FACTOR, MEMORY_BASE_BYTES = 4, 800_000_000
DISK_FACTOR, DISK_BASE_BYTES = 1.2, 50_000_000


@dataclass(frozen=True)
class Built:
    """``fresh`` is False where the engine was there already. ``notes`` are for the user."""

    engine: Engine
    fresh: bool
    notes: tuple[str, ...] = ()


def is_bundle(source: str | os.PathLike[str]) -> bool:
    """Whether SOURCE names a bundle (a bundled model's name, or a bundle's folder) and not a checkpoint."""
    return source in BUNDLED or os.path.isfile(Path(source) / BUNDLE_FILE)


def place_bundle(source: str, output: Path | None, force: bool = False) -> Bundle:
    """The bundle to add engines to: SOURCE itself, or its copy in ``output`` (without its engines).

    A copy that is there already is used again; any other bundle in ``output`` is replaced only with ``force``.

    Raises:
        UsageError: SOURCE takes no engines and no output is named, or the output may not be replaced.
        BundleError: the bundle is damaged.
        MachineError: the output cannot be written.
    """
    bundle = Bundle.load(source)
    if output is None or output.resolve() == bundle.path.resolve():
        where = "it is part of the installed package" if bundle.path.parent == ASSETS else ""
        where = where or ("" if os.access(bundle.path, os.W_OK) else "its folder is write-protected")
        if where:
            raise UsageError(f"bundle {source} takes no engines, {where}: name a copy with --output DIR")
        return bundle
    if os.path.isfile(output / BUNDLE_FILE) and (output / BUNDLE_FILE).read_bytes() == (
        bundle.path / BUNDLE_FILE
    ).read_bytes():
        return Bundle.load(output)
    if bundle.path.resolve().is_relative_to(output.resolve()):
        raise UsageError(f"output folder {output} holds the bundle {source}: name another output")
    with atomic_directory(output, overwrite=force) as folder:
        for name in (BUNDLE_FILE, *bundle.files):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(bundle.path / name, folder / name)
    return Bundle.load(output, verify=False)


def build_engines(
    bundle: Bundle,
    options: EngineOptions,
    target: Target,
    progress: Progress | None = None,
    force: bool = False,
) -> Built:
    """Build the engines of ``bundle`` for ``target``, unless they are there with the same options.

    ``progress(stage, fraction)`` as in ``export_bundle``. Nothing is left behind by an error or Ctrl-C.

    Raises:
        UsageError: the bundle is INT8 for another target.
        BundleError: TensorRT cannot build the files.
        MachineError: memory or disk is short, or a build was killed.
    """
    tell = progress or _silent
    if bundle.int8 is not None and bundle.int8["target"] != "tensorrt":
        raise UsageError(
            f"bundle {bundle.path} is INT8 for {bundle.int8['target']}, TensorRT cannot build it: export it again with "
            "--precision int8 --target tensorrt"
        )
    key = EngineKey(bundle.precision, target.flavour, target.version, target.gpu, target.compute_capabilities)
    folder = bundle.path / ENGINES_FOLDER / key.folder
    components = {**bundle.components, UPDATE: update_component(bundle.latent_size)}
    profiles = {name: rows(name, options.max_batch, bundle.branches) for name in components}
    wanted = Engine(
        folder, ENGINE_SCHEMA_VERSION, key, _hashes(bundle), {}, options.recorded(), profiles, {}
    )
    notes = []
    if os.path.lexists(folder) and not force:
        reason = _outdated(wanted, bundle)
        if not reason:
            return Built(read_engine(folder), fresh=False)
        notes.append(f"the engine {folder} is built again: {reason}")
    check_room(bundle)
    cache = _timing_cache(bundle, options, notes)
    started = time.monotonic()
    _make_parent(folder.parent)
    with atomic_directory(folder, overwrite=True, marker=ENGINE_FILE) as temporary:
        plans: dict[str, Any] = {}
        for index, (name, component) in enumerate(components.items(), start=1):
            stage = f"build {name} ({index} of {len(components)})"
            tell(stage, 0.0)
            ours = name == UPDATE
            request = {
                "component": name,
                "precision": "float32" if ours else bundle.precision,
                "onnx": None if ours else os.path.abspath(bundle.component_path(name)),
                "quantised": {**(bundle.int8 or {})}.get(_QUANTISED.get(name, ""), []),
                "plan": os.path.abspath(temporary / f"{name}.plan"),
                "flavour": target.flavour,
                "gpu": target.gpu,
                "compute_capabilities": list(target.compute_capabilities),
                "profile": profile(component, profiles[name]),
                "workspace_bytes": options.workspace_bytes,
                "opt_level": options.opt_level,
                "timing_cache": None if cache is None else os.path.abspath(cache),
            }
            plans[name] = run_build(request, partial(tell, stage), notes)
        built: dict[str, Any] = {
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "seconds": round(time.monotonic() - started, 1),
        }
        engine = replace(wanted, plans=plans, built=built)
        text = json.dumps(engine_document(engine), indent=2, allow_nan=False) + "\n"
        (temporary / ENGINE_FILE).write_text(text, encoding="utf-8")
    return Built(read_engine(folder), True, tuple(notes))


def rows(component: str, max_batch: int, branches: int = 2) -> list[int]:
    """Least, best and most rows: ``branches`` a picture for the denoiser, and one for the autoencoder."""
    return [1, branches, branches * max_batch] if component in (DENOISER, SHALLOW, UPDATE) else [1, 1, max_batch]


def profile(component: Component, batches: list[int]) -> dict[str, list[list[int]]]:
    """For every input the shape at each number of rows; all sizes but the batch are fixed."""
    return {
        tensor.name: [[n if d == "N" else int(d) for d in tensor.shape] for n in batches]
        for tensor in component.inputs
    }


def check_room(bundle: Bundle) -> None:
    """Raise ``MachineError`` where a build would run out of memory or disk; what cannot be learnt is no reason."""
    sizes = {name: bundle.files[c.file]["bytes"] for name, c in bundle.components.items()}
    largest = max(sizes, key=lambda name: sizes[name])
    needed = MEMORY_BASE_BYTES + MEMORY_FACTOR * sizes[largest]
    available = available_memory_bytes()
    if available is not None and available < needed:
        raise MachineError(
            f"building the {largest} takes about {needed / 1e9:.1f} GB of memory and {available / 1e9:.1f} GB are "
            "available: close other programs or add swap"
        )
    disk, free = DISK_BASE_BYTES + DISK_FACTOR * sum(sizes.values()), shutil.disk_usage(bundle.path).free
    if free < disk:
        raise MachineError(
            f"the engines take about {disk / 1e9:.1f} GB and the disk of {bundle.path} has {free / 1e9:.1f} GB left: "
            "free space or name a folder on another disk with --output"
        )


def _outdated(wanted: Engine, bundle: Bundle) -> str:
    """Why the engine at ``wanted.path`` is not the wanted one; empty if it is."""
    try:
        found = read_engine(wanted.path)
        found.verify("")
    except BundleError as error:
        return str(error).rpartition(":")[0]
    if stale := staleness(found, bundle):
        return f"it was {stale}"
    before: dict[str, Any] = {**found.settings}
    for name, value in wanted.settings.items():
        if before[name] != value:
            return f"{name} was {before[name]} and is {value} now"
    return "" if found.key == wanted.key and found.profiles == wanted.profiles else "it is of another key"


def _timing_cache(bundle: Bundle, options: EngineOptions, notes: list[str]) -> Path | None:
    if FLAVOURS[options.flavour].needs_gpu:
        return options.timing_cache or bundle.path / ENGINES_FOLDER / TIMING_CACHE
    if options.timing_cache is not None:
        notes.append("TensorRT for RTX keeps no timing cache: --timing-cache has no effect")
    return None


def _make_parent(folder: Path) -> None:
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise MachineError(
            f"cannot make folder {folder} ({error.strerror}): name a folder for the bundle's copy with --output"
        ) from error


def _hashes(bundle: Bundle) -> dict[str, str]:
    return {name: bundle.files[component.file]["sha256"] for name, component in bundle.components.items()}


def _silent(stage: str, fraction: float | None) -> None:
    """The progress of a caller who wants none."""
