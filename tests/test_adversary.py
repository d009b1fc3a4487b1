"""The discriminator: its loss by hand, gradients balanced, and blur told from detail."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from moebius_edge.training.adversary import Adversary, balance, build_discriminator, discriminator_loss

torch.set_num_threads(1)


def test_the_hinge_loss_by_hand() -> None:
    real, decoded = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.0])
    assert discriminator_loss(real, decoded).item() == pytest.approx((0 + 0.5) / 2 + (0 + 1) / 2)


def test_a_score_sees_the_stated_pixels() -> None:
    torch.manual_seed(0)
    network = build_discriminator()
    image = torch.randn(1, 3, 128, 128, requires_grad=True)
    scores = network(image)
    assert scores.shape == (1, 1, 16, 16)
    scores[0, 0, 8, 8].backward()
    assert image.grad is not None
    rows = image.grad.abs().sum((0, 1, 3)).nonzero().flatten()
    assert int(rows.max() - rows.min()) + 1 == 38


def test_balanced_gradients_are_equally_long() -> None:
    weight = nn.Parameter(torch.tensor([3.0, 4.0]))
    first, second = (weight**2).sum(), 0.01 * weight.sum()
    factor = balance(first, second, weight)
    assert not factor.requires_grad
    assert factor.item() == pytest.approx(10 / (0.01 * 2**0.5), rel=1e-3)
    assert balance(first, 0 * weight.sum(), weight, limit=50.0).item() == 50.0


def test_it_learns_to_tell_blur_and_judging_teaches_it_nothing() -> None:
    torch.manual_seed(0)
    adversary = Adversary(2e-3, "cpu")
    weights = [p.detach().clone() for p in adversary.network.parameters()]
    blurred = F.avg_pool2d(torch.randn(2, 3, 64, 64), 5, 1, 2).requires_grad_()
    adversary.judge(blurred).backward()
    assert blurred.grad is not None and blurred.grad.abs().max() > 0
    assert all(p.grad is None for p in adversary.network.parameters())
    assert all(torch.equal(a, b) for a, b in zip(weights, adversary.network.parameters(), strict=True))
    losses = []
    for _ in range(60):
        sharp = torch.randn(4, 3, 64, 64)
        losses.append(adversary.learn(sharp, F.avg_pool2d(torch.randn(4, 3, 64, 64), 5, 1, 2)))
    assert losses[0] > 1.5 and losses[-1] < 0.5
    sharp = torch.randn(2, 3, 64, 64)
    assert adversary.judge(sharp) < adversary.judge(F.avg_pool2d(sharp, 5, 1, 2))
