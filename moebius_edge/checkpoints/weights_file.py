"""A file of weights opened: what kind of file it is, and a table of the tensors in it, without PyTorch and without
running code.

Read are ``.safetensors`` files and both formats of torch.save, whatever the file is called. Every size that a file
states is compared with the size of the file before memory is taken for it. A file that is something else is named for
what it is.
"""

from __future__ import annotations

import errno
import io
import json
import math
import os
import re
import stat
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import BundleError, MachineError, UsageError
from .inert_pickle import (
    ELEMENT_BYTES,
    MAX_PICKLE_BYTES,
    Opaque,
    PickleError,
    Storage,
    StoredTensor,
    UnsafePickle,
    read_inert,
)

_GET_AGAIN = "copy or download it again"
_WANTED = "give a file of PyTorch weights (.bin, .pt, .pth, .ckpt or .safetensors)"
_HEAD_BYTES = 1024
_MAX_HEADER_BYTES = 16 << 20  # of safetensors, and of a zip archive's directory: a thousand tensors take 200 kB
_TORCH_MAGIC, _TORCH_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # of torch.save's format before 1.6, a row of pickles
_SAFETENSORS_TYPES = {
    **{"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32"},
    **{"I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool"},
}
_MAGIC = (
    (b"GGUF", "a GGUF file"),
    (b"\x89HDF", "an HDF5 file, as Keras writes"),
    (b"\x93NUMPY", "a numpy array"),
    (b"ftrt", "a TensorRT engine"),
    (b"\x1f\x8b", "a gzip archive, to be unpacked first"),
    (b"\xfd7zXZ", "an xz archive, to be unpacked first"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive, to be unpacked first"),
    (b"7z\xbc\xaf", "a 7z archive, to be unpacked first"),
    (b"Rar!", "a RAR archive, to be unpacked first"),
    (b"\x89PNG", "a picture"),
    (b"\xff\xd8\xff", "a picture"),
    (b"%PDF", "a PDF document"),
)
# What zipfile raises for an archive that is damaged or made up.
_ZIP_ERRORS = (
    *(zipfile.BadZipFile, zipfile.LargeZipFile, EOFError, zlib.error, NotImplementedError, RuntimeError),
    *(ValueError, OverflowError, struct.error, LookupError),
)


@dataclass(frozen=True)
class WeightsFile:
    """``content`` is what was saved: a dictionary, as a rule of ``StoredTensor`` by name.

    ``metadata`` are the texts in a safetensors header. ``read(storage)`` gives the bytes of a storage; it raises as
    ``open_weights``.
    """

    path: Path
    content: Any
    read: Callable[[Storage], bytearray]
    metadata: dict[str, str] = field(default_factory=dict)


def open_weights(path: str | os.PathLike[str]) -> WeightsFile:
    """The table of the file at ``path``; no tensor is read yet.

    Raises:
        UsageError: it is a folder or a device.
        MachineError: it does not exist or cannot be read.
        BundleError: it is damaged, unsafe, or no file of weights.
    """
    path = Path(path)
    with _reading(path):
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise UsageError(f"{path} is a folder: give the checkpoint file in it")
        if not stat.S_ISREG(status.st_mode):
            raise UsageError(f"{path} is no regular file: give a checkpoint file")
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
        if is_safetensors(head):
            return _open_safetensors(path, status.st_size)
        if head.startswith(b"PK\3\4"):
            return _open_archive(path, status.st_size)
        if head[:1] == b"\x80" and b"\x02" <= head[1:2] <= b"\x05":
            return _open_pickles(path, status.st_size)
        raise BundleError(f"{path} {_describe(path, head)}")


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turns what reading the file may raise into errors for the user."""
    try:
        yield
    except FileNotFoundError:
        raise MachineError(
            f"{path} does not exist: `moebius-edge download places2` fetches the published checkpoint"
        ) from None
    except OSError as error:
        if error.errno == errno.EINVAL:  # a place in the file that is none
            raise BundleError(f"{path} is truncated or damaged: {_GET_AGAIN}") from error
        raise MachineError(f"{path} cannot be read: {error.strerror or error}: give a readable file") from error
    except UnsafePickle as error:
        raise BundleError(
            f"{path} was refused: its pickle asks to run code ({shortened(str(error))}), which weights never need: do "
            "not trust its source; from a module of your own save module.state_dict()"
        ) from None
    except PickleError as error:
        raise BundleError(f"{path} is truncated, damaged or no torch file ({error}): {_GET_AGAIN}") from error


def is_safetensors(head: bytes) -> bool:
    """Whether a file that begins with ``head`` can only be safetensors: the length of a JSON object, and its brace."""
    return len(head) > 8 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 40


def shortened(text: str, most: int = 80) -> str:
    """``text`` from a file as it may stand in a message: on one line, without control characters, not long."""
    return "".join(c if c.isprintable() else "?" for c in text[:most]) + ("..." if len(text) > most else "")


def _describe(path: Path, head: bytes) -> str:
    """What a file is that holds no weights, and what to do: the end of a message that begins with its path."""
    if not head:
        return f"is empty: {_GET_AGAIN}"
    if head.startswith(b"version https://git-lfs"):
        size = re.search(rb"\nsize (\d{1,15})\n", head)
        of = f" of {int(size[1]) / 1e6:.0f} MB" if size else ""
        return f"is a git-LFS pointer, not the file{of} it stands for: run `git lfs pull`, or download the file itself"
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    if text[:1] == b"<":
        return "is a web page (HTML or XML) saved under that name: download the file itself, not the page that shows it"
    if path.suffix.lower() == ".onnx" or (
        head[0] == 8 and head[1:2] < b"\x20" and head[2:3] in b"\x12\x1a\x22\x3a\x42"
    ):
        return f"is an ONNX model: {_WANTED}; a bundle is run as it is, with `moebius-edge run --bundle`"
    for magic, what in _MAGIC:
        if head.startswith(magic):
            return f"is {what}: {_WANTED}"
    if head[257:262] == b"ustar":
        return f"is a tar archive, to be unpacked first: {_WANTED}"
    if text[:1] in (b"{", b"["):
        return f"is a JSON file: {_WANTED}, which may lie beside it"
    if len(text) >= 4 and all(byte in b"\t\r\n" or 32 <= byte < 127 for byte in text):
        first = shortened(text.decode("ascii").splitlines()[0], 40)
        return f"is a text file that begins {first!r}: {_WANTED}"
    return f"is truncated, damaged or no file of weights: {_WANTED}, or {_GET_AGAIN}"


def _open_safetensors(path: Path, size: int) -> WeightsFile:
    def damaged(why: str) -> BundleError:
        return BundleError(f"{path} is truncated or no safetensors file ({why}): {_GET_AGAIN}")

    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > size - 8:
            raise damaged(f"its header has {length} bytes, the file {size}")
        if length > _MAX_HEADER_BYTES:
            raise damaged(f"its header has {length} bytes, {_MAX_HEADER_BYTES} at most are read")
        text = file.read(length)
    try:
        header = json.loads(text)
        metadata = header.pop("__metadata__", None) or {}
        tensors = {name: _safetensors_entry(name, entry, size - 8 - length) for name, entry in header.items()}
        if not all(isinstance(note, str) for note in metadata.values()):
            raise ValueError("a note is no text")
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise damaged(shortened(str(error))) from error
    begins = {name: begin for name, (_, begin) in tensors.items()}

    def read(storage: Storage) -> bytearray:
        return _read_at(path, 8 + length + begins[storage.key], storage)

    return WeightsFile(path, {name: tensor for name, (tensor, _) in tensors.items()}, read, metadata)


def _safetensors_entry(name: str, entry: dict[str, Any], size: int) -> tuple[StoredTensor | Opaque, int]:
    """The tensor and where its bytes begin behind the header. ``size`` is how many bytes follow that header."""
    shape, (begin, end) = tuple(entry["shape"]), entry["data_offsets"]
    numbers = (begin, end, *shape)
    if not all(type(number) is int and 0 <= number < 1 << 48 for number in numbers) or len(shape) > 16 or end > size:
        raise ValueError(f"{shortened(name)} has the shape {shape[:8]} at bytes {begin} to {end} of {size}")
    dtype = _SAFETENSORS_TYPES.get(entry["dtype"])
    if dtype is None:
        return Opaque(f"a tensor of {shortened(str(entry['dtype'])[:20])} numbers"), begin
    count = math.prod(shape)
    if count * ELEMENT_BYTES[dtype] != end - begin:
        raise ValueError(f"{shortened(name)} has {count} elements in {end - begin} bytes")
    strides = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    return StoredTensor(Storage(name, dtype, count), shape, strides), begin


def _open_archive(path: Path, size: int) -> WeightsFile:
    """The zip archive of torch.save: the pickle ``NAME/data.pkl``, and a file ``NAME/data/KEY`` for every storage."""
    if _directory_bytes(path, size) > _MAX_HEADER_BYTES:
        raise BundleError(f"{path} is a zip archive with too many members for a file of weights: {_WANTED}")
    try:
        archive = zipfile.ZipFile(path)  # noqa: SIM115 - it stays open for ``read``, and closes itself with it
        members = {info.filename: info for info in archive.infolist()}
        root = _check_members(path, size, members)
        order = archive.read(f"{root}byteorder") if f"{root}byteorder" in members else b"little"
        content = read_inert(io.BytesIO(archive.read(f"{root}data.pkl")))
    except _ZIP_ERRORS as error:
        raise BundleError(f"{path} is truncated or damaged ({shortened(str(error))}): {_GET_AGAIN}") from error
    if order != b"little":
        raise BundleError(f"{path} was saved on a big-endian machine: save it again on this kind of machine")

    def read(storage: Storage) -> bytearray:
        name = f"{root}data/{storage.key}"
        if name not in members or members[name].file_size != storage.size:
            raise BundleError(
                f"{path} is damaged: it lacks the {storage.size} bytes of {shortened(name)}: {_GET_AGAIN}"
            )
        try:
            with _reading(path):
                return bytearray(archive.read(name))  # compares the checksum: a flipped bit would become a weight
        except _ZIP_ERRORS as error:
            raise BundleError(f"{path} is damaged at {shortened(name)!r}: {_GET_AGAIN}") from error

    return WeightsFile(path, content, read)


def _check_members(path: Path, size: int, members: dict[str, zipfile.ZipInfo]) -> str:
    """The folder in an archive in which torch.save put everything, with a slash at its end."""
    pickles = [name for name in members if re.fullmatch(r"[^/]+/data\.pkl", name)]
    if len(pickles) != 1:
        some = ", ".join(shortened(name, 40) for name in list(members)[:3])
        raise BundleError(f"{path} is a zip archive of other files ({some}), not of torch.save: {_WANTED}")
    root = pickles[0].removesuffix("data.pkl")
    if f"{root}constants.pkl" in members:
        raise BundleError(f"{path} is a TorchScript program: save its state_dict() and give that")
    for info in members.values():
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size or info.file_size > size:
            raise BundleError(
                f"{path} was packed again, {shortened(info.filename, 40)} in it is compressed, which torch.save never "
                "does: load and save it with torch, or unpack what is in it"
            )
    if members[pickles[0]].file_size > MAX_PICKLE_BYTES:
        raise PickleError(f"its pickle has over {MAX_PICKLE_BYTES} bytes, which no file of weights needs")
    return root


def _directory_bytes(path: Path, size: int) -> int:
    """The length of a zip archive's directory, which zipfile would read whole."""
    with path.open("rb") as file:
        file.seek(max(0, size - (1 << 17)))
        tail = file.read()
    length, at = 0, tail.rfind(b"PK\5\6")
    if at >= 0 and len(tail) >= at + 16:
        (length,) = struct.unpack_from("<I", tail, at + 12)
    if length == 0xFFFFFFFF and (wide := tail.rfind(b"PK\6\6", 0, at)) >= 0 and len(tail) >= wide + 48:
        (length,) = struct.unpack_from("<Q", tail, wide + 40)
    return length


def _open_pickles(path: Path, size: int) -> WeightsFile:
    """torch.save's older format: a magic number, a protocol, the machine, the object, the storages' keys; then their
    bytes."""
    with path.open("rb") as file:
        stream = io.BytesIO(file.read(MAX_PICKLE_BYTES))
    first = read_inert(stream)
    if first != _TORCH_MAGIC if isinstance(first, int) else True:
        raise BundleError(
            f"{path} is a pickle, but not one that torch.save wrote: save module.state_dict() with torch.save"
        )
    protocol, machine, content, keys = (read_inert(stream) for _ in range(4))
    if protocol != _TORCH_PROTOCOL or not isinstance(machine, dict) or not isinstance(keys, list):
        raise PickleError("it is of an unknown version")
    if machine.get("little_endian") is not True:
        raise BundleError(f"{path} was saved on a big-endian machine: save it again on this kind of machine")
    storages = _storages(content)
    begins: dict[str, int] = {}
    position = stream.tell()
    with path.open("rb") as file:
        for key in keys:
            file.seek(position)
            count = int.from_bytes(file.read(8), "little")
            storage = storages.get(key) if isinstance(key, str) else None
            if storage is None or storage.count != count or position + 8 + storage.size > size:
                raise PickleError("the sizes of its tensors do not agree with the file")
            begins[key] = position + 8
            position += 8 + storage.size
    if storages.keys() - begins.keys():
        raise PickleError("it lacks tensors")
    return WeightsFile(path, content, lambda storage: _read_at(path, begins[storage.key], storage))


def _storages(content: Any) -> dict[str, Storage]:
    """The storages of all tensors in ``content`` by key, each container visited once."""
    found: dict[str, Storage] = {}
    seen: set[int] = set()
    waiting = [content]
    while waiting:
        item = waiting.pop()
        if isinstance(item, StoredTensor):
            found[item.storage.key] = item.storage
        elif isinstance(item, (dict, list, tuple)) and id(item) not in seen:
            seen.add(id(item))
            waiting.extend(item.values() if isinstance(item, dict) else item)
    return found


def _read_at(path: Path, begin: int, storage: Storage) -> bytearray:
    data = bytearray(storage.size)
    with _reading(path), path.open("rb") as file:
        file.seek(begin)
        if file.readinto(data) != len(data):
            raise BundleError(f"{path} is truncated: {_GET_AGAIN}")
    return data
