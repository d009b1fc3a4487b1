"""``build_engines``: a bundle's three ONNX files -> ``BUNDLE/engines/<key>/``, or nothing at all.

What to build, for which machine, whether it is there already, and whether memory and disk allow it. TensorRT works in
a process a component (``build_engine``); neither PyTorch nor the onnx package is needed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import IO, Any

from ..bundle import ASSETS, BUNDLE_FILE, BUNDLED, ENGINES_FOLDER, Bundle
from ..errors import BundleError, MachineError, UsageError
from ..files import atomic_directory
from ..machine import available_memory_bytes
from ..runtimes.cuda import find_gpu
from ..runtimes.engine_files import (
    ANY_GPU,
    ENGINE_FILE,
    Engine,
    EngineKey,
    engine_document,
    read_engine,
    stale_components,
)
from ..runtimes.flavours import FLAVOURS, load_package
from ..spec import Component

Progress = Callable[[str, float | None], None]

TIMING_CACHE = "timing.cache"  # in the bundle's engines folder
# Bytes needed for each byte of ONNX, and besides; docs/engines.md has the measurements.
MEMORY_FACTOR, MEMORY_BASE_BYTES = 4, 800_000_000
DISK_FACTOR, DISK_BASE_BYTES = 1.2, 50_000_000
_LEAST_DEFAULT_CAPABILITY = (8, 0)  # for 7.5, TensorRT for RTX compiles no float32 matrix product
_DENOISER = "denoiser"


@dataclass(frozen=True)
class EngineOptions:
    """What the user chose. ``max_batch`` counts pictures; guidance makes two rows of each."""

    flavour: str
    max_batch: int = 1
    workspace_bytes: int | None = None
    opt_level: int | None = None
    timing_cache: Path | None = None
    compute_capabilities: tuple[str, ...] = ()

    def recorded(self) -> dict[str, Any]:
        """What decides the engine besides its key: another value means another engine."""
        return {
            "max_batch": self.max_batch,
            "workspace_bytes": self.workspace_bytes,
            "opt_level": self.opt_level,
        }


@dataclass(frozen=True)
class Target:
    """What is built for; see ``EngineKey``. ``version`` is that of the installed TensorRT."""

    flavour: str
    version: str
    gpu: str
    compute_capabilities: tuple[str, ...]


@dataclass(frozen=True)
class Built:
    """``fresh`` is False where the engine was there already. ``notes`` are for the user."""

    engine: Engine
    fresh: bool
    notes: tuple[str, ...] = ()


def find_target(options: EngineOptions) -> Target:
    """Check the options, and that this machine can build: cheap, so that it comes before a long export.

    Raises:
        UsageError: an option is unusable.
        MachineError: TensorRT or the GPU is missing, or one does not suit the other.
    """
    if options.max_batch < 1:
        raise UsageError(f"max batch is {options.max_batch}: give 1 or more pictures")
    flavour = FLAVOURS[options.flavour]
    package = load_package(flavour)
    version, gpu = str(package.__version__), find_gpu()
    asked = options.compute_capabilities
    if flavour.needs_gpu:
        if asked:
            raise UsageError(
                f"{flavour.title} builds for the GPU of this machine only: leave --compute-capability out, or use "
                "--engine tensorrt-rtx"
            )
        if gpu is None:
            raise MachineError(
                f"{flavour.title} builds on the GPU that will run the engine, and this machine shows none: check "
                "with `nvidia-smi`, or build with --engine tensorrt-rtx, which needs no GPU"
            )
        return Target(flavour.name, version, gpu.name, (_dotted(gpu.compute_capability),))
    known = _capabilities_of(package)
    names = ", ".join(map(_dotted, known))
    if strange := [c for c in asked if c not in map(_dotted, known)]:
        raise UsageError(
            f"{flavour.title} {version} does not build for compute capability {strange[0]}: it has {names}"
        )
    if not asked and gpu is not None and gpu.compute_capability not in known:
        raise MachineError(
            f"{flavour.title} {version} does not build for {gpu.name}, compute capability "
            f"{_dotted(gpu.compute_capability)} (it has {names}): use --engine tensorrt, or name another "
            "GPU's with --compute-capability"
        )
    usual = [c for c in known if c >= _LEAST_DEFAULT_CAPABILITY] if gpu is None else [gpu.compute_capability]
    chosen = sorted(set(asked), key=_parsed) or list(map(_dotted, usual))
    return Target(flavour.name, version, ANY_GPU, tuple(chosen))


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
        BundleError: TensorRT cannot build the files.
        MachineError: memory or disk is short, or a build was killed.
    """
    tell = progress or _silent
    key = EngineKey(bundle.precision, target.flavour, target.version, target.gpu, target.compute_capabilities)
    folder = bundle.path / ENGINES_FOLDER / key.folder
    profiles = {name: rows(name, options.max_batch) for name in bundle.components}
    wanted = Engine(folder, key, _hashes(bundle), {}, options.recorded(), profiles, {})
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
        plans = {}
        for index, (name, component) in enumerate(bundle.components.items(), start=1):
            stage = f"build {name} ({index} of {len(bundle.components)})"
            tell(stage, 0.0)
            request = {
                "component": name,
                "precision": bundle.precision,
                "onnx": os.path.abspath(bundle.component_path(name)),
                "plan": os.path.abspath(temporary / f"{name}.plan"),
                "flavour": target.flavour,
                "gpu": target.gpu,
                "compute_capabilities": list(target.compute_capabilities),
                "profile": profile(component, profiles[name]),
                "workspace_bytes": options.workspace_bytes,
                "opt_level": options.opt_level,
                "timing_cache": None if cache is None else os.path.abspath(cache),
            }
            plans[name] = _build(request, partial(tell, stage), notes)
        built = {
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "seconds": round(time.monotonic() - started, 1),
        }
        engine = replace(wanted, plans=plans, built=built)
        text = json.dumps(engine_document(engine), indent=2, allow_nan=False) + "\n"
        (temporary / ENGINE_FILE).write_text(text, encoding="utf-8")
    return Built(read_engine(folder), True, tuple(notes))


def rows(component: str, max_batch: int) -> list[int]:
    """Least, best and most rows: guidance doubles the denoiser's, the autoencoder takes a picture at a time."""
    return [1, 2, 2 * max_batch] if component == _DENOISER else [1, 1, max_batch]


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


def _build(request: dict[str, Any], on_progress: Callable[[float], None], notes: list[str]) -> dict[str, Any]:
    """One component in a process of its own, which does not outlive an error or Ctrl-C here."""
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}  # a tensorrt.py in the current folder is none of ours
    with tempfile.TemporaryFile() as errors:
        child = subprocess.Popen(
            _command(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            encoding="utf-8",
            env=environment,
            start_new_session=True,  # Ctrl-C on the terminal is for this process, which then ends the child
        )
        try:
            assert child.stdin is not None and child.stdout is not None
            with child.stdout:
                last = _converse(child.stdin, child.stdout, request, on_progress, notes)
            code = child.wait()
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()
        if last.get("event") == "done":
            return dict(last["result"])
        if last.get("event") == "failed":
            raise (BundleError if last["kind"] == "bundle" else MachineError)(last["message"])
        raise _died(request["component"], code, errors)


def _converse(
    stdin: IO[str],
    stdout: IO[str],
    request: dict[str, Any],
    on_progress: Callable[[float], None],
    notes: list[str],
) -> dict[str, Any]:
    """Send the request, pass on what comes, and return the last reply."""
    reply: dict[str, Any] = {}
    try:
        with stdin:
            json.dump(request, stdin)
    except BrokenPipeError:  # it died at once; its exit code says how
        return reply
    for line in stdout:
        reply = json.loads(line)
        if reply["event"] == "progress":
            on_progress(reply["fraction"])
        elif reply["event"] == "note":
            notes.append(reply["text"])
    return reply


def _died(component: str, code: int, errors: IO[bytes]) -> MachineError:
    errors.seek(0)
    lines = errors.read().decode(errors="replace").strip().splitlines()
    said = f" ({lines[-1].strip():.200})" if lines else ""
    if code in (-signal.SIGKILL, 128 + signal.SIGKILL):
        return MachineError(
            f"the build of {component} was killed, probably out of memory: close other programs, add swap, or pass a "
            "smaller --workspace or --max-batch"
        )
    how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
    return MachineError(
        f"the build of {component} ended {how}{said}: TensorRT itself failed; try another version of it"
    )


def _command() -> list[str]:
    return [sys.executable, "-m", f"{__package__}.build_engine"]


def _outdated(wanted: Engine, bundle: Bundle) -> str:
    """Why the engine at ``wanted.path`` is not the wanted one; empty if it is."""
    try:
        found = read_engine(wanted.path)
        found.verify("")
    except BundleError as error:
        return str(error).rpartition(":")[0]
    if stale := stale_components(found.onnx, bundle):
        return f"{stale[0]}.onnx has changed"
    if changed := [k for k, v in wanted.settings.items() if found.settings.get(k) != v]:
        name = changed[0]
        return f"{name} was {found.settings.get(name)} and is {wanted.settings[name]} now"
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


def _capabilities_of(package: Any) -> list[tuple[int, int]]:
    """What this TensorRT for RTX builds for: its enumeration has SM75, SM120."""
    names = (re.fullmatch(r"SM(\d+)(\d)", name) for name in dir(package.ComputeCapability))
    return sorted((int(m[1]), int(m[2])) for m in names if m)


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"


def _parsed(capability: str) -> tuple[int, ...]:
    return tuple(map(int, capability.split(".")))


def _silent(stage: str, fraction: float | None) -> None:
    """The progress of a caller who wants none."""
