"""What the commands print with: results on stdout, all else on stderr, one form for errors and for JSON.

Messages and paths are printed as they are, never wrapped or read as markup, so that they can be copied and
searched. Rich draws tables and bars only, and is imported when the first of them is drawn.
"""

from __future__ import annotations

import errno
import io
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, TextIO

from ..errors import MoebiusError
from ..text import ESCAPED, json_text

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

INTERRUPTED = 130  # 128 + SIGINT, as a shell reports it
BROKEN_PIPE = 141  # 128 + SIGPIPE
_UNTERMINATED_WIDTH = 1000  # columns where stdout is no terminal: nothing is cut or wrapped in a log
_LINE_EVERY_S = 5.0  # how often progress writes a line where stderr is no terminal

Update = Callable[[str, int, int], None]  # label, done, total (0: unknown)


class Interrupted(MoebiusError):
    """Ctrl-C, with what became of the work."""

    exit_code = INTERRUPTED


class Output:
    """What became of this process's stdout and stderr; see ``guarded_output``."""

    def __init__(self) -> None:
        self.stdout: _GuardedFile | None = None
        self.stderr: _GuardedFile | None = None

    @property
    def broken(self) -> bool:
        """Whether a reader of stdout or stderr has gone, as ``head`` does."""
        failures = [stream.failure for stream in (self.stdout, self.stderr) if stream is not None]
        return any(failure is not None and failure.errno == errno.EPIPE for failure in failures)

    def finish(self, message: str, code: int, as_json: bool) -> int:
        """Print the error ``message``, if any, and all that is buffered; return the exit code of the process."""
        with suppress(BrokenPipeError):
            if message and not self.broken:
                error(message, code, as_json)
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
        if self.broken:
            return code or BROKEN_PIPE
        failure = None if self.stdout is None else self.stdout.failure
        if failure is None or message:
            return code
        text = f"cannot write to standard output ({failure.strerror}), the work itself is done: redirect it elsewhere"
        return error(text, code or 1, as_json=False)


class _GuardedFile(io.FileIO):
    """A descriptor whose failing writes are remembered; only the first to a pipe without a reader is raised."""

    failure: OSError | None = None

    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        if self.failure is not None:
            return size
        try:
            return super().write(data)
        except OSError as failure:
            self.failure = failure
            if failure.errno == errno.EPIPE:
                raise
            return size


@contextmanager
def guarded_output() -> Iterator[Output]:
    """Let stdout and stderr be closed, full or broken without a traceback, until the interpreter has ended.

    What cannot be written is dropped and the work goes on, but for a pipe whose reader has gone: nobody waits any more
    then, and a ``BrokenPipeError`` ends the command. Names that no encoding can print are printed with escapes.
    """
    output, before = Output(), (sys.stdout, sys.stderr)
    if os.name == "posix":
        _occupy_closed_descriptors()
        if sys.stdout is sys.__stdout__:  # a test or a notebook has its own
            sys.stdout, output.stdout = _guarded(1, sys.stdout)
        if sys.stderr is sys.__stderr__:
            sys.stderr, output.stderr = _guarded(2, sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=ESCAPED)
    try:
        yield output
    finally:
        with suppress(BrokenPipeError):
            sys.stdout.flush()
        with suppress(BrokenPipeError):
            sys.stderr.flush()
        sys.stdout, sys.stderr = before


def _occupy_closed_descriptors() -> None:
    """Open what is closed of descriptors 0 to 2: else the next file to be opened would get what libraries print."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:  # a new descriptor is the lowest that is free; writing to a file open for reading fails
            os.set_inheritable(os.open(os.devnull, os.O_RDONLY), True)


def _guarded(descriptor: int, stream: TextIO | None) -> tuple[TextIO, _GuardedFile]:
    """A text stream like ``stream``, which is None where the descriptor was closed, over a guarded descriptor."""
    if stream is not None:
        stream.flush()
    file = _GuardedFile(descriptor, "w", closefd=False)
    lines = descriptor == 2 or file.isatty()
    encoding = "utf-8" if stream is None else stream.encoding
    return io.TextIOWrapper(io.BufferedWriter(file), encoding, line_buffering=lines), file


def error(message: str, exit_code: int, as_json: bool) -> int:
    """Print an error as one line on stderr, and as a document on stdout for ``--json``; return the code."""
    line = _one_line(message)
    prefix = "" if exit_code > 128 else _coloured("error:", 31) + " "  # being ended by a signal is no error
    print(f"{prefix}{line}", file=sys.stderr)
    if as_json:
        print_json({"error": line, "exit_code": exit_code})
    return exit_code


def note(message: str) -> None:
    """A remark about the work that is no part of its result."""
    print(f"{_coloured('note:', 33)} {_one_line(message)}", file=sys.stderr)


def print_json(document: dict[str, Any]) -> None:
    """The one document of ``--json``. ASCII, so that no locale can break it; a NaN in it would be a bug."""
    print(json_text(document, indent=2), end="")


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


def listed(names: Sequence[str], most: int = 5) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


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
