"""What a result was made from, so that it is taken up again only if it was made from the same."""

from __future__ import annotations

import hashlib
import json
import threading
from pathlib import Path
from typing import Any

from ..errors import MachineError
from ..text import json_text, printable
from .files import atomic_write


def fingerprint(facts: Any) -> str:
    """The SHA-256, in hexadecimal, of JSON-ready ``facts``; the order of keys does not matter."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, allow_nan=False).encode()).hexdigest()


def first_difference(there: Any, here: Any, where: str = "") -> str:
    """The first value in which two JSON-ready values differ, such as ``losses.hole_weight is 1 there, 2 here``."""
    if isinstance(there, dict) and isinstance(here, dict):
        for name in [*here, *(name for name in there if name not in here)]:
            if there.get(name) != here.get(name):
                return first_difference(there.get(name), here.get(name), f"{where}.{name}" if where else name)
    return f"{where} is {there!r:.200} there, {here!r:.200} here"


class ResultCache:
    """JSON-ready results in ``folder``, one file each, so that interrupted work goes on where it stopped.

    Each result is stored with the fingerprint of the facts that it follows from; under other facts it is not found.

    Raises:
        MachineError: ``folder`` cannot be made.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise MachineError(f"cannot make {folder} ({error.strerror})", "name another output") from error

    def get(self, name: str, facts: Any) -> Any:
        """The result stored under ``name`` with these ``facts``, or None; a damaged file counts as none."""
        try:
            document = json.loads((self.folder / f"{name}.json").read_text(encoding="utf-8"))
            return document["result"] if document["fingerprint"] == fingerprint(facts) else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def put(self, name: str, facts: Any, result: Any) -> None:
        """Store ``result``, which must not be None, whole or not at all."""
        text = json.dumps({"fingerprint": fingerprint(facts), "result": result}, allow_nan=False)
        with atomic_write(self.folder / f"{name}.json") as temporary:
            temporary.write_text(text, encoding="utf-8")


class ResultLog:
    """JSON-ready results in one file, a line of JSON each, so that interrupted work goes on where it stopped.

    Lines are only ever added, from any thread; of several with one name the last counts, and a line that a kill has
    cut short counts as none. The file appears with the first line that is added once its folder is there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._lines: dict[str, dict[str, Any]] = {}
        self._unwritten = ""
        try:
            text = path.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return
        except OSError as error:
            raise MachineError(f"cannot read {path} ({error.strerror})", "name another output") from error
        self._unwritten = "\n" if text and not text.endswith("\n") else ""
        for line in text.splitlines():
            try:
                document = json.loads(line)
                self._lines[document["name"]] = document
            except (ValueError, KeyError, TypeError):
                continue

    def get(self, name: str, facts: Any) -> dict[str, Any] | None:
        """The result last added under ``name``, if it was with these ``facts``."""
        line = self._lines.get(printable(name))
        return line if line is not None and line.get("fingerprint") == fingerprint(facts) else None

    def add(self, name: str, facts: Any, result: dict[str, Any]) -> None:
        """Add a result; without ``facts`` (None) it is for people to read, and never found again."""
        made_from = None if facts is None else fingerprint(facts)
        with self._lock:
            self._unwritten += json_text({"name": name, "fingerprint": made_from, **result})
            if not self.path.parent.is_dir():
                return
            try:
                with open(self.path, "a", encoding="utf-8") as stream:
                    stream.write(self._unwritten)
            except OSError as error:
                problem = f"cannot write {self.path} ({error.strerror})"
                raise MachineError(problem, "free space there or name another output") from error
            self._unwritten = ""
