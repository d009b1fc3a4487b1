"""What the commands print with: results on stdout, all else on stderr, one form for errors and for JSON.

Messages and paths are printed as they are, never wrapped or read as markup, so that they can be copied and
searched. Rich draws tables and bars only, and is imported when the first of them is drawn.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

from ..errors import MoebiusError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

INTERRUPTED = 130  # 128 + SIGINT, as a shell reports it
_UNTERMINATED_WIDTH = 1000  # columns where stdout is no terminal: nothing is cut or wrapped in a log
_LINE_EVERY_S = 5.0  # how often progress writes a line where stderr is no terminal

Update = Callable[[str, int, int], None]  # label, done, total (0: unknown)


class Interrupted(MoebiusError):
    """Ctrl-C, with what became of the work."""

    exit_code = INTERRUPTED


def error(message: str, exit_code: int, as_json: bool) -> int:
    """Print an error as one line on stderr, and as a document on stdout for ``--json``; return the code."""
    line = _one_line(message)
    prefix = "" if exit_code == INTERRUPTED else _coloured("error:", 31) + " "
    print(f"{prefix}{line}", file=sys.stderr)
    if as_json:
        print_json({"error": line, "exit_code": exit_code})
    return exit_code


def note(message: str) -> None:
    """A remark about the work that is no part of its result."""
    print(f"{_coloured('note:', 33)} {_one_line(message)}", file=sys.stderr)


def print_json(document: dict[str, Any]) -> None:
    """The one document of ``--json``. ASCII, so that no locale can break it; a NaN in it would be a bug."""
    print(json.dumps(document, indent=2, allow_nan=False))


def table(*columns: str, right: Sequence[str] = ()) -> Table:
    """An empty table with these headings; the columns named in ``right`` hold numbers."""
    from rich import box
    from rich.table import Table

    made = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
    for column in columns:
        made.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return made


def print_table(made: Table) -> None:
    _console(sys.stdout).print(made)


def size(count: float) -> str:
    """Bytes as a person reads them, in powers of 1000: 20.1 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def counted(number: int, noun: str) -> str:
    """1 file, 2 files."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


@contextmanager
def progress() -> Iterator[Update]:
    """Yield a function of (label, done, total): a bar on a terminal, a line now and then elsewhere."""
    if not sys.stderr.isatty():
        yield _Lines()
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[count]}", markup=False),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=_console(sys.stderr), transient=True) as bar:
        task = bar.add_task("", total=None, count="")

        def update(label: str, done: int, total: int) -> None:
            count = f"{done}/{total}" if total else ""
            bar.update(task, description=label, completed=done, total=total or None, count=count)

        yield update


class _Lines:
    """Progress for a log: the first line of each label, then one every few seconds."""

    def __init__(self) -> None:
        self._label, self._last = "", 0.0

    def __call__(self, label: str, done: int, total: int) -> None:
        now = time.monotonic()
        if label == self._label and now - self._last < _LINE_EVERY_S:
            return
        self._label, self._last = label, now
        print(f"{label}: {done} of {total}" if total else label, file=sys.stderr, flush=True)


def _console(stream: TextIO) -> Console:
    from rich.console import Console

    width = None if stream.isatty() or "COLUMNS" in os.environ else _UNTERMINATED_WIDTH
    return Console(file=stream, highlight=False, markup=False, emoji=False, width=width)


def _one_line(message: str) -> str:
    """Without line breaks; spaces stay, for they may be a file name's."""
    return " ".join(line.strip() for line in message.strip().splitlines())


def _coloured(text: str, code: int) -> str:
    plain = not sys.stderr.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return text if plain else f"\033[{code}m{text}\033[0m"
