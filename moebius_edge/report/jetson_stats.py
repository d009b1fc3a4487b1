"""Power from jtop, the service of the package jetson-stats, where it is installed: the last resort on a Jetson."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from ..system.jetson import Board
from .meter import Sample, Source, SourceError
from .rails import Throttling, power_mode


class JtopSource(Source):
    """``package`` stands in for the module ``jtop``, whose ``power["tot"]["power"]`` is the module's power in mW."""

    name = "jtop"
    covers = "the module, as jtop adds it up"
    paced = True

    def __init__(self, board: Board, root: Path, period_s: float, package: Any = None) -> None:
        self.power_mode = power_mode(board)
        self._root, self._period_s, self._package = root, period_s, package
        self._jetson: Any = None

    def open(self) -> None:
        self._throttling = Throttling(self._root)
        try:
            package = self._package or importlib.import_module("jtop")
        except ImportError:
            raise SourceError("the package jetson-stats is missing: run `sudo pip3 install jetson-stats`") from None
        jetson = package.jtop(interval=self._period_s)
        try:
            jetson.start()
        except Exception as error:  # a class of its own for each cause, all of them the service's
            text = " ".join(str(error).split())
            raise SourceError(f"its service does not answer ({text}): run `sudo systemctl restart jtop`") from None
        self._jetson = jetson

    def sample(self) -> Sample:
        jetson = self._jetson
        if jetson is None or not jetson.ok():  # waits for the next reading
            raise SourceError("its service ended: run `sudo systemctl restart jtop`")
        try:
            watts = float(jetson.power["tot"]["power"]) / 1000
        except (KeyError, TypeError, ValueError):
            raise SourceError("it tells no total power for this module") from None
        return Sample(watts=watts, throttles=self._throttling.seen())

    def close(self) -> None:
        if self._jetson is not None:
            jetson, self._jetson = self._jetson, None
            jetson.close()
