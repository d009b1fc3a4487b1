"""Whether an ONNX file is one that a runtime may be given: what ``export`` writes, and nothing that needs no end.

The hashes in ``bundle.json`` tell that a file is the one its author wrote; they say nothing about the author. A graph
without loops, without functions that call each other, and of limited length ends by itself. How long its operators
take is not limited. The file is read as the protobuf message that it is, since a device need not have the onnx package;
weights are skipped over.
"""

from __future__ import annotations

import mmap
from collections import Counter
from pathlib import Path

from ..errors import BundleError, MachineError
from .protobuf import VARINT, read_fields

MAX_NODES = 20_000  # functions written out; the published denoiser has 2 000, and three times that in INT8
_MAX_FIELDS = 1_000_000
_STANDARD, _OURS = ("", "ai.onnx"), "moebius"  # domains
_QUICK_GELU = ("com.microsoft", "QuickGelu")  # ONNX Runtime's own, which INT8 for a CPU uses

_SUBGRAPH = "!it has a graph inside of an operator, as loops and branches have"
_SPARSE = "!it has sparse weights"
_EXTERNAL = "!its weights lie in another file"
# What is read of each message of onnx.proto: by field number the message or value it holds, or "!" and what is wrong
# with a file that has it. Other fields are skipped.
_FIELDS: dict[str, dict[int, str]] = {
    "model": {7: "graph", 8: "operator set", 20: "!it has a part for training", 25: "function"},
    "graph": {1: "node", 5: "tensor", 15: _SPARSE},
    "function": {1: "text", 7: "node of a function", 11: "attribute"},
    "node": {4: "text", 5: "attribute", 7: "text"},
    "node of a function": {4: "text", 5: "attribute", 7: "text"},
    "attribute": {5: "tensor", 6: _SUBGRAPH, 10: "tensor", 11: _SUBGRAPH, 22: _SPARSE, 23: _SPARSE},
    "tensor": {13: _EXTERNAL, 14: "number"},
    "operator set": {1: "text", 2: "number"},
}


def check_onnx_file(path: Path) -> int:
    """The version of the standard operators that the ONNX file at ``path`` declares, 1 where it declares none.

    Raises:
        MachineError: the file cannot be read.
        BundleError: it is no ONNX model, or one that ``export`` does not write: with weights in other files, with a
            graph inside of a node (a loop or a branch), operators of foreign domains, functions in functions, too many
            nodes.
    """
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Reader(data).check_model()
    except OSError as error:
        raise MachineError(f"cannot read {path}: {error.strerror}", f"check it with `ls -l {path}`") from error
    except ValueError as problem:
        message = f"{path} is no ONNX file that this program writes ({problem})"
        raise BundleError(message, "export the bundle again") from None


class _Reader:
    """Reads one file; ``bodies`` has how many nodes each function has, ``calls`` how often each is called."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._opset, self._nodes, self._fields_read = 1, 0, 0
        self._bodies: dict[str, int] = {}
        self._calls: Counter[str] = Counter()

    def check_model(self) -> int:
        self._read("model", 0, len(self._data))
        if missing := self._calls.keys() - self._bodies.keys():
            raise ValueError(f"it calls {sorted(missing)[0]!r:.60}, a function that it lacks")
        self._count(sum(self._bodies[name] * times for name, times in self._calls.items()))
        return self._opset

    def _count(self, nodes: int) -> None:
        self._nodes += nodes
        if self._nodes > MAX_NODES:
            raise ValueError(f"it has over {MAX_NODES} operators")

    def _read(self, message: str, at: int, end: int) -> None:
        """Read the message between two bytes of the file and check it."""
        texts: dict[int, str] = {}
        numbers: dict[int, int] = {}
        before = self._nodes
        for field in read_fields(self._data, at, end):
            self._fields_read += 1
            if self._fields_read > _MAX_FIELDS:
                raise ValueError(f"it has over {_MAX_FIELDS} fields")
            content = _FIELDS[message].get(field.number, "")
            if content.startswith("!"):
                raise ValueError(content[1:])
            if content and (content == "number") != (field.wire_type == VARINT):
                raise ValueError("a number stands where a message belongs")
            if content == "number":
                numbers[field.number] = field.value
            elif content == "text":
                text = self._data[field.content : min(field.end, field.content + 200)]
                texts[field.number] = text.decode("utf-8", "replace")
            elif content:
                self._read(content, field.content, field.end)
        if message == "function":
            name = texts.get(1, "")
            if name in self._bodies:
                raise ValueError(f"it has the function {name!r:.60} twice")
            self._bodies[name] = self._nodes - before
        elif message.startswith("node"):
            self._add_node(texts.get(4, ""), texts.get(7, ""), inside=message != "node")
        elif message == "tensor" and numbers.get(14):
            raise ValueError(_EXTERNAL[1:])
        elif message == "operator set" and texts.get(1, "") in _STANDARD:
            self._opset = numbers.get(2, 1)

    def _add_node(self, operator: str, domain: str, inside: bool) -> None:
        """A function's nodes are operators of the standard alone, so that none can call itself or multiply."""
        if domain == _OURS and not inside:
            self._calls[operator] += 1
        elif domain not in _STANDARD and (domain, operator) != _QUICK_GELU:
            where = f"domain {domain!r:.40}" + (" inside of a function" if inside else "")
            raise ValueError(f"it has the operator {operator!r:.40} of {where}")
        self._count(1)
