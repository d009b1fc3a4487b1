"""The losses of adaptive multi-granularity distillation, and the weights that balance them.

Moebius, arXiv 2606.19195. All are means over the batch, taken in float32 (float64 stays) whatever the networks
ran in. ``LatentDistance`` in ``perceptual`` is the fourth term.
"""

from __future__ import annotations

from collections.abc import Callable, Set
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UsageError

Gradient = Callable[[Tensor], Tensor]  # of a loss, a scalar with its graph, at one layer's weight

OUTPUT_EPSILON, OUTPUT_LIMIT = 1e-6, 1e6  # of w_out and w_perc
COARSE_EPSILON, COARSE_LIMIT = 1e-4, 1e4  # of w_cross


@dataclass(frozen=True)
class Losses:
    """The four terms, scalars with their graph. None: not measured. ``task`` always is, since the weights need it."""

    task: Tensor
    fine: Tensor | None = None
    coarse: Tensor | None = None
    perceptual: Tensor | None = None


@dataclass(frozen=True)
class Coefficients:
    """The fixed factors: a_kd of coarse and fine, a_task and a_perc."""

    distillation: float = 0.01
    task: float = 0.5
    perceptual: float = 0.5


@dataclass(frozen=True)
class Weights:
    """The adaptive factors w_out, w_perc and w_cross: scalars, detached. See ``adaptive_weights``."""

    out: Tensor
    perceptual: Tensor
    cross: Tensor


def noise_loss(predicted: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean squared error of noises (N, 4, h, w): against the teacher's it is the fine loss, the true one's the task.

    ``weight`` broadcasts to (N, 4, h, w) and multiplies the squares; the mean is not divided by its sum.
    """
    squares = (_full(predicted) - _full(target)).square()
    return (squares if weight is None else squares * weight).mean()


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


def identity(gradient: Tensor) -> Tensor:
    """One process: its gradient is the whole batch's."""
    return gradient


def adaptive_weights(
    losses: Losses,
    at_output: Gradient,
    at_coarse: Gradient,
    reduce: Callable[[Tensor], Tensor] = identity,
    scale: float = 1.0,
) -> Weights:
    """The factors that bring every term's gradient to the task's length, and the task's to the coarse term's.

    At the weight of ``Student.output_layer`` w_out = |g task| / (|g fine| + 1e-6) and w_perc likewise, at most 1e6;
    at that of ``Student.coarse_layer`` w_cross = |g coarse| / (|g task| + 1e-4), at most 1e4. ``at_output`` and
    ``at_coarse`` give the gradients g, see ``layer_gradient``. The weight of a term that is not measured is 0;
    w_cross is then 1, for there is nothing to balance against. NaN when a gradient is not finite, so that the step
    is noticed rather than clamped.

    ``reduce`` averages a gradient over processes before its length is taken, so that N processes find what one
    finds with the whole batch (batch norms apart: they need SyncBatchNorm for that). ``scale`` is GradScaler's
    ``get_scale()``: in fp16 the gradients vanish without it. The lengths are those of the unscaled losses.

    The graphs are kept for the backward pass, and no ``grad`` is written to.
    """

    def length(loss: Tensor, gradient: Gradient) -> Tensor:
        return torch.linalg.vector_norm(reduce(gradient(loss * scale))) / scale

    def of_output(loss: Tensor | None) -> Tensor:
        if loss is None:
            return losses.task.new_zeros(())
        task = length(losses.task, at_output)
        return _ratio(task, length(loss, at_output), OUTPUT_EPSILON, OUTPUT_LIMIT)

    cross = losses.task.new_ones(())
    if losses.coarse is not None:
        coarse = length(losses.coarse, at_coarse)
        cross = _ratio(coarse, length(losses.task, at_coarse), COARSE_EPSILON, COARSE_LIMIT)
    return Weights(out=of_output(losses.fine), perceptual=of_output(losses.perceptual), cross=cross)


def total_loss(losses: Losses, weights: Weights, coefficients: Coefficients, terms: Set[str] | None = None) -> Tensor:
    """a_kd · coarse + w_cross · (a_task · task + a_kd · w_out · fine + a_perc · w_perc · perceptual).

    ``terms``, names of ``Losses``' fields, are those that enter; by default all that were measured. Raises
    ValueError for a term that was not, or for none at all.
    """
    factors = {
        "coarse": weights.cross.new_tensor(coefficients.distillation),
        "task": weights.cross * coefficients.task,
        "fine": weights.cross * coefficients.distillation * weights.out,
        "perceptual": weights.cross * coefficients.perceptual * weights.perceptual,
    }
    measured = {name: loss for name in factors if (loss := getattr(losses, name)) is not None}
    entering = measured.keys() if terms is None else terms
    if not entering or not entering <= measured.keys():
        raise ValueError(f"terms {sorted(entering)} are not among the measured {sorted(measured)}")
    # In the formula's order, not the set's: a sum of floats depends on it.
    return torch.stack([factors[name] * measured[name] for name in factors if name in entering]).sum()


def _full(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _ratio(numerator: Tensor, denominator: Tensor, epsilon: float, limit: float) -> Tensor:
    ratio = (numerator / (denominator + epsilon)).clamp(max=limit)
    return torch.where(torch.isfinite(numerator + denominator), ratio, torch.nan).detach()
