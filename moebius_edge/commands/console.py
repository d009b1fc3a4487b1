"""What the commands print with: results on stdout, all else on stderr, one form for errors, tables and JSON.

Messages and paths are printed as they are, never wrapped or read as markup, so that they can be copied and
searched. Rich draws tables and bars only, and is imported when the first of them is drawn.
"""

from __future__ import annotations

import io
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, TextIO

from ..errors import MachineError, MoebiusError
from ..progress import Progress
from ..text import ESCAPED, json_text

if TYPE_CHECKING:
    from rich.console import Console

_WIDTH_OF_A_LOG = 1000  # columns where stdout is no terminal: nothing is cut or wrapped
_LINE_EVERY_S = 5.0  # how often progress writes a line where stderr is no terminal


class Interrupted(MoebiusError):
    """Ended by Ctrl-C or another signal, with what became of the work; shells report 128 and the signal's number."""

    def __init__(self, problem: str, number: int = signal.SIGINT) -> None:
        super().__init__(problem)
        self.exit_code = 128 + number


# --- stdout and stderr, which may be closed, full, or a pipe without a reader ---------------------------------------


def open_output() -> None:
    """Make stdout and stderr print any name, with escapes where no encoding can; writing to a closed one fails.

    stderr gets a descriptor of its own: 2 is silenced while some pictures are decoded, which other threads do.
    """
    while (descriptor := os.open(os.devnull, os.O_RDONLY)) < 3:  # else the next file would get what is printed
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115
    if sys.stderr is None or sys.stderr is sys.__stderr__:  # else a test or a notebook has its own, or it is done
        encoding = None if sys.stderr is None else sys.stderr.encoding
        sys.stderr = open(os.dup(2), "w", buffering=1, encoding=encoding)  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a test or a notebook has its own
            stream.reconfigure(errors=ESCAPED)


def flush_output() -> OSError | None:
    """Print what is buffered; return why stdout could not be written, and let the interpreter's end not try again."""
    failure = None
    for stream in filter(None, (sys.stderr, sys.stdout, sys.__stdout__)):  # typer may have wrapped stdout
        try:
            stream.flush()
        except OSError as error:
            failure = failure if stream is sys.stderr else error
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return failure


# --- errors, notes, documents, tables ------------------------------------------------------------------------------


def print_error(error: MoebiusError, as_json: bool = False) -> None:
    """Print an error as one line on stderr, and as a document on stdout for ``--json``.

    The document has the remedy, a command or a change that mends it, for itself where the error has one.
    """
    line = _one_line(str(error))
    if line:
        ended = isinstance(error, Interrupted)  # by a signal, which is no error
        _say(line if ended else f"error: {line}")
    if line and as_json:
        with suppress(OSError):
            print_json({"error": line, **({"remedy": error.remedy} if error.remedy else {})}, error.exit_code)


def note(message: str) -> None:
    """A remark about the work that is no part of its result."""
    _say(f"note: {_one_line(message)}")


def _say(line: str) -> None:
    """Print to stderr; where that fails nobody can be told."""
    with suppress(OSError):
        print(line, file=sys.stderr, flush=True)


def print_json(document: Mapping[str, Any], code: int = 0) -> None:
    """The one document of ``--json``. ASCII, so that no locale can break it; a NaN in it would be a bug."""
    print(json_text({**document, "exit_code": code}, indent=2), end="")


def print_facts(facts: Mapping[str, Any]) -> None:
    """A line for each value that is there: its name, and the value as ``shown`` writes it.

    On a terminal a value of several parts is broken between them; any other stays one line, to be copied.
    """
    texts = {_label(name): shown(name, value) for name, value in facts.items()}
    parted = {_label(name) for name, value in facts.items() if isinstance(value, Mapping)}
    indent = max(map(len, texts)) + 2
    room = os.get_terminal_size().columns - indent if sys.stdout.isatty() else _WIDTH_OF_A_LOG
    for name, text in texts.items():
        lines = [""]
        for part in text.split(", ") if name in parted else [text]:
            if lines[-1] and len(lines[-1]) + len(part) + 3 > room:
                lines[-1] += ","
                lines.append("")
            lines[-1] += f", {part}" if lines[-1] else part
        if text:
            print(f"{name:<{indent}}" + f"\n{'':<{indent}}".join(lines))


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """A table with a line for each of ``rows`` and a column for each of their keys; numbers are set to the right."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
    columns = list(dict.fromkeys(name for row in rows for name in row))
    for name in columns:
        are_numbers = all(isinstance(row.get(name), (int, float, type(None))) for row in rows)
        table.add_column(_label(name), justify="right" if are_numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*(shown(name, row.get(name)) for name in columns))
    _console(sys.stdout).print(table)


def _label(name: str) -> str:
    """A name as a person reads it; a size is shown with its own unit."""
    return name.removesuffix("_bytes").replace("_", " ")


def shown(name: str, value: Any) -> str:
    """A value as a person reads it; the unit that its name ends with decides how. Nested names are dotted."""
    if value is None:
        return ""
    if isinstance(value, Mapping):
        parts = ((_label(key), shown(key, each)) for key, each in _leaves(value))
        return ", ".join(f"{key} {text}" for key, text in parts if text)
    if isinstance(value, (list, tuple)):
        texts = [shown(name, each) for each in value]
        return f"{texts[0]} .. {texts[-1]} ({len(texts)} values)" if len(texts) > 8 else " x ".join(texts)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if name.endswith("bytes"):
        return size(value)
    if name.endswith("_ms"):
        return f"{value:.1f}" if value < 100 else f"{value:.0f}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def size(count: float) -> str:
    """Bytes as a person reads them, in powers of 1000: 20.1 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def listed(names: Sequence[str], most: int = 5) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _console(stream: TextIO) -> Console:
    from rich.console import Console

    width = None if stream.isatty() or "COLUMNS" in os.environ else _WIDTH_OF_A_LOG
    return Console(file=stream, highlight=False, markup=False, emoji=False, width=width)


def _one_line(message: str) -> str:
    """Without line breaks; spaces stay, for they may be a file name's."""
    return " ".join(line.strip() for line in message.strip().splitlines())


# --- long work -----------------------------------------------------------------------------------------------------


@contextmanager
def progress() -> Iterator[Progress]:
    """Yield a ``Progress`` that shows a bar on a terminal, and elsewhere a line now and then."""
    if not sys.stderr.isatty():
        yield _lines()
        return
    from rich import progress as bars

    first, second = (bars.TextColumn(f"{{task.fields[{name}]}}", markup=False) for name in ("what", "count"))
    columns = (first, bars.BarColumn(), second, bars.TimeRemainingColumn())
    with bars.Progress(*columns, console=_console(sys.stderr), transient=True) as bar:
        task = bar.add_task("", total=None, what="", count="")

        def show(what: str, done: int, total: int) -> None:
            count = f"{done}/{total}" if total else ""
            bar.update(task, what=what, completed=done, total=total or None, count=count)

        yield show


def _lines() -> Progress:
    """Progress for a log: the first line of each piece of work, then one every few seconds."""
    begun: set[str] = set()
    last = 0.0

    def show(what: str, done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if what in begun and now - last < _LINE_EVERY_S:
            return
        begun.add(what)
        last = now
        _say(f"{what}: {done} of {total}" if total else what)

    return show


@contextmanager
def interruption(message: Callable[[], str]) -> Iterator[None]:
    """Say ``message()``, what became of the work, where Ctrl-C or SIGTERM ends it."""
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(message()) from None


@contextmanager
def needs(what: str, extra: str) -> Iterator[None]:
    """Make a missing or broken package a ``MachineError`` with the command that installs it; ours would be a bug."""
    try:
        yield
    except ImportError as error:
        if (error.name or "").startswith("moebius_edge"):
            raise
        problem = f"{what} needs {error.name}" if isinstance(error, ModuleNotFoundError) else f"{what} fails ({error})"
        from ..system.packages import install

        raise MachineError(problem, str(install(extra))) from None
