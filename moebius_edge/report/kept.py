"""What a report has measured already, in ``measured/`` of its folder: one file a configuration, whole or absent.

Each lies there with a key of everything its figures depend on; under another key it is not found.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from ..errors import MachineError, UsageError
from ..system.files import atomic_write
from .results import PICTURES_FOLDER, RESULTS_FILE

MEASURED_FOLDER = "measured"
_WRITTEN = (RESULTS_FILE, "report.md", "report.html")


class Kept:
    """The outcomes kept in a report's folder, and beside them the references' traces, one file a picture."""

    def __init__(self, report: Path) -> None:
        self._folder = report / MEASURED_FOLDER
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise MachineError(f"cannot make {self._folder} ({error.strerror}): name another output") from error

    def get(self, name: str, key: str) -> Any:
        """What was put under ``name`` with this ``key``, else None; a damaged file counts as none."""
        try:
            document = json.loads((self._folder / f"{name}.json").read_text(encoding="utf-8"))
            return document["outcome"] if document["key"] == key else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def put(self, name: str, key: str, outcome: Any) -> None:
        with atomic_write(self._folder / f"{name}.json") as temporary:
            text = json.dumps({"key": key, "outcome": outcome}, allow_nan=False)
            temporary.write_text(text, encoding="utf-8")

    def traces(self, name: str) -> Path:
        """The folder of a reference's traces."""
        return self._folder / f"{name}.traces"

    def drop_traces(self) -> None:
        """They are large, and needed only until everything was compared with them."""
        for path in self._folder.glob("*.traces"):
            shutil.rmtree(path, ignore_errors=True)


def claim(folder: Path, force: bool = False) -> None:
    """Refuse a folder with other contents than a report's; with ``force`` remove what a report has left in it.

    Raises:
        UsageError: it is a file, or holds something else.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"output {folder} is a file: name a folder")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not any((folder / name).exists() for name in (RESULTS_FILE, MEASURED_FOLDER)):
        raise UsageError(f"output folder {folder} holds something else than a report: name another")
    if force:
        for name in (MEASURED_FOLDER, PICTURES_FOLDER):
            shutil.rmtree(folder / name, ignore_errors=True)
        for name in _WRITTEN:
            (folder / name).unlink(missing_ok=True)


def digest(facts: Any) -> str:
    """SHA-256 of JSON-ready ``facts``."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
