"""The latent perceptual distances: the teacher's features by hand, E-LatentLPIPS through a stand-in package."""

from __future__ import annotations

import sys
from dataclasses import replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training_toys import TEACHER

from moebius_edge.errors import MachineError
from moebius_edge.model import Teacher, build_teacher
from moebius_edge.training.perceptual import (
    ELATENTLPIPS_FILES,
    ELatentLPIPS,
    TeacherFeatures,
    choose_distance,
    unit_distance,
)

torch.set_num_threads(1)

CONFIG = replace(TEACHER, block_out_channels=(32, 64), num_heads=2)


@pytest.fixture
def teacher() -> Teacher:
    torch.manual_seed(0)
    return build_teacher(CONFIG)


def latents() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Predicted, clean, mask, masked."""
    torch.manual_seed(1)
    predicted, clean, masked = torch.randn(3, 2, 4, 8, 8)
    return predicted, clean, torch.ones(2, 1, 8, 8), masked


def test_unit_distance_by_hand() -> None:
    features = torch.tensor([[3.0, 1.0], [4.0, 0.0]])[None, :, None, :]  # at two positions (3, 4) and (1, 0)
    references = torch.tensor([[4.0, 0.0], [3.0, 5.0]])[None, :, None, :]
    expected = ((0.6 - 0.8) ** 2 + (0.8 - 0.6) ** 2 + 2) / 2
    assert unit_distance(features, references).item() == pytest.approx(expected)
    assert unit_distance(7 * features, references).item() == pytest.approx(expected)
    assert unit_distance(-references, references).item() == pytest.approx(4)


def test_the_teachers_distance_is_that_of_its_down_and_mid_blocks(teacher: Teacher) -> None:
    predicted, clean, mask, masked = latents()
    distance = TeacherFeatures(teacher, timestep=17)
    blocks = []
    for latent in (predicted, clean):
        sample, ids = torch.cat([latent, mask, masked], 1), torch.arange(10).expand(2, 10)
        with torch.no_grad():
            blocks.append(teacher(sample, torch.tensor([17, 17]), ids).blocks[:3])
    expected = sum(unit_distance(ours, theirs) for ours, theirs in zip(*blocks, strict=True)) / 3
    torch.testing.assert_close(distance(predicted, clean, mask, masked), expected)
    assert distance(clean, clean, mask, masked).item() == 0


def test_gradients_reach_the_predicted_latent_alone(teacher: Teacher) -> None:
    inputs = [x.requires_grad_() for x in latents()[:2]]
    teacher.train()
    TeacherFeatures(teacher)(*inputs, *latents()[2:]).backward()
    assert inputs[0].grad is not None and float(inputs[0].grad.abs().min()) > 0
    assert inputs[1].grad is None
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())


def test_the_teachers_distance_in_half_precision(teacher: Teacher) -> None:
    exact = TeacherFeatures(teacher)(*latents())
    with torch.autocast("cpu", torch.bfloat16):
        rounded = TeacherFeatures(teacher)(*latents())
    assert rounded.dtype == torch.float32
    assert rounded.item() == pytest.approx(exact.item(), rel=0.02)
    assert TeacherFeatures(teacher.bfloat16())(*latents()).item() == pytest.approx(exact.item(), rel=0.05)


class FakeNetwork(nn.Module):
    """Stands in for elatentlpips.ELatentLPIPS: talks, has weights and dropout, draws random numbers."""

    made: list[dict[str, Any]] = []

    def __init__(self, **options: Any) -> None:
        super().__init__()
        print("Loading VGG16bn-base from: somewhere")
        self.made.append(options)
        self.weight = nn.Parameter(torch.tensor(2.0))

    def forward(self, in0: Tensor, in1: Tensor, normalize: bool = True) -> Tensor:
        in0, in1 = (x * 0.13025 if normalize else x for x in (in0, in1))
        assert in0.dtype == in1.dtype == torch.float32
        assert not torch.is_autocast_enabled("cpu") and not self.training
        shift = torch.rand(()) * 0
        return self.weight * (in0 - in1 + shift).abs().mean((1, 2, 3), keepdim=True)


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The stand-in is importable, the working folder empty, and the network out of reach."""
    module = ModuleType("elatentlpips")
    module.__spec__ = ModuleSpec("elatentlpips", None)
    module.ELatentLPIPS = FakeNetwork  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "elatentlpips", module)
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *_: pytest.fail("a download"))
    monkeypatch.setattr(FakeNetwork, "made", [])
    monkeypatch.chdir(tmp_path)
    return module


def put_weights() -> None:
    for path in ELATENTLPIPS_FILES:
        path.parent.mkdir(exist_ok=True)
        path.touch()


def test_elatentlpips_is_told_what_our_latents_are(package: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    put_weights()
    state = torch.get_rng_state()
    distance = ELatentLPIPS(torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), state), "the trial call moved the caller's random numbers"
    assert FakeNetwork.made == [{"encoder": "sdxl", "augment": "bg", "verbose": False}]
    printed = capsys.readouterr()
    assert printed.out == "" and "VGG16bn" in printed.err

    predicted, clean, mask, masked = latents()
    predicted.requires_grad_()
    clean.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        value = distance(predicted.bfloat16(), clean, mask, masked)
    assert value.item() == pytest.approx(2 * (predicted.bfloat16() - clean).abs().mean().item(), rel=1e-6)
    value.backward()
    assert predicted.grad is not None and clean.grad is None
    assert not any(p.requires_grad for p in distance.network.parameters())
    with torch.no_grad():
        rescaled = ELatentLPIPS(torch.device("cpu"), rescale=True)(predicted.bfloat16(), clean, mask, masked)
    assert rescaled.item() == pytest.approx(0.13025 * value.item(), rel=1e-5)


def test_auto_takes_elatentlpips_only_when_all_of_it_is_at_hand(package: ModuleType, teacher: Teacher) -> None:
    assert choose_distance("auto", teacher).name == "teacher"
    put_weights()
    assert choose_distance("auto", teacher).name == "elatentlpips"
    assert choose_distance("elatentlpips", teacher).name == "elatentlpips"
    assert choose_distance("teacher", teacher).name == "teacher"
    ELATENTLPIPS_FILES[1].unlink()
    assert choose_distance("auto", teacher).name == "teacher"
    FakeNetwork.made.clear()
    text = r"lacks elatentlpips' weights ckpt/sdxl_latest_vgg16_tuned.pth; run there: python -c \"import elatentlpips"
    with pytest.raises(MachineError, match=text):
        choose_distance("elatentlpips", teacher)
    assert FakeNetwork.made == []


def test_asked_for_without_its_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, teacher: Teacher) -> None:
    monkeypatch.delitem(sys.modules, "elatentlpips", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert choose_distance("auto", teacher).name == "teacher"
    with pytest.raises(MachineError, match='elatentlpips is not installed; run: pip install elatentlpips "setuptools'):
        choose_distance("elatentlpips", teacher)


def test_auto_hides_no_failure_of_what_is_there(
    package: ModuleType, monkeypatch: pytest.MonkeyPatch, teacher: Teacher
) -> None:
    put_weights()
    errors = iter([RuntimeError("Ninja is required\nmore"), EOFError()])

    def fail(**_: Any) -> None:
        raise next(errors)

    monkeypatch.setattr(package, "ELatentLPIPS", fail)
    for reason in ("Ninja is required", "EOFError"):
        with pytest.raises(MachineError, match=rf"does not work on cpu \({reason}\): delete ckpt and run python"):
            choose_distance("auto", teacher)
