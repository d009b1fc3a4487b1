"""The gradient of a loss at a 1x1 convolution's weight, taken from what passed through the layer.

With y = W x at every position, dL/dW is the sum over samples and positions of (dL/dy) xᵀ. So the weight itself is not
asked, which FSDP holds in shards, and whose own gradient hooks belong to the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class LayerGradient:
    """A context manager for the forward pass; then a function from a loss to its gradient at ``layer``'s weight.

    It sees the layer's last call alone, and none after leaving the context: recomputation by gradient checkpointing
    calls the layer again.
    """

    def __init__(self, layer: nn.Conv2d) -> None:
        self._layer = layer

    def __enter__(self) -> LayerGradient:
        self._hook = self._layer.register_forward_hook(self._keep)
        return self

    def __exit__(self, *error: object) -> None:
        self._hook.remove()

    def _keep(self, layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        self._input, self._output = inputs[0].detach(), output

    def __call__(self, loss: Tensor) -> Tensor:
        """(outputs, inputs), in float32 (float64 stays). The graph is kept, and no ``grad`` is written to."""
        (gradient,) = torch.autograd.grad(loss, self._output, retain_graph=True)
        dtype = torch.promote_types(gradient.dtype, torch.float32)
        return torch.einsum("nohw,nihw->oi", gradient.to(dtype), self._input.to(dtype))
