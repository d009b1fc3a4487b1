"""The discriminator that sharpens the decoder: a pixel loss answers doubt with blur, an opponent sees blur.

A patch discriminator (Isola et al., arXiv 1611.07004, section 3.2) with spectral norms and the hinge loss, weighed
against the reconstruction as VQGAN does (Esser et al., arXiv 2012.09841, equation 7).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm


def build_discriminator(channels: tuple[int, ...] = (32, 64, 96)) -> nn.Sequential:
    """Images (N, 3, H, W) to a map of scores (N, 1, h, w): above 0 real, below 0 decoded. A score sees 38 pixels."""
    layers: list[nn.Module] = []
    inputs = 3
    for outputs in channels:
        layers += [spectral_norm(nn.Conv2d(inputs, outputs, 4, stride=2, padding=1)), nn.LeakyReLU(0.2)]
        inputs = outputs
    return nn.Sequential(*layers, spectral_norm(nn.Conv2d(inputs, 1, 3, padding=1)))


def discriminator_loss(real: torch.Tensor, decoded: torch.Tensor) -> torch.Tensor:
    """The hinge loss of scores (any shape): real ones are pushed above 1, those of decoded pictures below -1."""
    return F.relu(1 - real).mean() + F.relu(1 + decoded).mean()


def balance(first: torch.Tensor, second: torch.Tensor, weight: torch.Tensor, limit: float = 1e4) -> torch.Tensor:
    """The factor for ``second`` that makes its gradient at ``weight`` as long as ``first``'s; a scalar, detached."""
    lengths = [torch.autograd.grad(loss, weight, retain_graph=True)[0].norm() for loss in (first, second)]
    return (lengths[0] / (lengths[1] + 1e-6)).clamp(max=limit).detach()


class Adversary:
    """A discriminator and its optimiser; ``judge`` for the decoder's loss, ``learn`` for its own step."""

    def __init__(self, learning_rate: float, device: str) -> None:
        self.network = build_discriminator().to(device)
        self.optimiser = torch.optim.Adam(self.network.parameters(), lr=learning_rate, betas=(0.5, 0.9))

    def judge(self, decoded: torch.Tensor) -> torch.Tensor:
        """How far the decoded pictures are from being taken for real ones; lower is better for the decoder."""
        self.network.requires_grad_(False)
        loss = -self.network(decoded).mean()
        self.network.requires_grad_(True)
        return loss

    def learn(self, image: torch.Tensor, decoded: torch.Tensor) -> float:
        """One step on real and decoded pictures (N, 3, H, W); returns its loss."""
        scores = self.network(torch.cat([image, decoded.detach()])).float().chunk(2)
        loss = discriminator_loss(*scores)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        self.optimiser.step()
        return loss.item()

    def state_dict(self) -> dict[str, Any]:
        return {"network": self.network.state_dict(), "optimiser": self.optimiser.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.network.load_state_dict(state["network"])
        self.optimiser.load_state_dict(state["optimiser"])
