"""Trains a student to predict the noise, without a teacher: the task loss of the paper alone.

Distillation is not here. The loss is weighted by 1 / alpha-bar, cut at ``weight_limit``: as much as
predicting the velocity would weigh it (Salimans and Ho, arXiv 2202.00512, section 4), because with equal
weights the early steps, which decide the hole's colours, hardly count.
"""

from __future__ import annotations

import time
from collections import deque
from contextlib import closing
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..model import StudentConfig, build_student
from ..scheduler import DDIM
from ..spec import NOISE_OFFSET, NUM_TRAIN_TIMESTEPS
from .latents import LatentCache
from .loop import Loader, check_finite, cosine, load_state, progress_bar, save_state, update_average
from .optimiser import MuonAdamW


@dataclass(frozen=True)
class DenoiserRecipe:
    """Everything that decides the result, saved beside the weights."""

    student: StudentConfig = field(
        default_factory=lambda: StudentConfig(
            block_out_channels=(64, 96, 128),
            layers_per_block=1,
            cross_attention_dim=32,
            prompt_embedding_dim=32,
            latent_size=32,
        )
    )
    steps: int = 5000
    batch: int = 12
    learning_rate: float = 3e-3
    warmup: int = 100
    ema_decay: float = 0.997
    prompt_dropout: float = 0.15
    hole_weight: float = 5.0
    weight_limit: float = 40.0
    seed: int = 0


def initialise(student: nn.Module) -> None:
    """Starts every λ block as the identity, ``conv_in`` as one that loses nothing, and both branches equal.

    The noisy latent passes ``conv_in`` through one 3x3 kernel a channel and a ReLU. A random kernel has zeros in
    its spectrum, and what falls there cannot be recovered: the early steps, which need the noise to a percent,
    end in checkerboards. So the kernels start as the identity, and the batch norm's bias keeps the ReLU open.
    """
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if name.endswith("proj_out.weight") or name.endswith("proj_out.bias"):
                parameter.zero_()
            elif name.endswith("conv_in.conv_dw.weight"):
                parameter.zero_()
                parameter[..., 1, 1] = 1.0
            elif name.endswith("conv_in.bn1.bias"):
                parameter.fill_(3.0)
            elif name == "embedding_layer.weight":
                parameter[len(parameter) // 2 :] = parameter[: len(parameter) // 2]


def task_loss(noise_pred: torch.Tensor, noise: torch.Tensor, hole: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Weighted mean squared error; noise (N, 4, h, w), hole weights (N, 1, h, w), sample weights (N,)."""
    error = (noise_pred.float() - noise).square() * hole
    return (error.mean((1, 2, 3)) * weight).mean()


class DenoiserTrainer:
    """One student, its average and its optimiser. ``step`` and ``save``/``resume`` are the whole loop."""

    def __init__(self, recipe: DenoiserRecipe, cache: LatentCache, output: Path, device: str = "cpu") -> None:
        torch.manual_seed(recipe.seed)
        self.recipe, self.cache, self.output, self.device = recipe, cache, output, device
        self.student = build_student(recipe.student)
        initialise(self.student)
        self.student.to(device)
        self.average = build_student(recipe.student).to(device).requires_grad_(False)
        self.average.load_state_dict(self.student.state_dict())
        self.optimiser = MuonAdamW(self.student, recipe.learning_rate)
        scheduler = DDIM(NUM_TRAIN_TIMESTEPS)
        self.alpha_bar = torch.tensor(
            [scheduler.alpha_bar(t) for t in range(NUM_TRAIN_TIMESTEPS)], dtype=torch.float32, device=device
        )
        self.done = 0

    def draw(self, rng: np.random.Generator) -> tuple[Any, ...]:
        """One sample: clean, masked and mask latents, noise, a place in its share of the timesteps, prompts dropped."""
        clean, masked, mask = self.cache.pair(rng)
        noise = rng.standard_normal(clean.shape, np.float32)
        noise += NOISE_OFFSET * rng.standard_normal((len(clean), 1, 1), np.float32)
        return clean, masked, mask, noise, rng.random(), np.int64(rng.random() < self.recipe.prompt_dropout)

    def predict(self, network: nn.Module, batch: tuple[np.ndarray, ...]) -> tuple[torch.Tensor, ...]:
        """The predicted noise and what the loss needs beside it."""
        clean, masked, mask, noise, place, drop = (torch.from_numpy(a).to(self.device) for a in batch)
        # Each sample of a batch has its own share of the trajectory: less spread between batches.
        shares = torch.arange(len(place), device=self.device)
        timestep = ((shares + place) / len(place) * NUM_TRAIN_TIMESTEPS).long()
        alpha_bar = self.alpha_bar[timestep]
        signal, spread = (a.sqrt()[:, None, None, None] for a in (alpha_bar, 1 - alpha_bar))
        sample = torch.cat([signal * clean + spread * noise, mask, masked], 1)
        prompts = self.recipe.student.num_prompts
        ids = torch.arange(prompts, device=self.device)[None] + prompts * drop[:, None]
        with torch.autocast(self.device, torch.bfloat16):
            predicted = network(sample, timestep, ids).noise
        return predicted, noise, mask, alpha_bar

    def step(self, batch: tuple[np.ndarray, ...]) -> float:
        """One optimiser step; returns the loss. Raises BundleError when the loss is not finite."""
        recipe = self.recipe
        share = self.done / recipe.steps
        rate = min(1.0, (self.done + 1) / recipe.warmup) * cosine(share, 0.01)
        self.optimiser.set_learning_rate(recipe.learning_rate * rate)
        predicted, noise, mask, alpha_bar = self.predict(self.student, batch)
        weight = (1 / alpha_bar).clamp(max=recipe.weight_limit)
        loss = task_loss(predicted, noise, 1 + (recipe.hole_weight - 1) * mask, weight)
        check_finite(loss, "the denoiser's loss", self.done)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
        check_finite(norm, "the denoiser's gradient", self.done)
        self.optimiser.step()
        self.optimiser.zero_grad()
        self.done += 1
        update_average(self.average, self.student, min(recipe.ema_decay, self.done / (self.done + 10)))
        return loss.item()

    def run(self, save_every: int = 250) -> nn.Module:
        """Trains to the end, saving on the way; returns the averaged student, ready for inference."""
        started, first, steps = time.monotonic(), self.done, self.recipe.steps
        recent: deque[float] = deque(maxlen=100)
        loader = Loader(self.draw, self.recipe.batch, self.recipe.seed, first * self.recipe.batch)
        with progress_bar("denoiser", steps) as report, closing(iter(loader)) as batches:
            for batch in islice(batches, steps - first):
                recent.append(self.step(batch))
                if self.done % 20 == 0:
                    speed = (self.done - first) * self.recipe.batch / (time.monotonic() - started)
                    report(self.done, {"step": self.done, "loss": float(np.mean(recent)), "images_per_s": speed})
                if self.done % save_every == 0 or self.done == steps:
                    self.save()
        self.settle_batch_norms()
        return self.average.eval()

    def settle_batch_norms(self, batches: int = 60) -> None:
        """Measures the batch norms' statistics anew with the averaged weights, over ``batches`` batches."""
        norms = [m for m in self.average.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a plain mean over all batches
        self.average.train()
        loader = Loader(self.draw, self.recipe.batch, self.recipe.seed + 1)
        with torch.no_grad(), closing(iter(loader)) as drawn:
            for batch in islice(drawn, batches):
                self.predict(self.average, batch)
        self.average.eval()

    def save(self) -> None:
        """Writes the state that ``resume`` reads."""
        save_state(
            self.output / "state.pt",
            asdict(self.recipe),
            student=self.student.state_dict(),
            average=self.average.state_dict(),
            optimiser=self.optimiser.state_dict(),
            done=self.done,
        )

    def resume(self) -> bool:
        """Continues from ``state.pt`` if there is one, exactly; says whether there was. Raises as ``load_state``."""
        state = load_state(self.output / "state.pt", asdict(self.recipe), self.device)
        if state is None:
            return False
        self.student.load_state_dict(state["student"])
        self.average.load_state_dict(state["average"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.done = state["done"]
        return True
