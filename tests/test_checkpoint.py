"""Loading checkpoints: what fits is loaded exactly, everything else is refused in one line that says why."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch
from golden import golden_state
from safetensors.torch import save_file

from moebius_edge.errors import BundleError, MachineError, MoebiusError, UsageError
from moebius_edge.model import StudentConfig, build_student, load_checkpoint

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


@pytest.fixture
def student():
    return build_student(CONFIG)


@pytest.fixture
def state(student):
    return golden_state(student)


def save(state, path: Path) -> Path:
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    return path


def refused(student, path: Path, kind: type[MoebiusError], text: str) -> str:
    """Asserts the error's kind and text, that it is one line, and that the module was left alone."""
    before = {k: v.clone() for k, v in student.state_dict().items()}
    with pytest.raises(kind, match=text) as caught:
        load_checkpoint(student, path)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message
    assert all(torch.equal(v, before[k]) for k, v in student.state_dict().items())
    return message


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "a.pt", "a.pth", "a.safetensors"])
def test_every_format_loads_exactly(student, state, tmp_path, name):
    load_checkpoint(student, save(state, tmp_path / name))
    loaded = student.state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[k], v) for k, v in state.items())


def test_torchs_older_file_format_loads(student, state, tmp_path):
    path = tmp_path / "old.bin"
    torch.save(state, path, _use_new_zipfile_serialization=False)
    load_checkpoint(student, path)
    assert torch.equal(student.state_dict()[KEY], state[KEY])


class RunsCode:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("writer", ["torch", "older torch", "pickle"])
def test_a_pickle_that_would_run_code_is_refused(student, state, tmp_path, writer, protocol):
    path, marker = tmp_path / "evil.bin", tmp_path / "ran"
    evil = {**state, "more": RunsCode(marker)}
    if writer == "pickle":
        path.write_bytes(pickle.dumps({"more": RunsCode(marker)}, protocol=protocol))
    else:
        torch.save(evil, path, pickle_protocol=protocol, _use_new_zipfile_serialization=writer == "torch")
    refused(student, path, BundleError, "was refused: its pickle asks to run code")
    assert not marker.exists()


@pytest.mark.parametrize("kept", [0, 10, 0.3, 0.99])
@pytest.mark.parametrize("name", ["a.bin", "a.safetensors"])
def test_a_truncated_file_is_refused(student, state, tmp_path, name, kept):
    path = save(state, tmp_path / name)
    whole = path.read_bytes()
    path.write_bytes(whole[: kept if isinstance(kept, int) else int(kept * len(whole))])
    refused(student, path, BundleError, "is empty|truncated|damaged")


def test_a_flipped_bit_in_a_weight_is_refused(student, state, tmp_path):
    path = save(state, tmp_path / "a.bin")
    content = bytearray(path.read_bytes())
    content[content.index(state[KEY].numpy().tobytes()) + 5] ^= 1
    path.write_bytes(content)
    refused(student, path, BundleError, "is damaged at 'a/data/")


@pytest.mark.parametrize("zipped", [True, False])
def test_damage_anywhere_ends_in_one_clear_error(student, state, tmp_path, zipped):
    path = tmp_path / "a.bin"
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    for place in range(0, 4000, 97):  # the pickle itself lies at the start
        content = bytearray(whole)
        content[place : place + 4] = b"\xff\x00\x80R"
        path.write_bytes(content)
        try:
            load_checkpoint(student, path)
        except BundleError as error:
            assert "\n" not in str(error)


def test_text_named_as_a_checkpoint_is_refused(student, tmp_path):
    path = tmp_path / "page.bin"
    path.write_text("<html>not found</html>")
    refused(student, path, BundleError, "is truncated or no torch file; copy or download it again")


@pytest.mark.parametrize("content", [[1, 2], {"state_dict": {"a": torch.zeros(1)}}, {"a": 1}])
def test_other_content_is_refused(student, tmp_path, content):
    refused(student, save(content, tmp_path / "a.pt"), BundleError, "holds no flat dictionary of tensors")


def test_missing_and_unexpected_keys_are_counted_and_named(student, state, tmp_path):
    del state[KEY]
    for i in range(5):
        state[f"more.{i}"] = torch.zeros(1)
    message = refused(student, save(state, tmp_path / "a.bin"), BundleError, "does not fit the network")
    assert f"missing 1 ({KEY}), unexpected 5 (more.0, more.1, more.2, ...)" in message
    assert "of another configuration" in message


def test_another_latent_size_is_told_by_its_shapes(student, tmp_path):
    with torch.device("meta"):
        other = build_student(StudentConfig.from_dict({**CONFIG.to_dict(), "latent_size": 16}))
    message = refused(student, save(golden_state(other), tmp_path / "a.bin"), BundleError, "tensors of other shapes 6 ")
    assert "attn2.rel_pos_emb is (256, 10, 16, 1), expected (64, 10, 16, 1)" in message
    assert "of another configuration" in message


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused_by_name(student, state, tmp_path, value):
    state[KEY][3, 2] = value
    message = refused(student, save(state, tmp_path / "a.safetensors"), BundleError, "not finite in tensors 1 ")
    assert KEY in message


def test_huge_but_finite_values_load(student, state, tmp_path):
    state[KEY].fill_(3e38)  # their sum overflows
    load_checkpoint(student, save(state, tmp_path / "a.bin"))
    assert bool((student.state_dict()[KEY] == state[KEY]).all())


def test_a_missing_file_names_the_download(student, tmp_path):
    refused(student, tmp_path / "none.bin", MachineError, "does not exist; `moebius-edge download places2`")


def test_a_folder_or_another_ending_is_refused(student, tmp_path):
    refused(student, tmp_path, UsageError, "is a folder; give the checkpoint file in it")
    path = tmp_path / "weights.onnx"
    path.write_bytes(b"x")
    refused(student, path, UsageError, "give a .bin, .pt, .pth or .safetensors file")
