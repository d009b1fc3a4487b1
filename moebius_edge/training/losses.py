"""What a step minimises: the task alone, the paper's distillation, guidance distilled into one call, or INT8's error.

The distillation is the adaptive multi-granularity one of Moebius, arXiv 2606.19195. Losses are means over the batch,
taken in float32 (float64 stays) whatever the networks ran in. A dictionary holds the measured terms by their names:
``task`` always, since the weights need it, and ``fine``, ``coarse`` and ``perceptual`` (see
``perceptual.LatentDistance``) where they were measured; scalars with their graph.

An objective is called with the network being trained (perhaps wrapped for several processes), a batch, and what its
caller multiplies the total with before the backward pass (fp16's loss scaling). It returns the total loss, a scalar,
and detached scalars to show, by name. Its teacher or frozen copy is never updated.
"""

from __future__ import annotations

from collections.abc import Callable, Set
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..model.student import Student
from ..model.teacher import Teacher
from ..model.unet import Denoised
from .fake_quantise import Simulation
from .noising import Batch, prompt_ids
from .perceptual import LatentDistance
from .recipe import LossRecipe

Figures = dict[str, Tensor]
Objective = Callable[[nn.Module, Batch, float], tuple[Tensor, Figures]]
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
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
    losses: Figures,
    at_output: Callable[[Tensor], Tensor],
    at_coarse: Callable[[Tensor], Tensor],
    mean: Callable[[Tensor], Tensor],
    scale: float = 1.0,
) -> Figures:
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


def total_loss(losses: Figures, weights: Figures, recipe: LossRecipe, terms: Set[str]) -> Tensor:
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


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """Mixed precision as the recipe names it; ``fp32`` is none."""
    return torch.autocast(device.type, _DTYPES.get(precision, torch.bfloat16), enabled=precision in _DTYPES)


def noise_weight(batch: Batch, recipe: LossRecipe) -> Tensor:
    """(N, 1, h, w) weights of the squared noise error."""
    weight = 1 + (recipe.hole_weight - 1) * batch.mask
    if recipe.velocity_limit:
        weight = weight * (1 / batch.alpha_bar).clamp(max=recipe.velocity_limit)[:, None, None, None]
    return weight


def _noise(network: Any, batch: Batch, num_prompts: int, branch: Tensor, precision: str) -> Tensor:
    with autocast(batch.sample.device, precision):
        noise: Tensor = network(batch.sample, batch.timestep, prompt_ids(num_prompts, branch)).noise
    return noise


class Task:
    """Predicting the true noise, without a teacher: how a teacher is trained, and the ablation's baseline."""

    def __init__(self, recipe: LossRecipe, num_prompts: int, precision: str) -> None:
        self._recipe, self._prompts, self._precision = recipe, num_prompts, precision

    def __call__(self, model: nn.Module, batch: Batch, scale: float = 1.0) -> tuple[Tensor, Figures]:
        predicted = _noise(model, batch, self._prompts, batch.unconditional, self._precision)
        loss = noise_loss(predicted, batch.noise, noise_weight(batch, self._recipe))
        return loss, {"task": loss.detach()}


class Distillation:
    """The paper's adaptive multi-granularity distillation (arXiv 2606.19195): ``losses`` put together.

    ``student`` is the network itself, at whose layers the adaptive weights are measured; ``mean`` averages a tensor
    over the processes. A call raises UsageError if student and teacher do not fit each other.
    """

    def __init__(
        self,
        recipe: LossRecipe,
        student: Student,
        teacher: Teacher,
        distance: LatentDistance | None,
        precision: str,
        mean: Callable[[Tensor], Tensor],
    ) -> None:
        self._recipe, self._student, self._teacher = recipe, student, teacher.eval().requires_grad_(False)
        self.distance, self._precision, self._mean = distance, precision, mean
        self._terms = frozenset(recipe.terms)

    def __call__(self, model: nn.Module, batch: Batch, scale: float = 1.0) -> tuple[Tensor, Figures]:
        student, terms = self._student, self._terms
        at_output, at_coarse = LayerGradient(student.output_layer), LayerGradient(student.coarse_layer)
        with autocast(batch.sample.device, self._precision), at_output, at_coarse:
            ids = prompt_ids(student.config.num_prompts, batch.unconditional)
            ours: Denoised = model(batch.sample, batch.timestep, ids)
        losses = self._losses(ours, batch)
        weights = adaptive_weights(losses, at_output, at_coarse, self._mean, scale)
        total = total_loss(losses, weights, self._recipe, terms)
        if terms == {"coarse"}:  # several processes wait for a gradient of every parameter
            total = total + 0 * ours.noise.float().sum()
        return total, {name: loss.detach() for name, loss in losses.items()} | weights

    def _losses(self, ours: Denoised, batch: Batch) -> dict[str, Tensor]:
        """The task, and what else the recipe's terms name."""
        weight = noise_weight(batch, self._recipe)
        losses = {"task": noise_loss(ours.noise, batch.noise, weight)}
        if self._terms & {"fine", "coarse"}:
            with torch.no_grad(), autocast(batch.sample.device, self._precision):
                ids = prompt_ids(self._teacher.config.num_prompts, batch.unconditional)
                theirs = cast(Denoised, self._teacher(batch.sample, batch.timestep, ids))
            if "fine" in self._terms:
                losses["fine"] = noise_loss(ours.noise, theirs.noise, weight)
            if "coarse" in self._terms:
                losses["coarse"] = coarse_loss(self._student.coarse_feature(ours), self._teacher.coarse_feature(theirs))
        if self.distance is not None:
            clean = predicted_clean(batch.noisy, ours.noise, batch.alpha_bar)
            with autocast(batch.sample.device, self._precision):
                losses["perceptual"] = self.distance(clean, batch.clean, batch.mask, batch.masked)
        return losses


class Guidance:
    """The guided prediction of a frozen copy of the student, learnt by its conditional branch.

    Target eu + g (ec - eu) at one fixed g (Meng et al., arXiv 2210.03142, section 3.1). The total is the mean
    squared error to it; ``task`` is shown beside it.
    """

    def __init__(self, recipe: LossRecipe, frozen: Student, precision: str) -> None:
        self._recipe, self._frozen, self._precision = recipe, frozen.eval().requires_grad_(False), precision

    def __call__(self, model: nn.Module, batch: Batch, scale: float = 1.0) -> tuple[Tensor, Figures]:
        prompts, conditional = self._frozen.config.num_prompts, torch.zeros_like(batch.unconditional)
        twice = batch._replace(sample=batch.sample.repeat(2, 1, 1, 1), timestep=batch.timestep.repeat(2))
        with torch.no_grad():
            branches = torch.cat([conditional + 1, conditional])
            free, bound = _noise(self._frozen, twice, prompts, branches, self._precision).float().chunk(2)
        predicted = _noise(model, batch, prompts, conditional, self._precision)
        weight = noise_weight(batch, self._recipe)
        loss = noise_loss(predicted, free + self._recipe.guidance * (bound - free), weight)
        return loss, {"guided": loss.detach(), "task": noise_loss(predicted, batch.noise, weight).detach()}


class QuantisationAware:
    """The prediction of a frozen copy of the student, learnt by the student whose products are rounded to INT8.

    The total is the mean squared error to it, weighted by ``noise_weight`` and by 1 - alpha-bar, the noise's share of
    what the network sees: near t = 0 rounding the input hides the noise, which no weights can mend and no picture
    shows. ``task``, the error to the true noise under the same weights, is shown beside it. With ``one_branch``, for
    a student with distilled guidance, the unconditional branch plays no part.
    """

    def __init__(
        self, recipe: LossRecipe, frozen: Student, simulation: Simulation, precision: str, one_branch: bool
    ) -> None:
        self._recipe, self._frozen, self._precision = recipe, frozen.eval().requires_grad_(False), precision
        self._one_branch, self.simulation = one_branch, simulation

    def __call__(self, model: nn.Module, batch: Batch, scale: float = 1.0) -> tuple[Tensor, Figures]:
        branch = torch.zeros_like(batch.unconditional) if self._one_branch else batch.unconditional
        prompts = self._frozen.config.num_prompts
        with torch.no_grad():
            target = _noise(self._frozen, batch, prompts, branch, self._precision)
        predicted = _noise(model, batch, prompts, branch, self._precision)
        weight = (1 - batch.alpha_bar)[:, None, None, None] * noise_weight(batch, self._recipe)
        loss = noise_loss(predicted, target, weight)
        return loss, {"int8": loss.detach(), "task": noise_loss(predicted, batch.noise, weight).detach()}
