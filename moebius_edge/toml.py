"""TOML files, read with ``tomllib``, or on Python 3.10 with the package ``tomli``, which is the same."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

from .errors import MachineError, UsageError


def parse_toml(text: str) -> dict[str, Any]:
    """Raises ``ValueError`` for what is no TOML, and MachineError where Python cannot read any."""
    try:
        parser = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    except ImportError as error:
        raise MachineError(f"Python {sys.version.split()[0]} reads no TOML", "run `pip install tomli`") from error
    return dict(parser.loads(text))


def read_toml(path: Path) -> dict[str, Any]:
    """The contents of a TOML file. Raises MachineError if it cannot be read, UsageError if it is no TOML."""
    try:
        return parse_toml(path.read_text("utf-8"))
    except OSError as error:
        raise MachineError(f"{path} cannot be read: {error.strerror}", "name a TOML file") from error
    except ValueError as error:  # also bytes that are no UTF-8
        raise UsageError(f"{path} is no TOML: {error}") from error
