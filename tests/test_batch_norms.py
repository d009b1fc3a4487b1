"""Running statistics under accumulation, averaging and recomputation."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from training_toys import STUDENT

from moebius_edge.model import build_student
from moebius_edge.training.batch_norms import average_statistics, batch_norms, set_training, settle, spread_momentum

torch.set_num_threads(1)


def test_micro_batches_together_move_the_statistics_as_far_as_one_batch() -> None:
    whole, parts = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    spread_momentum(parts, 4)
    batch = torch.randn(16, 3) + 5
    whole(batch)
    for _ in range(4):
        parts(batch)
    torch.testing.assert_close(parts.running_mean, whole.running_mean)
    torch.testing.assert_close(parts.running_var, whole.running_var)


def test_running_statistics_stay_and_weights_still_learn() -> None:
    norm = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout())
    set_training(norm, running=True)
    assert norm[1].training and not norm[0].training
    norm(torch.randn(8, 3) + 5).sum().backward()
    assert norm[0].running_mean.abs().max() == 0 and norm[0].weight.grad.abs().max() > 0
    set_training(norm, running=False)
    norm(torch.randn(8, 3) + 5)
    assert norm[0].running_mean.abs().min() > 0


def test_the_mean_over_processes() -> None:
    norm = nn.BatchNorm1d(2)
    average_statistics(norm, lambda value: (value + 3) / 2)  # the other process has 3
    assert norm.running_mean.tolist() == [1.5, 1.5] and norm.running_var.tolist() == [2, 2]


def test_settled_statistics_are_the_plain_mean_and_the_weights_stay() -> None:
    norm = nn.BatchNorm1d(1)
    norm.running_mean.fill_(100)
    batches = [torch.full((4, 1), value) + torch.tensor([[-1.0], [1], [-1], [1]]) for value in (1.0, 3.0)]
    settle(norm, [lambda b=b: norm(b) for b in batches])
    assert norm.running_mean.item() == pytest.approx(2) and norm.momentum == 0.1 and not norm.training


@pytest.mark.parametrize("passes", [1, 3])
def test_gradient_checkpointing_changes_neither_gradients_nor_statistics(passes: int) -> None:
    torch.manual_seed(0)
    plain = build_student(STUDENT)
    frugal = build_student(STUDENT)
    frugal.load_state_dict(plain.state_dict())
    frugal.diff_model.checkpoint_gradients()
    sample, timestep = torch.randn(2, 9, 8, 8), torch.tensor([10, 900])
    ids = torch.arange(STUDENT.num_prompts).expand(2, -1)
    gradients = []
    for student in (plain, frugal):
        loss = student(sample, timestep, ids).noise.square().mean()
        for _ in range(passes - 1):  # as the adaptive weights do
            torch.autograd.grad(loss, student.coarse_layer.weight, retain_graph=True)
        loss.backward()
        gradients.append([p.grad for p in student.parameters()])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-8)
    for ours, theirs in zip(batch_norms(plain), batch_norms(frugal), strict=True):
        assert torch.equal(ours.running_mean, theirs.running_mean)
        assert torch.equal(ours.running_var, theirs.running_var) and theirs.momentum == 0.1
