"""What a step minimises: the task alone, the paper's distillation, guidance distilled into one call, or INT8's error.

An objective is called with the network being trained (perhaps wrapped for several processes), a batch, and what its
caller multiplies the total with before the backward pass (fp16's loss scaling). It returns the total loss, a scalar,
and detached scalars to show, by name. Its teacher or frozen copy is never updated.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..model.student import Student
from ..model.teacher import Teacher
from ..model.unet import Denoised
from .fake_quantise import Simulation
from .losses import LayerGradient, adaptive_weights, coarse_loss, noise_loss, predicted_clean, total_loss
from .noising import Batch, prompt_ids
from .perceptual import LatentDistance
from .recipe import LossRecipe

Figures = dict[str, Tensor]
Objective = Callable[[nn.Module, Batch, float], tuple[Tensor, Figures]]
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


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
