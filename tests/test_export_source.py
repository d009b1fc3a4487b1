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
from safetensors.torch import save_file

from moebius_edge.errors import BundleError, MachineError, UsageError
from moebius_edge.export import export_bundle
from moebius_edge.export.source import find_source, load_config, load_student, load_vae
from moebius_edge.model import StudentConfig, TeacherConfig, build_teacher


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("parts")
    return SimpleNamespace(student=save_student(folder / "golden.pt"), vae=save_vae(folder / "vae"))


def refused(parts: SimpleNamespace, tmp_path: Path, **changes: Any) -> None:
    """Run the exporter with ``changes``; whatever is raised, no output may exist afterwards."""
    arguments = {"source": parts.student, "vae": parts.vae, "output": tmp_path / "made" / "bundle", **changes}
    (tmp_path / "made").mkdir()
    try:
        export_bundle(arguments.pop("source"), arguments.pop("vae"), arguments.pop("output"), steps=2, **arguments)
    finally:
        assert list((tmp_path / "made").iterdir()) == []


class Payload:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("ran"),))


def test_a_pickle_that_would_run_code(parts: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    bad = tmp_path / "bad.bin"
    torch.save({"w": Payload()}, bad)
    with pytest.raises(BundleError, match="bad.bin was refused: its pickle asks to run code"):
        refused(parts, tmp_path, source=bad)
    vae = tmp_path / "vae"
    shutil.copytree(parts.vae, vae)
    (vae / "diffusion_pytorch_model.safetensors").unlink()
    torch.save({"w": Payload()}, vae / "diffusion_pytorch_model.bin")
    shutil.rmtree(tmp_path / "made")
    with pytest.raises(BundleError, match="diffusion_pytorch_model.bin was refused: its pickle asks to run code"):
        refused(parts, tmp_path, vae=vae)
    assert not (tmp_path / "ran").exists()


def test_weights_that_are_not_finite(parts: SimpleNamespace, tmp_path: Path) -> None:
    state = torch.load(parts.student, weights_only=True)
    state["diff_model.conv_out.conv_pw.weight"][0, 0] = math.nan
    save_file(state, tmp_path / "nan.safetensors")
    shutil.copy(parts.student.with_suffix(".json"), tmp_path / "student.json")
    with pytest.raises(BundleError, match=r"not finite in tensors 1 \(diff_model.conv_out.conv_pw.weight\)"):
        refused(parts, tmp_path, source=tmp_path / "nan.safetensors")


def test_a_vae_that_is_not_finite(parts: SimpleNamespace, tmp_path: Path) -> None:
    vae = AutoencoderKL.from_pretrained(parts.vae, low_cpu_mem_usage=False)
    vae.decoder.conv_out.bias.data[0] = math.inf
    vae.save_pretrained(tmp_path / "vae")
    with pytest.raises(BundleError, match=r"not finite in tensors 1 \(decoder.conv_out.bias\)"):
        refused(parts, tmp_path, vae=tmp_path / "vae")


def test_a_vae_that_lacks_a_tensor(parts: SimpleNamespace, tmp_path: Path) -> None:
    """diffusers would fill it with random values and only log that."""
    state = AutoencoderKL.from_pretrained(parts.vae, low_cpu_mem_usage=False).state_dict()
    del state["decoder.conv_out.bias"]
    shutil.copytree(parts.vae, tmp_path / "vae")
    save_file(state, tmp_path / "vae" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(BundleError, match=r"does not fit the network: tensors missing 1 \(decoder.conv_out.bias"):
        refused(parts, tmp_path, vae=tmp_path / "vae")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scaling_factor": None}, "has the scaling_factor None: write the one .* published one is 0.13025"),
        ({"latent_channels": 16}, "has 16 latent channels, the student works on 4"),
        ({"_class_name": "VQModel"}, "describes 'VQModel'"),
        ({"block_out_channels": [8, 16]}, "does not reduce images 8-fold"),
        ({"shift_factor": 0.1}, "shifts its latents by 0.1"),
    ],
)
def test_a_vae_of_another_model(parts: SimpleNamespace, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    shutil.copytree(parts.vae, tmp_path / "vae")
    config = json.loads((parts.vae / "config.json").read_text())
    (tmp_path / "vae" / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(UsageError, match=message):
        refused(parts, tmp_path, vae=tmp_path / "vae")


def test_things_that_are_not_there(parts: SimpleNamespace, tmp_path: Path) -> None:
    for changes, error, message in (
        ({"vae": tmp_path / "none"}, MachineError, "no VAE folder .*none: .*moebius-edge download"),
        ({"vae": tmp_path}, UsageError, "holds no config.json"),
        ({"vae": None}, UsageError, "needs an autoencoder: add --vae DIR"),
        ({"source": tmp_path / "none.bin"}, MachineError, "there is no checkpoint .*none.bin"),
        ({"source": tmp_path}, UsageError, "is a folder: name the file"),
        ({"config": tmp_path / "none.json"}, MachineError, "cannot read .*none.json"),
        ({"output": tmp_path / "no" / "where"}, MachineError, "mkdir -p"),
        ({"guidance": -1.0}, UsageError, "guidance is -1.0"),
        (
            {"name": "", "config": parts.vae / "config.json"},
            BundleError,
            "config.json: model configuration: _class_name is an unknown field",
        ),
    ):
        with pytest.raises(error, match=message):
            refused(parts, tmp_path, **changes)
        (tmp_path / "made").rmdir()


def test_weights_of_another_configuration(parts: SimpleNamespace, tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    other.write_text(json.dumps({**CONFIG.to_dict(), "window": 7}))
    with pytest.raises(BundleError, match="another configuration"):
        refused(parts, tmp_path, config=other)


def test_a_missing_package(parts: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(MachineError, match=r'export needs onnxscript: run `pip install "moebius-edge\[export\]"`'):
        refused(parts, tmp_path)


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


@pytest.mark.parametrize(
    "change",
    [
        {"layers_per_block": 10**9},
        {"block_out_channels": [2**30] * 4},
        {"block_out_channels": ["8", 16, 16, 16]},
        {"norm_num_groups": 0},
        {"in_channels": 2.5},
    ],
)
def test_a_vae_configuration_of_impossible_sizes(
    parts: SimpleNamespace, tmp_path: Path, change: dict[str, Any]
) -> None:
    shutil.copytree(parts.vae, tmp_path / "vae")
    config = json.loads((parts.vae / "config.json").read_text())
    (tmp_path / "vae" / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(UsageError, match="config.json has sizes that no autoencoder has"):
        refused(parts, tmp_path, vae=tmp_path / "vae")


@pytest.mark.parametrize("change", [{"down_block_types": ["None"] * 4}, {"act_fn": "nothing"}, {"norm_num_groups": 3}])
def test_a_vae_configuration_that_describes_none(
    parts: SimpleNamespace, tmp_path: Path, change: dict[str, Any]
) -> None:
    shutil.copytree(parts.vae, tmp_path / "vae")
    config = json.loads((parts.vae / "config.json").read_text())
    (tmp_path / "vae" / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(UsageError, match="config.json describes no autoencoder"):
        refused(parts, tmp_path, vae=tmp_path / "vae")


def test_a_configuration_that_is_too_large_for_one(parts: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / "large.json").write_text("[" * (2 << 20))
    with pytest.raises(UsageError, match="large.json is too large for a configuration"):
        load_config(find_source(parts.student, parts.vae, tmp_path / "large.json"))


def test_a_teacher_is_named_before_anything_else_is_asked_for(parts: SimpleNamespace, tmp_path: Path) -> None:
    config = TeacherConfig(block_out_channels=(32, 64), num_heads=4, layers_per_block=1)
    with torch.device("meta"):
        teacher = build_teacher(config)
    state = golden_state(teacher)
    for name in ("teacher.safetensors", "own.bin"):
        save_file(state, tmp_path / name) if name.endswith("s") else torch.save(state, tmp_path / name)
        (tmp_path / name).with_suffix(".json").write_text(json.dumps(config.to_dict()))
        with pytest.raises(BundleError, match=f"{name} is a teacher .*: teachers are for `moebius-edge train"):
            refused(parts, tmp_path, source=tmp_path / name, vae=None)
        (tmp_path / "made").rmdir()
    with pytest.raises(UsageError, match=r"teacher.json: it describes a teacher, and a student is wanted"):
        refused(parts, tmp_path, config=tmp_path / "teacher.json")


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
