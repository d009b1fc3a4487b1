"""What engines are built for: the options of the user, and the TensorRT and GPU of this machine. Cheap to ask."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import MachineError, UsageError
from ..runtimes.cuda import find_gpu
from ..runtimes.engine_files import ANY_GPU, FLAVOURS, Settings, load_package

_LEAST_DEFAULT_CAPABILITY = (8, 0)  # for 7.5, TensorRT for RTX compiles no float32 matrix product


@dataclass(frozen=True)
class EngineOptions:
    """What the user chose. ``max_batch`` counts pictures; guidance makes two rows of each."""

    flavour: str
    max_batch: int = 1
    workspace_bytes: int | None = None
    opt_level: int | None = None
    timing_cache: Path | None = None
    compute_capabilities: tuple[str, ...] = ()

    def recorded(self) -> Settings:
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


def _capabilities_of(package: Any) -> list[tuple[int, int]]:
    """What this TensorRT for RTX builds for: its enumeration has SM75, SM120."""
    names = (re.fullmatch(r"SM(\d+)(\d)", name) for name in dir(package.ComputeCapability))
    return sorted((int(m[1]), int(m[2])) for m in names if m)


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"


def _parsed(capability: str) -> tuple[int, ...]:
    return tuple(map(int, capability.split(".")))
