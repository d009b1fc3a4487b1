"""Files of weights: what is none is named in one line, and no size that a file states is believed."""

from __future__ import annotations

import io
import json
import os
import pickle
import pickletools
import struct
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save

from moebius_edge.checkpoints.weights_file import open_weights
from moebius_edge.errors import BundleError, MoebiusError, UsageError

WEIGHTS = {"w": torch.arange(6.0).reshape(2, 3)}


def refused(path: Path, text: str, kind: type[MoebiusError] = BundleError) -> str:
    with pytest.raises(kind, match=text) as caught:
        open_weights(path)
    message = str(caught.value)
    assert message.startswith(str(path)) and message.isprintable() and len(message) < 600
    return message


def npz() -> bytes:
    stream = io.BytesIO()
    np.savez(stream, a=np.ones(2))
    return stream.getvalue()


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "is empty: copy or download it again"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 905298356\n",
            "is a git-LFS pointer, not the file of 905 MB it stands for: run `git lfs pull`",
        ),
        (b"<!DOCTYPE html><html></html>", "is a web page .*: download the file itself"),
        (b"\n <html>", "is a web page"),
        (b"\x08\x0a\x12\x07pytorch", "is an ONNX model: .* `moebius-edge run --bundle`"),
        (b"GGUF\x03\0\0\0", "is a GGUF file: give a file of PyTorch weights"),
        (b"\x89HDF\r\n\x1a\n", "is an HDF5 file"),
        (b"\x93NUMPY\x01\0", "is a numpy array"),
        (b"\x1f\x8b\x08\0", "is a gzip archive, to be unpacked first"),
        (bytes(257) + b"ustar", "is a tar archive, to be unpacked first"),
        (b"\x89PNG\r\n\x1a\n", "is a picture"),
        (b'{"weight_map": {}}', "is a JSON file: give a file of PyTorch weights .*, which may lie beside it"),
        (b"Entry not found", "is a text file that begins 'Entry not found'"),
        (bytes(4096), "is truncated, damaged or no file of weights"),
        (os.urandom(8) + b"\xff" * 100, "is truncated, damaged or no"),
        (npz(), r"is a zip archive of other files \(a.npy\), not of torch.save"),
        (b"PK\3\4 and no more", "is truncated or damaged"),
        (pickle.dumps({"a": [1.0]}, protocol=2), "is a pickle, but not one that torch.save wrote"),
        (pickle.dumps(np.ones(3), protocol=4), "is a pickle, but not one that torch.save wrote"),
        (pickle.dumps(os.getcwd, protocol=4), r"asks to run code \(posix.getcwd\), which weights never need"),
        (b"\x80", "is truncated, damaged or no file of weights"),
        (b"\x80\x02" + b"(" * 100, "truncated, damaged or no torch file"),
    ],
)
@pytest.mark.parametrize("name", ["a.bin", "a.safetensors"])
def test_what_is_no_file_of_weights_is_named(tmp_path: Path, content: bytes, text: str, name: str) -> None:
    (tmp_path / name).write_bytes(content)
    refused(tmp_path / name, text)


def test_things_that_are_no_files(tmp_path: Path) -> None:
    refused(tmp_path, "is a folder: give the checkpoint file in it", UsageError)
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe", "is no regular file", UsageError)


def test_a_torchscript_program(tmp_path: Path) -> None:
    program = torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2))
    torch.jit.save(program, tmp_path / "a.pt")
    refused(tmp_path / "a.pt", r"is a TorchScript program: save its state_dict\(\)")


def test_an_archive_that_was_packed_again(tmp_path: Path) -> None:
    torch.save(WEIGHTS, tmp_path / "a.pt")
    with (
        zipfile.ZipFile(tmp_path / "a.pt") as old,
        zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            new.writestr(name, old.read(name))
    refused(tmp_path / "b.pt", "was packed again, .*data.pkl in it is compressed, which torch.save never does")


def safetensors(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(shape: object, begin: object = 0, end: object = 4, dtype: object = "F32") -> dict[str, object]:
    return {"w": {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}}


@pytest.mark.parametrize(
    "content",
    [
        safetensors(b"{"),
        safetensors(b"{" + b"[" * 100_000),
        safetensors(b'{"w": ' + b"9" * 10_000 + b"}"),
        safetensors({"w": 1}),
        safetensors({"__metadata__": [1]}),
        safetensors({"__metadata__": {"a": 1}}),
        safetensors(entry([2**40]), b"1234"),
        safetensors(entry([-1]), b"1234"),
        safetensors(entry([True]), b"1234"),
        safetensors(entry("1"), b"1234"),
        safetensors(entry([1], 0, 2**40), b"1234"),
        safetensors(entry([1], -4, 0), b"1234"),
        safetensors(entry([1], 0, 4, ["F32"]), b"1234"),
        safetensors(entry([1]), b"12"),
        struct.pack("<Q", 1 << 39) + b"{}",
    ],
)
def test_a_safetensors_header_that_lies(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.bin").write_bytes(content)
    refused(tmp_path / "a.bin", "is truncated or no safetensors file")


def pickled(operations: bytes) -> bytes:
    """A file in torch.save's older format whose object is made by ``operations``."""
    magic, protocol = (pickle.dumps(number, 2) for number in (0x1950A86A20F9469CFC6C, 1001))
    machine = pickle.dumps({"little_endian": True}, 2)
    return magic + protocol + machine + b"\x80\x02" + operations + b"." + pickle.dumps([], 2)


def doubling(times: int) -> bytes:
    """A tuple of two tuples of two tuples ...: hashing or printing it takes 2 ** times steps."""
    return b")" + b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(times))


@pytest.mark.parametrize(
    "operations",
    [
        b"}" + doubling(60) + b"K\x01s",  # as a key, it would have to be hashed
        doubling(60),
        doubling(60) + doubling(60) + b"\x93",  # as a name
        b"cbuiltins\nbytearray\n" + b"\x8a\x06" + (1 << 40).to_bytes(6, "little") + b"\x85R",  # would take a terabyte
        b"]q\x00h\x00a",  # a list in itself
        b"}q\x00X\x05\0\0\0modelh\x00s",  # a dictionary in itself
        b"]" * 100_000 + b"a" * 99_999,  # deep
        b"N" * 1_000_001,
        b"r\xff\xff\xff\x7f",  # a memo of two thousand million entries
        b"\x8b\xff\xff\xff\x7f1",  # a number of two thousand million bytes
        b"X\xff\xff\xff\xffa",
        b"I" + b"9" * 100_000 + b"\n",
    ],
)
def test_a_pickle_made_to_take_time_or_memory(tmp_path: Path, operations: bytes) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(pickled(operations))
    tracemalloc.start()
    try:
        open_weights(path)
    except BundleError as error:
        assert str(error).isprintable()
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 200e6


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    "change",
    [(b"K\x02K\x03\x86", b"K\xffK\xff\x86"), (b"K\x03K\x01\x86", b"K\xffK\xff\x86"), (b"K\x06", b"K\xff")],
)
def test_a_tensor_larger_than_its_storage(tmp_path: Path, zipped: bool, change: tuple[bytes, bytes]) -> None:
    """PyTorch would enlarge the storage to whatever the shape asks for."""
    path = tmp_path / "a.bin"
    torch.save(WEIGHTS, path, _use_new_zipfile_serialization=zipped)
    content = path.read_bytes()
    if zipped:
        with zipfile.ZipFile(path) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        assert change[0] in members["a/data.pkl"]
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in members.items():
                archive.writestr(name, data.replace(*change) if name.endswith(".pkl") else data)
    else:
        assert change[0] in content
        path.write_bytes(content.replace(*change))
    with pytest.raises(BundleError, match="in a storage of|do not agree with the file|it lacks the 1020 bytes"):
        file = open_weights(path)
        file.read(file.content["w"].storage)


def test_what_is_right_is_read(tmp_path: Path) -> None:
    for name, write in {
        "zip.bin": lambda p: torch.save(WEIGHTS, p),
        "old.bin": lambda p: torch.save(WEIGHTS, p, _use_new_zipfile_serialization=False),
        "a.safetensors": lambda p: p.write_bytes(save(WEIGHTS, {"note": "1"})),
        "protocol4.bin": lambda p: torch.save(WEIGHTS, p, pickle_protocol=4),
    }.items():
        write(tmp_path / name)
        file = open_weights(tmp_path / name)
        tensor = file.content["w"]
        assert (tensor.dtype, tensor.shape, tensor.strides) == ("float32", (2, 3), (3, 1))
        assert bytes(file.read(tensor.storage)) == WEIGHTS["w"].numpy().tobytes()
    assert open_weights(tmp_path / "a.safetensors").metadata == {"note": "1"}


def test_every_instruction_of_a_pickle_is_known_or_refused(tmp_path: Path) -> None:
    """One of each of pickle's instructions, with nothing on the stack: no traceback."""
    for opcode in pickletools.opcodes:
        (tmp_path / "a.bin").write_bytes(pickled(opcode.code.encode("latin-1") + b"\0" * 16))
        with pytest.raises(BundleError):
            open_weights(tmp_path / "a.bin")
