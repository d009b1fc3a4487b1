"""A student, a teacher and samples small enough to train in a test, and the recipe that does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL

from moebius_edge.model import StudentConfig, TeacherConfig
from moebius_edge.training.recipe import LossRecipe, OptimiserRecipe, Recipe, RunOptions
from moebius_edge.training.stage import StageInputs, train_stage

STUDENT = StudentConfig(
    block_out_channels=(32, 32, 32),
    num_heads=4,
    cross_attention_dim=16,
    prompt_embedding_dim=16,
    latent_size=8,
    layers_per_block=1,
    window=5,
)
TEACHER = TeacherConfig(
    block_out_channels=(32, 32, 32, 32),
    num_heads=4,
    cross_attention_dim=16,
    prompt_embedding_dim=16,
    layers_per_block=1,
    gate_rank=4,
)
RECIPE = Recipe(
    student=STUDENT,
    teacher=TEACHER,
    losses=LossRecipe(distance="teacher"),
    optimiser=OptimiserRecipe(steps=6, batch=4, learning_rate=2e-3, warmup=2, ema_decay=0.9, precision="fp32"),
)
OPTIONS = RunOptions(save_every=2, log_every=1, sample_every=0, device="cpu")


class FlatLatents:
    """What lies under a mask is what lies beside it. Latents are of type ``dtype``."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype

    def draw(self, number: int, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
        clean = np.broadcast_to(rng.standard_normal((4, 1, 1), np.float32), (4, 8, 8)).copy()
        mask = (rng.random((1, 8, 8)) < 0.3).astype(np.float32)
        return clean, clean * (1 - mask), mask

    def latents(self, drawn: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return tuple(tensor.to(self.dtype) for tensor in drawn)


def stage_inputs(**files: Any) -> StageInputs:
    return StageInputs(FlatLatents(), {"latents": "flat"}, **files)  # type: ignore[arg-type]


def trained_teacher(folder: Path) -> Path:
    """A teacher's checkpoint, hardly trained."""
    recipe = replace(RECIPE, stage="teacher", optimiser=replace(RECIPE.optimiser, steps=2))
    return train_stage(recipe, stage_inputs(), folder, OPTIONS)


def small_vae(seed: int = 0, scaling_factor: float = 1.0, channels: int = 4) -> AutoencoderKL:
    """An autoencoder of random weights with four levels of eight channels."""
    torch.manual_seed(seed)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=4,
        scaling_factor=scaling_factor,
    ).eval()
