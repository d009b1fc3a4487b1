"""The contents of a pickle that torch.save wrote, as plain Python containers, without running anything the pickle asks
for.

A pickle is a program for a stack machine, and Python's own unpickler imports and calls whatever the program names.
This one knows the few calls that rebuild a tensor and answers them with a description of the tensor, a
``StoredTensor``. Every other call becomes an ``Opaque`` and is never made. PyTorch's ``weights_only`` loader runs no
foreign code either, but it does run its own: a file of one kilobyte can make it take any amount of memory or time.
Here both are bounded by the length of the pickle.
"""

from __future__ import annotations

import math
import pickletools
from dataclasses import dataclass
from io import BytesIO
from typing import Any

MAX_PICKLE_BYTES = 16 << 20  # a thousand tensors take 200 kB
_MAX_OPCODES = 1_000_000  # two to five seconds
_MAX_DIMENSIONS = 16
_MAX_SIZE = 1 << 48  # of one dimension, so that products of sizes stay cheap to compute

# Bytes of an element, by the names that PyTorch and numpy use.
ELEMENT_BYTES = {
    **{"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2},
    **{"int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1, "bool": 1},
}
_STORAGES = {
    **{"DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16"},
    **{"LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8"},
    **{"ByteStorage": "uint8", "BoolStorage": "bool"},
}

# Packages whose objects stand in training checkpoints. A pickle that names anything else is refused: nothing of it
# would run here, but the next program that opens the file would run it.
_EXPECTED_PACKAGES = {
    *("torch", "collections", "numpy", "argparse", "omegaconf", "pytorch_lightning", "lightning", "_codecs", "pathlib"),
    *("copyreg", "copy_reg", "typing", "datetime", "moebius_edge"),
}
_BUILTINS = {
    "set",
    "frozenset",
    "bytearray",
    "bytes",
    "complex",
    "int",
    "float",
    "str",
    "bool",
    "list",
    "dict",
    "tuple",
}
_TENSOR_CALLS = {"torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2"}
_PARAMETER_CALLS = {"torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"}


class PickleError(Exception):
    """The pickle is damaged, or not one that torch.save writes. The message says why."""


class UnsafePickle(PickleError):
    """The pickle names code that a file of weights has no use for. The message is the name."""


@dataclass(frozen=True)
class Name:
    """A class or a function that the pickle names. It is not imported."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(frozen=True)
class Opaque:
    """An object that is neither a container, nor a number or text, nor a dense tensor. ``what`` names it."""

    what: str


@dataclass(frozen=True)
class Storage:
    """``count`` elements of type ``dtype`` in the file, found there by ``key``."""

    key: str
    dtype: str
    count: int

    @property
    def size(self) -> int:
        """In bytes."""
        return self.count * ELEMENT_BYTES[self.dtype]


@dataclass(frozen=True)
class StoredTensor:
    """A dense tensor in a file: the elements of ``storage`` at ``offset``, with ``strides``, both counted in elements.

    It never has more elements than its storage, so that a small file cannot describe a large tensor.
    """

    storage: Storage
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int = 0

    @property
    def dtype(self) -> str:
        return self.storage.dtype


def read_inert(stream: BytesIO) -> Any:
    """The object of the pickle at the stream's position; the stream is left behind it.

    Dictionaries keep the entries whose keys are texts and lose the others, whose hashes could take forever.
    Raises ``PickleError``.
    """
    try:
        return _Machine().run(stream)
    except (PickleError, MemoryError):
        raise
    except Exception as error:  # a damaged pickle can raise anything, in pickletools too
        raise PickleError("it is damaged") from error


class _Machine:
    """The stack machine of the pickle format: its stack, its marks on the stack, and its memory."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self, stream: BytesIO) -> Any:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
            if count >= _MAX_OPCODES:
                raise PickleError(f"it has over {_MAX_OPCODES} instructions, which no file of weights needs")
            if opcode.name == "STOP":
                return self.stack.pop()
            self._step(opcode.name, argument)
        raise PickleError("it is cut short")

    def _step(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in _PUSH_ARGUMENT:
            stack.append(argument)
        elif name in _PUSH_CONSTANT:
            stack.append(_PUSH_CONSTANT[name]())
        elif name in _TUPLES:
            count = _TUPLES[name]
            stack[len(stack) - count :] = [tuple(stack[len(stack) - count :])]
        elif name == "MARK":
            self.marks.append(len(stack))
        elif name == "TUPLE":
            stack.append(tuple(self._from_mark()))
        elif name in ("APPEND", "APPENDS"):
            items = [stack.pop()] if name == "APPEND" else self._from_mark()
            if isinstance(stack[-1], list):
                stack[-1].extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            items = [stack.pop(-2), stack.pop()] if name == "SETITEM" else self._from_mark()
            if isinstance(stack[-1], dict):
                _set_items(stack[-1], items)
        elif name in ("BINPUT", "LONG_BINPUT"):
            self.memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif name == "GLOBAL":
            stack.append(_named(*argument.split(" ", 1)))
        elif name == "STACK_GLOBAL":
            stack.append(_named(stack.pop(-2), stack.pop()))
        elif name in ("REDUCE", "NEWOBJ"):
            stack.append(_call(stack.pop(-2), stack.pop()))
        elif name == "BUILD":
            stack.pop()  # attributes of an object, of which a container or a tensor has none that matter
        elif name == "BINPERSID":
            stack.append(_storage(stack.pop()))
        elif name in ("POP", "DUP"):
            stack.append(stack[-1]) if name == "DUP" else stack.pop()
        elif name == "ADDITEMS":
            self._from_mark()
        elif name not in ("PROTO", "FRAME"):
            raise PickleError(f"it has the instruction {name}, which torch.save never writes")

    def _from_mark(self) -> list[Any]:
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items


_PUSH_ARGUMENT = {
    *("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
_PUSH_CONSTANT: dict[str, Any] = {
    **{"NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False},
    **{"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "EMPTY_SET": lambda: Opaque("a set")},
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def _set_items(target: dict[str, Any], items: list[Any]) -> None:
    target.update((key, value) for key, value in zip(items[::2], items[1::2], strict=True) if isinstance(key, str))


def _named(module: Any, name: Any) -> Name:
    if not isinstance(module, str) or not isinstance(name, str):
        raise PickleError("it has a name that is no text")
    found = Name(module[:100], name[:100])
    if found.module in ("builtins", "__builtin__"):
        expected = found.name in _BUILTINS
    else:  # a name with a dot is a method
        expected = found.module.split(".")[0] in _EXPECTED_PACKAGES and "." not in found.name
    if not expected:
        raise UnsafePickle(str(found))
    return found


def _call(function: Any, arguments: Any) -> Any:
    name = str(function) if isinstance(function, Name) else "an object"
    if name == "collections.OrderedDict" and not arguments:
        return {}
    if name in _TENSOR_CALLS:
        return _tensor(*arguments[:4])
    if name in _PARAMETER_CALLS:
        return arguments[0]
    if (
        name == "torch._tensor._rebuild_from_type_v2"
    ):  # a tensor with attributes: function, type, its arguments, attributes
        return _call(arguments[0], arguments[2])
    return Opaque(name)


def _storage(reference: Any) -> Storage | Opaque:
    kind, storage_type, key, _, count = reference[:5]
    view = reference[5] if len(reference) > 5 else None  # in files of PyTorch before 0.4
    if kind != "storage" or not isinstance(storage_type, Name) or view is not None:
        raise PickleError("it refers to something that is no storage")
    dtype = _STORAGES.get(storage_type.name)
    if dtype is None:
        return Opaque(f"a tensor of {storage_type.name.removesuffix('Storage').lower()} numbers")
    if not isinstance(key, str) or not _is_size(count):
        raise PickleError("it has a storage without a size")
    return Storage(key, dtype, count)


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any) -> StoredTensor | Opaque:
    if isinstance(storage, Opaque):
        return storage
    if not isinstance(storage, Storage) or len(shape) != len(strides) or len(shape) > _MAX_DIMENSIONS:
        raise PickleError("it has a tensor that is none")
    if not all(map(_is_size, (offset, *shape, *strides))):
        raise PickleError("it has a tensor of impossible sizes")
    elements = math.prod(shape)
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if elements and (last >= storage.count or elements > storage.count):
        raise PickleError(f"it has a tensor of {elements} elements in a storage of {storage.count}")
    return StoredTensor(storage, tuple(shape), tuple(strides), offset)


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < _MAX_SIZE
