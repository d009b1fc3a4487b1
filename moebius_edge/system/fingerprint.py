"""What a result was made from, so that it is taken up again only if it was made from the same."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from ..errors import MachineError
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
