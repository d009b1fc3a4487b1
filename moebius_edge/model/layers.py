"""The layers that student and teacher share: time embedding, resnet, samplers, the transformer's outer part.

Module names are the checkpoints' (diffusers' UNet2DConditionModel).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import GROUPS

Conv3x3 = Callable[[int, int], nn.Module]  # (in channels, out channels) -> 3x3 convolution of the same size


def timestep_embedding(timesteps: Tensor, channels: int) -> Tensor:
    """Cosines, then sines, of timesteps (N,) at frequencies 10000 ** (-i / half) -> (N, channels), float32.

    Diffusers' get_timestep_embedding with flip_sin_to_cos and downscale_freq_shift 0.
    """
    half = channels // 2
    # In the order of the source: an angle of up to 999 radians shows the frequency's rounding.
    exponents = -math.log(10000.0) * torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
    angles = timesteps.float().unsqueeze(-1) * exponents.exp()
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimeEmbedding(nn.Module):
    """Two linear layers with SiLU between, on the sinusoidal embedding."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.channels = channels
        self.linear_1 = nn.Linear(channels, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, timesteps: Tensor) -> Tensor:
        """timesteps (N,), any numeric type -> (N, width)."""
        embedded = timestep_embedding(timesteps, self.channels).to(self.linear_1.weight.dtype)
        return cast(Tensor, self.linear_2(F.silu(self.linear_1(embedded))))


class Resnet(nn.Module):
    """Group norm, SiLU, convolution, twice, the time added between, plus the (projected) input."""

    def __init__(self, inputs: int, outputs: int, time_width: int, conv: Conv3x3) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(GROUPS, inputs, eps=1e-5)
        self.conv1 = conv(inputs, outputs)
        self.time_emb_proj = nn.Linear(time_width, outputs)
        self.norm2 = nn.GroupNorm(GROUPS, outputs, eps=1e-5)
        self.conv2 = conv(outputs, outputs)
        self.conv_shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else None

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x (N, inputs, h, w), time (N, time_width) -> (N, outputs, h, w)."""
        y = self.conv1(F.silu(self.norm1(x)))
        y = y + self.time_emb_proj(F.silu(time))[:, :, None, None]
        y = self.conv2(F.silu(self.norm2(y)))
        return cast(Tensor, y + (x if self.conv_shortcut is None else self.conv_shortcut(x)))


class Downsample(nn.Module):
    """Half the size: a dense 3x3 convolution of stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.conv(x))


class Upsample(nn.Module):
    """Twice the size: nearest neighbour, then a dense 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest")))


class SpatialTransformer(nn.Module):
    """Group norm, 1x1 in, one transformer block on the positions as tokens, 1x1 out, plus the input."""

    def __init__(self, channels: int, block: nn.Module) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(GROUPS, channels, eps=1e-6)
        self.proj_in = nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList([block])
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, prompts: Tensor) -> Tensor:
        """x (N, C, h, w), prompts (N, M, D) -> (N, C, h, w).

        The block maps tokens (N, h*w, C), prompts and (h, w) to tokens.
        """
        height, width = x.shape[2:]
        tokens = self.proj_in(self.norm(x)).flatten(2).transpose(1, 2)
        for block in self.transformer_blocks:
            tokens = block(tokens, prompts, (height, width))
        return cast(Tensor, x + self.proj_out(tokens.transpose(1, 2).unflatten(2, (height, width))))
