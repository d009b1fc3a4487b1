"""The U-Net that student and teacher share: Stable Diffusion's layout, with the parts that differ passed in.

Module names are the checkpoints' (diffusers' UNet2DConditionModel). Knows nothing of lambda or attention.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..spec import sample_channels
from .config import GROUPS, NetworkConfig
from .layers import Conv3x3, Downsample, Resnet, TimeEmbedding, Upsample

# (level, channels) -> what follows a resnet there, called with (x, prompts); None at a level without
Attention = Callable[[int, int], nn.Module | None]


class Denoised(NamedTuple):
    """What a network returns: ``noise`` (N, C, h, w), and each block's output in order, for distillation."""

    noise: Tensor
    blocks: list[Tensor]


class Block(nn.Module):
    """Resnets, each followed by its attention where the level has one; the base of the three kinds of block."""

    def __init__(self, resnets: Sequence[Resnet], attentions: Sequence[nn.Module | None]) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([a for a in attentions if a is not None])
        self.resnets = nn.ModuleList(resnets)
        self.checkpointing = False

    def layer(self, index: int, x: Tensor, time: Tensor, prompts: Tensor) -> Tensor:
        """x through resnet ``index`` and what follows it; with ``checkpointing`` only x is kept for the backward."""
        if self.checkpointing and torch.is_grad_enabled():
            # The recomputation moves no batch norm's statistics.
            options: dict[str, Any] = {"context_fn": lambda: (nullcontext(), _FrozenStatistics(self))}
            return cast(Tensor, checkpoint(self._layer, index, x, time, prompts, use_reentrant=False, **options))
        return self._layer(index, x, time, prompts)

    def _layer(self, index: int, x: Tensor, time: Tensor, prompts: Tensor) -> Tensor:
        x = self.resnets[index](x, time)
        return self.attentions[index](x, prompts) if len(self.attentions) else x


class _FrozenStatistics(AbstractContextManager[None]):
    """Entered once for every backward pass through the layer, so it can be used again."""

    def __init__(self, module: nn.Module) -> None:
        self._norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        self._momenta = [norm.momentum for norm in self._norms]

    def __enter__(self) -> None:
        for norm in self._norms:
            norm.momentum = 0.0

    def __exit__(self, *error: object) -> None:
        for norm, momentum in zip(self._norms, self._momenta, strict=True):
            norm.momentum = momentum


class DownBlock(Block):
    """Returns its output and what it adds to the skip connections (every layer's output)."""

    def __init__(self, resnets: Sequence[Resnet], attentions: Sequence[nn.Module | None], sampler: int | None) -> None:
        super().__init__(resnets, attentions)
        self.downsamplers = nn.ModuleList([Downsample(sampler)] if sampler else [])

    def layers(self, x: Tensor, time: Tensor, prompts: Tensor) -> list[Tensor]:
        """The outputs of the layers at the block's own level."""
        outputs = []
        for index in range(len(self.resnets)):
            x = self.layer(index, x, time, prompts)
            outputs.append(x)
        return outputs

    def forward(self, x: Tensor, time: Tensor, prompts: Tensor) -> tuple[Tensor, list[Tensor]]:
        skips = self.layers(x, time, prompts)
        x = skips[-1]
        for downsampler in self.downsamplers:
            x = downsampler(x)
            skips.append(x)
        return x, skips


class MidBlock(Block):
    """Resnet, attention, resnet at the coarsest level."""

    def forward(self, x: Tensor, time: Tensor, prompts: Tensor) -> Tensor:
        x = self.layer(0, x, time, prompts)
        return cast(Tensor, self.resnets[1](x, time))


class UpBlock(Block):
    """Takes one skip connection per resnet, the last added first."""

    def __init__(self, resnets: Sequence[Resnet], attentions: Sequence[nn.Module | None], sampler: int | None) -> None:
        super().__init__(resnets, attentions)
        self.upsamplers = nn.ModuleList([Upsample(sampler)] if sampler else [])

    def forward(self, x: Tensor, skips: Sequence[Tensor], time: Tensor, prompts: Tensor) -> Tensor:
        for index, skip in enumerate(reversed(skips)):
            x = self.layer(index, torch.cat([x, skip], dim=1), time, prompts)
        for upsampler in self.upsamplers:
            x = upsampler(x)
        return x


class UNet(nn.Module):
    """Down blocks, a mid block if ``middle``, up blocks, with skip connections between.

    ``conv`` makes every 3x3 convolution but the samplers'; ``attention`` what follows each resnet.
    """

    def __init__(self, config: NetworkConfig, conv: Conv3x3, attention: Attention, middle: bool) -> None:
        super().__init__()
        channels, layers = config.block_out_channels, config.layers_per_block
        time_width = 4 * channels[0]
        last = len(channels) - 1
        self.conv_in = conv(sample_channels(config.latent_channels), channels[0])
        self.time_embedding = TimeEmbedding(channels[0], time_width)
        self.encoder_hid_proj = nn.Linear(config.prompt_embedding_dim, config.cross_attention_dim)

        skips = [channels[0]]
        width = channels[0]
        downs = []
        for level, outputs in enumerate(channels):
            resnets = [Resnet(width if i == 0 else outputs, outputs, time_width, conv) for i in range(layers)]
            attentions = [attention(level, outputs) for _ in range(layers)]
            downs.append(DownBlock(resnets, attentions, outputs if level < last else None))
            skips += [outputs] * (layers if level == last else layers + 1)
            width = outputs
        self.down_blocks = nn.ModuleList(downs)

        self.mid_block = None
        if middle:
            resnets = [Resnet(width, width, time_width, conv) for _ in range(2)]
            # A level of its own, so that it can have attention where the coarsest level has none.
            self.mid_block = MidBlock(resnets, [attention(last + 1, width)])

        ups = []
        for level in range(last, -1, -1):
            outputs = channels[level]
            resnets = []
            for _ in range(layers + 1):
                resnets.append(Resnet(width + skips.pop(), outputs, time_width, conv))
                width = outputs
            attentions = [attention(level, outputs) for _ in range(layers + 1)]
            ups.append(UpBlock(resnets, attentions, outputs if level else None))
        self.up_blocks = nn.ModuleList(ups)

        self.conv_norm_out = nn.GroupNorm(GROUPS, channels[0], eps=1e-5)
        self.conv_out = conv(channels[0], config.latent_channels)

    def checkpoint_gradients(self) -> None:
        """Keeps every layer's input alone for the backward pass and computes the rest again: less memory, more time."""
        for block in self.modules():
            if isinstance(block, Block):
                block.checkpointing = True

    def forward(self, sample: Tensor, timesteps: Tensor, prompts: Tensor) -> Denoised:
        """sample (N, 2C+1, h, w), timesteps (N,), prompts (N, M, prompt_embedding_dim)."""
        time, prompts = self.time_embedding(timesteps), self.encoder_hid_proj(prompts)
        blocks, skips = self.encode(sample, time, prompts)
        x = blocks[-1]
        for block in self.up_blocks:
            layers = len(cast(UpBlock, block).resnets)
            skips, own = skips[:-layers], skips[-layers:]
            x = block(x, own, time, prompts)
            blocks.append(x)
        return Denoised(self._noise(x), blocks)

    def shallow(self, sample: Tensor, timesteps: Tensor, prompts: Tensor, deep: Tensor) -> Tensor:
        """The noise by the finest level alone, with ``deep`` (N, C, h, w) from an earlier call.

        That is what entered the last up block, ``Denoised.blocks[-2]``; with one of the same inputs, which are
        ``forward``'s, the noise is the same.
        """
        time, prompts = self.time_embedding(timesteps), self.encoder_hid_proj(prompts)
        x = self.conv_in(sample)
        skips = [x, *cast(DownBlock, self.down_blocks[0]).layers(x, time, prompts)]
        return self._noise(self.up_blocks[-1](deep, skips, time, prompts))

    def _noise(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.conv_out(F.silu(self.conv_norm_out(x))))

    def encode(self, sample: Tensor, time: Tensor, prompts: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """The outputs of the blocks before the up blocks, and the skip connections; time and prompts are embedded."""
        x = self.conv_in(sample)
        skips = [x]
        blocks = []
        for block in self.down_blocks:
            x, added = block(x, time, prompts)
            skips += added
            blocks.append(x)
        if self.mid_block is not None:
            blocks.append(self.mid_block(x, time, prompts))
        return blocks, skips


class Network(nn.Module):
    """The prompt embeddings and the U-Net, under the checkpoint's names; the base of student and teacher."""

    def __init__(self, config: NetworkConfig, conv: Conv3x3, attention: Attention, middle: bool) -> None:
        super().__init__()
        self.embedding_layer = nn.Embedding(2 * config.num_prompts, config.prompt_embedding_dim)
        self.diff_model = UNet(config, conv, attention, middle)

    def forward(self, sample: Tensor, timesteps: Tensor, prompt_ids: Tensor) -> Denoised:
        """The noise in ``sample``.

        sample (N, 2C+1, h, w): noisy latent, mask, masked-image latent; timesteps (N,) int64 or float; prompt_ids
        (N, M) int64: 0..M-1 conditional, M..2M-1 unconditional. Raises UsageError for a sample of another shape.
        """
        self.check(sample)
        return cast(Denoised, self.diff_model(sample, timesteps, self.embedding_layer(prompt_ids)))

    def check(self, sample: Tensor) -> None:
        """Raise UsageError for a sample that the network cannot take."""
        raise NotImplementedError
