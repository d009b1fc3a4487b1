"""What export is given: what is refused, with which words and leaving nothing behind, and what is accepted."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from exporting import CONFIG, save_student, save_vae
from golden import golden_state
from safetensors.torch import load_file, save, save_file

from moebius_edge.checkpoints.weights_metadata import find_guidance, guidance_metadata
from moebius_edge.errors import BundleError, MachineError, UsageError
from moebius_edge.export import BundleOptions, export_bundle
from moebius_edge.export.source import find_source, load_config, load_student, load_vae
from moebius_edge.model import StudentConfig, TeacherConfig, build_teacher

WEIGHTS = "diffusion_pytorch_model"


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("parts")
    return SimpleNamespace(student=save_student(folder / "golden.pt"), vae=save_vae(folder / "vae"))


def refused(
    error: type[Exception], message: str, parts: SimpleNamespace, folder: Path, source: Any = None, **changes: Any
) -> None:
    """Run the exporter with ``changes``: it raises, and no output exists afterwards."""
    output = changes.pop("output", folder / "made" / "bundle")
    (folder / "made").mkdir()
    with pytest.raises(error, match=message):
        export_bundle(source or parts.student, output, BundleOptions(**{"vae": parts.vae, "steps": 2, **changes}))
    (folder / "made").rmdir()


def changed_vae(parts: SimpleNamespace, folder: Path, **change: Any) -> Path:
    """A copy of the VAE's folder with other values in its configuration."""
    shutil.copytree(parts.vae, folder)
    config = json.loads((parts.vae / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    return folder


class Payload:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("ran"),))


def test_a_pickle_that_would_run_code(parts: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"w": Payload()}, tmp_path / "bad.bin")
    refused(BundleError, "bad.bin was refused: its pickle asks to run code", parts, tmp_path, tmp_path / "bad.bin")
    vae = changed_vae(parts, tmp_path / "vae")
    (vae / f"{WEIGHTS}.safetensors").unlink()
    torch.save({"w": Payload()}, vae / f"{WEIGHTS}.bin")
    refused(BundleError, f"{WEIGHTS}.bin was refused: its pickle asks to run code", parts, tmp_path, vae=vae)
    assert not (tmp_path / "ran").exists()


def test_weights_that_are_not_finite(parts: SimpleNamespace, tmp_path: Path) -> None:
    state = torch.load(parts.student, weights_only=True)
    state["diff_model.conv_out.conv_pw.weight"][0, 0] = math.nan
    save_file(state, tmp_path / "nan.safetensors")
    shutil.copy(parts.student.with_suffix(".json"), tmp_path / "student.json")
    message = r"not finite in tensors 1 \(diff_model.conv_out.conv_pw.weight\)"
    refused(BundleError, message, parts, tmp_path, tmp_path / "nan.safetensors")


@pytest.mark.parametrize(
    ("bias", "message"),
    [
        (math.inf, r"not finite in tensors 1 \(decoder.conv_out.bias\)"),
        (None, r"does not fit the network: tensors missing 1 \(decoder.conv_out.bias"),  # diffusers would draw it
    ],
)
def test_vae_weights_that_are_unfit(parts: SimpleNamespace, tmp_path: Path, bias: float | None, message: str) -> None:
    vae = changed_vae(parts, tmp_path / "vae")
    state = load_file(vae / f"{WEIGHTS}.safetensors")
    if bias is None:
        del state["decoder.conv_out.bias"]
    else:
        state["decoder.conv_out.bias"][0] = bias
    save_file(state, vae / f"{WEIGHTS}.safetensors")
    refused(BundleError, message, parts, tmp_path, vae=vae)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scaling_factor": None}, r"scaling_factor is None, expected .*the published scaling_factor is 0\.13025"),
        ({"latent_channels": 0}, "latent_channels is 0"),
        ({"_class_name": "VQModel"}, "_class_name is 'VQModel', expected .*AutoencoderKL"),
        ({"block_out_channels": [8, 16]}, "block_out_channels is "),  # it does not reduce images eightfold
        ({"shift_factor": 0.1}, "shift_factor is 0.1"),
        ({"layers_per_block": 10**9}, "layers_per_block is 1000000000"),
        ({"block_out_channels": [2**30] * 4}, "block_out_channels.0 is "),
        ({"block_out_channels": ["8", 16, 16, 16]}, "block_out_channels.0 is '8'"),
        ({"norm_num_groups": 0}, "norm_num_groups is 0"),
        ({"in_channels": 2.5}, "in_channels is 2.5"),
        ({"down_block_types": ["None"] * 4}, "describes no autoencoder"),
        ({"act_fn": "nothing"}, "describes no autoencoder"),
        ({"norm_num_groups": 3}, "describes no autoencoder"),
    ],
)
def test_a_vae_of_another_model(parts: SimpleNamespace, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    refused(UsageError, f"config.json:? {message}", parts, tmp_path, vae=changed_vae(parts, tmp_path / "vae", **change))


def test_a_vae_of_other_latents_than_the_student_s(parts: SimpleNamespace, tmp_path: Path) -> None:
    message = "the student works on latents of 4 channels, but the autoencoder .*vae makes 16: .*--vae DIR"
    refused(UsageError, message, parts, tmp_path, vae=changed_vae(parts, tmp_path / "vae", latent_channels=16))


def test_things_that_are_not_there(parts: SimpleNamespace, tmp_path: Path) -> None:
    for changes, error, message in (
        ({"vae": tmp_path / "none"}, MachineError, "no VAE in .*none, .*moebius-edge download"),
        ({"vae": tmp_path}, MachineError, "which has no config.json"),
        ({"vae": None}, UsageError, "needs an autoencoder: add --vae DIR"),
        ({"source": tmp_path / "none.bin"}, MachineError, "there is no checkpoint .*none.bin"),
        ({"source": tmp_path}, UsageError, "is a folder: name the file"),
        ({"config": tmp_path / "none.json"}, MachineError, "cannot read .*none.json"),
        ({"output": tmp_path / "no" / "where"}, MachineError, "mkdir -p"),
        ({"guidance": -1.0}, UsageError, "guidance is -1.0"),
        ({"config": parts.vae / "config.json"}, BundleError, "model configuration: _class_name is an unknown field"),
    ):
        refused(error, message, parts, tmp_path, **changes)


def test_weights_of_another_configuration(parts: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text(json.dumps({**CONFIG.to_dict(), "window": 7}))
    refused(BundleError, "another configuration", parts, tmp_path, config=tmp_path / "other.json")
    (tmp_path / "large.json").write_text("[" * (3 << 20))
    refused(UsageError, "large.json: the file has 3145728 bytes", parts, tmp_path, config=tmp_path / "large.json")


def test_a_missing_package(parts: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    refused(MachineError, r'export needs onnxscript: run `pip install "moebius-edge\[export\]"`', parts, tmp_path)


def test_half_precision_weights_become_float32(parts: SimpleNamespace, tmp_path: Path) -> None:
    state = torch.load(parts.student, weights_only=True)
    half = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
    save_file(half, tmp_path / "student.safetensors")
    shutil.copy(parts.student.with_suffix(".json"), tmp_path / "student.json")
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    AutoencoderKL.from_pretrained(parts.vae, low_cpu_mem_usage=False).half().save_pretrained(
        tmp_path / "vae", safe_serialization=False
    )
    source = find_source(tmp_path / "student.safetensors", tmp_path / "vae", None)
    assert source.config == tmp_path / "student.json"
    student, vae = load_student(source, load_config(source)), load_vae(source)
    for module in (student, vae):
        assert {p.dtype for p in module.parameters()} == {torch.float32} and not module.training
    key = "diff_model.conv_in.conv_pw.weight"
    assert torch.equal(student.state_dict()[key], half[key].float())
    (tmp_path / "student.json").unlink()
    source = find_source(tmp_path / "student.safetensors", tmp_path / "vae", None)
    assert source.config is None and load_config(source) == StudentConfig(), "a diffusers file is no configuration"


@pytest.mark.parametrize("safe", [True, False])
def test_a_vae_folder_with_the_fp16_variant_alone(parts: SimpleNamespace, tmp_path: Path, safe: bool) -> None:
    vae = AutoencoderKL.from_pretrained(parts.vae, low_cpu_mem_usage=False).half()
    vae.save_pretrained(tmp_path / "vae", variant="fp16", safe_serialization=safe)
    source = find_source(parts.student, tmp_path / "vae", None)
    assert source.vae_weights.name == f"diffusion_pytorch_model.fp16.{'safetensors' if safe else 'bin'}"
    loaded = load_vae(source).state_dict()
    assert all(torch.equal(loaded[key], tensor.float()) for key, tensor in vae.state_dict().items())


def test_a_teacher_is_named_before_anything_else_is_asked_for(parts: SimpleNamespace, tmp_path: Path) -> None:
    config = TeacherConfig(block_out_channels=(32, 64), num_heads=4, layers_per_block=1)
    with torch.device("meta"):
        teacher = build_teacher(config)
    state = golden_state(teacher)
    for name in ("teacher.safetensors", "own.bin"):
        save_file(state, tmp_path / name) if name.endswith("s") else torch.save(state, tmp_path / name)
        (tmp_path / name).with_suffix(".json").write_text(json.dumps(config.to_dict()))
        message = f"{name} is a teacher .*: teachers are for `moebius-edge train"
        refused(BundleError, message, parts, tmp_path, tmp_path / name, vae=None)
    message = "teacher.json: it describes a teacher, and a student is wanted"
    refused(UsageError, message, parts, tmp_path, config=tmp_path / "teacher.json")


def test_a_vae_with_the_older_names_of_its_attention(parts: SimpleNamespace, tmp_path: Path) -> None:
    expected = AutoencoderKL.from_pretrained(parts.vae, low_cpu_mem_usage=False).state_dict()
    state = {}
    for key, tensor in expected.items():
        for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            key = key.replace(f"attentions.0.{new}", f"attentions.0.{old}")
        state[key] = tensor
    assert set(state) != set(expected)
    (tmp_path / "vae").mkdir()
    shutil.copy(parts.vae / "config.json", tmp_path / "vae")
    torch.save(state, tmp_path / "vae" / "diffusion_pytorch_model.bin")
    loaded = load_vae(find_source(parts.student, tmp_path / "vae", None)).state_dict()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in expected.items())


# The guidance that a student has learned, noted in its file of weights


def noted(path: Path, metadata: dict[str, str] | None = None) -> Path:
    path.write_bytes(save({"w": torch.arange(3.0)}, metadata))
    return path


@pytest.mark.parametrize("guidance", [2, 1.1, 7.5])
def test_what_is_noted_is_found_and_not_overruled(parts: SimpleNamespace, tmp_path: Path, guidance: float) -> None:
    path = noted(tmp_path / "student.safetensors", guidance_metadata(guidance))
    assert find_guidance(path, None) == find_guidance(path, guidance) == guidance
    assert find_source(path, parts.vae, None).distilled_guidance == guidance
    assert torch.equal(load_file(path)["w"], torch.arange(3.0)), "the weights are as without the note"
    with pytest.raises(UsageError, match=r"notes guidance .* as distilled, not 3.0: leave --distilled-g"):
        find_guidance(path, 3.0)


def test_without_a_note_the_user_may_say(parts: SimpleNamespace, tmp_path: Path) -> None:
    (pickled := tmp_path / "student.bin").write_bytes(b"not opened")
    for path in (pickled, noted(tmp_path / "a.safetensors"), noted(tmp_path / "b.safetensors", {"format": "pt"})):
        assert find_guidance(path, None) is None and find_guidance(path, 2.5) == 2.5
    assert find_source(path, parts.vae, None, 4.0).distilled_guidance == 4.0


@pytest.mark.parametrize("guidance", [1.0, 0.0, -2.0, float("nan"), float("inf")])
def test_a_guidance_that_cannot_be_distilled(tmp_path: Path, guidance: float) -> None:
    for call in (guidance_metadata, lambda value: find_guidance(tmp_path / "student.bin", value)):
        with pytest.raises(UsageError, match=f"distilled guidance is {guidance}: give a number of more than 1"):
            call(guidance)


@pytest.mark.parametrize("note", ["two", "", "1.0", "nan", "inf", "-3"])
def test_a_note_that_is_no_guidance(tmp_path: Path, note: str) -> None:
    path = noted(tmp_path / "student.safetensors", {"distilled_guidance": note})
    with pytest.raises(BundleError, match=f"notes the distilled_guidance '{note}', not a number of more than 1: copy"):
        find_guidance(path, None)


def test_weights_that_cannot_be_read(tmp_path: Path) -> None:
    path = noted(tmp_path / "student.safetensors")
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(BundleError, match=r"student.safetensors is truncated or no safetensors file .*: copy or"):
        find_guidance(path, None)
    with pytest.raises(MachineError, match=r"none.safetensors cannot be read \(.*\): give a readable file"):
        find_guidance(tmp_path / "none.safetensors", None)
