"""The command line's entry: run one command, and turn whatever ends it into an exit code and one line.

Exit codes: 0 done, 2 usage, 3 the machine lacks something, 4 damaged bundle, 5 a quality gate missed,
6 part of a batch failed, 130 interrupted. A user's error is one line on stderr, a traceback a bug of ours.
The commands are in ``commands/``. Even typer is imported inside ``main``, so that Ctrl-C at any moment ends
without a traceback.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from .commands import console
from .errors import MachineError, MoebiusError, UsageError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; ``arguments`` are by default those of the process."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):  # a file name no encoding can print must not end the run
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    as_json = "--json" in given
    with _noticing_interrupts() as interrupts:
        try:
            code, message = _run(given)
        except KeyboardInterrupt:
            code, message = console.INTERRUPTED, "interrupted, nothing written"
        except Exception:
            if not interrupts:
                raise
            code, message = console.INTERRUPTED, "interrupted"
    if interrupts and message and code != console.INTERRUPTED:
        # Ctrl-C in the import of a compiled module arrives as an ImportError, or as our error for one.
        code, message = console.INTERRUPTED, "interrupted"
    return console.error(message, code, as_json) if message else code


@contextmanager
def _noticing_interrupts() -> Iterator[list[int]]:
    """Yield a list that Ctrl-C adds to, besides raising ``KeyboardInterrupt`` as always."""
    noticed: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield noticed  # only the main thread may, and need, handle signals
        return

    def handler(number: int, frame: FrameType | None) -> None:
        noticed.append(number)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, handler)
    try:
        yield noticed
    finally:
        signal.signal(signal.SIGINT, before)


def _run(arguments: list[str]) -> tuple[int, str]:
    """The exit code of a command, and the error to print, if any."""
    from .commands.app import Abort, ParseError, app, parse_message

    try:
        code = app(args=arguments or ["--help"], prog_name="moebius-edge", standalone_mode=False)
    except MoebiusError as error:
        return error.exit_code, str(error)
    except ParseError as error:
        return UsageError.exit_code, parse_message(error)
    except MemoryError as error:
        reason = f" ({error})" if str(error) else ""
        message = f"not enough memory{reason}: close other programs or use a smaller image"
        return MachineError.exit_code, message
    except Abort:  # how typer passes on Ctrl-C; newer versions return the code instead
        code = console.INTERRUPTED
    if code == console.INTERRUPTED:
        raise KeyboardInterrupt
    return (code if isinstance(code, int) else 0), ""
