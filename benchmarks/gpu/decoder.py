"""The published decoder's shape in PyTorch alone, and the rescaling of its residual stream as a change of modules.

The shape is that of diffusers' ``AutoencoderKL``, module names included, so that its weights fit. ``rescale`` does to
the modules what ``moebius_edge.export.autoencoder.divide`` does to the exported file, and takes its divisor from there;
the tests hold one against the other.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moebius_edge.export.autoencoder import choose_divisor
from moebius_edge.export.specialise import QUARTERED_FROM, QuarteredUpsample
from moebius_edge.model.config import GROUPS
from moebius_edge.model.layers import Upsample

PUBLISHED = (128, 256, 512, 512)
LOUD = 1e5  # how many times larger than PyTorch's own start a stream is begun and added to


def norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(GROUPS, channels, eps=1e-6)


class Resnet(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = norm(inputs), nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2, self.conv2 = norm(outputs), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return y + self.conv_shortcut(x)  # type: ignore[no-any-return]


class Attention(nn.Module):
    """One head over all positions; ``wide``: scores and their softmax in float32, as in the exported FP16 file."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.group_norm, self.wide = norm(channels), False
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)
        q, k, v = self.to_q(tokens), self.to_k(tokens), self.to_v(tokens)
        if self.wide:
            q, k = q.float(), k.float()
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(1, 2)
        y = self.to_out[0](scores.softmax(-1).to(v.dtype) @ v)
        return x + y.transpose(1, 2).reshape(x.shape)  # type: ignore[no-any-return]


class Stage(nn.Module):
    """Resnets with an attention or an upsampler among them, named as in diffusers."""

    def __init__(self, inputs: int, outputs: int, resnets: int, up: bool = False, attention: bool = False) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(Resnet(inputs if i == 0 else outputs, outputs) for i in range(resnets))
        if attention:
            self.attentions = nn.ModuleList([Attention(outputs)])
        if up:
            self.upsamplers = nn.ModuleList([Upsample(outputs)])
        self.attention, self.up = attention, up

    def forward(self, x: Tensor) -> Tensor:
        for index, resnet in enumerate(self.resnets):
            x = resnet(x)
            if self.attention and index == 0:
                x = self.attentions[0](x)
        return self.upsamplers[0](x) if self.up else x  # type: ignore[no-any-return]


class Decoder(nn.Module):
    """Latent (N, 4, h, w) -> image (N, 3, 8h, 8w) for four ``channels``, finest first."""

    def __init__(self, channels: tuple[int, ...] = PUBLISHED, latent: int = 4) -> None:
        super().__init__()
        widths = channels[::-1]
        self.conv_in = nn.Conv2d(latent, widths[0], 3, padding=1)
        self.mid_block = Stage(widths[0], widths[0], 2, attention=True)
        pairs = zip(widths[:1] + widths, widths, strict=False)
        self.up_blocks = nn.ModuleList(Stage(a, b, 3, up=i < len(widths) - 1) for i, (a, b) in enumerate(pairs))
        self.conv_norm_out, self.conv_out = norm(widths[-1]), nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(x))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))  # type: ignore[no-any-return]


def loud_decoder(channels: tuple[int, ...]) -> Decoder:
    """Random weights with which the residual stream leaves FP16: what begins it and what is added to it is loud."""
    torch.manual_seed(0)
    decoder = Decoder(channels).eval().requires_grad_(False)
    for name, weight in decoder.named_parameters():
        if name.startswith("conv_in.") or ".conv2." in name or ".to_out." in name:
            weight.mul_(LOUD)
    return decoder


def quarter(decoder: Decoder) -> None:
    """Put the product's upsamplers in quarters where it does."""
    for name, module in list(decoder.named_modules()):
        if isinstance(module, Upsample) and module.conv.out_channels >= QUARTERED_FROM:
            decoder.set_submodule(name, QuarteredUpsample(module))


def largest_of_stream(decoder: Decoder, latent: Tensor) -> float:
    """The largest magnitude in float32 of all that ``rescale`` divides: what a group norm reads or adds up to it."""
    found: list[Tensor] = []

    def note(module: nn.Module, inputs: Any, output: Tensor) -> None:
        found.append((inputs[0] if isinstance(module, nn.GroupNorm) else output).abs().max())

    watched = [m for m in decoder.modules() if isinstance(m, nn.GroupNorm)]
    watched += [m for name, m in decoder.named_modules() if _divides(name, m)]
    hooks = [m.register_forward_hook(note) for m in watched]
    decoder(latent)
    for hook in hooks:
        hook.remove()
    return max(float(value) for value in found)


def rescale(decoder: Decoder, latent: Tensor) -> int:
    """Divide the residual stream, in place, by the divisor that ``latent``'s ranges ask for; the divisor."""
    divisor = choose_divisor([largest_of_stream(decoder, latent)])
    for name, module in decoder.named_modules():
        if isinstance(module, nn.GroupNorm):
            module.eps /= divisor**2
        elif isinstance(module, Attention):
            module.wide = True
        elif _divides(name, module):
            assert isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None
            module.bias.div_(divisor)
            if not ("conv_shortcut" in name or "upsamplers" in name):  # these read what is divided already
                module.weight.div_(divisor)
    return divisor


def _divides(name: str, module: nn.Module) -> bool:
    """Whether a module's output is part of the stream, or is read by a group norm alone."""
    kept = ("to_q", "to_k", "to_v", "conv_out")
    return isinstance(module, (nn.Conv2d, nn.Linear)) and not name.endswith(kept)
