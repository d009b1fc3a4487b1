"""Whether an ONNX file is one that a runtime may be given: what ``export`` writes, and nothing that needs no end.

The hashes in ``bundle.json`` tell that a file is the one its author wrote; they say nothing about the author. A graph
without loops, without functions that call each other, and of limited length ends by itself. How long its operators
take is another matter, for which ``time_limit`` is there. The file is read as the protobuf message that it is, since a
device need not have the onnx package; weights are skipped over.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import BundleError, MachineError

MAX_NODES = 20_000  # functions written out; the published denoiser has 2 000, and three times that in INT8
_MAX_FIELDS = 1_000_000
_STOP_SECONDS = 10
_STANDARD, _OURS = ("", "ai.onnx"), "moebius"  # domains
_QUICK_GELU = ("com.microsoft", "QuickGelu")  # ONNX Runtime's own, which INT8 for a CPU uses
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5

Span = tuple[int, int]  # of a field that is a text, bytes or a message


@dataclass
class _Model:
    """What is collected of a file. ``bodies``: how many nodes each function has; ``called``: how often each is
    called."""

    opset: int = 1
    nodes: int = 0
    fields: int = 0
    bodies: dict[str, int] = field(default_factory=dict)
    called: Counter[str] = field(default_factory=Counter)


class _Problem(Exception):
    """Why the file is not given to a runtime."""


def check_onnx_file(path: Path) -> int:
    """The version of the standard operators that the ONNX file at ``path`` declares, 1 where it declares none.

    Raises MachineError for a file that cannot be read, BundleError for one that is no ONNX model, or one that
    ``export`` does not write: with weights in other files, with a graph inside of a node (a loop or a branch),
    operators of foreign domains, functions in functions, too many nodes.
    """
    try:
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                raise _Problem("it is empty")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                model = _Model()
                _read_model(data, model)
    except OSError as error:
        raise MachineError(f"cannot read {path}: {error.strerror}: check it with `ls -l {path}`") from error
    except (_Problem, ValueError) as problem:
        raise BundleError(
            f"{path} is no ONNX file that this program writes ({problem}): export the bundle again"
        ) from None
    return model.opset


def _read_model(data: mmap.mmap, model: _Model) -> None:
    functions: list[Span] = []
    for number, value in _fields(data, (0, len(data)), model):
        if number == 7:
            for inner, span in _messages(data, value, model, (1, 5, 15)):
                if inner == 1:
                    _read_node(data, span, model, ours=True)
                else:
                    _read_tensor(data, span, model, sparse=inner == 15)
        elif number == 8:
            domain, version = _operator_set(data, value, model)
            model.opset = version if domain in _STANDARD else model.opset
        elif number == 20:
            raise _Problem("it has a part for training")
        elif number == 25:
            functions.append(_span(value))
    for span in functions:
        _read_function(data, span, model)
    if missing := model.called.keys() - model.bodies.keys():
        raise _Problem(f"it calls {sorted(missing)[0]!r:.60}, a function that it lacks")
    if model.nodes + sum(model.bodies[name] * times for name, times in model.called.items()) > MAX_NODES:
        raise _Problem(f"it has over {MAX_NODES} operators")


def _read_function(data: mmap.mmap, span: Span, model: _Model) -> None:
    """A function's nodes are operators of the standard alone, so that none can call itself or multiply."""
    name, count = "", 0
    for number, value in _messages(data, span, model, (1, 7, 11)):
        if number == 1:
            name = _text(data, value)
        elif number == 7:
            _read_node(data, value, model, ours=False)
            count += 1
        else:
            _read_attribute(data, value, model)
    if name in model.bodies:
        raise _Problem(f"it has the function {name!r:.60} twice")
    model.bodies[name] = count


def _read_node(data: mmap.mmap, span: Span, model: _Model, ours: bool) -> None:
    kind = domain = ""
    for number, value in _messages(data, span, model, (4, 5, 7)):
        if number == 4:
            kind = _text(data, value)
        elif number == 7:
            domain = _text(data, value)
        else:
            _read_attribute(data, value, model)
    if domain not in _STANDARD and not (ours and domain == _OURS) and (domain, kind) != _QUICK_GELU:
        where = f"domain {domain!r:.40}" if ours else f"domain {domain!r:.40} inside of a function"
        raise _Problem(f"it has the operator {kind!r:.40} of {where}")
    if domain == _OURS:
        model.called[kind] += 1
    model.nodes += 1
    if model.nodes > MAX_NODES:
        raise _Problem(f"it has over {MAX_NODES} operators")


def _read_attribute(data: mmap.mmap, span: Span, model: _Model) -> None:
    for number, value in _messages(data, span, model, (5, 6, 10, 11, 22, 23)):
        if number in (6, 11):
            raise _Problem("it has a graph inside of an operator, as loops and branches have")
        _read_tensor(data, value, model, sparse=number in (22, 23))


def _read_tensor(data: mmap.mmap, span: Span, model: _Model, sparse: bool) -> None:
    if sparse:
        raise _Problem("it has sparse weights")
    for number, value in _fields(data, span, model):
        if number == 13 or (number == 14 and value != 0):
            raise _Problem("its weights lie in another file")


def _operator_set(data: mmap.mmap, value: int | Span, model: _Model) -> tuple[str, int]:
    domain, version = "", 1
    for number, inner in _fields(data, _span(value), model):
        if number == 1:
            domain = _text(data, _span(inner))
        elif number == 2 and isinstance(inner, int):
            version = inner
    return domain, version


def _messages(data: mmap.mmap, value: int | Span, model: _Model, wanted: tuple[int, ...]) -> Iterator[tuple[int, Span]]:
    """The fields of a message whose numbers are ``wanted``, all of them texts or messages."""
    return ((number, _span(inner)) for number, inner in _fields(data, _span(value), model) if number in wanted)


def _fields(data: mmap.mmap, span: Span, model: _Model) -> Iterator[tuple[int, int | Span]]:
    """The fields of the message at ``span``: their numbers, with the number or the span that each holds."""
    at, end = span
    while at < end:
        model.fields += 1
        if model.fields > _MAX_FIELDS:
            raise _Problem(f"it has over {_MAX_FIELDS} fields")
        tag, at = _varint(data, at, end)
        number, kind = tag >> 3, tag & 7
        if not number or kind not in (_VARINT, _FIXED64, _BYTES, _FIXED32):
            raise _Problem(f"no field of a model at byte {at}")
        if kind == _VARINT:
            value, at = _varint(data, at, end)
            yield number, value
            continue
        length = 8 if kind == _FIXED64 else 4
        if kind == _BYTES:
            length, at = _varint(data, at, end)
        if at + length > end:
            raise _Problem("it is cut short")
        yield number, (at, at + length) if kind == _BYTES else 0
        at += length


def _varint(data: mmap.mmap, at: int, end: int) -> tuple[int, int]:
    """The number whose first byte is at ``at``, and where it ends."""
    value = shift = 0
    while at < end:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise _Problem("a number is too long")
    raise _Problem("it is cut short")


def _span(value: int | Span) -> Span:
    if isinstance(value, int):
        raise _Problem("a number stands where a message belongs")
    return value


def _text(data: mmap.mmap, span: Span) -> str:
    begin, end = span
    return data[begin : min(end, begin + 200)].decode("utf-8", "replace")


@contextmanager
def time_limit(seconds: float, message: str, stop: Callable[[], None] | None = None) -> Iterator[None]:
    """Limits how long the block may take.

    A runtime's native code cannot be interrupted from Python. ``stop`` may ask it to return: it is called first, and
    has ``_STOP_SECONDS`` to succeed. After that the process is ended, with the one-line error ``message`` and exit code
    4, if it is the command line's own (the environment has MOEBIUS_EDGE_OWNS_PROCESS): a program that uses the Python
    interface is not ended.
    """
    done = threading.Event()

    def watch() -> None:
        if done.wait(seconds):
            return
        if stop is not None:
            stop()
            if done.wait(_STOP_SECONDS):
                return
        if "MOEBIUS_EDGE_OWNS_PROCESS" not in os.environ:
            return
        os.write(2, f"error: {message}\n".encode(errors="replace"))
        os._exit(BundleError.exit_code)

    threading.Thread(target=watch, daemon=True, name="time limit").start()
    try:
        yield
    finally:
        done.set()
