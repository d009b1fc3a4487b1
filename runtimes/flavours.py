"""The two TensorRTs, imported by name: the full one and TensorRT for RTX. Their Python calls are the same.

What differs stands in ``FLAVOURS``; what needs a GPU, or a file, does not stand here.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from ..errors import MachineError

Sink = Callable[[str, str], None]  # severity (VERBOSE, INFO, WARNING, ERROR, INTERNAL_ERROR), message


@dataclass(frozen=True)
class Flavour:
    """One TensorRT. Versions are (major, minor); ``below`` is the first that is not supported."""

    name: str  # on the command line, and in an engine's key
    title: str
    module: str
    extra: str
    least: tuple[int, int]
    below: tuple[int, int]
    needs_gpu: bool  # to build


FLAVOURS = {
    f.name: f
    for f in (
        Flavour("tensorrt", "TensorRT", "tensorrt", "tensorrt", (10, 3), (12, 0), True),
        Flavour("tensorrt-rtx", "TensorRT for RTX", "tensorrt_rtx", "rtx", (1, 7), (2, 0), False),
    )
}


def max_opset(flavour: str, version: tuple[int, int]) -> int:
    """The highest opset that ``flavour`` (as in ``FLAVOURS``) of (major, minor) ``version`` is known to parse."""
    if flavour == "tensorrt-rtx":
        return 23  # the highest that was tried with 1.7, whose parser refuses none by number
    if version >= (11, 0):
        return 25
    return 24 if version >= (10, 15) else 20


def load_package(flavour: Flavour) -> ModuleType:
    """The Python package of ``flavour``.

    Raises:
        MachineError: it is missing, broken, or of a version that was never tried.
    """
    install = f'`pip install "moebius-edge[{flavour.extra}]"`'
    try:
        package = importlib.import_module(flavour.module)
    except Exception as error:  # a library that does not load arrives as OSError or RuntimeError too
        hint = " (a Jetson has it: make the environment with --system-site-packages)" if flavour.needs_gpu else ""
        raise MachineError(
            f"the package {flavour.module} is missing or broken ({error}): run {install}{hint}"
        ) from None
    found = version_of(package)
    if not flavour.least <= found < flavour.below:
        least, below = (".".join(map(str, v)) for v in (flavour.least, flavour.below))
        raise MachineError(
            f"{flavour.title} {package.__version__} is not supported, {least} or newer and below {below} is: "
            f"run {install}"
        )
    return package


def version_of(package: ModuleType) -> tuple[int, int]:
    """(major, minor) of the package."""
    major, minor = str(package.__version__).split(".")[:2]
    return int(major), int(minor)


def make_logger(package: Any, sink: Sink) -> Any:
    """A logger that passes messages on. Keep one a process: TensorRT uses the first it is given, always."""

    class Logger(package.ILogger):
        def __init__(self) -> None:
            package.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            sink(str(severity).rpartition(".")[2], message)

    return Logger()
