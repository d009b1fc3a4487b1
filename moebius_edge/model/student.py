"""The Moebius student: a U-Net of depthwise-separable convolutions with a LλMI block after every resnet.

The plain network, with the checkpoint's names; rewrites for inference belong to export.
"""

from __future__ import annotations

from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UsageError
from ..spec import LATENT_DOWNSCALE, sample_channels
from .config import StudentConfig
from .lambdas import InteractiveLambda, LocalLambda
from .layers import SpatialTransformer
from .unet import Block, Denoised, Network


class SeparableConv(nn.Module):
    """Depthwise 3x3, batch norm, ReLU, pointwise 1x1, batch norm; plus the input where channels agree."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.residual = inputs == outputs
        self.conv_dw = nn.Conv2d(inputs, inputs, 3, padding=1, groups=inputs, bias=False)
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv_pw = nn.Conv2d(inputs, outputs, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """x (N, inputs, h, w) -> (N, outputs, h, w)."""
        y = self.bn2(self.conv_pw(F.relu(self.bn1(self.conv_dw(x)))))
        return cast(Tensor, x + y if self.residual else y)


class Conv(nn.Module):
    """A convolution under the name ``conv``, as the checkpoint nests the Mix-FFN's."""

    def __init__(self, inputs: int, outputs: int, kernel: int, groups: int = 1, bias: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, groups=groups, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.conv(x))


class MixFFN(nn.Module):
    """1x1 up and SiLU, depthwise 3x3, value times SiLU(gate), 1x1 down. The gate is the second half."""

    def __init__(self, channels: int, ratio: float) -> None:
        super().__init__()
        hidden = int(ratio * channels)
        self.inverted_conv = Conv(channels, 2 * hidden, 1)
        self.depth_conv = Conv(2 * hidden, 2 * hidden, 3, groups=2 * hidden)
        self.point_conv = Conv(hidden, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (N, C, h, w) -> the same shape."""
        value, gate = self.depth_conv(F.silu(self.inverted_conv(x))).chunk(2, dim=1)
        return cast(Tensor, self.point_conv(value * F.silu(gate)))


class LambdaBlock(nn.Module):
    """Local-lambda, Interactive-lambda and Mix-FFN, each with a layer norm before and a residual around."""

    def __init__(self, config: StudentConfig, level: int, channels: int) -> None:
        super().__init__()
        size = config.latent_size // 2**level
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = LocalLambda(channels, config.num_heads, config.window)
        self.norm2 = nn.LayerNorm(channels)
        self.attn2 = InteractiveLambda(channels, config.num_heads, config.cross_attention_dim, config.num_prompts, size)
        self.norm3 = nn.LayerNorm(channels)
        self.ff = MixFFN(channels, config.mix_ffn_ratio)

    def forward(self, tokens: Tensor, prompts: Tensor, size: tuple[int, int]) -> Tensor:
        """tokens (N, h*w, C), prompts (N, M, D), size (h, w) -> (N, h*w, C)."""

        def grid(x: Tensor) -> Tensor:
            return x.transpose(1, 2).unflatten(2, size)  # (N, C, h, w)

        def flat(x: Tensor) -> Tensor:
            return x.flatten(2).transpose(1, 2)

        tokens = tokens + flat(self.attn1(grid(self.norm1(tokens))))
        tokens = tokens + flat(self.attn2(grid(self.norm2(tokens)), prompts))
        return tokens + flat(self.ff(grid(self.norm3(tokens))))


class Student(Network):
    """The Moebius student, for the one latent grid of ``config.latent_size``. Built by ``build_student``."""

    def __init__(self, config: StudentConfig) -> None:
        super().__init__(
            config,
            conv=SeparableConv,
            attention=lambda level, channels: SpatialTransformer(channels, LambdaBlock(config, level, channels)),
            middle=False,
        )
        self.config = config

    def check(self, sample: Tensor) -> None:
        size = self.config.latent_size
        channels = sample_channels(self.config.latent_channels)
        if tuple(sample.shape[1:]) != (channels, size, size):
            pixels = size * LATENT_DOWNSCALE
            shape, takes = tuple(sample.shape), f"(N, {channels}, {size}, {size})"
            problem = f"sample has shape {shape}; this network takes {takes}, that is images of {pixels}x{pixels} only"
            raise UsageError(problem, "resize or crop to that")

    def shallow(self, sample: Tensor, timesteps: Tensor, prompt_ids: Tensor, deep: Tensor) -> Tensor:
        """The noise by the finest level alone, see ``UNet.shallow``; other inputs as ``forward``'s."""
        return self.diff_model.shallow(sample, timesteps, self.embedding_layer(prompt_ids), deep)

    @property
    def output_layer(self) -> nn.Conv2d:
        """The last convolution's 1x1 part, C to 4 channels: all that decides the noise alone passes here."""
        return cast(SeparableConv, self.diff_model.conv_out).conv_pw

    @property
    def coarse_layer(self) -> nn.Conv2d:
        """The 1x1 convolution, C to C, that ends the last down block: the last one before ``coarse_feature``."""
        attention = cast(Block, self.diff_model.down_blocks[-1]).attentions[-1]
        return cast(SpatialTransformer, attention).proj_out

    def coarse_feature(self, denoised: Denoised) -> Tensor:
        """The last down block's output (N, C, h, w), the coarsest: (N, 1280, 16, 16) in the published network."""
        return denoised.blocks[len(self.diff_model.down_blocks) - 1]


def build_student(config: StudentConfig | None = None) -> Student:
    """A student with fresh weights, in training mode; the published shape unless ``config`` is given."""
    return Student(StudentConfig() if config is None else config)
