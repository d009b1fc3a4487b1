"""Engines on disk, and the two TensorRTs that they are built with and for.

``BUNDLE/engines/<key>/`` holds a plan a component, one for the sampler's arithmetic (``latent_loop.UPDATE``), and
``engine.json``, which says what they are. An engine fits one bundle's ONNX files, one precision, one version of
TensorRT and one kind of GPU. What was built for anything else is refused here, before TensorRT sees it, with the
command that builds the right one. The Python calls of TensorRT and of TensorRT for RTX are the same; what differs
stands in ``VARIANTS``.
"""

from __future__ import annotations

import hashlib
import importlib
import mmap
import os
import re
import shlex
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Final, Literal

from pydantic import ConfigDict, Field
from typing_extensions import NotRequired, TypedDict

from ..bundle.bundle import ASSETS, ENGINES_FOLDER, Bundle, check_file
from ..bundle.manifest import FileRecord
from ..documents import Count, FileName, JsonObject, Number, Positive, Sha256, Text, read_document
from ..errors import BundleError, MachineError, MoebiusError
from ..system.files import atomic_write, safe_join
from ..system.packages import CUDA_13_DRIVER, install, install_older, too_new
from .cuda import Gpu
from .latent_loop import UPDATE

ENGINE_FILE = "engine.json"
ENGINE_SCHEMA_VERSION: Final = 1
ANY_GPU = "any"  # TensorRT for RTX builds for compute capabilities, whatever the card's name


@dataclass(frozen=True)
class Variant:
    """One variant of TensorRT. Versions are (major, minor); ``below`` is the first that is not supported."""

    name: str  # on the command line, and in an engine's key
    title: str
    module: str
    extra: str
    least: tuple[int, int]
    below: tuple[int, int]
    needs_gpu: bool  # to build


VARIANTS = {
    f.name: f
    for f in (
        Variant("tensorrt", "TensorRT", "tensorrt", "tensorrt", (10, 3), (12, 0), True),
        Variant("tensorrt-rtx", "TensorRT for RTX", "tensorrt_rtx", "rtx", (1, 7), (2, 0), False),
    )
}


def max_opset(variant: str, version: tuple[int, int]) -> int:
    """The highest opset that ``variant`` (as in ``VARIANTS``) of (major, minor) ``version`` is known to parse."""
    if variant == "tensorrt-rtx":
        return 23  # the highest that was tried with 1.7, whose parser refuses none by number
    return 25 if version >= (11, 0) else 24 if version >= (10, 15) else 20


def load_package(variant: Variant) -> ModuleType:
    """The Python package of ``variant``.

    Raises:
        MachineError: it is missing, broken, for a newer CUDA than the driver's, or of a version that was never tried.
    """
    advice = str(install(variant.extra))
    try:
        package = importlib.import_module(variant.module)
    except Exception as error:  # a library that does not load arrives as OSError or RuntimeError too
        raise MachineError(f"the package {variant.module} is missing or broken ({error})", advice) from None
    if problem := too_new(variant.name):
        older = install_older(variant.name, variant.extra)
        raise MachineError(problem, f"{older}, or update the driver to {CUDA_13_DRIVER} or newer")
    if not variant.least <= version_of(package) < variant.below:
        least, below = (".".join(map(str, v)) for v in (variant.least, variant.below))
        problem = f"{variant.title} {package.__version__} is not supported, {least} or newer and below {below} is"
        raise MachineError(problem, advice)
    return package


def version_of(package: ModuleType) -> tuple[int, int]:
    """(major, minor) of the package."""
    major, minor = str(package.__version__).split(".")[:2]
    return int(major), int(minor)


def make_logger(package: Any, sink: Callable[[str, str], None]) -> Any:
    """A logger that passes on the severity (VERBOSE, INFO, WARNING, ERROR, INTERNAL_ERROR) and text of each message.

    Keep one a process: TensorRT uses the first it is given, always.
    """

    class Logger(package.ILogger):
        def __init__(self) -> None:
            package.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            sink(str(severity).rpartition(".")[2], message)

    return Logger()


class Plan(FileRecord):
    """One component's plan, and what its build measured. Sizes that TensorRT has not logged are None."""

    file: FileName
    weights_bytes: NotRequired[Count | None]
    activation_bytes: NotRequired[Count | None]
    persistent_bytes: NotRequired[Count | None]  # of each context
    build_seconds: NotRequired[Number]
    build_peak_memory_bytes: NotRequired[Count | None]


class Settings(TypedDict):
    """What the user chose."""

    max_batch: Positive  # pictures
    workspace_bytes: Count | None
    opt_level: Count | None
    lambda_plugin: NotRequired[Literal[True]]  # where LocalLambda is one kernel (``lambda_plugin``)


@dataclass(frozen=True)
class EngineKey:
    """What an engine runs with. ``gpu`` is as ``Gpu.model`` gives it, or ``any``."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    precision: Text
    variant: Text
    version: Text  # TensorRT's, whole: a plan is good for no other
    gpu: Text
    compute_capabilities: tuple[Annotated[str, Field(pattern=r"^\d{1,3}\.\d$")], ...]  # such as 8.7

    @property
    def folder(self) -> str:
        """The folder's name, such as float32-tensorrt-10.3.0-orin-8-sm-8-gb-sm87."""
        capabilities = "-".join(c.replace(".", "") for c in self.compute_capabilities)
        parts = (self.precision, self.variant, self.version, self.gpu, f"sm{capabilities}")
        return "-".join(map(_slug, parts))


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.")


@dataclass(frozen=True)
class Engine:
    """A checked ``engine.json`` and where it lies."""

    path: Path
    schema_version: Literal[1]
    key: EngineKey
    onnx: dict[Text, Sha256]  # component -> SHA-256 of the ONNX file it was built from
    plans: dict[Text, Plan]  # of each component, and ``update``
    settings: Settings
    profiles: dict[Text, Annotated[list[Positive], Field(min_length=3, max_length=3)]]  # rows: least, best, most
    built: JsonObject  # when, how long, notes

    def plan_path(self, component: str) -> Path:
        return safe_join(self.path, self.plans[component]["file"])

    def verify(self, remedy: str, hashes: bool = True) -> None:
        """Raise ``BundleError`` unless every plan is there with the size and, with ``hashes``, the SHA-256 recorded."""
        for component, record in self.plans.items():
            check_file(self.plan_path(component), record, hashes, remedy)

    def map_plan(self, component: str, remedy: str) -> mmap.mmap:
        """A plan as mapped, read-only memory, to be closed; its SHA-256 is compared in that memory.

        So what is loaded is what was checked, it is read from the disk once, and no copy of it is made.

        Raises:
            BundleError: the plan is missing or was altered.
            MachineError: it cannot be read.
        """
        path, record = self.plan_path(component), self.plans[component]
        check_file(path, record, False, remedy)
        try:
            with open(path, "rb") as file:
                plan = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # an empty file cannot be mapped
            raise MachineError(f"cannot read {path}: {error}", f"check it with `ls -l {path}`") from error
        if hashlib.sha256(plan).hexdigest() != record["sha256"].lower():
            plan.close()
            raise BundleError(f"{path} was altered, its SHA-256 is not the recorded one", remedy)
        return plan


class RuntimeCache:
    """The kernels that TensorRT for RTX compiles for one GPU, kept beside ``engine.json`` so that it is done once.

    ``config``, a runtime configuration of TensorRT's, makes the cache, and those of other engines may use it as well.
    A file that TensorRT refuses, for it is damaged or of another driver, GPU or version, is replaced. ``state`` says
    what was there, ``notes`` what a user should know of it.

    Raises:
        BundleError: the file is a link that leads out of ``folder``.
    """

    def __init__(self, config: Any, folder: Path, gpu: str) -> None:
        self.path = safe_join(folder, f"runtime-{_slug(gpu)}.cache")
        self.handle: Any = config.create_runtime_cache()
        self.state, self.notes = "new", list[str]()
        self._writable = os.access(folder, os.W_OK)
        try:
            self._content = self.path.read_bytes() if self.path.is_file() else b""
        except OSError as error:
            raise MachineError(f"cannot read {self.path}: {error.strerror}", f"remove it: `rm {self.path}`") from error
        slow = "TensorRT compiles its kernels again, which takes up to a minute"
        if self._content:
            self.state = "loaded" if self.handle.deserialize(self._content) else "rebuilt"
            if self.state == "rebuilt":
                self.notes.append(f"{self.path} is damaged, or of another driver, GPU or version: {slow}")
        if not self._writable:
            self.notes.append(f"{folder} is write-protected, so no runtime cache is kept there: {slow}")

    def save(self) -> None:
        """Write what was compiled since; where that fails, ``state`` says why: a cache is no reason to fail."""
        try:
            memory = self.handle.serialize() if self._writable else None
            if memory is None or (content := bytes(memory)) == self._content:
                return
            with atomic_write(self.path) as temporary:
                temporary.write_bytes(content)
        except (MoebiusError, RuntimeError) as error:
            self.state = f"not written: {error}"


def engine_folders(bundle: Path) -> list[Path]:
    """The engines' folders of a bundle, by name. Hidden ones are builds in progress, or interrupted."""
    root = bundle / ENGINES_FOLDER
    return sorted(p for p in root.glob("*") if p.is_dir() and not p.name.startswith("."))


def read_engine(folder: Path) -> Engine:
    """Read ``folder/engine.json``; plans are not opened.

    Raises:
        BundleError: it is missing, no JSON, of another schema, or a field of it is wrong.
    """
    remedy = f"remove it with `rm -r {shlex.quote(str(folder))}` and build it again"
    path = folder / ENGINE_FILE
    if not os.path.lexists(path):
        raise BundleError(f"{folder} holds no {ENGINE_FILE}, so it is no engine", remedy)
    safe_join(folder, ENGINE_FILE)
    engine: Engine = read_document(path, Engine, BundleError, remedy, path=folder)
    for component in (*engine.onnx, UPDATE):
        for name, entries in (("plans", engine.plans), ("profiles", engine.profiles)):
            if component not in entries:
                raise BundleError(f"{path}: {name}.{component} is missing", remedy)
    for component in engine.plans:
        engine.plan_path(component)
    return engine


def engine_document(engine: Engine) -> dict[str, Any]:
    """The contents of ``engine.json``."""
    return {name: value for name, value in asdict(engine).items() if name != "path"}


def choose_engine(bundle: Bundle, variant: Variant, version: str, gpu: Gpu) -> Engine:
    """The engine of ``bundle`` for this machine. Its plans have their sizes; ``Engine.map_plan`` compares the hashes.

    Raises:
        BundleError: there is none, or it was built with or from something else, or a plan has not its size.
    """
    remedy = f"run `{build_command(bundle, variant)}`"
    rejected: list[tuple[int, str]] = []  # how many reasons, and the message; the nearest one is told
    for folder in engine_folders(bundle.path):
        try:
            engine = read_engine(folder)
        except BundleError as error:
            rejected.append((99, str(error)))
            continue
        if engine.key.variant != variant.name:
            continue
        problems = _mismatches(engine, bundle, variant, version, gpu)
        if not problems:
            engine.verify(f"{remedy} --force", hashes=False)
            return engine
        rejected.append((len(problems), f"the engine {folder} was {' and '.join(problems)}: {remedy}"))
    raise BundleError(min(rejected)[1] if rejected else f"bundle {bundle.path} has no {variant.title} engine: {remedy}")


def _mismatches(engine: Engine, bundle: Bundle, variant: Variant, version: str, gpu: Gpu) -> list[str]:
    """Why ``engine`` cannot run ``bundle`` here, each as a phrase after "the engine was"; empty if it can."""
    key, title, problems = engine.key, variant.title, []
    here = ".".join(map(str, gpu.compute_capability))
    if key.version != version or here not in key.compute_capabilities or key.gpu not in (ANY_GPU, gpu.model):
        capabilities = ", ".join(key.compute_capabilities)
        problems.append(
            f"built with {title} {key.version} for GPU {key.gpu} (compute capability {capabilities}), "
            f"this machine has {title} {version} and {gpu.model} ({here})"
        )
    if key.precision != bundle.precision:
        problems.append(f"built with precision {key.precision}, the bundle has {bundle.precision}")
    stale = staleness(engine, bundle)
    return [*problems, stale] if stale else problems


def staleness(engine: Engine, bundle: Bundle) -> str:
    """That ``engine`` was built from another ONNX file than the bundle has today; empty if it was not."""
    for name, component in bundle.components.items():
        if engine.onnx.get(name) != bundle.files[component.file]["sha256"]:
            return f"built from another {name}.onnx than the bundle's"
    return ""


def build_command(bundle: Bundle, variant: Variant) -> str:
    """What builds the engines of ``bundle`` on this machine."""
    if bundle.path.parent == ASSETS:  # part of the installed package, where nothing is written
        return f"moebius-edge export {bundle.path.name} --engine {variant.name} --output DIR"
    return f"moebius-edge export {shlex.quote(str(bundle.path))} --engine {variant.name}"
