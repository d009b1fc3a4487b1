"""The command line's entry: run one command, and turn whatever ends it into an exit code and one line.

Exit codes: 0 done, 1 the results could not be printed, 2 usage, 3 the machine lacks something, 4 damaged bundle,
5 a quality gate missed, 6 part of a batch failed; ended by a signal 128 and its number, as shells report it: 130 by
Ctrl-C, 143 by SIGTERM, 129 by a terminal that closes, 141 by a reader of the output that has gone. A user's error is
one line on stderr, a traceback a bug of ours. The commands are in ``commands/``. Even typer is imported inside
``main``, so that Ctrl-C at any moment ends without a traceback.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from .commands import console
from .errors import MachineError, MoebiusError, UsageError

_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")
_CLEANING_S = 5.0  # for so long after a signal further ones are ignored: temporary files are being removed


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; ``arguments`` are by default those of the process."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    as_json = "--json" in given
    # ONNX Runtime would keep an identifier in the home folder, and complain on stderr where there is none.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    if arguments is None:  # this process is the command and nothing else
        os.environ["MOEBIUS_EDGE_OWNS_PROCESS"] = "1"
    with console.guarded_output() as output, _noticing_signals(ending=arguments is None) as received:
        try:
            code, message = _run(given)
        except KeyboardInterrupt:
            code, message = console.INTERRUPTED, "interrupted, nothing written"
        except (Exception, SystemExit):  # typer makes a broken pipe a SystemExit
            if not received and not output.broken:
                raise
            code, message = (console.INTERRUPTED, "interrupted") if received else (console.BROKEN_PIPE, "")
        if received and message:
            code, message = _ended_by(received[0], code, message)
        try:
            return output.finish(message, code, as_json)
        except KeyboardInterrupt:  # only what is printed is cut short
            return 128 + (received or [signal.SIGINT])[0]


def _ended_by(number: int, code: int, message: str) -> tuple[int, str]:
    """The exit code and the line of a command that was ended by signal ``number``.

    Ctrl-C in the import of a compiled module arrives as an ImportError, or as our error for one: the line is not
    about that then.
    """
    if code != console.INTERRUPTED:
        message = "interrupted"
    if number != signal.SIGINT:
        message = message.replace("interrupted", "terminated", 1)
    return 128 + number, message


@contextmanager
def _noticing_signals(ending: bool) -> Iterator[list[int]]:
    """Yield a list that Ctrl-C, SIGTERM and SIGHUP add to, besides raising ``KeyboardInterrupt`` as Ctrl-C always does.

    Temporary files are then removed and child processes ended by the same ``finally`` clauses, whatever the signal.
    ``ending`` says that the process ends after this.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received  # only the main thread may, and need, handle signals
        return
    last = float("-inf")

    def handler(number: int, frame: FrameType | None) -> None:
        nonlocal last
        received.append(number)
        now = time.monotonic()
        if now - last > _CLEANING_S:
            last = now
            raise KeyboardInterrupt

    before = {}
    for number in (getattr(signal, name) for name in _SIGNALS if hasattr(signal, name)):
        if number == signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
            before[number] = signal.signal(number, handler)
    try:
        yield received
    finally:
        for number, old in before.items():
            signal.signal(number, old or signal.SIG_DFL)
        if ending:  # Python's own handler would print a traceback while the interpreter shuts down
            signal.signal(signal.SIGINT, signal.SIG_IGN if received else signal.SIG_DFL)


def _run(arguments: list[str]) -> tuple[int, str]:
    """The exit code of a command, and the error to print, if any."""
    from .commands.app import Abort, ParseError, app, parse_message

    try:
        os.getcwd()
    except OSError as error:
        return MachineError.exit_code, f"the current folder is gone ({error.strerror}): run `cd` to one that exists"
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
