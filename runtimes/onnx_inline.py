"""Writes the calls of local functions in an ONNX file out, for a runtime that knows no functions.

The file is read as the protobuf message that it is (fields of onnx.proto are named by their numbers here), since a
device need not have the onnx package, and so that weights are copied once and never decoded.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from .protobuf import Data, Field, field_head, read_contents, read_fields, write_field

_MODEL_GRAPH, _MODEL_FUNCTION = 7, 25
_GRAPH_NODE = 1
_FUNCTION_NAME, _FUNCTION_INPUT, _FUNCTION_OUTPUT, _FUNCTION_NODE = 1, 4, 5, 7
_NODE_INPUT, _NODE_OUTPUT, _NODE_NAME, _NODE_OPERATOR, _NODE_DOMAIN = 1, 2, 3, 4, 7
_STANDARD = (b"", b"ai.onnx")


class _Function(NamedTuple):
    formal: list[bytes]  # the names of its inputs, then of its outputs
    nodes: list[bytes]


def inline_functions(path: Path) -> bytes:
    """The model in the ONNX file at ``path``, every call of a local function replaced by the function's nodes.

    Functions may not call functions, nor read the attributes of their call; ``check_onnx_file`` and ``export`` see to
    that. A name inside of a function gets that of the call as a prefix.
    """
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        fields = list(read_fields(data, 0, len(data)))
        functions = dict(_function(data, field) for field in fields if field.number == _MODEL_FUNCTION)
        parts: list[bytes] = []
        for field in fields:
            if field.number == _MODEL_GRAPH:
                graph = [part for inner in read_fields(data, field.content, field.end)
                         for part in _graph_field(data, inner, functions)]  # fmt: skip
                parts += [field_head(_MODEL_GRAPH, sum(map(len, graph))), *graph]
            elif field.number != _MODEL_FUNCTION:
                parts.append(data[field.start : field.end])
        return b"".join(parts)


def _function(data: Data, field: Field) -> tuple[bytes, _Function]:
    texts = read_contents(data, field.content, field.end)
    formal = [*texts.get(_FUNCTION_INPUT, []), *texts.get(_FUNCTION_OUTPUT, [])]
    return texts[_FUNCTION_NAME][0], _Function(formal, texts.get(_FUNCTION_NODE, []))


def _graph_field(data: Data, field: Field, functions: Mapping[bytes, _Function]) -> Iterator[bytes]:
    """The field of a graph as it is, or the nodes of the function that it calls."""
    if field.number == _GRAPH_NODE:
        call = read_contents(data, field.content, field.end)
        function = functions.get(call[_NODE_OPERATOR][0])
        if function is not None and call.get(_NODE_DOMAIN, [b""])[0] not in _STANDARD:
            actual = [*call.get(_NODE_INPUT, []), *call.get(_NODE_OUTPUT, [])]
            names = dict(zip(function.formal, actual, strict=True))
            prefix = call[_NODE_OUTPUT][0] + b"/"  # which is unique in a graph, as the names of nodes need not be
            for node in function.nodes:
                yield write_field(_GRAPH_NODE, b"".join(_renamed(node, names, prefix)))
            return
    yield data[field.start : field.end]


def _renamed(node: bytes, names: Mapping[bytes, bytes], prefix: bytes) -> Iterator[bytes]:
    """The fields of a function's ``node`` with the call's tensors for the formal ones, all other names prefixed."""
    for field in read_fields(node, 0, len(node)):
        text = node[field.content : field.end]
        if field.number in (_NODE_INPUT, _NODE_OUTPUT) and text:  # an optional input that is absent has no name
            yield write_field(field.number, names.get(text, prefix + text))
        elif field.number == _NODE_NAME:
            yield write_field(field.number, prefix + text)
        else:
            yield node[field.start : field.end]
