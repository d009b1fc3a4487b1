"""The two lambda operators of the Moebius student: Local-lambda and Interactive-lambda.

Plain forms, as the paper defines them (arXiv 2606.19195; after LambdaNetworks, arXiv 2102.08602): they are
the reference that every rewrite for inference is compared with. No rewrite lives here.

Letters in shapes: N batch, C channels, H heads, K and V a head's key and value width (both C / H),
P positions (h * w, row-major), M prompts.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class PositionConv(torch.autograd.Function):
    """``F.conv2d(v, weight, bias, padding=r // 2)`` for one input channel; a faster weight gradient.

    oneDNN's weight gradient is slow for one input channel and a 15x15 kernel; here it is the equal forward
    convolution that swaps batch and channels. 8 to 40 times faster on two cores at 16 channels, 32x32.
    """

    @staticmethod
    def forward(ctx: Any, v: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(v, weight)
        return F.conv2d(v, weight, bias, padding=weight.shape[-1] // 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        v, weight = (saved.to(grad.dtype) for saved in ctx.saved_tensors)
        half = weight.shape[-1] // 2
        grad_v = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_v = F.conv_transpose2d(grad, weight, padding=half)
        if ctx.needs_input_grad[1]:
            # (1, B, h, w) correlated with (K, B, h, w) -> (1, K, r, r)
            grad_weight = F.conv2d(v.transpose(0, 1), grad.transpose(0, 1), padding=half).transpose(0, 1)
        if ctx.needs_input_grad[2]:
            grad_bias = grad.sum((0, 2, 3))
        return grad_v, grad_weight, grad_bias


_SMALL_GRID = 1024  # positions up to which a GPU trains with ``position_product``


def position_product(v: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``position_conv`` as one matrix product, for training small grids on a GPU.

    Row (k, y, x) of the matrix is kernel k centred on (y, x), cut off at the grid's edges. A convolution with one input
    channel leaves the tensor cores idle, above all in its weight gradient.
    """
    height, width = v.shape[2:]
    half = weight.shape[-1] // 2
    # Both flipped, so that entry (y, x) with (y', x') lies at (y + y', x + x'): two unfolds give the matrix.
    table = F.pad(weight.float().flip(2, 3).squeeze(1), (width - 1 - half,) * 2 + (height - 1 - half,) * 2)
    matrix = table.unfold(1, height, 1).unfold(2, width, 1).reshape(-1, height * width)
    product = F.linear(v.flip(2, 3).flatten(1), matrix.to(v.dtype))
    return product.reshape(len(v), -1, height, width) + bias[:, None, None].to(v.dtype)


def position_conv(v: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Zero-padded correlation of v (B, 1, h, w) with weight (K, 1, r, r), plus bias (K,) -> (B, K, h, w)."""
    if v.is_cuda and torch.is_grad_enabled() and weight.requires_grad and v[0, 0].numel() <= _SMALL_GRID:
        return position_product(v, weight, bias)
    if v.device.type == "cpu" and torch.is_grad_enabled() and weight.requires_grad:
        return cast(Tensor, PositionConv.apply(v, weight, bias))
    return F.conv2d(v, weight, bias, padding=weight.shape[-1] // 2)


def local_lambda(q: Tensor, k: Tensor, v: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Y[h,v,p] = sum_k Q[h,k,p] (sum_m K[k,m] V[v,m] + (W[k] * V[v])[p] + b[k]), * a zero-padded correlation.

    q (N, H, K, P); k (N, K, P), already normalised over positions; v (N, V, h, w); weight (K, 1, r, r) with
    r odd; bias (K,). Returns (N, H, V, P).
    """
    values, height, width = v.shape[1:]
    keys = weight.shape[0]
    content = v.flatten(2) @ k.transpose(1, 2)  # (N, V, K)
    # One kernel per key serves every value channel, so the value channels are the convolution's batch.
    position = position_conv(v.reshape(-1, 1, height, width), weight, bias)
    position = position.reshape(-1, values, keys, height * width)
    lambdas = position + content.unsqueeze(-1)  # (N, V, K, P)
    # A small matrix product per position; MatMul, since Einsum is slow in the runtimes we export to.
    y = lambdas.permute(0, 3, 1, 2) @ q.permute(0, 3, 2, 1)  # (N, P, V, K) (N, P, K, H)
    return y.permute(0, 3, 2, 1)


def interactive_lambda(q: Tensor, k: Tensor, v: Tensor, e: Tensor) -> Tensor:
    """Y[h,v,p] = sum_k Q[h,k,p] sum_m (K[k,m] + E[p,m,k]) V[v,m].

    q (N, H, K, P); k (N, K, M), already normalised over the prompts; v (N, V, M); e (P, M, K), one table per
    position of the latent grid. Returns (N, H, V, P).

    Summed over k before m: equal, and the (P, K, V) lambdas of the definition are never held.
    """
    tables = e + k.transpose(1, 2).unsqueeze(1)  # (N, P, M, K)
    mixed = tables @ q.permute(0, 3, 2, 1)  # (N, P, M, K) (N, P, K, H)
    y = v.unsqueeze(1) @ mixed  # (N, 1, V, M) (N, P, M, H)
    return y.permute(0, 3, 2, 1)


class LocalLambda(nn.Module):
    """``attn1``: every position attends to the whole grid by content and to its window by position."""

    def __init__(self, channels: int, heads: int, window: int) -> None:
        super().__init__()
        width = channels // heads
        self.heads = heads
        self.to_q = nn.Conv2d(channels, channels, 1, bias=False)
        self.to_k = nn.Conv2d(channels, width, 1, bias=False)
        self.to_v = nn.Conv2d(channels, width, 1, bias=False)
        self.norm_q = nn.BatchNorm2d(channels)
        self.norm_v = nn.BatchNorm2d(width)
        # Stored as the checkpoint has it, applied as the equal 2-D convolution.
        self.pos_conv = nn.Conv3d(1, width, (1, window, window), padding=(0, window // 2, window // 2))

    def forward(self, x: Tensor) -> Tensor:
        """x (N, C, h, w) -> the same shape; output channel h * V + v."""
        q = self.norm_q(self.to_q(x)).flatten(2).unflatten(1, (self.heads, -1))
        k = self.to_k(x).flatten(2).softmax(-1)
        v = self.norm_v(self.to_v(x))
        assert self.pos_conv.bias is not None
        y = local_lambda(q, k, v, self.pos_conv.weight.squeeze(2), self.pos_conv.bias)
        return y.reshape(x.shape)


class InteractiveLambda(nn.Module):
    """``attn2``: every position reads the prompts, through a table of its own (``rel_pos_emb``).

    The tables fix the latent grid: ``size`` is its side.
    """

    def __init__(self, channels: int, heads: int, prompt_dim: int, prompts: int, size: int) -> None:
        super().__init__()
        width = channels // heads
        self.heads = heads
        self.to_q = nn.Conv2d(channels, channels, 1, bias=False)
        self.to_k = nn.Linear(prompt_dim, width, bias=False)
        self.to_v = nn.Linear(prompt_dim, width, bias=False)
        self.norm_q = nn.BatchNorm2d(channels)
        self.norm_v = nn.BatchNorm1d(width)
        # Small, so that a network trained from scratch starts with the content term.
        self.rel_pos_emb = nn.Parameter(0.02 * torch.randn(size * size, prompts, width, 1))

    def forward(self, x: Tensor, prompts: Tensor) -> Tensor:
        """x (N, C, h, w), prompts (N, M, prompt_dim) -> (N, C, h, w); output channel h * V + v."""
        q = self.norm_q(self.to_q(x)).flatten(2).unflatten(1, (self.heads, -1))
        k = self.to_k(prompts).transpose(1, 2).softmax(-1)
        v = self.norm_v(self.to_v(prompts).transpose(1, 2))
        return interactive_lambda(q, k, v, self.rel_pos_emb.squeeze(-1)).reshape(x.shape)
