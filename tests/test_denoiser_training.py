"""The denoiser's loss on known values, its start, and runs that resume bit for bit or refuse to."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from moebius_edge.errors import BundleError, UsageError
from moebius_edge.model import StudentConfig, build_student
from moebius_edge.training.denoiser import DenoiserRecipe, DenoiserTrainer, initialise, task_loss
from moebius_edge.training.latents import LatentCache

torch.set_num_threads(1)
STUDENT = StudentConfig(
    block_out_channels=(32, 32, 32), num_heads=4, cross_attention_dim=16, prompt_embedding_dim=16, latent_size=8
)
RECIPE = DenoiserRecipe(student=STUDENT, steps=6, batch=2, warmup=2, learning_rate=2e-3)


class Stop(Exception):
    """Raised by a test in the middle of a run."""


@pytest.fixture(scope="module")
def cache() -> LatentCache:
    """Flat latents: what lies under a mask is what lies beside it."""
    rng = np.random.default_rng(0)
    clean = np.broadcast_to(rng.standard_normal((6, 4, 1, 1)), (6, 4, 8, 8)).astype(np.float16)
    mask = (rng.random((6, 2, 8, 8)) < 0.3).astype(np.uint8)
    return LatentCache(clean, clean[:, None] * (1 - mask[:, :, None]).astype(np.float16), mask)


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def settle_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two batches for the batch norms' statistics, not sixty."""
    whole = DenoiserTrainer.settle_batch_norms
    monkeypatch.setattr(DenoiserTrainer, "settle_batch_norms", lambda self: whole(self, 2))


def test_the_loss_by_hand() -> None:
    noise = torch.zeros(2, 4, 1, 2)
    predicted = torch.ones(2, 4, 1, 2)
    predicted[1] *= 2
    hole = torch.tensor([[[[1.0, 3.0]]], [[[1.0, 1.0]]]])  # half of the first sample weighs three
    # first sample: (1·1 + 1·3) / 2 = 2, times 5; second: 4, times 0.5; their mean
    assert task_loss(predicted, noise, hole, torch.tensor([5.0, 0.5])).item() == pytest.approx((10 + 2) / 2)
    assert task_loss(noise, noise, hole, torch.tensor([5.0, 0.5])).item() == 0
    assert task_loss(predicted.bfloat16(), noise, hole, torch.ones(2)).dtype == torch.float32


@torch.no_grad()
def test_at_the_start_a_lambda_block_is_the_identity_and_the_branches_are_equal() -> None:
    torch.manual_seed(0)
    student = build_student(STUDENT)
    noticed: list[str] = []

    def watch(name: str) -> None:
        def hook(module: nn.Module, given: tuple[torch.Tensor, ...], result: torch.Tensor) -> None:
            if torch.equal(given[0], result):
                noticed.append(name)

        student.get_submodule(name).register_forward_hook(hook)

    blocks = [name for name, m in student.named_modules() if type(m).__name__ == "SpatialTransformer"]
    assert blocks
    for name in blocks:
        watch(name)
    sample, timesteps = torch.randn(2, 9, 8, 8), torch.tensor([10, 900])
    conditional = torch.arange(STUDENT.num_prompts).expand(2, -1)

    student.eval()(sample, timesteps, conditional)
    assert not noticed  # before, none of them is
    initialise(student)
    first = student(sample, timesteps, conditional).noise
    assert sorted(noticed) == sorted(blocks)
    table = student.embedding_layer.weight
    assert torch.equal(table[: STUDENT.num_prompts], table[STUDENT.num_prompts :])
    assert torch.equal(first, student(sample, timesteps, conditional + STUDENT.num_prompts).noise)


def test_nothing_of_the_input_is_lost_at_the_start() -> None:
    """The depthwise half of ``conv_in``, up to its ReLU, keeps values of three deviations either way apart."""
    student = build_student(STUDENT).eval()
    initialise(student)
    entry = student.diff_model.conv_in
    sample = torch.randn(2, 9, 8, 8).clamp(-2.9, 2.9)
    opened = torch.relu(entry.bn1(entry.conv_dw(sample)))
    torch.testing.assert_close(opened - 3, sample, atol=1e-4, rtol=0)


def test_a_sample_is_drawn_with_noise_of_its_own(cache: LatentCache, tmp_path: Path) -> None:
    trainer = DenoiserTrainer(RECIPE, cache, tmp_path)
    draws = [trainer.draw(np.random.default_rng([0, i])) for i in range(300)]
    clean, masked, mask, noise, _, _ = draws[0]
    assert clean.shape == masked.shape == noise.shape == (4, 8, 8) and mask.shape == (1, 8, 8)
    assert np.array_equal(masked, clean * (1 - mask)) and noise.dtype == np.float32
    assert np.mean([d[5] for d in draws]) == pytest.approx(RECIPE.prompt_dropout, abs=0.07)
    places = [d[4] for d in draws]
    assert 0 <= min(places) < 0.05 and 0.95 < max(places) < 1
    assert np.std([d[3] for d in draws]) == pytest.approx(1, abs=0.05)


def test_the_loss_falls(cache: LatentCache, tmp_path: Path) -> None:
    trainer = DenoiserTrainer(replace(RECIPE, steps=60, batch=4, warmup=5), cache, tmp_path)
    losses = []
    for number in range(60):
        drawn = [trainer.draw(np.random.default_rng([0, 4 * number + i])) for i in range(4)]
        losses.append(trainer.step(tuple(np.stack(column) for column in zip(*drawn, strict=True))))
    assert trainer.done == 60
    assert np.mean(losses[-10:]) < 0.7 * np.mean(losses[:10])


def test_a_resumed_run_ends_as_an_uninterrupted_one(
    cache: LatentCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settle_little(monkeypatch)
    whole = DenoiserTrainer(RECIPE, cache, tmp_path / "whole")
    assert not whole.resume()
    expected = whole.run()

    cut = DenoiserTrainer(RECIPE, cache, tmp_path / "cut")
    with monkeypatch.context() as patch, pytest.raises(Stop):
        step = DenoiserTrainer.step

        def stopping(self: DenoiserTrainer, batch: tuple[np.ndarray, ...]) -> float:
            if self.done == 5:
                raise Stop
            return step(self, batch)

        patch.setattr(DenoiserTrainer, "step", stopping)
        cut.run(save_every=4)

    torch.manual_seed(99)  # as another process would have it
    resumed = DenoiserTrainer(RECIPE, cache, tmp_path / "cut")
    assert resumed.resume() and resumed.done == 4
    assert same(resumed.run(), expected) and same(resumed.student, whole.student)
    assert resumed.done == 6 and not expected.training

    finished = DenoiserTrainer(RECIPE, cache, tmp_path / "cut")
    assert finished.resume() and finished.done == 6
    assert same(finished.run(), expected)  # nothing is left to do


def test_settled_norms_hold_the_statistics_of_the_average(cache: LatentCache, tmp_path: Path) -> None:
    trainer = DenoiserTrainer(RECIPE, cache, tmp_path)
    weights = {name: p.clone() for name, p in trainer.average.named_parameters()}
    trainer.settle_batch_norms(2)
    norms = [m for m in trainer.average.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(norm.num_batches_tracked == 2 and norm.running_mean.abs().max() > 0 for norm in norms)
    assert all(torch.equal(p, weights[name]) for name, p in trainer.average.named_parameters())


def test_another_recipe_is_refused(cache: LatentCache, tmp_path: Path) -> None:
    DenoiserTrainer(RECIPE, cache, tmp_path).save()
    other = DenoiserTrainer(replace(RECIPE, hole_weight=4.0), cache, tmp_path)
    with pytest.raises(UsageError, match=r"state.pt was made by another recipe: remove it or give another output"):
        other.resume()


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_state(cache: LatentCache, tmp_path: Path) -> None:
    trainer = DenoiserTrainer(RECIPE, cache, tmp_path)
    trainer.save()
    before = (tmp_path / "state.pt").read_bytes()
    bad = LatentCache(np.full_like(cache.clean, np.nan), cache.masked, cache.mask)
    broken = DenoiserTrainer(RECIPE, bad, tmp_path)
    assert broken.resume()
    with pytest.raises(BundleError, match="the denoiser's loss is nan at step 0: lower the recipe's learning rate"):
        broken.run(save_every=1)
    assert (tmp_path / "state.pt").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["state.pt"]
