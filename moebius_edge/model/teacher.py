"""The PixelHacker teacher: Stable Diffusion's U-Net with gated linear attention in place of self-attention.

Written with the checkpoint's names (diffusers' UNet2DConditionModel). For distillation and comparison; it is
never exported.
"""

from __future__ import annotations

from functools import partial
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UsageError
from ..spec import sample_channels
from .config import TeacherConfig
from .gla import GatedLinearAttention
from .layers import SpatialTransformer
from .unet import Denoised, Network


class CrossAttention(nn.Module):
    """``attn2``: softmax attention of the positions to the prompts."""

    def __init__(self, channels: int, heads: int, prompt_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(prompt_dim, channels, bias=False)
        self.to_v = nn.Linear(prompt_dim, channels, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor, prompts: Tensor) -> Tensor:
        """x (N, P, C), prompts (N, M, D) -> (N, P, C)."""

        def by_head(projected: Tensor) -> Tensor:
            return projected.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (N, H, P or M, C / H)

        q, k, v = by_head(self.to_q(x)), by_head(self.to_k(prompts)), by_head(self.to_v(prompts))
        y = F.scaled_dot_product_attention(q, k, v)
        return cast(Tensor, self.to_out[0](y.transpose(1, 2).flatten(2)))


class GEGLU(nn.Module):
    """value * GELU(gate), both from one linear layer; the gate is the second half."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(channels, 2 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        """x (N, P, C) -> (N, P, hidden)."""
        value, gate = self.proj(x).chunk(2, dim=-1)
        return cast(Tensor, value * F.gelu(gate))


class FeedForward(nn.Module):
    """GEGLU to four times the width, and back."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        # The checkpoint numbers a dropout between the two; the identity keeps its place.
        self.net = nn.Sequential(GEGLU(channels, 4 * channels), nn.Identity(), nn.Linear(4 * channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        """x (N, P, C) -> the same shape."""
        return cast(Tensor, self.net(x))


class TeacherBlock(nn.Module):
    """Gated linear attention, cross-attention, feed-forward, each pre-normed with a residual around."""

    def __init__(self, config: TeacherConfig, channels: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = GatedLinearAttention(channels, config.num_heads, config.gate_rank)
        self.norm2 = nn.LayerNorm(channels)
        self.attn2 = CrossAttention(channels, config.num_heads, config.cross_attention_dim)
        self.norm3 = nn.LayerNorm(channels)
        self.ff = FeedForward(channels)

    def forward(self, tokens: Tensor, prompts: Tensor, size: tuple[int, int]) -> Tensor:
        """tokens (N, P, C), prompts (N, M, D) -> (N, P, C). ``size`` is not needed here."""
        tokens = tokens + self.attn1(self.norm1(tokens))
        tokens = tokens + self.attn2(self.norm2(tokens), prompts)
        return cast(Tensor, tokens + self.ff(self.norm3(tokens)))


class Teacher(Network):
    """The PixelHacker teacher, for latents that halve cleanly at each level. Built by ``build_teacher``.

    Its blocks in ``Denoised`` are the down blocks, the mid block and the up blocks.
    """

    def __init__(self, config: TeacherConfig) -> None:
        coarsest = len(config.block_out_channels) - 1

        def attention(level: int, channels: int) -> nn.Module | None:
            # The coarsest down and up block have none; the mid block (one level further) has.
            return None if level == coarsest else SpatialTransformer(channels, TeacherBlock(config, channels))

        super().__init__(config, conv=partial(nn.Conv2d, kernel_size=3, padding=1), attention=attention, middle=True)
        self.config = config

    def encode(self, sample: Tensor, timesteps: Tensor, prompt_ids: Tensor) -> list[Tensor]:
        """The outputs of the down blocks and of the mid block, without running the rest; inputs as ``forward``'s."""
        self.check(sample)
        network = self.diff_model
        prompts = network.encoder_hid_proj(self.embedding_layer(prompt_ids))
        return network.encode(sample, network.time_embedding(timesteps), prompts)[0]

    def coarse_feature(self, denoised: Denoised) -> Tensor:
        """The first up block's output (N, C, h, w), what a student's coarsest level is to match.

        (N, 1280, 16, 16) in the published network: that block ends in an upsampler, so it is one level finer
        than the coarsest, and a student has one level less.
        """
        return denoised.blocks[-len(self.diff_model.up_blocks)]

    def check(self, sample: Tensor) -> None:
        step = 2 ** (len(self.config.block_out_channels) - 1)
        channels = sample_channels(self.config.latent_channels)
        if sample.dim() != 4 or sample.shape[1] != channels or any(s % step for s in sample.shape[2:]):
            problem = f"sample has shape {tuple(sample.shape)}; the teacher takes (N, {channels}, h, w)"
            raise UsageError(f"{problem} with h and w multiples of {step}", "crop or pad to that")


def build_teacher(config: TeacherConfig | None = None) -> Teacher:
    """A teacher with fresh weights, in training mode; the published shape unless ``config`` is given."""
    return Teacher(TeacherConfig() if config is None else config)
