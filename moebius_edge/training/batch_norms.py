"""Batch norms whose statistics stay sane under accumulation, several processes, averaging and recomputation.

The student has some sixty of them, and in inference they use the running statistics, so those must be right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def batch_norms(module: nn.Module) -> list[_BatchNorm]:
    return [m for m in module.modules() if isinstance(m, _BatchNorm)]


def set_training(module: nn.Module, running: bool) -> None:
    """Training mode; with ``running`` the batch norms keep to their stored statistics, and do not change them."""
    module.train()
    if running:
        for norm in batch_norms(module):
            norm.eval()


def spread_momentum(module: nn.Module, micro_batches: int) -> None:
    """Makes ``micro_batches`` updates move the statistics as far as one: 1 - (1 - m)^(1/n) each."""
    for norm in batch_norms(module):
        norm.momentum = 1 - (1 - (0.1 if norm.momentum is None else norm.momentum)) ** (1 / micro_batches)


@torch.no_grad()
def average_statistics(module: nn.Module, mean: Callable[[Tensor], Tensor]) -> None:
    """Sets the running statistics to their ``mean`` over the processes, each of which saw its own samples."""
    for norm in batch_norms(module):
        for statistic in (norm.running_mean, norm.running_var):
            if statistic is not None:
                statistic.copy_(mean(statistic))


@torch.no_grad()
def settle(module: nn.Module, passes: Iterable[Callable[[], object]]) -> None:
    """Measures the statistics anew, as a plain mean over ``passes`` (each a forward pass), and leaves them in use.

    Averaged weights have no statistics of their own: those of the last weights are not theirs.
    """
    norms = batch_norms(module)
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over all batches
    module.train()
    for forward in passes:
        forward()
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    module.eval()
