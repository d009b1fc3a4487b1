"""The losses of adaptive multi-granularity distillation, and the weights that balance them.

Moebius, arXiv 2606.19195. All are means over the batch, taken in float32 (float64 stays) whatever the networks ran in.
A dictionary holds the measured terms by their names: ``task`` always, since the weights need it, and ``fine``,
``coarse`` and ``perceptual`` (see ``perceptual.LatentDistance``) where they were measured; scalars with their graph.
"""

from __future__ import annotations

from collections.abc import Callable, Set
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UsageError
from .recipe import LossRecipe

Losses = dict[str, Tensor]

OUTPUT_EPSILON, OUTPUT_LIMIT = 1e-6, 1e6  # of w_out and w_perceptual
COARSE_EPSILON, COARSE_LIMIT = 1e-4, 1e4  # of w_cross


def noise_loss(predicted: Tensor, target: Tensor, weight: Tensor | float = 1.0) -> Tensor:
    """Mean squared error of noises (N, 4, h, w): the fine loss against the teacher's, the task against the true one.

    ``weight`` broadcasts to (N, 4, h, w) and multiplies the squares; the mean is not divided by its sum.
    """
    return ((_full(predicted) - _full(target)).square() * weight).mean()


def coarse_loss(student_feature: Tensor, teacher_feature: Tensor) -> Tensor:
    """Mean squared error of the two networks' ``coarse_feature`` (N, C, h, w).

    Raises UsageError when their shapes differ: the two networks make no pair.
    """
    if student_feature.shape != teacher_feature.shape:
        raise UsageError(
            f"the student's coarsest feature has shape {tuple(student_feature.shape)}, what the teacher has for it "
            f"{tuple(teacher_feature.shape)}: give the student the teacher's last block_out_channels and one level less"
        )
    return (_full(student_feature) - _full(teacher_feature)).square().mean()


def predicted_clean(noisy: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """The clean latent that ``noise`` implies, (x_t - √(1-ᾱ) ε) / √ᾱ (DDIM, arXiv 2010.02502, equation 9).

    noisy x_t and noise ε (N, 4, h, w), alpha_bar (N,) -> (N, 4, h, w).
    """
    alpha_bar = _full(alpha_bar)[:, None, None, None]
    return (_full(noisy) - (1 - alpha_bar).sqrt() * _full(noise)) / alpha_bar.sqrt()


class LayerGradient:
    """The gradient of a loss at the weight of a 1x1 convolution, taken from what passed through the layer.

    With y = W x at every position, dL/dW is the sum over samples and positions of (dL/dy) xᵀ. The weight itself, whose
    gradient hooks belong to the backward pass, is not asked. A context manager for the forward pass, then a function
    of a loss. It sees the layer's last call, and none after leaving the context, when gradient checkpointing calls the
    layer again.
    """

    def __init__(self, layer: nn.Conv2d) -> None:
        self._layer = layer

    def __enter__(self) -> LayerGradient:
        self._hook = self._layer.register_forward_hook(self._remember)
        return self

    def __exit__(self, *error: object) -> None:
        self._hook.remove()

    def _remember(self, layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        self._input, self._output = inputs[0].detach(), output

    def __call__(self, loss: Tensor) -> Tensor:
        """(outputs, inputs), in float32 (float64 stays). The graph is kept, and no ``grad`` is written to."""
        (gradient,) = torch.autograd.grad(loss, self._output, retain_graph=True)
        return torch.einsum("nohw,nihw->oi", _full(gradient), self._input.to(_full(gradient).dtype))


def adaptive_weights(
    losses: Losses,
    at_output: Callable[[Tensor], Tensor],
    at_coarse: Callable[[Tensor], Tensor],
    mean: Callable[[Tensor], Tensor],
    scale: float = 1.0,
) -> Losses:
    """The factors that bring every term's gradient to the task's length, and the task's to the coarse term's.

    At the weight of ``Student.output_layer`` w_out = |g task| / (|g fine| + 1e-6) and w_perceptual likewise, at most
    1e6; at that of ``Student.coarse_layer`` w_cross = |g coarse| / (|g task| + 1e-4), at most 1e4. The weight of a term
    that is not measured is 0; w_cross is then 1, for there is nothing to balance against. A weight is NaN when a
    gradient is not finite, so that the step is noticed rather than clamped.

    Args:
        losses: the measured terms; their graphs are kept for the backward pass.
        at_output, at_coarse: give the gradient g of a loss at the layer, see ``LayerGradient``.
        mean: averages a gradient over the processes, before its length is taken.
        scale: multiplies a loss before its gradient is taken, as fp16's loss scaling does; taken out of the lengths.
    """

    def length(name: str, gradient: Callable[[Tensor], Tensor]) -> Tensor:
        return torch.linalg.vector_norm(mean(gradient(losses[name] * scale))) / scale

    def at_task_length(name: str) -> Tensor:
        if name not in losses:
            return losses["task"].new_zeros(())
        return _ratio(length("task", at_output), length(name, at_output), OUTPUT_EPSILON, OUTPUT_LIMIT)

    cross = losses["task"].new_ones(())
    if "coarse" in losses:
        cross = _ratio(length("coarse", at_coarse), length("task", at_coarse), COARSE_EPSILON, COARSE_LIMIT)
    return {"w_out": at_task_length("fine"), "w_perceptual": at_task_length("perceptual"), "w_cross": cross}


def total_loss(losses: Losses, weights: Losses, recipe: LossRecipe, terms: Set[str]) -> Tensor:
    """a_kd · coarse + w_cross · (a_task · task + a_kd · w_out · fine + a_perc · w_perceptual · perceptual).

    The coefficients a are the recipe's; only ``terms``, all of them measured, enter.
    """
    factors = {
        "coarse": weights["w_cross"].new_tensor(recipe.distillation),
        "task": weights["w_cross"] * recipe.task,
        "fine": weights["w_cross"] * recipe.distillation * weights["w_out"],
        "perceptual": weights["w_cross"] * recipe.perceptual * weights["w_perceptual"],
    }
    # In the formula's order, not the set's: a sum of floats depends on it.
    return torch.stack([factor * losses[name] for name, factor in factors.items() if name in terms]).sum()


def _full(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _ratio(numerator: Tensor, denominator: Tensor, epsilon: float, limit: float) -> Tensor:
    ratio = (numerator / (denominator + epsilon)).clamp(max=limit)
    return torch.where(torch.isfinite(numerator + denominator), ratio, torch.nan).detach()
