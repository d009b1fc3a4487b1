"""Gated linear attention, the teacher's ``attn1``.

    S_t = diag(exp g_t) S_{t-1} + k_t v_t^T,    o_t = S_t^T q_t / sqrt K

``chunked_gla`` is plain PyTorch without a loop over tokens; on CUDA flash-linear-attention's kernel is used when it
is importable.
Source: Gated Linear Attention, arXiv 2312.06635, sections 3 and 4.

Letters in shapes: N batch, P tokens, H heads, K and V a head's key and value width, J chunks, T a chunk's
tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHUNK = 16  # tokens; the pairs of a chunk take P * CHUNK * H * K numbers
GATE_NORMALIZER = 16.0  # divides the log decay, so that a fresh gate forgets slowly
RMS_EPS = 1e-6


def chunked_gla(q: Tensor, k: Tensor, v: Tensor, g: Tensor, chunk: int = CHUNK) -> Tensor:
    """The recurrence over chunks of tokens at once.

    q, k (N, P, H, K), v (N, P, H, V), g (N, P, H, K) log decays, <= 0. Returns (N, P, H, V) in v's type; half
    types are computed in float32. Every exponential is of a sum of decays, never of its negative, so nothing
    overflows however fast it forgets.
    """
    kind = q.device.type
    # Meta tensors, on which arithmetic is counted, know no autocast.
    with torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext():
        return _chunked_gla(q, k, v, g, chunk).to(v.dtype)


def _chunked_gla(q: Tensor, k: Tensor, v: Tensor, g: Tensor, chunk: int) -> Tensor:
    tokens = q.shape[1]
    padding = -tokens % chunk
    dtype = torch.promote_types(v.dtype, torch.float32)

    def split(x: Tensor) -> Tensor:
        x = x.to(dtype)
        # Zero keys add nothing and zero decays forget nothing, so padding leaves the result alone.
        return F.pad(x, (0, 0, 0, 0, 0, padding)).unflatten(1, (-1, chunk)).permute(0, 3, 1, 2, 4)

    q, k, v, g = split(q), split(k), split(v), split(g)  # (N, H, J, T, K or V)
    decay = g.cumsum(-2)  # from the chunk's start to and with token t
    total = decay[..., -1:, :]  # (N, H, J, 1, K)

    # Within a chunk: A[t,s] = sum_k q[t,k] k[s,k] exp(decay[t,k] - decay[s,k]) for s <= t.
    later = torch.ones(chunk, chunk, dtype=torch.bool, device=q.device).triu(1)
    gap = decay.unsqueeze(-2) - decay.unsqueeze(-3)  # (N, H, J, T, T, K)
    gap = gap.masked_fill(later.unsqueeze(-1), float("-inf")).exp()
    scores = ((gap * k.unsqueeze(-3)) @ q.unsqueeze(-1)).squeeze(-1)  # (N, H, J, T, T)
    inside = scores @ v

    # Across chunks: what each adds to the state, summed with the decays between by a doubling scan.
    state = ((total - decay).exp() * k).transpose(-1, -2) @ v  # (N, H, J, K, V)
    span = total.transpose(-1, -2)  # log decay over the chunks that state[j] has gathered
    step = 1
    while step < state.shape[2]:
        reach = span[:, :, step:]
        state = torch.cat([state[:, :, :step], state[:, :, step:] + reach.exp() * state[:, :, :-step]], dim=2)
        span = torch.cat([span[:, :, :step], reach + span[:, :, :-step]], dim=2)
        step *= 2
    before = F.pad(state[:, :, :-1], (0, 0, 0, 0, 1, 0))  # a chunk reads the state its predecessors left
    output = (inside + (q * decay.exp()) @ before) * q.shape[-1] ** -0.5
    return output.permute(0, 2, 3, 1, 4).flatten(1, 2)[:, :tokens]


@functools.cache
def _fused_gla() -> Callable[..., Any] | None:
    """flash-linear-attention's chunked kernel, or None where the package is not installed."""
    try:
        from fla.ops.gla import chunk_gla
    except ImportError:
        return None
    return cast(Callable[..., Any], chunk_gla)


def gated_linear_attention(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """The fused kernel for CUDA tensors where there is one, else ``chunked_gla``; shapes as there."""
    fused = _fused_gla() if q.is_cuda else None
    if fused is None:
        return chunked_gla(q, k, v, g)
    return cast(Tensor, fused(q, k, v, g, scale=q.shape[-1] ** -0.5)[0])


class GatedRMSNorm(nn.Module):
    """RMS norm over a head's values, times a learned weight, times SiLU(gate)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        """x and gate (..., V) -> (..., V)."""
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), RMS_EPS) * F.silu(gate)


class GatedLinearAttention(nn.Module):
    """``attn1`` of the teacher: keys of half the width, a low-rank decay gate, a gated norm after."""

    def __init__(self, channels: int, heads: int, gate_rank: int) -> None:
        super().__init__()
        self.heads = heads
        keys = channels // 2
        self.q_proj = nn.Linear(channels, keys, bias=False)
        self.k_proj = nn.Linear(channels, keys, bias=False)
        self.v_proj = nn.Linear(channels, channels, bias=False)
        self.g_proj = nn.Linear(channels, channels, bias=False)
        self.gk_proj = nn.Sequential(nn.Linear(channels, gate_rank, bias=False), nn.Linear(gate_rank, keys))
        self.o_proj = nn.Linear(channels, channels, bias=False)
        self.g_norm_swish_gate = GatedRMSNorm(channels // heads)

    def forward(self, x: Tensor) -> Tensor:
        """x (N, P, C), tokens in row-major order -> the same shape."""

        def by_head(projected: Tensor) -> Tensor:
            return projected.unflatten(-1, (self.heads, -1))  # (N, P, H, K or V)

        gate = by_head(self.gk_proj(x))
        decay = F.logsigmoid(gate.to(torch.promote_types(gate.dtype, torch.float32))) / GATE_NORMALIZER
        q, k, v = by_head(self.q_proj(x)), by_head(self.k_proj(x)), by_head(self.v_proj(x))
        o = gated_linear_attention(q, k, v, decay)
        o = self.g_norm_swish_gate(o, by_head(self.g_proj(x)))
        return cast(Tensor, self.o_proj(o.flatten(2)))
