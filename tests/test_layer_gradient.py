"""A loss's gradient at a 1x1 convolution's weight, without the weight: as autograd has it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moebius_edge.training.layer_gradient import LayerGradient

torch.set_num_threads(1)


@pytest.mark.parametrize(
    ("precision", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
)
def test_it_is_autograd_s(precision: torch.dtype, tolerance: float) -> None:
    """bfloat16 is autocast's, in which autograd rounds the gradient of the weight, too."""
    torch.manual_seed(0)
    dtype = torch.float64 if precision == torch.float64 else torch.float32
    layer, x = nn.Conv2d(5, 3, 1).to(dtype), torch.randn(2, 5, 4, 6, dtype=dtype)
    gradient = LayerGradient(layer)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16), gradient:
        y = layer(x)
    loss = y.to(dtype).sin().sum()
    (expected,) = torch.autograd.grad(loss, layer.weight, retain_graph=True)
    ours = gradient(loss)
    assert ours.shape == (3, 5) and ours.dtype == dtype and layer.weight.grad is None
    torch.testing.assert_close(ours, expected.flatten(1), rtol=tolerance, atol=tolerance * expected.abs().max().item())


def test_recomputation_is_not_taken_for_the_forward_pass() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Tanh(), nn.Conv2d(4, 2, 1), nn.Tanh())
    gradient = LayerGradient(net[0])
    with gradient:
        y: Tensor = checkpoint(net, torch.randn(2, 3, 4, 4), use_reentrant=False)
    loss = y.square().sum()
    first, again = gradient(loss), gradient(loss)
    (expected,) = torch.autograd.grad(loss, net[0].weight)
    torch.testing.assert_close(first, expected.flatten(1))
    assert torch.equal(first, again)
