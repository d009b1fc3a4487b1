"""Timesteps, noise and the forward process on known values."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from moebius_edge.sampling.scheduler import DDIM
from moebius_edge.training.noising import Noising, draw_noise, timestep_at
from moebius_edge.training.recipe import NoiseRecipe

UNIFORM = NoiseRecipe(timesteps="uniform")


def test_places_are_quantiles_of_the_timesteps() -> None:
    assert [timestep_at(p, UNIFORM) for p in (0.0, 0.5, 0.9999)] == [0, 500, 999]
    recipe = NoiseRecipe(logit_mean=0.5, logit_std=2.0)
    one_deviation = 0.8413447460685429  # of a normal distribution, below its mean plus one deviation
    assert timestep_at(one_deviation, recipe) == int(1000 / (1 + math.exp(-2.5)))
    assert timestep_at(0.5, recipe) == int(1000 / (1 + math.exp(-0.5)))
    assert 0 <= timestep_at(0.0, recipe) < timestep_at(1.0, recipe) <= 999


def test_a_batch_takes_one_timestep_of_each_share() -> None:
    drawn = [draw_noise(np.random.default_rng(i), (4, 8, 8), i, 10, UNIFORM)[1] for i in range(10)]
    assert [t // 100 for t in drawn] == list(range(10))


def test_the_noise_has_an_offset_a_channel_and_the_branch_its_share() -> None:
    recipe = NoiseRecipe(offset=0.5, prompt_dropout=0.2)
    drawn = [draw_noise(np.random.default_rng(i), (4, 16, 16), 0, 1, recipe) for i in range(400)]
    noise = np.stack([d[0] for d in drawn])
    means = noise.mean((2, 3))
    assert noise.dtype == np.float32
    assert means.std() == pytest.approx(math.sqrt(0.5**2 + 1 / 256), rel=0.1)
    assert (noise - means[:, :, None, None]).std() == pytest.approx(1, abs=0.02)
    assert np.mean([d[2] for d in drawn]) == pytest.approx(0.2, abs=0.06)


def test_the_forward_process_is_the_sampler_s() -> None:
    generator = torch.Generator().manual_seed(0)
    clean, masked, noise = (torch.randn(3, 4, 8, 8, generator=generator) for _ in range(3))
    mask = torch.zeros(3, 1, 8, 8)
    timestep = torch.tensor([0, 400, 999])
    batch = Noising("cpu")(clean, masked, mask, noise, timestep, torch.tensor([0, 1, 0]))
    scheduler = DDIM(1000)
    for i, t in enumerate(timestep.tolist()):
        expected = scheduler.add_noise(clean[i].numpy(), noise[i].numpy(), t)
        np.testing.assert_allclose(batch.noisy[i].numpy(), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(batch.sample, torch.cat([batch.noisy, mask, masked], 1))
    assert batch.alpha_bar.dtype == torch.float32
