"""The pictures that could not be read: a list that the loading processes share."""

from __future__ import annotations

import json
import os
import tempfile
import weakref
from pathlib import Path

from ..errors import MachineError
from ..system.files import atomic_write


class Unreadable:
    """Names with reasons, each once, of this process and of all that are forked from it.

    They are noted in a nameless temporary file: pictures are read in loading processes, and what those note in
    memory never reaches the process that reports it.
    """

    def __init__(self) -> None:
        # Open as long as the object lives, and appended to, so that lines of several processes do not mix.
        self._file = tempfile.TemporaryFile("a+b", buffering=0)  # noqa: SIM115
        weakref.finalize(self, self._file.close)

    def add(self, name: str, reason: str) -> None:
        self._file.write((json.dumps([name, reason]) + "\n").encode())

    def entries(self) -> dict[str, str]:
        """Reasons by the pictures' names, in the order in which they were met."""
        descriptor = self._file.fileno()
        lines = os.pread(descriptor, os.fstat(descriptor).st_size, 0).splitlines()
        found: dict[str, str] = {}
        for name, reason in map(json.loads, lines):
            found.setdefault(name, reason)
        return found

    def __len__(self) -> int:
        return len(self.entries())

    def write(self, path: Path) -> int:
        """Adds the entries to the list at ``path``, NAME, a tab and REASON a line; returns how many it then has.

        A resumed run thereby keeps what it met before. Nothing is written where there is nothing to list.

        Raises:
            MachineError: the list cannot be read or written.
        """
        try:
            old = path.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
        except FileNotFoundError:
            old = []
        except OSError as error:
            raise MachineError(f"cannot read {path}: {error.strerror}: run `chmod u+r {path}`") from error
        lines = {line.partition("\t")[0]: line for line in old}
        before = len(lines)
        for name, reason in self.entries().items():
            lines.setdefault(_one_line(name), f"{_one_line(name)}\t{_one_line(reason)}")
        if len(lines) > before:
            with atomic_write(path) as temporary:
                temporary.write_text("\n".join(lines.values()) + "\n", encoding="utf-8", errors="surrogateescape")
        return len(lines)


def _one_line(text: str) -> str:
    """A file's name may hold anything: line breaks and other control characters are written as escapes."""
    return "".join(c if c.isprintable() or "\ud800" <= c <= "\udfff" else repr(c)[1:-1] for c in text)
