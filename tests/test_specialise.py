"""Every rewrite beside its plain twin: differences under 1e-5 of the output's scale, and the plain one untouched."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from exporting import CONFIG, PlainDenoiser
from golden import fill_golden
from torch import nn

from moebius_edge.bundle.manifest import resolved_components
from moebius_edge.export.onnx_file import OPSET, write_onnx
from moebius_edge.export.operators import TRANSLATIONS, function_bodies
from moebius_edge.export.specialise import (
    FoldedSeparableConv,
    QuarteredUpsample,
    SpecialBlock,
    SpecialInteractive,
    SpecialLocal,
    SpecialMixFFN,
    specialise,
)
from moebius_edge.model import Student, build_student
from moebius_edge.model.layers import SpatialTransformer, Upsample
from moebius_edge.model.student import LambdaBlock, MixFFN, SeparableConv

torch.set_num_threads(1)
LIMIT = 1e-5  # of the output's largest value


def unsettled(module: nn.Module, seed: int = 0) -> nn.Module:
    """``module`` in evaluation mode, with norms that change something: their statistics are not 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    for norm in module.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            assert norm.running_mean is not None and norm.running_var is not None
            norm.running_mean.uniform_(-0.5, 0.5, generator=generator)
            norm.running_var.uniform_(0.5, 2.0, generator=generator)
        if isinstance(norm, (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm)):
            nn.init.uniform_(norm.weight, 0.5, 1.5, generator=generator)
            nn.init.uniform_(norm.bias, -0.5, 0.5, generator=generator)
    return module.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def student() -> Student:
    made = unsettled(fill_golden(build_student(CONFIG)))
    assert isinstance(made, Student)
    return made


def check(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.shape == expected.shape
    worst = float((found - expected).abs().max())
    assert worst <= LIMIT * float(expected.abs().max()), worst


@torch.no_grad()
@pytest.mark.parametrize(
    ("rewrite", "plain", "size"),
    [
        (FoldedSeparableConv, lambda: SeparableConv(6, 6), (8, 8)),  # with the residual
        (FoldedSeparableConv, lambda: SeparableConv(6, 9), (8, 8)),
        *[(QuarteredUpsample, lambda: Upsample(6), size) for size in ((4, 4), (3, 5), (1, 1))],
    ],
)
def test_a_layer(rewrite: Any, plain: Callable[[], nn.Module], size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    layer, x = unsettled(plain()), torch.randn(2, 6, *size)
    check(rewrite(layer)(x), layer(x))


@torch.no_grad()
def test_the_parts_of_a_block(student: Student) -> None:
    prompts = student.diff_model.encoder_hid_proj(student.embedding_layer.weight.unflatten(0, (2, CONFIG.num_prompts)))
    plain = student.diff_model.down_blocks[0].attentions[0]
    assert isinstance(plain, SpatialTransformer)
    block = plain.transformer_blocks[0]
    assert isinstance(block, LambdaBlock)
    torch.manual_seed(1)
    x, branch = torch.randn(3, 32, 8, 8), torch.tensor([1, 0, 1])
    tokens = x.flatten(2).transpose(1, 2)

    for tile in (0, 4):
        check(SpecialLocal(block.attn1, 8, tile)(tokens), block.attn1(x).flatten(2).transpose(1, 2))
    check(SpecialInteractive(block.attn2, prompts)(tokens, branch), block.attn2(x, prompts[branch]).flatten(2).mT)
    check(SpecialMixFFN(block.ff)(x), block.ff(x))
    check(SpecialBlock(plain, prompts, 4)(x, branch), plain(x, prompts[branch]))


@torch.no_grad()
def test_the_whole_network_and_that_the_plain_one_is_left_alone(student: Student) -> None:
    before = copy.deepcopy(student.state_dict())
    special, plain = specialise(student), PlainDenoiser(student).eval()
    torch.manual_seed(2)
    given = (torch.randn(4, 9, 8, 8), torch.tensor([0.0, 50.0, 900.0, 999.0]), torch.tensor([0, 1, 1, 0]))
    noise, deep = special(*given)
    check(noise, plain(*given))
    ids = torch.arange(CONFIG.num_prompts) + CONFIG.num_prompts * given[2][:, None]
    check(deep, student(given[0], given[1], ids).blocks[-2])
    assert deep.shape == (4, CONFIG.deep_channels, 8, 8)
    assert all(torch.equal(t, before[name]) for name, t in student.state_dict().items())
    kinds = Counter(type(m) for m in special.modules())
    assert not any(kinds[k] for k in (SeparableConv, SpatialTransformer, Upsample, MixFFN, nn.BatchNorm2d, nn.Conv3d))
    assert kinds[SpecialBlock] == 6 and kinds[QuarteredUpsample] == 1


def test_the_file_has_one_node_an_operator(student: Student, tmp_path: Path) -> None:
    component = resolved_components(8 * CONFIG.latent_size, CONFIG.deep_channels)["denoiser"]
    write_onnx(specialise(student), component, tmp_path / "d.onnx", TRANSLATIONS, function_bodies(CONFIG, OPSET))
    model = onnx.load(tmp_path / "d.onnx")
    found = Counter(node.op_type for node in model.graph.node)
    assert found["LocalLambda"] == found["InteractiveLambda"] == 6
    assert not any(found[name] for name in ("BatchNormalization", "Einsum", "GroupNormalization", "Resize"))
    functions = sorted((f.domain, f.name) for f in model.functions)
    assert functions == [("moebius", "InteractiveLambda"), ("moebius", "LocalLambda")]
