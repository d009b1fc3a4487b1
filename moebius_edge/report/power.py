"""Which power meter this machine has: ``open_meter`` tries the sources that fit, and says of each why it does not work.

On a Jetson the module's own rails, whatever computes. Elsewhere what computes decides: a GPU is asked through NVML, a
CPU through RAPL. One is never measured for the other, for its figure would be that of something else.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..system.jetson import ROOT, read_board
from .ina3221 import Ina3221Source
from .jetson_stats import JtopSource
from .meter import PERIOD_S, Meter, Source, SourceError
from .nvml import NvmlSource
from .rapl import RaplSource
from .tegrastats import TegrastatsSource

CPU = "cpu"  # what ``Runtime.info["device"]`` calls it; all others are GPUs


def open_meter(device: str, root: Path | None = None, period_s: float = PERIOD_S) -> Meter:
    """A meter for what computes on ``device``, to be entered with ``with``; its ``reason`` is set where none works.

    A source is opened and read once to be chosen. ``root`` is where the system's files lie, for the tests have samples.
    """
    root = ROOT if root is None else root
    reasons = []
    for make in _candidates(device, root, period_s):
        source = make()
        if not (problem := _problem(source)):
            return Meter(source, period_s=period_s)
        reasons.append(f"{source.name}: {problem}")
    return Meter(None, "; ".join(reasons))


def _candidates(device: str, root: Path, period_s: float) -> list[Callable[[], Source]]:
    board = read_board(root)
    if board is not None:
        return [
            lambda: TegrastatsSource(board, root, period_s),
            lambda: Ina3221Source(board, root),
            lambda: JtopSource(board, root, period_s),
        ]
    return [lambda: RaplSource(root)] if device == CPU else [lambda: NvmlSource()]


def _problem(source: Source) -> str:
    """Why ``source`` cannot be used here; empty where it can."""
    try:
        source.open()
        sample = source.sample()
    except SourceError as error:
        return str(error)
    finally:
        source.close()
    return "" if sample.watts is not None or sample.joules is not None else "it tells no power"
