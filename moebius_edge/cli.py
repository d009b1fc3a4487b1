"""The command line's entry: run one command, and turn whatever ends it into an exit code and one line.

Exit codes: 0 done, 1 the results could not be printed, 2 usage, 3 the machine lacks something, 4 damaged bundle,
5 a quality gate missed, 6 part of a batch failed; ended by a signal 128 and its number, as shells report it: 130 by
Ctrl-C, 143 by SIGTERM, 129 by a terminal that closes, 141 by a reader of the output that has gone. A user's error is
one line on stderr, a traceback a bug of ours. The commands are in ``commands/``. Even typer is imported inside
``main``, so that Ctrl-C at any moment ends without a traceback.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType

from .commands import console
from .errors import MachineError, MoebiusError, OutOfMemory, UsageError

_CLEANING_S = 5.0  # for so long after a signal further ones are ignored: temporary files are being removed


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; ``arguments`` are by default those of the process."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    # ONNX Runtime would keep an identifier in the home folder, and complain on stderr where there is none.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    if arguments is None:  # this process is the command and nothing else
        os.environ["MOEBIUS_EDGE_OWNS_PROCESS"] = "1"
    console.open_output()
    with _noticing_signals(process_ends=arguments is None) as received:
        code, error, unprinted = 0, None, None
        try:
            code = _run(given)
        except MoebiusError as failure:
            error = failure
        except KeyboardInterrupt:
            error = console.Interrupted("interrupted, nothing written")
        except (Exception, SystemExit) as end:  # typer makes a broken pipe a SystemExit
            unprinted = console.probe_stdout() if isinstance(end, (OSError, SystemExit)) else None
            if unprinted is None and not received:
                raise
        if received:
            error = _ended_by(received[0], error)
        try:
            return _finish(code, error, unprinted, "--json" in given)
        except KeyboardInterrupt:  # only what is printed is cut short
            return 128 + (received or [signal.SIGINT])[0]


def _ended_by(number: int, error: MoebiusError | None) -> MoebiusError:
    """What to say of a command that was ended by signal ``number``.

    Ctrl-C in the import of a compiled module arrives as an ImportError, or as our error for one: the message is not
    about that then.
    """
    message = str(error) if isinstance(error, console.Interrupted) else "interrupted"
    if number != signal.SIGINT:
        message = message.replace("interrupted", "terminated", 1)
    return console.Interrupted(message, number)


def _finish(code: int, error: MoebiusError | None, unprinted: OSError | None, as_json: bool) -> int:
    """Print ``error``, if any, and all that is buffered; return the exit code of the process."""
    if error is not None:
        with suppress(OSError):
            console.print_error(error, as_json)
        console.flush_output()
        return error.exit_code
    unprinted = console.flush_output() or unprinted
    if unprinted is None:
        return code
    if unprinted.errno == errno.EPIPE:
        return code or 128 + signal.SIGPIPE
    problem = MoebiusError(f"cannot write to standard output ({unprinted.strerror})", "redirect it elsewhere")
    console.print_error(problem)
    return code or problem.exit_code


@contextmanager
def _noticing_signals(process_ends: bool) -> Iterator[list[int]]:
    """Yield a list that Ctrl-C, SIGTERM and SIGHUP add to, besides raising ``KeyboardInterrupt`` as Ctrl-C always does.

    Temporary files are then removed and child processes ended by the same ``finally`` clauses, whatever the signal.
    """
    received: list[int] = []
    last = float("-inf")

    def handler(number: int, frame: FrameType | None) -> None:
        nonlocal last
        received.append(number)
        now = time.monotonic()
        if now - last > _CLEANING_S:
            last = now
            raise KeyboardInterrupt

    before = {}
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number == signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
            before[number] = signal.signal(number, handler)
    try:
        yield received
    finally:
        for number, old in before.items():
            signal.signal(number, old or signal.SIG_DFL)
        if process_ends:  # Python's own handler would print a traceback while the interpreter shuts down
            signal.signal(signal.SIGINT, signal.SIG_IGN if received else signal.SIG_DFL)


def _run(arguments: list[str]) -> int:
    """The exit code of a command that has ended without an error; any other end is raised."""
    from .commands.app import Abort, ParseError, app, parse_message

    try:
        os.getcwd()
    except OSError as error:
        raise MachineError(f"the current folder is gone ({error.strerror})", "run `cd` to one that exists") from None
    try:
        code = app(args=arguments or ["--help"], prog_name="moebius-edge", standalone_mode=False)
    except ParseError as error:
        raise UsageError(*parse_message(error)) from None
    except MemoryError as error:
        reason = f" ({error})" if str(error) else ""
        raise OutOfMemory(f"not enough memory{reason}", "close other programs or use a smaller image") from None
    except Abort:  # how typer passes on Ctrl-C; newer versions return the code instead
        code = console.INTERRUPTED
    if code == console.INTERRUPTED:
        raise KeyboardInterrupt
    return code if isinstance(code, int) else 0
