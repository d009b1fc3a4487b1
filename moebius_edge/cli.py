"""The command line's entry: run one command, and turn whatever ends it into an exit code and one line.

Exit codes: 0 done, 1 the results could not be printed, 2 usage, 3 the machine lacks something, 4 damaged bundle,
5 a quality gate missed, 6 part of a batch failed; ended by a signal 128 and its number, as shells report it: 130 by
Ctrl-C, 143 by SIGTERM, 129 by a terminal that closes, 141 by a reader of the output that has gone. A user's error is
one line on stderr, a traceback a bug of ours. Even typer is imported inside ``main``, so that Ctrl-C at any moment ends
without a traceback.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from .commands import console
from .errors import MachineError, MoebiusError, OutOfMemory, UsageError

_CLEANING_S = 5.0  # for so long after a signal further ones are ignored: temporary files are being removed
_UNPRINTED = (errno.EPIPE, errno.ENOSPC, errno.EBADF, errno.EIO)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; ``arguments`` are by default those of the process."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    # ONNX Runtime would keep an identifier in the home folder, and complain on stderr where there is none.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    console.open_output()
    with _noticing_signals(process_ends=arguments is None) as received:
        code, error = 0, None
        try:
            code = _run(given)
        except MoebiusError as failure:
            error = failure
        except KeyboardInterrupt:
            error = console.Interrupted("interrupted, nothing written")
        except (Exception, SystemExit) as end:
            # A file's error has its name; typer makes a broken pipe a SystemExit, and ends so after a completion.
            is_output = isinstance(end, OSError) and end.filename is None and end.errno in _UNPRINTED
            if not (received or is_output or isinstance(end, SystemExit)):
                raise
            if isinstance(end, SystemExit) and not isinstance(end.__context__, OSError):
                code = end.code if isinstance(end.code, int) else 0
            else:
                error = _unprinted(end)
        if received and error is not None:
            error = _ended_by(received[0], error)
        try:
            if error is not None:
                console.print_error(error, "--json" in given)
            if (unprinted := console.flush_output()) is not None and error is None:
                error = _unprinted(unprinted)
                console.print_error(error)
        except KeyboardInterrupt:  # only what is printed is cut short
            return 128 + (received or [signal.SIGINT])[0]
        return code or (0 if error is None else error.exit_code)


def _unprinted(failure: BaseException) -> MoebiusError:
    """What to say of results that could not be printed; nothing where their reader has gone, as ``head`` does."""
    if not isinstance(failure, OSError) or failure.errno == errno.EPIPE:
        return console.Interrupted("", signal.SIGPIPE)
    return MoebiusError(f"cannot write to standard output ({failure.strerror})", "redirect it elsewhere")


def _ended_by(number: int, error: MoebiusError) -> MoebiusError:
    """What to say of a command that was ended by signal ``number``.

    Ctrl-C in the import of a compiled module arrives as an ImportError, or as our error for one: the message is not
    about that then.
    """
    message = str(error) if isinstance(error, console.Interrupted) and str(error) else "interrupted"
    if number != signal.SIGINT:
        message = message.replace("interrupted", "terminated", 1)
    return console.Interrupted(message, number)


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

    numbers = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) != signal.SIG_IGN]  # as nohup does
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, *numbers)}
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
    except (OSError, RuntimeError) as error:
        if "--install-completion" not in arguments:
            raise
        problem = f"completion cannot be installed ({error})"
        raise MachineError(problem, "add what `moebius-edge --show-completion` prints to your shell's file") from None
    except Abort:  # how typer passes on Ctrl-C; newer versions return the code instead
        code = 128 + signal.SIGINT
    if code == 128 + signal.SIGINT:
        raise KeyboardInterrupt
    return code if isinstance(code, int) else 0
