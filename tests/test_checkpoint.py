"""Loading checkpoints: what fits is loaded exactly, everything else is refused in one line that says why."""

from __future__ import annotations

import argparse
import io
import os
import pickle
import re
import struct
import sys
import zipfile
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
import torch
from golden import golden_state
from safetensors.torch import save as safetensors_bytes
from safetensors.torch import save_file

from moebius_edge.checkpoints.weights_file import open_weights
from moebius_edge.errors import BundleError, MachineError, MoebiusError, UsageError
from moebius_edge.model import StudentConfig, TeacherConfig, build_student, build_teacher, load_checkpoint
from moebius_edge.system.machine import peak_memory_bytes

CONFIG = StudentConfig(
    block_out_channels=(32, 32),
    num_heads=2,
    cross_attention_dim=16,
    prompt_embedding_dim=16,
    latent_size=8,
    window=3,
    layers_per_block=1,
)
KEY = "diff_model.conv_in.conv_pw.weight"
ONE = torch.ones(1)
WEIGHTS = {"w": torch.arange(6.0).reshape(2, 3)}


@pytest.fixture
def student():
    return build_student(CONFIG)


@pytest.fixture
def state(student):
    return golden_state(student)


def save(state, path: Path) -> Path:
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    return path


def refused(student, path: Path, kind: type[MoebiusError], text: str) -> str:
    """Asserts the error's kind and text, that it is one line, and that the module was left alone."""
    before = {k: v.clone() for k, v in student.state_dict().items()}
    with pytest.raises(kind, match=text) as caught:
        load_checkpoint(student, path)
    message = str(caught.value)
    assert message.isprintable() and message.startswith(str(path)) and len(message) < 600
    assert all(torch.equal(v, before[k]) for k, v in student.state_dict().items())
    return message


@pytest.mark.parametrize(
    ("saved_as", "name"),
    [
        ("a.pth", "a.pth"),
        ("a.safetensors", "a.safetensors"),
        ("a.safetensors", "a.bin"),  # the content decides and not the name
        ("a.bin", "a.safetensors"),
        ("a.bin", os.fsdecode(b"c\xe9.bin")),
        ("old.bin", "old.bin"),
    ],
)
def test_every_format_loads_exactly(student, state, tmp_path, saved_as, name):
    if name == "old.bin":
        wrapped = {"state_dict": state, "options": argparse.Namespace(x=1)}
        torch.save(wrapped, tmp_path / name, _use_new_zipfile_serialization=False)
    else:
        save(state, tmp_path / saved_as).rename(tmp_path / name)
    load_checkpoint(student, tmp_path / name)
    loaded = student.state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[k], v) for k, v in state.items())


@pytest.mark.parametrize(
    ("wrap", "said"),
    [
        (lambda s: {"state_dict": s, "epoch": 3, "optimizer": [{"state": {0: ONE}}]}, "under state_dict"),
        (
            lambda s: {"state_dict": s, "sets": {1, 2}, "path": Path("a"), "when": datetime.now(), "x": np.float64(3)},
            "under state_dict",
        ),
        (lambda s: {"net": {k: v.mT.contiguous().mT if v.dim() > 1 else v for k, v in s.items()}}, "under net"),
        (lambda s: {"net": {**s, KEY: torch.stack([s[KEY], s[KEY]])[1]}}, "under net"),  # views are read as they were
        (lambda s: {"model": s, "ema": s}, r"under model \(not ema\) are taken"),
        (lambda s: {"state_dict": {"module": s}}, "under state_dict / module"),
        (lambda s: {f"module._orig_mod.{k}": v for k, v in s.items()}, "prefixes are taken off"),
        (lambda s: {k.replace("diff_model.", "diff_model.module."): v for k, v in s.items()}, "prefixes are taken off"),
        (
            lambda s: {**{f"model.{k}": v for k, v in s.items()}, "vae.quant_conv.bias": torch.ones(2)},
            "prefixes are taken off .*, 1 tensors beside them are not used",
        ),
        (lambda s: {"state_dict": {f"student.module.{k}": v for k, v in s.items()}}, "under state_dict are taken"),
    ],
)
def test_prefixes_and_nesting_are_unwrapped_with_a_note(student, state, tmp_path, wrap, said):
    notes = []
    load_checkpoint(student, save(wrap(state), tmp_path / "a.ckpt"), note=notes.append)
    assert all(torch.equal(student.state_dict()[k], v) for k, v in state.items())
    assert re.search(said, " | ".join(notes)) and "\n" not in "".join(notes)


def test_notes_go_to_stderr_and_a_plain_checkpoint_has_none(student, state, tmp_path, capsys):
    (tmp_path / "a").write_bytes(safetensors_bytes(WEIGHTS, {"note": "1"}))
    assert open_weights(tmp_path / "a").metadata == {"note": "1"}
    load_checkpoint(student, save(state, tmp_path / "a.bin"))
    assert capsys.readouterr().err == ""
    load_checkpoint(student, save({"state_dict": state}, tmp_path / "a.bin"))
    assert capsys.readouterr().err == "note: a.bin: the weights under state_dict are taken\n"


def test_an_average_takes_the_statistics_of_the_file_beside_it(student, state, tmp_path):
    """Upstream's trainer saves the parameters alone, under names without dots, and a table of their names."""
    path = tmp_path / "diffusion_pytorch_model.EMA.bin"
    average = {name: torch.full_like(p, 0.5) for name, p in student.named_parameters()}
    short = {name: name.replace(".", "") for name in average}
    buffers = {"num_updates": torch.tensor(7), **{short[name]: tensor for name, tensor in average.items()}}
    torch.save({"ema_buffers": buffers, "ema_name_map": short}, path)
    refused(student, path, BundleError, "not the batch norms' statistics: put diffusion_pytorch_model.bin, the file")
    save(state, tmp_path / "diffusion_pytorch_model.bin")
    notes: list[str] = []
    load_checkpoint(student, path, note=notes.append)
    loaded = student.state_dict()
    assert all(torch.equal(loaded[name], average.get(name, state[name])) for name in state)
    assert f"{len(state) - len(average)} tensors are taken from diffusion_pytorch_model.bin" in notes[-1]
    torch.save({"ema_buffers": {"x": ONE}}, path)
    refused(student, path, BundleError, "is a moving average without its ema_name_map")


@pytest.mark.parametrize("name", ["a.bin", "a.safetensors"])
def test_a_module_without_memory_gets_weights_of_its_own(state, tmp_path, name):
    with torch.device("meta"):
        student = build_student(CONFIG)
    half = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
    path = save(half, tmp_path / name)
    load_checkpoint(student, path)
    path.write_bytes(bytes(path.stat().st_size))
    assert all(torch.equal(student.state_dict()[k], v.to(state[k].dtype)) for k, v in half.items())
    assert all(parameter.requires_grad for parameter in student.parameters())


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ({"model.diffusion_model.input_blocks.0.0.weight": ONE}, r"has tensors 1 \(model.dif.*, none of a student"),
        ({"diff_model.mid_block.a.attn1.gk_proj.0.weight": ONE}, "is a teacher .*`moebius-edge train --teacher FILE`"),
        ({"network": {"a": ONE}, "average": {"a": ONE}, "recipe": {}}, "what `moebius-edge train --resume` goes on"),
        ([1, 2], "holds no dictionary of dense tensors: save module.state_dict"),
        ({1: ONE, (2, 3): ONE, float("nan"): ONE}, "holds no dictionary of dense tensors"),
        ({"a": ONE, "step": 3}, r"1 \(step\) beside them, a int"),
        ({"a": ONE.to_sparse()}, "holds no dictionary of dense tensors"),
        ({"a": ONE, "b": torch.ones(1, dtype=torch.complex64)}, r"1 \(b\) beside them, a Tensor"),
        ({"bad\nname" * 50: ONE}, r"has tensors 1 \(bad\?name.*\.\.\.\), none of a student: give a student's"),
        ({"diff_model.conv_in.conv_dw.weight": ONE, "more": ONE}, r"missing \d+ \(.*, unexpected 1 \(more\)"),
    ],
)
def test_what_is_no_student_is_named(student, tmp_path, content, text):
    torch.save(content, tmp_path / "a.pt")
    refused(student, tmp_path / "a.pt", BundleError, text)


def test_another_network_or_two(student, state, tmp_path):
    twice = {**{f"a.{k}": v for k, v in state.items()}, **{f"b.{k}": v for k, v in state.items()}}
    refused(student, save(twice, tmp_path / "a.bin"), BundleError, "holds several networks: save the one that is meant")
    twice = {**{f"module.{k}": v for k, v in state.items()}, **state, "more": torch.ones(1)}
    del twice[KEY]
    refused(student, save(twice, tmp_path / "a.bin"), BundleError, "holds several networks")
    teacher = build_teacher(TeacherConfig(block_out_channels=(32, 64), num_heads=2, layers_per_block=1))
    path = save(state, tmp_path / "a.bin")
    refused(teacher, path, BundleError, "is a Moebius student, .*`moebius-edge download teacher`")


def test_tensors_that_do_not_fit_are_counted_and_named(student, state, tmp_path):
    with torch.device("meta"):
        other = build_student(StudentConfig.from_dict({**CONFIG.to_dict(), "latent_size": 16}))
    message = refused(student, save(golden_state(other), tmp_path / "a.bin"), BundleError, "tensors of other shapes 6 ")
    assert "attn2.rel_pos_emb is (256, 10, 16, 1), expected (64, 10, 16, 1)" in message
    assert "give the configuration it was trained with" in message
    quantised = save({**state, KEY: state[KEY].to(torch.int8)}, tmp_path / "a.safetensors")
    refused(student, quantised, BundleError, rf"tensors of whole numbers 1 \({KEY} of int8\)")
    del state[KEY]
    state |= {f"more.{i}": torch.zeros(1) for i in range(5)}
    message = refused(student, save(state, tmp_path / "a.bin"), BundleError, "does not fit the network")
    assert f"missing 1 ({KEY}), unexpected 5 (more.0, more.1, more.2, ...)" in message


def test_values_that_are_not_finite_are_refused_by_name(student, state, tmp_path):
    for value in (float("nan"), float("inf")):
        state[KEY][3, 2] = value
        refused(student, save(state, tmp_path / "a.bin"), BundleError, rf"not finite in tensors 1 \({KEY}\)")
    state[KEY].fill_(3e38)  # finite, though their sum overflows
    load_checkpoint(student, save(state, tmp_path / "a.bin"))


class RunsCode:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("writer", ["torch", "older torch", "pickle"])
def test_a_pickle_that_would_run_code_is_refused(student, tmp_path, writer, protocol):
    path, marker = tmp_path / "evil.bin", tmp_path / "ran"
    evil = {**WEIGHTS, "more": RunsCode(marker)}
    if writer == "pickle":
        path.write_bytes(pickle.dumps(evil, protocol=protocol))
    else:
        torch.save(evil, path, pickle_protocol=protocol, _use_new_zipfile_serialization=writer == "torch")
    code = r"was refused: its pickle asks to run code \(posix.mkdir\), which weights never need"
    expected = {"pickle": "not one that torch.save wrote"}.get(writer, code)
    if protocol == 4 and writer != "pickle":
        expected = "no torch file|not one that torch.save wrote"
    refused(student, path, BundleError, expected)
    assert not marker.exists()


@pytest.mark.parametrize("kept", [10, 0.99])
@pytest.mark.parametrize("name", ["a.bin", "a.safetensors"])
def test_a_truncated_or_altered_file_is_refused(student, state, tmp_path, name, kept):
    path = save(state, tmp_path / name)
    whole = path.read_bytes()
    path.write_bytes(whole[: kept if isinstance(kept, int) else int(kept * len(whole))])
    refused(student, path, BundleError, "is empty|truncated|damaged")
    content = bytearray(whole)
    content[whole.index(state[KEY].numpy().tobytes()) + 5] ^= 1  # a flipped bit, which safetensors has no checksum for
    path.write_bytes(content)
    if name == "a.bin":
        refused(student, path, BundleError, "is damaged at 'a/data/")


npz = io.BytesIO()
np.savez(npz, a=np.ones(2))


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "is empty: copy or download it again"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a git-LFS pointer, .*: run `git lfs pull`"),
        (b"\n <!DOCTYPE html><html></html>", "is a web page .*: download the file itself"),
        (b"GGUF\x03\0\0\0", r"no file of weights, it begins b'GGUF.*: give a file of PyTorch weights"),
        (bytes(4096), "is truncated, damaged or no file of weights"),
        (npz.getvalue(), r"is a zip archive of other files \(a.npy\), not of torch.save"),
        (b"PK\3\4 and no more", "is truncated or damaged"),
        (pickle.dumps({"a": [1.0]}, protocol=2), "is a pickle, but not one that torch.save wrote"),
    ],
)
def test_what_is_no_file_of_weights_is_named(student, tmp_path, content, text):
    for name in ("a.bin", "a.safetensors"):
        (tmp_path / name).write_bytes(content)
        refused(student, tmp_path / name, BundleError, text)


def test_what_is_no_file_at_all(student, state, tmp_path, monkeypatch):
    refused(student, tmp_path / "none.bin", MachineError, "does not exist: `moebius-edge download places2`")
    refused(student, tmp_path, UsageError, "is a folder: give the checkpoint file in it")
    os.mkfifo(tmp_path / "pipe")
    refused(student, tmp_path / "pipe", UsageError, "is no regular file")
    for name, package in (("a.bin", "torch"), ("a.safetensors", "safetensors")):
        save(state, tmp_path / name)
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(MachineError, match=rf"reading weights needs {package}: run `pip install"):
            open_weights(tmp_path / name)


def zip_again(path: Path, old=b"", new=b"", compression=zipfile.ZIP_STORED) -> None:
    """Writes the archive anew, with right checksums, and ``new`` for ``old`` in the pickle."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data.replace(old, new) if old and name.endswith("data.pkl") else data)


def test_archives_of_another_kind(student, tmp_path):
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)), tmp_path / "a.pt")
    refused(student, tmp_path / "a.pt", BundleError, r"is a TorchScript program: save its state_dict\(\)")
    zip_again(save(WEIGHTS, tmp_path / "b.pt"), compression=zipfile.ZIP_DEFLATED)
    refused(student, tmp_path / "b.pt", BundleError, "was packed again or made up")


@pytest.mark.parametrize(
    "header",
    [
        b"{",
        b"{" + b"[" * 100_000,
        b'{"__metadata__": {"a": 1}}',
        b'{"w": {"dtype": "F32", "shape": [1099511627776], "data_offsets": [0, 4]}}',
        b'{"w": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}',
        b'{"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 1099511627776]}}',
    ],
)
def test_a_safetensors_header_that_lies(student, tmp_path, header):
    (tmp_path / "a.bin").write_bytes(struct.pack("<Q", len(header)) + header + b"1234")
    refused(student, tmp_path / "a.bin", BundleError, "is truncated or no safetensors file")


@pytest.mark.parametrize(
    ("old", "new", "zipped"),
    [
        *((b"K\x02K\x03\x86", b"K\xffK\xff\x86", zipped) for zipped in (True, False)),  # the shape
        *((b"K\x03K\x01\x86", b"K\xffK\xff\x86", zipped) for zipped in (True, False)),  # the strides
        (b"K\x06", b"K\xff", False),  # the size of the storage
    ],
)
def test_a_tensor_larger_than_its_storage(student, tmp_path, zipped, old, new):
    """Its elements would be whatever is in memory there."""
    path = tmp_path / "a.bin"
    torch.save(WEIGHTS, path, _use_new_zipfile_serialization=zipped)
    assert old in path.read_bytes()
    zip_again(path, old, new) if zipped else path.write_bytes(path.read_bytes().replace(old, new))
    refused(student, path, BundleError, "is truncated, damaged or no torch file")


@pytest.mark.parametrize(
    "operations",
    [
        b"cbuiltins\nbytearray\n" + b"\x8a\x06" + (1 << 40).to_bytes(6, "little") + b"\x85R",  # would take a terabyte
        b"cbuiltins\nbytearray\n" + b"\x8a\x04" + (1 << 30).to_bytes(4, "little") + b"\x85R",  # a gigabyte
        b"N" * 1_000_001,
        b"]q\x00h\x00a",  # a list in itself
        b"}q\x00X\x05\0\0\0modelh\x00s",  # a dictionary in itself
        b"\x8b\xff\xff\xff\x7f1",  # a number of two thousand million bytes
    ],
)
def test_a_pickle_made_to_take_memory(student, tmp_path, operations):
    magic, protocol = (pickle.dumps(number, 2) for number in (0x1950A86A20F9469CFC6C, 1001))
    machine = pickle.dumps({"little_endian": True}, 2)
    content = magic + protocol + machine + b"\x80\x02" + operations + b"." + pickle.dumps([], 2)
    (tmp_path / "a.bin").write_bytes(content)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is that of now
    before = peak_memory_bytes()
    refused(student, tmp_path / "a.bin", BundleError, "asks to run code|no torch file|no dictionary of dense tensors")
    after = peak_memory_bytes()
    assert before is not None and after is not None and after - before < 200e6
