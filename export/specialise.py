"""The student rewritten for inference: the same function of the same weights, with less arithmetic and less memory.

``specialise`` replaces the parts of a student by modules that compute what they did; the plain network in
``moebius_edge.model`` stays the reference. Every rewrite is exact in real numbers, so that only rounding differs, and
stands in ``docs/rewrites.md`` with its figures. The lambda operators' own order of sums is in ``operators.py``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..model import Student
from ..model.config import GROUPS
from ..model.lambdas import InteractiveLambda, LocalLambda
from ..model.layers import SpatialTransformer, Upsample
from ..model.student import LambdaBlock, MixFFN, SeparableConv
from .operators import best_tile, interactive_lambda, layout, local_lambda

# Channels from which an upsampler of the autoencoder pays in quarters; below, one is as fast on a CPU as the other.
QUARTERED_FROM = 128

_Layer = TypeVar("_Layer", nn.Linear, nn.Conv2d)


def folded(weight: Tensor, norm: nn.BatchNorm1d | nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Weight (C_out, ...) and bias (C_out,) of a map without bias followed by ``norm``, in one map."""
    assert norm.running_var is not None and norm.running_mean is not None
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    return weight * scale.reshape(-1, *[1] * (weight.ndim - 1)), norm.bias - norm.running_mean * scale


def linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """A linear layer with these weights; a 1x1 convolution's (C_out, C_in, 1, 1) are taken too."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    return _with_weights(layer, weight.flatten(1), bias)


def convolution(weight: Tensor, bias: Tensor | None, padding: int = 0, groups: int = 1) -> nn.Conv2d:
    """A convolution with these weights (C_out, C_in / groups, r, r)."""
    outputs, inputs, side, _ = weight.shape
    layer = nn.Conv2d(inputs * groups, outputs, side, padding=padding, groups=groups, bias=bias is not None)
    return _with_weights(layer, weight, bias)


def _with_weights(layer: _Layer, weight: Tensor, bias: Tensor | None) -> _Layer:
    layer.weight = nn.Parameter(weight.detach().clone())
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone())
    return layer


class FoldedSeparableConv(nn.Module):
    """``SeparableConv`` with both batch norms in its convolutions."""

    def __init__(self, plain: SeparableConv) -> None:
        super().__init__()
        self.residual = plain.residual
        depthwise = folded(plain.conv_dw.weight, plain.bn1)
        self.depthwise = convolution(*depthwise, padding=1, groups=len(depthwise[0]))
        self.pointwise = convolution(*folded(plain.conv_pw.weight, plain.bn2))

    def forward(self, x: Tensor) -> Tensor:
        y = self.pointwise(F.relu(self.depthwise(x)))
        return cast(Tensor, x + y if self.residual else y)


class QuarteredUpsample(nn.Module):
    """``Upsample`` without the doubled grid: of the 3x3 taps on doubled pixels each output pixel sees 2x2 sources.

    Four 2x2 convolutions on the small grid, one for each place in a doubled pixel, then interleaved: 2.25 times
    fewer multiplications. The autoencoder's upsamplers, diffusers' ``Upsample2D``, have the same ``conv``.
    """

    def __init__(self, plain: Any) -> None:
        super().__init__()
        kernels = phase_kernels(plain.conv.weight)
        self.phases = nn.ModuleList(convolution(kernel, plain.conv.bias) for kernel in kernels)

    def forward(self, x: Tensor) -> Tensor:
        """x (N, C, h, w) -> (N, C, 2h, 2w)."""
        return phases_together(x, self.phases)


def phase_kernels(weight: Tensor) -> list[Tensor]:
    """The 2x2 kernels (C, C, 2, 2) of the four places in a doubled pixel, row-major, from a 3x3 one (C, C, 3, 3)."""
    sums = ([(0,), (1, 2)], [(0, 1), (2,)])  # for an even and an odd place: which taps fall on the same source

    def sum_taps(rows: tuple[int, ...], columns: tuple[int, ...]) -> Tensor:
        return weight[:, :, list(rows)][:, :, :, list(columns)].sum((2, 3))

    return [
        torch.stack([torch.stack([sum_taps(r, c) for c in columns], -1) for r in rows], -2)
        for rows in sums
        for columns in sums
    ]


def phases_together(x: Tensor, phases: Iterable[Callable[[Tensor], Tensor]]) -> Tensor:
    """The four convolutions ``phases`` on x (N, C, h, w), interleaved: (N, C, 2h, 2w)."""
    padded = F.pad(x, (1, 1, 1, 1))
    height, width = x.shape[2:]
    parts = []
    for index, phase in enumerate(phases):
        row, column = divmod(index, 2)
        parts.append(phase(padded[:, :, row : row + height + 1, column : column + width + 1]))
    stacked = torch.stack(parts, 2)  # (N, C, 4, h, w)
    return F.pixel_shuffle(stacked.flatten(1, 2), 2)


class SpecialLocal(nn.Module):
    """``LocalLambda`` on tokens; batch norms folded, positions summed in the order of ``operators``."""

    layout: Tensor
    kernel: Tensor
    bias: Tensor

    def __init__(self, plain: LocalLambda, size: int, tile: int) -> None:
        super().__init__()
        self.heads, self.tile = plain.heads, tile
        self.to_q = linear(*folded(plain.to_q.weight, plain.norm_q))
        self.to_k = linear(plain.to_k.weight)
        self.to_v = linear(*folded(plain.to_v.weight, plain.norm_v))
        window = plain.pos_conv.kernel_size[-1]
        assert plain.pos_conv.bias is not None
        self.register_buffer("kernel", plain.pos_conv.weight.detach().flatten(1).clone())  # (K, r * r)
        self.register_buffer("bias", plain.pos_conv.bias.detach()[:, None].clone())
        self.register_buffer("layout", layout(size, window, tile))

    def forward(self, x: Tensor) -> Tensor:
        """x (N, P, C) -> the same shape."""
        batch, positions, channels = x.shape
        width = channels // self.heads
        together = max(1, self.tile)
        q = self.to_q(x).reshape(batch, positions // together, together * self.heads, width)
        k = self.to_k(x).transpose(1, 2).softmax(-1)
        y = local_lambda(q, k, self.to_v(x), self.kernel, self.bias, self.layout, self.heads, self.tile)
        return y.reshape(batch, positions, channels)


class SpecialInteractive(nn.Module):
    """``InteractiveLambda`` on tokens, its prompts baked: keys and values are tables of the two branches."""

    keys: Tensor
    values: Tensor
    table: Tensor

    def __init__(self, plain: InteractiveLambda, prompts: Tensor) -> None:
        """``prompts`` (2, M, D): projected, of the conditional and the unconditional branch."""
        super().__init__()
        self.heads = plain.heads
        self.to_q = linear(*folded(plain.to_q.weight, plain.norm_q))
        keys = plain.to_k(prompts).transpose(1, 2).softmax(-1)  # (2, K, M)
        values = plain.norm_v(plain.to_v(prompts).transpose(1, 2)).transpose(1, 2)  # (2, M, V)
        self.register_buffer("keys", keys[:, None].clone())
        self.register_buffer("values", values.contiguous().clone())
        self.register_buffer("table", plain.rel_pos_emb.squeeze(-1).transpose(1, 2).contiguous().clone())  # (P, K, M)

    def forward(self, x: Tensor, branch: Tensor) -> Tensor:
        """x (N, P, C), branch (N,) int64 -> (N, P, C)."""
        q = self.to_q(x).unflatten(-1, (self.heads, -1))
        keys, values = (t.index_select(0, branch) for t in (self.keys, self.values))
        return interactive_lambda(q, keys, values, self.table).reshape(x.shape)


class SpecialMixFFN(nn.Module):
    """``MixFFN`` with value and gate apart from the start, so that nothing is split at run time."""

    def __init__(self, plain: MixFFN) -> None:
        super().__init__()
        up, deep = plain.inverted_conv.conv, plain.depth_conv.conv
        assert up.bias is not None and deep.bias is not None
        self.ups, self.deeps = nn.ModuleList(), nn.ModuleList()
        for part in zip(*(t.chunk(2) for t in (up.weight, up.bias, deep.weight, deep.bias)), strict=True):
            self.ups.append(convolution(part[0], part[1]))
            self.deeps.append(convolution(part[2], part[3], padding=1, groups=len(part[2])))
        self.down = convolution(plain.point_conv.conv.weight, None)

    def forward(self, x: Tensor) -> Tensor:
        """x (N, C, h, w) -> the same shape."""
        value, gate = (deep(F.silu(up(x))) for up, deep in zip(self.ups, self.deeps, strict=True))
        return cast(Tensor, self.down(value * F.silu(gate)))


class SpecialBlock(nn.Module):
    """A ``SpatialTransformer`` with its ``LambdaBlock``; takes the branch where that took the prompts."""

    def __init__(self, plain: SpatialTransformer, prompts: Tensor, tile: int) -> None:
        super().__init__()
        (block,) = plain.transformer_blocks
        assert isinstance(block, LambdaBlock)
        size = round(block.attn2.rel_pos_emb.shape[0] ** 0.5)
        weight = plain.proj_in.weight.flatten(1)
        assert plain.proj_in.bias is not None
        # The group norm's scale and shift, a channel each, go into the projection that follows.
        self.proj_in = linear(weight * plain.norm.weight, plain.proj_in.bias + weight @ plain.norm.bias)
        self.eps = plain.norm.eps
        self.norm1, self.norm2, self.norm3 = block.norm1, block.norm2, block.norm3
        self.attn1 = SpecialLocal(block.attn1, size, tile)
        self.attn2 = SpecialInteractive(block.attn2, prompts)
        self.ff = SpecialMixFFN(block.ff)
        self.proj_out = plain.proj_out

    def forward(self, x: Tensor, branch: Tensor) -> Tensor:
        """x (N, C, h, w), branch (N,) -> (N, C, h, w)."""
        tokens = self.proj_in(F.group_norm(x, GROUPS, eps=self.eps).flatten(2).transpose(1, 2))
        tokens = tokens + self.attn1(self.norm1(tokens))
        tokens = tokens + self.attn2(self.norm2(tokens), branch)
        fed = self.ff(self.norm3(tokens).transpose(1, 2).reshape(x.shape))
        return cast(Tensor, x + self.proj_out(fed + tokens.transpose(1, 2).reshape(x.shape)))


class SpecialDenoiser(nn.Module):
    """The bundle's denoiser: ``sample`` (N, 9, h, w), ``timestep`` (N,), ``branch`` (N,) -> ``noise`` (N, 4, h, w) and
    ``deep`` (N, C, h, w), what enters the last up block.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, sample: Tensor, timestep: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
        denoised = self.network(sample, timestep, branch)
        return denoised.noise, denoised.blocks[-2]


@torch.no_grad()
def specialise(student: Student) -> SpecialDenoiser:
    """``student`` rewritten for inference; it is not changed. Both must be float32 and in evaluation mode."""
    config = student.config
    network = copy.deepcopy(student.diff_model).eval()
    embeddings = student.embedding_layer.weight.unflatten(0, (2, config.num_prompts))
    prompts = network.encoder_hid_proj(embeddings)
    network.add_module("encoder_hid_proj", nn.Identity())  # what is handed on is the branch
    tile = best_tile(config)

    for name, module in list(network.named_modules()):
        if isinstance(module, SeparableConv):
            network.set_submodule(name, FoldedSeparableConv(module))
        elif isinstance(module, SpatialTransformer):
            network.set_submodule(name, SpecialBlock(module, prompts, tile))
        elif isinstance(module, Upsample):
            network.set_submodule(name, QuarteredUpsample(module))
    return SpecialDenoiser(network).eval().requires_grad_(False)


@torch.no_grad()
def specialise_autoencoder(vae: Any) -> Any:
    """The diffusers ``AutoencoderKL`` with its wide upsamplers in quarters; ``vae`` is not changed."""
    from diffusers.models.upsampling import Upsample2D

    special = copy.deepcopy(vae)
    for name, module in list(special.decoder.named_modules()):
        if isinstance(module, Upsample2D) and module.channels >= QUARTERED_FROM:
            special.decoder.set_submodule(name, QuarteredUpsample(module))
    return special.eval().requires_grad_(False)
