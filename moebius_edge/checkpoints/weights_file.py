"""A file of weights opened, by its content and not by its name; nothing that is in it is run.

Read are safetensors files and both formats of ``torch.save``, by those libraries' own safe loaders. What these leave
open is checked before: checksums, sizes, and the names that a pickle calls. Tensors stay in the file, mapped into
memory, until they are used. PyTorch is imported when a file is opened.
"""

from __future__ import annotations

import io
import itertools
import os
import pickle
import pickletools
import re
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import BundleError, MachineError, UsageError

_GET_AGAIN = "copy or download it again"
_WEIGHTS = "give a file of PyTorch weights (.bin, .pt, .pth, .ckpt or .safetensors)"
_HEAD_BYTES = 1024
_MAX_PICKLE_BYTES, _MAX_OPCODES = 16 << 20, 1_000_000  # a thousand tensors take 200 kB and 60 000 instructions
_LEGACY_PICKLES = 5  # magic number, protocol, machine, the object, the storages' keys; then come the storages' bytes
_LEGACY_MAGIC = pickle.dumps(0x1950A86A20F9469CFC6C, 2)  # with it begins what torch.save wrote before version 1.6

# Packages whose objects are in training checkpoints; an inert object takes the place of each. A pickle that names
# anything else is refused, for the next program that opens the file might run it.
_EXPECTED_PACKAGES = {
    *("torch", "collections", "numpy", "argparse", "omegaconf", "pytorch_lightning", "lightning", "_codecs", "pathlib"),
    *("copyreg", "copy_reg", "typing", "datetime", "moebius_edge"),
}
_EXPECTED_BUILTINS = {"set", "frozenset", "bytes", "complex", "int", "float", "str", "bool", "list", "dict", "tuple"}


@dataclass(frozen=True)
class WeightsFile:
    """``content`` is what was saved, as a rule a dictionary of tensors; ``metadata`` is a safetensors header's text."""

    content: Any
    metadata: dict[str, str] = field(default_factory=dict)


def open_weights(path: str | os.PathLike[str]) -> WeightsFile:
    """The contents of the file at ``path``.

    Raises:
        UsageError: it is a folder or a device.
        MachineError: it does not exist or cannot be read, or PyTorch is missing.
        BundleError: it is damaged, unsafe, or no file of weights.
    """
    path = Path(path)
    if path.is_dir():
        raise UsageError(f"{path} is a folder", "give the checkpoint file in it")
    if path.exists() and not path.is_file():
        raise UsageError(f"{path} is no regular file", "give a checkpoint file")
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
    except FileNotFoundError:
        remedy = "`moebius-edge download places2` fetches the published checkpoint"
        raise MachineError(f"{path} does not exist", remedy) from None
    except OSError as error:
        raise MachineError(f"{path} cannot be read: {error.strerror or error}", "give a readable file") from error
    try:
        return _open(path, head)
    except ModuleNotFoundError as error:
        remedy = 'run `pip install "moebius-edge[export]"`'
        raise MachineError(f"reading weights needs {error.name}", remedy) from None


def _open(path: Path, head: bytes) -> WeightsFile:
    if is_safetensors(head):
        return _open_safetensors(path)
    if head.startswith(b"PK\3\4"):
        return WeightsFile(_load(path, [_checked_pickle(path)], zipped=True))
    if head.startswith(_LEGACY_MAGIC):
        with path.open("rb") as file:
            stream = io.BytesIO(file.read(_MAX_PICKLE_BYTES))
        return WeightsFile(_load(path, [stream] * _LEGACY_PICKLES, zipped=False))
    raise BundleError(f"{path} {_describe(head)}")


def is_safetensors(head: bytes) -> bool:
    """Whether a file that begins with ``head`` can only be safetensors: the length of a JSON object, and its brace."""
    return len(head) > 8 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 40


def shortened(text: str, most: int = 80) -> str:
    """``text`` from a file as it may stand in a message: on one line, without control characters, not long."""
    return "".join(c if c.isprintable() else "?" for c in text[:most]) + ("..." if len(text) > most else "")


def _describe(head: bytes) -> str:
    """What a file is that holds no weights, and what to do: the end of a message that begins with its path."""
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    if not head:
        return f"is empty: {_GET_AGAIN}"
    if head.startswith(b"version https://git-lfs"):
        return "is a git-LFS pointer, not the file it stands for: run `git lfs pull`, or download the file itself"
    if text[:1] == b"<":
        return "is a web page (HTML or XML) saved under that name: download the file itself, not the page that shows it"
    if head[:1] == b"\x80":
        return "is a pickle, but not one that torch.save wrote: save module.state_dict() with torch.save"
    return f"is truncated, damaged or no file of weights, it begins {head[:16]!r}: {_WEIGHTS}, or {_GET_AGAIN}"


@contextmanager
def _name_for_libraries(path: Path) -> Iterator[str]:
    """A name for a file that is valid UTF-8 and has no ending, for ``torch.load`` goes by the ending."""
    with path.open("rb") as file:
        yield f"/proc/self/fd/{file.fileno()}" if os.path.isdir("/proc/self/fd") else str(path)


def _open_safetensors(path: Path) -> WeightsFile:
    from safetensors import SafetensorError, safe_open

    try:
        with _name_for_libraries(path) as name, safe_open(name, "pt") as file:
            content = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dictionary
            return WeightsFile(content, file.metadata() or {})
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        problem = f"{path} is truncated or no safetensors file ({shortened(str(error))})"
        raise BundleError(problem, _GET_AGAIN) from error


def _checked_pickle(path: Path) -> io.BytesIO:
    """The pickle in torch.save's zip archive; raises ``BundleError`` unless it is one, and all its checksums hold.

    ``torch.load`` compares no checksums, and a flipped bit would become a weight.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename: info for info in archive.infolist()}
            pickles = [name for name in members if re.fullmatch(r"[^/]+/data\.pkl", name)]
            if len(pickles) != 1:
                some = ", ".join(shortened(name, 40) for name in list(members)[:3])
                raise BundleError(f"{path} is a zip archive of other files ({some}), not of torch.save", _WEIGHTS)
            if pickles[0].replace("data.pkl", "constants.pkl") in members:
                raise BundleError(f"{path} is a TorchScript program", "save its state_dict() and give that")
            stored = all(info.compress_type == zipfile.ZIP_STORED for info in members.values())
            size = sum(info.file_size for info in members.values())
            if not stored or size > path.stat().st_size or members[pickles[0]].file_size > _MAX_PICKLE_BYTES:
                problem = f"{path} was packed again or made up: torch.save neither compresses nor writes such sizes"
                raise BundleError(problem, "load and save it with torch, or unpack what is in it")
            damaged = archive.testzip()
            content = archive.read(pickles[0])
    except BundleError:
        raise
    except Exception as error:  # zipfile raises a dozen kinds for an archive that is damaged or made up
        raise BundleError(f"{path} is truncated or damaged ({shortened(str(error))})", _GET_AGAIN) from error
    if damaged is not None:
        raise BundleError(f"{path} is damaged at {shortened(damaged)!r}", _GET_AGAIN)
    return io.BytesIO(content)


def _objects(path: Path, streams: list[io.BytesIO]) -> set[str]:
    """The names of the classes and functions that the pickles call; raises ``BundleError`` for an unexpected one.

    A ``bytearray`` is none that is expected: ``torch.load`` would make one of any size.
    """
    names: set[str] = set()
    instructions = itertools.chain.from_iterable(map(pickletools.genops, streams))
    for count, (opcode, argument, _) in enumerate(instructions):
        if count >= _MAX_OPCODES:
            raise ValueError(f"it has over {_MAX_OPCODES} instructions, which no file of weights needs")
        if opcode.name == "GLOBAL":  # ``torch.load`` refuses the other ways to name something
            names.add(str(argument).replace(" ", "."))
    for name in names:
        package, _, rest = name.partition(".")
        builtin = package in ("builtins", "__builtin__") and rest in _EXPECTED_BUILTINS
        if not builtin and package not in _EXPECTED_PACKAGES:
            raise BundleError(
                f"{path} was refused: its pickle asks to run code ({shortened(name)}), which weights never need",
                "do not trust its source; from a module of your own save module.state_dict()",
            )
    return names


class _Inert:
    """Takes the place of an object in a pickle that is no tensor: nothing of the object's own class is imported."""

    def __new__(cls, *arguments: Any, **named: Any) -> _Inert:
        return object.__new__(cls)

    def __init__(self, *arguments: Any, **named: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _load(path: Path, streams: list[io.BytesIO], zipped: bool) -> Any:
    """What ``torch.load`` makes of the file, whose pickles are in ``streams``, without running any code of its own."""
    import torch

    try:
        safe = torch.serialization.safe_globals([(_Inert, name) for name in _objects(path, streams)])
        with _name_for_libraries(path) as name, safe, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns of what it refuses next
            return torch.load(name, map_location="cpu", weights_only=True, mmap=zipped)
    except BundleError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        reason = shortened(str(error).rpartition("WeightsUnpickler error: ")[2].strip().partition("\n")[0])
        raise BundleError(f"{path} is truncated, damaged or no torch file ({reason})", _GET_AGAIN) from error
