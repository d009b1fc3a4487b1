"""``build_engines``: a bundle's ONNX files, and ``update``, become ``BUNDLE/engines/<key>/``, or nothing at all.

Here is decided what to build for which machine, and whether it is there already. TensorRT works in a process a
component (``trt_builder``); neither PyTorch nor the onnx package is needed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import time
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ..bundle.bundle import ASSETS, BUNDLE_FILE, BUNDLED, ENGINES_FOLDER, Bundle
from ..errors import BundleError, MachineError, UsageError
from ..progress import Progress, no_progress
from ..runtimes.cuda import Gpu, find_gpu, require_gpu
from ..runtimes.engine_files import (
    ANY_GPU,
    ENGINE_FILE,
    ENGINE_SCHEMA_VERSION,
    VARIANTS,
    Engine,
    EngineKey,
    engine_document,
    load_package,
    read_engine,
)
from ..runtimes.lambda_plugin import uses_plugin
from ..runtimes.latent_loop import UPDATE, update_component
from ..spec import DENOISER, SHALLOW, Component
from ..system.files import atomic_directory
from ..system.fingerprint import first_difference
from ..system.subprocess_job import run_job

WORKER = (sys.executable, "-m", f"{__package__}.trt_builder")
_LEAST_DEFAULT_CAPABILITY = (8, 0)  # for 7.5, TensorRT for RTX compiles no float32 matrix product
_MEMORY_REMEDY = "close other programs, add swap, or pass a smaller --workspace or --max-batch"


@dataclass(frozen=True)
class EngineOptions:
    """How engines are built. ``max_batch`` counts pictures; guidance makes two rows of each.

    ``compute_capabilities``, such as 8.6, are for TensorRT for RTX, and by default those of this machine's GPU or, in
    a machine without one, all that it builds for. ``lambda_plugin`` is auto, on or off. ``force`` builds engines again
    that are there.
    """

    variant: str
    max_batch: int = 1
    workspace_bytes: int | None = None
    opt_level: int | None = None
    timing_cache: Path | None = None
    compute_capabilities: tuple[str, ...] = ()
    lambda_plugin: str = "auto"
    force: bool = False


@dataclass(frozen=True)
class Built:
    """``fresh`` is False where the engine was there already. ``notes`` are for the user."""

    engine: Engine
    fresh: bool
    notes: tuple[str, ...] = ()


def find_engine_key(options: EngineOptions, precision: str) -> EngineKey:
    """What is built for on this machine: cheap, so that it can come before a long export.

    Raises:
        UsageError: an option is unusable.
        MachineError: TensorRT or the GPU is missing, or one does not suit the other.
    """
    if options.max_batch < 1:
        raise UsageError(f"max batch is {options.max_batch}: give 1 or more pictures")
    variant = VARIANTS[options.variant]
    package = load_package(variant)
    gpu = find_gpu()
    key = EngineKey(precision, variant.name, str(package.__version__), ANY_GPU, ())
    if not variant.needs_gpu:
        if options.timing_cache is not None:
            raise UsageError(f"{variant.title} keeps no timing cache: leave --timing-cache out")
        return replace(key, compute_capabilities=_choose_capabilities(package, gpu, options.compute_capabilities))
    if options.compute_capabilities:
        problem = f"{variant.title} builds for the GPU of this machine only"
        raise UsageError(problem, "leave --compute-capability out, or use --engine tensorrt-rtx")
    if gpu is None:
        try:
            gpu = require_gpu()
        except MachineError as error:
            problem = f"{variant.title} builds on the GPU that will run the engine; {error.problem}"
            raise MachineError(problem, error.remedy) from None
    return replace(key, gpu=gpu.model, compute_capabilities=(_dotted(gpu.compute_capability),))


def _choose_capabilities(package: Any, gpu: Gpu | None, asked: tuple[str, ...]) -> tuple[str, ...]:
    """The GPU generations that TensorRT for RTX builds for; its enumeration has names such as SM75 and SM120."""
    names = (re.fullmatch(r"SM(\d+)(\d)", name) for name in dir(package.ComputeCapability))
    known = sorted((int(m[1]), int(m[2])) for m in names if m)
    dotted = [_dotted(capability) for capability in known]
    title, listed = f"TensorRT for RTX {package.__version__} does not build for", ", ".join(dotted)
    if unknown := [c for c in asked if c not in dotted]:
        raise UsageError(f"{title} compute capability {unknown[0]}: it has {listed}")
    if asked:
        return tuple(c for c in dotted if c in asked)
    if gpu is None:
        return tuple(_dotted(c) for c in known if c >= _LEAST_DEFAULT_CAPABILITY)
    own = _dotted(gpu.compute_capability)
    if own not in dotted:
        remedy = "use --engine tensorrt, or name another GPU's with --compute-capability"
        raise MachineError(f"{title} {gpu.name}, compute capability {own} (it has {listed})", remedy)
    return (own,)


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"


def is_bundle(source: str | os.PathLike[str]) -> bool:
    """Whether SOURCE names a bundle (a bundled model's name, or a bundle's folder) and not a checkpoint."""
    return source in BUNDLED or os.path.isfile(Path(source) / BUNDLE_FILE)


def copy_bundle_for_engines(source: str, output: Path | None, force: bool = False) -> Bundle:
    """The bundle to add engines to: SOURCE itself, or its copy in ``output`` (without its engines).

    A copy that is there already is used again; any other bundle in ``output`` is replaced only with ``force``.

    Raises:
        UsageError: SOURCE takes no engines and no output is named, or the output may not be replaced.
        BundleError: the bundle is damaged.
        MachineError: the output cannot be written.
    """
    bundle = Bundle.load(source)
    if output is None or output.resolve() == bundle.path.resolve():
        reason = "" if os.access(bundle.path, os.W_OK) else "its folder is write-protected"
        reason = "it is part of the installed package" if bundle.path.parent == ASSETS else reason
        if reason:
            raise UsageError(f"bundle {source} takes no engines, {reason}: name a copy with --output DIR")
        return bundle
    document = (bundle.path / BUNDLE_FILE).read_bytes()
    if os.path.isfile(output / BUNDLE_FILE) and (output / BUNDLE_FILE).read_bytes() == document:
        return Bundle.load(output)
    if bundle.path.resolve().is_relative_to(output.resolve()):
        raise UsageError(f"output folder {output} holds the bundle {source}: name another output")
    with atomic_directory(output, overwrite=force) as folder:
        for name in (BUNDLE_FILE, *bundle.files):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(bundle.path / name, folder / name)
    return Bundle.load(output, verify=False)


def build_engines(bundle: Bundle, options: EngineOptions, progress: Progress = no_progress) -> Built:
    """Build the engines of ``bundle`` for this machine, unless they are there with the same options.

    Nothing is left behind by an error or Ctrl-C. Raises as ``find_engine_key``, and

    Raises:
        UsageError: there is no plug-in for it.
        BundleError: TensorRT cannot build the files.
        MachineError: memory or disk ran out, or a build was killed.
    """
    key = find_engine_key(options, bundle.precision)
    folder = bundle.path / ENGINES_FOLDER / key.folder
    components = {**bundle.components, UPDATE: update_component(bundle.latent_size, bundle.latent_channels)}
    hashes = {name: bundle.files[component.file]["sha256"] for name, component in bundle.components.items()}
    settings: Any = {name: getattr(options, name) for name in ("max_batch", "workspace_bytes", "opt_level")}
    plugin = uses_plugin(options.lambda_plugin, bundle, key.variant, key.compute_capabilities)
    settings |= {"lambda_plugin": True} if plugin else {}
    profiles = {name: rows(name, options.max_batch, bundle.branches) for name in components}
    engine = Engine(folder, ENGINE_SCHEMA_VERSION, key, hashes, {}, settings, profiles, {})
    notes: list[str] = []
    if os.path.lexists(folder) and not options.force:
        reason = _why_outdated(engine)
        if not reason:
            return Built(read_engine(folder), fresh=False)
        notes.append(f"the engine {folder} is built again: {reason}")
    try:
        folder.parent.mkdir(exist_ok=True)
    except OSError as error:
        problem = f"cannot make folder {folder.parent} ({error.strerror})"
        raise MachineError(problem, "name a folder for the bundle's copy with --output") from error
    started = time.monotonic()
    with atomic_directory(folder, overwrite=True, marker=ENGINE_FILE) as temporary:
        for index, (name, component) in enumerate(components.items(), start=1):
            stage = f"build {name} ({index} of {len(components)})"
            request = {
                "stage": stage,
                "component": name,
                "onnx": None if name == UPDATE else os.path.abspath(bundle.component_path(name)),
                "plan": os.path.abspath(temporary / f"{name}.plan"),
                "variant": key.variant,
                "compute_capabilities": list(key.compute_capabilities),
                "profile": profile(component, profiles[name]),
                "workspace_bytes": options.workspace_bytes,
                "opt_level": options.opt_level,
                "lambda_plugin": key.compute_capabilities[0] if plugin else None,
                "timing_cache": _timing_cache(bundle, options, key),
            }
            progress(stage, 0, 100)
            plan: Any = run_job(WORKER, request, f"the build of {name}", progress, notes.append, _MEMORY_REMEDY)
            engine.plans[name] = plan
        engine.built["created"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
        engine.built["seconds"] = round(time.monotonic() - started, 1)
        text = json.dumps(engine_document(engine), indent=2, allow_nan=False) + "\n"
        (temporary / ENGINE_FILE).write_text(text, encoding="utf-8")
    return Built(read_engine(folder), True, tuple(notes))


def rows(component: str, max_batch: int, branches: int = 2) -> list[int]:
    """Least, best and most rows: ``branches`` a picture for the denoiser, and one for the autoencoder."""
    return [1, branches, branches * max_batch] if component in (DENOISER, SHALLOW, UPDATE) else [1, 1, max_batch]


def profile(component: Component, batches: list[int]) -> dict[str, list[list[int]]]:
    """For every input the shape at each number of rows; all sizes but the batch are fixed."""
    return {t.name: [[n if d == "N" else int(d) for d in t.shape] for n in batches] for t in component.inputs}


def _why_outdated(engine: Engine) -> str:
    """Why the engine in the folder of ``engine`` has to be built again; empty where it is the same and whole."""
    try:
        there = read_engine(engine.path)
        there.verify("")
    except BundleError as error:
        return error.problem
    old, new = ({n: engine_document(e)[n] for n in ("onnx", "settings", "profiles")} for e in (there, engine))
    return "" if old == new else first_difference(old, new)


def _timing_cache(bundle: Bundle, options: EngineOptions, key: EngineKey) -> str | None:
    """Where TensorRT keeps what it measured; the default's name has the GPU and version that it is good for."""
    if not VARIANTS[options.variant].needs_gpu:
        return None
    name = re.sub(r"[^A-Za-z0-9.]+", "-", f"timing-{key.version}-{key.gpu}.cache")
    return os.path.abspath(options.timing_cache or bundle.path / ENGINES_FOLDER / name)
