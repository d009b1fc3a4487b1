"""The optimiser: which parameters are matrices, and a state that resumes exactly. Networks: their batch norms."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from training_toys import STUDENT

from moebius_edge.model import build_student
from moebius_edge.training.networks import (
    average_statistics,
    batch_norms,
    measure_statistics,
    set_training,
    spread_momentum,
    upstream_start,
)
from moebius_edge.training.optimiser import MuonAdamW, is_matrix

torch.set_num_threads(1)


def train(net: nn.Module, optimiser: MuonAdamW, steps: range) -> None:
    for step in steps:
        x = torch.randn(8, 6, 5, 5, generator=torch.Generator().manual_seed(step))
        loss = (net(x) - x[:, :3, 1:-1, 1:-1]).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()


def test_the_matrices_of_a_student_are_its_dense_maps() -> None:
    names = {n: is_matrix(n, p) for n, p in build_student(STUDENT).named_parameters()}
    block = "diff_model.down_blocks.0.attentions.0.transformer_blocks.0"
    for name in ("attn1.to_q.weight", "attn2.to_k.weight", "ff.point_conv.conv.weight"):
        assert names[f"{block}.{name}"]
    for name in ("attn1.pos_conv.weight", "attn2.rel_pos_emb", "ff.depth_conv.conv.weight", "norm1.weight"):
        assert not names[f"{block}.{name}"]
    assert names["diff_model.down_blocks.0.downsamplers.0.conv.weight"]
    for name in ("diff_model.conv_in.conv_pw.weight", "diff_model.conv_out.conv_pw.weight", "embedding_layer.weight"):
        assert not names[name]


def test_upstream_s_muon_has_every_tensor_of_two_axes_but_the_ends() -> None:
    with torch.device("meta"):
        published = build_student()
    chosen = {kind: [n for n, p in published.named_parameters() if is_matrix(n, p, kind)] for kind in ("dense", "all")}
    assert (len(chosen["dense"]), len(chosen["all"])) == (213, 288)
    added = set(chosen["all"]) - set(chosen["dense"])
    kinds = ("conv_dw.weight", "pos_conv.weight", "rel_pos_emb", "depth_conv.conv.weight")
    assert all(name.endswith(kinds) for name in added) and len(added) == 75


@pytest.mark.parametrize(("decay", "expected"), [("matrices", 1.0), ("all", 0.99)])
def test_decay_shrinks_the_matrices_or_all(decay: str, expected: float) -> None:
    net = nn.Sequential(nn.Conv2d(6, 4, 1), nn.BatchNorm2d(4))
    before = net[0].weight.detach().clone()
    optimiser = MuonAdamW(net, 0.1, weight_decay=0.1, decay=decay, muon="all", betas=(0.95, 0.95))
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimiser.step()
    torch.testing.assert_close(net[0].weight, 0.99 * before)
    torch.testing.assert_close(net[1].weight, torch.full((4,), expected))
    assert [group["betas"] for group in optimiser.param_groups[1:]] == [(0.95, 0.95)]


def test_upstream_s_start() -> None:
    torch.manual_seed(0)
    student = build_student(STUDENT)
    upstream_start(student)
    for module in student.modules():
        if isinstance(module, nn.Linear):
            outputs, inputs = module.weight.shape
            limit = (6 / (inputs + outputs)) ** 0.5  # of the uniform distribution
            assert 0.8 * limit < module.weight.abs().max() <= limit
            assert module.bias is None or not module.bias.any()
    tables = torch.cat([p.flatten() for n, p in student.named_parameters() if n.endswith("rel_pos_emb")])
    assert tables.std().item() == pytest.approx(1, abs=0.03)


def test_a_first_step_of_muon_turns_a_gradient_into_its_orthogonal_factor() -> None:
    """U Vᵀ of the gradient's singular value decomposition, times the rate; Newton and Schulz come near it."""
    torch.manual_seed(0)
    net = nn.Conv2d(24, 16, 1)
    net.weight.grad = torch.randn(16, 24, 1, 1)
    u, _, v = torch.linalg.svd(net.weight.grad.flatten(1), full_matrices=False)
    before = net.weight.detach().clone()
    MuonAdamW(net, 0.1, weight_decay=0.0).step()
    moved = (before - net.weight.detach()).flatten(1) / 0.1
    scale = 0.2 * 24**0.5  # that of an AdamW step's root mean square
    singular = torch.linalg.svdvals(moved) / scale
    assert singular.min() > 0.6 and singular.max() < 1.3
    cosine = (moved * (u @ v)).sum() / (moved.norm() * (u @ v).norm())
    assert cosine > 0.95


def test_a_saved_state_goes_on_exactly() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(6, 4, 1), nn.Conv2d(4, 4, 3, groups=4, bias=False), nn.Conv2d(4, 3, 1))
    optimiser = MuonAdamW(net, 0.02)
    train(net, optimiser, range(3))
    later = copy.deepcopy(net)
    resumed = MuonAdamW(later, 0.02)
    resumed.load_state_dict(copy.deepcopy(optimiser.state_dict()))
    train(net, optimiser, range(3, 6))
    train(later, resumed, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), later.parameters(), strict=True))


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
    measure_statistics(norm, [lambda b=b: norm(b) for b in batches])
    assert norm.running_mean.item() == pytest.approx(2) and norm.momentum == 0.1 and not norm.training


@pytest.mark.parametrize("passes", [1, 3])
def test_gradient_checkpointing_changes_neither_gradients_nor_statistics(passes: int) -> None:
    torch.manual_seed(0)
    plain, frugal = build_student(STUDENT), build_student(STUDENT)
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
