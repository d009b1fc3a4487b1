"""Loading checkpoints: what fits is loaded exactly, everything else is refused in one line that says why."""

from __future__ import annotations

import os
import pickle
import re
from pathlib import Path

import pytest
import torch
from golden import golden_state
from safetensors.torch import save_file

from moebius_edge.errors import BundleError, MachineError, MoebiusError
from moebius_edge.model import StudentConfig, TeacherConfig, build_student, build_teacher, load_checkpoint

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


@pytest.mark.parametrize(
    ("wrap", "said"),
    [
        (
            lambda s: {"state_dict": s, "epoch": 3, "optimizer_states": [{"state": {0: torch.ones(2)}}]},
            "under state_dict",
        ),
        (lambda s: {"model": s, "ema": s}, r"under model \(not ema\) are taken"),
        (lambda s: {"state_dict": {"module": s}}, "under state_dict / module"),
        (lambda s: {f"module.{k}": v for k, v in s.items()}, "'module.' is left out"),
        (lambda s: {f"_orig_mod.{k}": v for k, v in s.items()}, "'_orig_mod.' is left out"),
        (lambda s: {k.replace("diff_model.", "diff_model.module."): v for k, v in s.items()}, "'module.' is left out"),
        (lambda s: {f"module._orig_mod.{k}": v for k, v in s.items()}, "'module.' is left out"),
        (lambda s: {k.replace("diff_model.", "unet."): v for k, v in s.items()}, r"unet.\* are taken as diff_model.\*"),
        (lambda s: {k.replace("diff_model.", ""): v for k, v in s.items()}, r"named \* are taken as diff_model.\*"),
        (
            lambda s: {**{f"model.{k}": v for k, v in s.items()}, "vae.quant_conv.bias": torch.ones(2)},
            r"named model.diff_model.\* are taken as diff_model.\*, 1 tensors beside them are not used",
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
    load_checkpoint(student, save(state, tmp_path / "a.bin"))
    assert capsys.readouterr().err == ""
    load_checkpoint(student, save({"state_dict": state}, tmp_path / "a.bin"))
    assert capsys.readouterr().err == "note: a.bin: the weights under state_dict are taken\n"


def test_the_content_decides_and_not_the_name(student, state, tmp_path):
    save(state, tmp_path / "a.safetensors").rename(tmp_path / "a.bin")
    load_checkpoint(student, tmp_path / "a.bin")
    save(state, tmp_path / "b.bin").rename(tmp_path / "b.safetensors")
    load_checkpoint(student, tmp_path / "b.safetensors")
    assert torch.equal(student.state_dict()[KEY], state[KEY])


def save_average(student, path: Path) -> dict[str, torch.Tensor]:
    """As upstream's trainer saves its moving average: parameters alone, under names without dots, and a table of
    them."""
    average = {name: torch.full_like(p, 0.5) for name, p in student.named_parameters()}
    short = {name: name.replace(".", "") for name in average}
    buffers = {"decay": torch.tensor(0.9999), "num_updates": torch.tensor(7)}
    buffers |= {short[name]: tensor for name, tensor in average.items()}
    torch.save({"ema_buffers": buffers, "ema_name_map": short}, path)
    return average


def test_an_average_takes_the_statistics_of_the_file_beside_it(student, state, tmp_path):
    path = tmp_path / "diffusion_pytorch_model.EMA.bin"
    average = save_average(student, path)
    refused(student, path, BundleError, "not the batch norms' statistics: put diffusion_pytorch_model.bin, the file")
    save(state, tmp_path / "diffusion_pytorch_model.bin")
    notes: list[str] = []
    load_checkpoint(student, path, note=notes.append)
    loaded = student.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in average.items())
    statistics = state.keys() - average.keys()
    assert all(torch.equal(loaded[name], state[name]) for name in statistics)
    assert f"{len(statistics)} tensors are taken from diffusion_pytorch_model.bin" in notes[-1]


def test_an_average_without_its_table_of_names(student, tmp_path):
    path = tmp_path / "a.EMA.bin"
    torch.save({"ema_buffers": {"x": torch.ones(1)}}, path)
    refused(student, path, BundleError, "is a moving average without its ema_name_map")


def test_the_same_network_twice_is_refused(student, state, tmp_path):
    twice = {**{f"a.{k}": v for k, v in state.items()}, **{f"b.{k}": v for k, v in state.items()}}
    refused(student, save(twice, tmp_path / "a.bin"), BundleError, "holds several networks, under a., b.: save the one")
    twice = {**{f"module.{k}": v for k, v in state.items()}, **state, "more": torch.ones(1)}
    del twice[KEY]
    refused(student, save(twice, tmp_path / "a.bin"), BundleError, "the same network twice, wrapped and plain")


def test_a_u_net_without_its_prompts(student, state, tmp_path):
    bare = {k.removeprefix("diff_model."): v for k, v in state.items() if k.startswith("diff_model.")}
    path = save(bare, tmp_path / "a.bin")
    refused(student, path, BundleError, "holds the U-Net without the prompts' embedding_layer.weight: save")


ONE = torch.ones(1)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ({"lora_unet_down_blocks_0.lora_down.weight": ONE}, "is a LoRA, .* give the weights of a whole student"),
        ({"diff_model.x.attn1.pos_conv.lora_A.weight": ONE}, "is a LoRA"),
        ({"model.diffusion_model.input_blocks.0.0.weight": ONE}, "is a Stable Diffusion checkpoint"),
        (
            {"conv_in.weight": ONE, "up_blocks.0.resnets.0.conv1.weight": ONE},
            "up_blocks.0.resnets.0.conv1.weight, is a Stable Diffusion U-Net: .*`moebius-edge download places2`",
        ),
        ({"decoder.conv_in.weight": ONE}, r"is an autoencoder \(VAE\): give its folder with --vae"),
        ({"text_model.embeddings.token_embedding.weight": ONE}, "is a text encoder or a language model"),
        ({"diff_model.mid_block.a.attn1.gk_proj.0.weight": ONE}, "is a teacher .*`moebius-edge train --teacher FILE`"),
        (
            {"network": {"a": ONE}, "average": {"a": ONE}, "recipe": {}},
            "what `moebius-edge train --resume` goes on from",
        ),
        ({"optimizer": {"state": {0: ONE}}}, "holds no dictionary of tensors"),
        ([1, 2], "holds no dictionary of tensors: save module.state_dict"),
        ({"a": 1}, "holds no dictionary of tensors"),
        ({"a": ONE, "step": 3}, r"1 \(step\) beside them, a int"),
        ({"a": ONE.to_sparse()}, "no dense tensors but torch._utils._rebuild_sparse_tensor"),
        (
            {"a": ONE, "b": torch.quantize_per_tensor(ONE, 1.0, 0, torch.qint8)},
            r"1 \(b\) beside them, torch._utils._rebuild_q",
        ),
        ({"a": torch.ones(1, device="meta")}, "no dense tensors but torch._utils._rebuild_meta_tensor"),
        ({"a": torch.ones(1, dtype=torch.complex64)}, "no dense tensors but a tensor of complexfloat numbers"),
        ({"bad\nname" * 50: ONE}, r"has tensors 1 \(bad\?name.*\.\.\.\), none of a student: give a student's"),
        ({"diff_model.conv_in.conv_dw.weight": ONE, "more": ONE}, r"missing \d+ \(.*, unexpected 1 \(more\)"),
        ({1: ONE, (2, 3): ONE, float("nan"): ONE}, "holds no dictionary of tensors"),
    ],
)
def test_what_is_no_student_is_named(student, tmp_path, content, text):
    path = tmp_path / "a.pt"
    torch.save(content, path)
    refused(student, path, BundleError, text)


def test_a_student_where_a_teacher_is_wanted(state, tmp_path):
    teacher = build_teacher(TeacherConfig(block_out_channels=(32, 64), num_heads=2, layers_per_block=1))
    refused(
        teacher, save(state, tmp_path / "a.bin"), BundleError, "is a Moebius student, .*`moebius-edge download teacher`"
    )


def test_whole_numbers_where_weights_belong(student, state, tmp_path):
    state[KEY] = state[KEY].to(torch.int8)
    refused(student, save(state, tmp_path / "a.safetensors"), BundleError, rf"whole numbers .* 1 \({KEY} of int8\)")


def test_views_are_read_as_they_were_saved(student, state, tmp_path):
    whole = torch.cat([torch.zeros(3), state[KEY].flatten()])
    shared = {**state, KEY: whole[3:].view(state[KEY].shape)}
    transposed = shared["embedding_layer.weight"].t().contiguous().t()
    torch.save({**shared, "embedding_layer.weight": transposed}, tmp_path / "a.bin")
    load_checkpoint(student, tmp_path / "a.bin")
    assert all(torch.equal(student.state_dict()[k], v) for k, v in state.items())


def test_a_small_storage_seen_as_a_large_tensor_is_refused(student, state, tmp_path):
    state[KEY] = torch.ones(1).expand(1 << 20, 1 << 20)  # four bytes in the file
    path = tmp_path / "a.bin"
    torch.save(state, path)
    refused(student, path, BundleError, "a tensor of 1099511627776 elements in a storage of 1")


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
    refused(student, tmp_path / "none.bin", MachineError, "does not exist: `moebius-edge download places2`")


def test_a_module_without_memory_gets_the_weights(state, tmp_path):
    with torch.device("meta"):
        student = build_student(CONFIG)
    half = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
    load_checkpoint(student, save(half, tmp_path / "a.safetensors"))
    assert all(torch.equal(student.state_dict()[k], v.to(state[k].dtype)) for k, v in half.items())
    assert all(parameter.requires_grad for parameter in student.parameters())
