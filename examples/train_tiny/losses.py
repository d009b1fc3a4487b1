"""The autoencoder's losses on pictures, and the discriminator that sharpens the decoder.

All take pictures (N, 3, H, W) in [-1, 1], sides multiples of 8, and return a scalar.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm


def _split(picture: Tensor) -> tuple[Tensor, Tensor]:
    """One level of a Laplacian pyramid: the fine band at full size, and the coarse picture at half the size."""
    coarse = F.avg_pool2d(picture, 2)
    return picture - F.interpolate(coarse, scale_factor=2.0, mode="nearest"), coarse


def pyramid_l1(a: Tensor, b: Tensor, levels: int = 3) -> Tensor:
    """L1 between pictures, plus L1 between the bands of their Laplacian pyramids."""
    difference = a - b
    loss = difference.abs().mean()
    for _ in range(levels):
        band, difference = _split(difference)
        loss = loss + band.abs().mean()
    return loss + 2 * difference.abs().mean()


def mean_colours(image: Tensor) -> Tensor:
    """Brightness and two colour differences of each cell of 8x8 pixels, (N, 3, h, w).

    Each has about unit deviation on photographs. Three latent channels are anchored to these.
    """
    red, green, blue = F.avg_pool2d(image, 8).unbind(1)
    return torch.stack([(red + green + blue) * (2 / 3), (red - blue) * 3, (green - (red + blue) / 2) * 4], 1)


def random_filters(number: int = 24, side: int = 5) -> Tensor:
    """Seeded filters (F, 3, side, side) of unit length that answer nothing to a flat picture."""
    filters = torch.randn(number, 3, side, side, generator=torch.Generator().manual_seed(0))
    filters = filters - filters.mean((2, 3), keepdim=True)
    return filters / filters.flatten(1).norm(dim=1)[:, None, None, None]


def texture_loss(decoded: Tensor, image: Tensor, window: int = 16, floor: float = 1e-4) -> Tensor:
    """How far the local texture of ``decoded`` is from that of ``image``; 0.7 is texture of half the contrast.

    In windows, the energies of the answers of random filters to the two finest pyramid bands are compared: half the
    mean of |log ratio|, summed over both bands. Pixel losses answer doubt with blur; this asks for the right amount of
    detail of the right kind, wherever it lies (after Ustyuzhaninov et al., arXiv 1606.00021: random filters describe a
    texture). An energy of ``floor`` counts as none.
    """
    filters = random_filters().to(decoded)

    def energies(band: Tensor) -> Tensor:
        answers = F.conv2d(band, filters).square()
        return F.avg_pool2d(answers, min(window, *answers.shape[2:]), window // 2) + floor

    loss = decoded.new_zeros(())
    for _ in range(2):
        (band, decoded), (expected_band, image) = _split(decoded), _split(image)
        loss = loss + (energies(band) / energies(expected_band)).log().abs().mean() / 2
    return loss


def pattern_loss(decoded: Tensor, image: Tensor, cells: int = 4) -> Tensor:
    """The part of the error that repeats from cell to cell of 8x8 pixels, within blocks of ``cells`` x ``cells``.

    A decoder that is asked for texture finds it cheapest to draw one pattern in every latent cell, a mesh. The mean of
    the cells of a block shows it; texture that differs from cell to cell has none. L1, without the cells' means.
    """
    error = decoded - image
    error = error - F.interpolate(F.avg_pool2d(error, 8), scale_factor=8.0, mode="nearest")
    blocks = error.unflatten(3, (-1, cells, 8)).unflatten(2, (-1, cells, 8))  # (N, 3, b, cells, 8, b, cells, 8)
    return blocks.mean((3, 6)).abs().mean()


def balance(first: Tensor, second: Tensor, weight: Tensor, limit: float = 1e4) -> Tensor:
    """The factor for ``second`` that makes its gradient at ``weight`` as long as that of ``first``; detached.

    So VQGAN weighs its discriminator (Esser et al., arXiv 2012.09841, equation 7).
    """
    lengths = [torch.autograd.grad(loss, weight, retain_graph=True)[0].norm() for loss in (first, second)]
    return (lengths[0] / (lengths[1] + 1e-6)).clamp(max=limit).detach()


class Adversary:
    """A patch discriminator with its optimiser: spectral norms and the hinge loss.

    After Isola et al., arXiv 1611.07004, section 3.2. A score above 0 says real, below 0 decoded; it sees 38 pixels.
    """

    def __init__(self, learning_rate: float, device: str, channels: tuple[int, ...] = (32, 64, 96)) -> None:
        layers: list[nn.Module] = []
        for inputs, outputs in zip((3, *channels), channels, strict=False):
            layers += [spectral_norm(nn.Conv2d(inputs, outputs, 4, stride=2, padding=1)), nn.LeakyReLU(0.2)]
        self.network = nn.Sequential(*layers, spectral_norm(nn.Conv2d(channels[-1], 1, 3, padding=1))).to(device)
        self.optimiser = torch.optim.Adam(self.network.parameters(), lr=learning_rate, betas=(0.5, 0.9))

    def judge(self, decoded: Tensor) -> Tensor:
        """How far the decoded pictures are from being taken for real ones: the decoder lowers it."""
        self.network.requires_grad_(False)
        loss = -self.network(decoded).mean()
        self.network.requires_grad_(True)
        return loss

    def learn(self, image: Tensor, decoded: Tensor) -> float:
        """Take one step on real and decoded pictures, and return its loss."""
        real, fake = self.network(torch.cat([image, decoded.detach()])).float().chunk(2)
        loss = F.relu(1 - real).mean() + F.relu(1 + fake).mean()
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        self.optimiser.step()
        return loss.item()

    def state_dict(self) -> dict[str, Any]:
        return {"network": self.network.state_dict(), "optimiser": self.optimiser.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.network.load_state_dict(state["network"])
        self.optimiser.load_state_dict(state["optimiser"])
