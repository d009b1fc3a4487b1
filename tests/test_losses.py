"""The losses by hand, the gradient at a layer as autograd has it, and what each stage minimises."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from golden import fill_golden
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from training_toys import STUDENT, TEACHER

from moebius_edge.errors import UsageError
from moebius_edge.model import Student, build_student, build_teacher
from moebius_edge.training.fake_quantise import simulate
from moebius_edge.training.losses import (
    Distillation,
    Guidance,
    LayerGradient,
    QuantisationAware,
    Task,
    adaptive_weights,
    coarse_loss,
    noise_loss,
    noise_weight,
    predicted_clean,
    total_loss,
)
from moebius_edge.training.noising import Batch, Noising, prompt_ids
from moebius_edge.training.perceptual import choose_distance
from moebius_edge.training.recipe import LossRecipe

torch.set_num_threads(1)
LOSSES = LossRecipe(distance="teacher")


def alone(tensor: Tensor) -> Tensor:
    """The mean over one process."""
    return tensor


def test_noise_loss_by_hand() -> None:
    predicted, target = torch.tensor([[[[1.0, 2.0]]], [[[0.0, -1.0]]]]), torch.tensor([[[[3.0, 2.0]]], [[[1.0, 2.0]]]])
    assert noise_loss(predicted, target).item() == pytest.approx((4 + 0 + 1 + 9) / 4)
    weight = torch.tensor([2.0, 0.5])[:, None, None, None]
    assert noise_loss(predicted, target, weight).item() == pytest.approx((2 * 4 + 0.5 * (1 + 9)) / 4)


def test_half_types_are_compared_in_float32() -> None:
    target = torch.zeros(1, 4, 64, 64, dtype=torch.float16)
    for loss in (noise_loss(target + 300, target), coarse_loss(target + 300, target)):
        assert loss.dtype == torch.float32
        assert loss.item() == 90000  # beyond float16


def test_coarse_loss_by_hand_and_of_a_pair_that_is_none() -> None:
    assert coarse_loss(torch.full((2, 3, 1, 1), 5.0), torch.full((2, 3, 1, 1), 2.0)).item() == 9.0
    text = r"shape \(2, 64, 4, 4\), what the teacher has for it \(2, 32, 4, 4\): give the student the teacher's last"
    with pytest.raises(UsageError, match=text):
        coarse_loss(torch.zeros(2, 64, 4, 4), torch.zeros(2, 32, 4, 4))
    with pytest.raises(UsageError, match=r"shape \(1, 1, 1, 1\)"):  # although it would broadcast
        coarse_loss(torch.zeros(1, 1, 1, 1), torch.zeros(2, 32, 4, 4))


def test_predicted_clean_undoes_the_noising_of_each_sample() -> None:
    torch.manual_seed(0)
    clean, noise = torch.randn(2, 2, 4, 8, 8, dtype=torch.double)
    alpha_bar = torch.tensor([0.25, 0.64], dtype=torch.double)
    noisy = torch.stack([0.5 * clean[0] + 0.75**0.5 * noise[0], 0.8 * clean[1] + 0.6 * noise[1]])
    torch.testing.assert_close(predicted_clean(noisy, noise, alpha_bar), clean)
    wrong = predicted_clean(noisy, noise + 1, alpha_bar) - clean
    torch.testing.assert_close(wrong[1], torch.full_like(clean[1], -0.75))


@pytest.mark.parametrize(
    ("precision", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
)
def test_the_gradient_at_a_layer_is_autograd_s(precision: torch.dtype, tolerance: float) -> None:
    """bfloat16 is autocast's, in which autograd rounds the gradient of the weight, too."""
    torch.manual_seed(0)
    dtype = torch.float64 if precision == torch.float64 else torch.float32
    layer, x = nn.Conv2d(5, 3, 1).to(dtype), torch.randn(2, 5, 4, 6, dtype=dtype)
    gradient = LayerGradient(layer)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16), gradient:
        y = layer(x)
    loss = y.to(dtype).sin().sum()
    (expected,) = torch.autograd.grad(loss, layer.weight, retain_graph=True)
    ours = gradient(loss)
    assert ours.shape == (3, 5) and ours.dtype == dtype and layer.weight.grad is None
    torch.testing.assert_close(ours, expected.flatten(1), rtol=tolerance, atol=tolerance * expected.abs().max().item())


def test_recomputation_is_not_taken_for_the_forward_pass() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Tanh(), nn.Conv2d(4, 2, 1), nn.Tanh())
    gradient = LayerGradient(net[0])
    with gradient:
        y: Tensor = checkpoint(net, torch.randn(2, 3, 4, 4), use_reentrant=False)
    loss = y.square().sum()
    first, again = gradient(loss), gradient(loss)
    (expected,) = torch.autograd.grad(loss, net[0].weight)
    torch.testing.assert_close(first, expected.flatten(1))
    assert torch.equal(first, again)


def line(weight: Tensor, *gradient: float) -> Tensor:
    """A loss whose gradient at ``weight`` is known."""
    return (weight * weight.new_tensor(gradient)).sum()


def at(weight: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda loss: torch.autograd.grad(loss, weight, retain_graph=True)[0]


def weights_of_two() -> tuple[nn.Parameter, nn.Parameter]:
    return nn.Parameter(torch.ones(2, dtype=torch.double)), nn.Parameter(torch.ones(2, dtype=torch.double))


def test_adaptive_weights_by_hand() -> None:
    output, inner = weights_of_two()
    losses = {
        "task": line(output, 3, 4) + line(inner, 8, 6),
        "fine": line(output, 0, 2),
        "coarse": line(inner, 3, 0),
        "perceptual": line(output, 0.6, 0.8),
    }
    weights = adaptive_weights(losses, at(output), at(inner), alone)
    assert weights["w_out"].item() == pytest.approx(5 / (2 + 1e-6), rel=1e-12)
    assert weights["w_perceptual"].item() == pytest.approx(5 / (1 + 1e-6), rel=1e-12)
    assert weights["w_cross"].item() == pytest.approx(3 / (10 + 1e-4), rel=1e-12)
    assert not any(w.requires_grad for w in weights.values())
    assert output.grad is None and inner.grad is None
    total_loss(losses, weights, LOSSES, losses.keys()).backward(retain_graph=True)  # the graphs are still there
    assert output.grad is not None
    weights = adaptive_weights({"task": losses["task"]}, at(output), at(inner), alone)
    assert [w.item() for w in weights.values()] == [0, 0, 1]  # of terms that are off


def test_adaptive_weights_are_clamped_unless_a_gradient_is_not_finite() -> None:
    output, inner = weights_of_two()
    task = line(output, 3, 4) + line(inner, 0, 0)
    losses = {"task": task, "fine": line(output, 0, 0), "coarse": line(inner, 30, 40)}
    weights = adaptive_weights({**losses, "perceptual": line(output, 1e-7, 0)}, at(output), at(inner), alone)
    assert [w.item() for w in weights.values()] == [1e6, 1e6, 1e4]
    losses |= {"task": line(output, 1, 1) + line(inner, 1, 1), "coarse": line(inner, math.inf, 1)}
    for spoilt in ({"task": line(output, math.inf, 1) + line(inner, 1, 1)}, {"fine": line(output, math.inf, 1)}):
        weights = adaptive_weights({**losses, **spoilt}, at(output), at(inner), alone)
        assert weights["w_out"].isnan() and weights["w_cross"].isnan()


def test_the_length_is_that_of_the_mean_gradient() -> None:
    """Two processes whose gradients partly cancel: the mean's length, not the lengths' mean."""
    output, inner = weights_of_two()
    first = {"task": line(output, 3, 4) + line(inner, 8, 0), "fine": line(output, 2, 0), "coarse": line(inner, 0, 4)}
    second = {"task": line(output, 3, -4) + line(inner, 0, 6), "fine": line(output, 0, 2), "coarse": line(inner, 0, -2)}
    sent: list[list[Tensor]] = [[], []]
    for share, gradients in zip((first, second), sent, strict=True):
        adaptive_weights(share, at(output), at(inner), lambda g, to=gradients: to.append(g.clone()) or g)
    pairs = zip(*sent, strict=True)  # both processes ask in the same order
    weights = adaptive_weights(first, at(output), at(inner), lambda _: torch.stack(next(pairs)).mean(0))
    assert next(pairs, None) is None
    assert weights["w_out"].item() == pytest.approx(3 / (2**0.5 + 1e-6))
    assert weights["w_cross"].item() == pytest.approx(1 / (5 + 1e-4))
    mean = {name: (first[name] + second[name]) / 2 for name in first}
    assert weights == adaptive_weights(mean, at(output), at(inner), alone)


def test_scaling_saves_what_half_precision_loses() -> None:
    """Autocast's gradients pass through half precision, where 1e-8 is zero."""
    output, inner = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(1))
    noise = output.half().float()
    losses = {"task": 1e-8 * noise.sum(), "fine": 2e-8 * noise.sum()}
    assert adaptive_weights(losses, at(output), at(inner), alone)["w_out"].item() == 0
    scaled = adaptive_weights(losses, at(output), at(inner), alone, scale=2.0**16)["w_out"].item()
    assert scaled == pytest.approx(2e-8 / (4e-8 + 1e-6), rel=1e-3)


ALL = ("coarse", "fine", "task", "perceptual")


@pytest.mark.parametrize(
    ("terms", "recipe", "expected"),
    [
        (ALL, LOSSES, 0.01 * 5 + 2 * (0.5 * 2 + 0.01 * 10 * 3 + 0.5 * 4 * 7)),
        (("coarse", "fine"), LOSSES, 0.01 * 5 + 2 * 0.01 * 10 * 3),
        (("task",), LOSSES, 2 * 0.5 * 2),
        (ALL, LossRecipe(distillation=1, task=2, perceptual=3), 5 + 2 * (2 * 2 + 10 * 3 + 3 * 4 * 7)),
    ],
)
def test_total_by_hand(terms: tuple[str, ...], recipe: LossRecipe, expected: float) -> None:
    losses = {"task": torch.tensor(2.0), "fine": torch.tensor(3.0), "coarse": torch.tensor(5.0)}
    losses["perceptual"] = torch.tensor(7.0)
    weights = {"w_out": torch.tensor(10.0), "w_perceptual": torch.tensor(4.0), "w_cross": torch.tensor(2.0)}
    assert total_loss(losses, weights, recipe, set(terms)).item() == pytest.approx(expected)


def batch(unconditional: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(2, 4, 8, 8, generator=generator) for _ in range(2))
    mask = torch.zeros(2, 1, 8, 8)
    mask[:, :, 2:5, 2:5] = 1
    branch = torch.full((2,), unconditional)
    return Noising("cpu")(clean, clean * (1 - mask), mask, noise, torch.tensor([100, 900]), branch)


def test_the_noise_error_s_weights_by_hand() -> None:
    given = batch()
    assert noise_weight(given, LOSSES).eq(1).all()
    hole = noise_weight(given, replace(LOSSES, hole_weight=5.0))
    assert hole[0, 0, 2, 2] == 5 and hole[0, 0, 0, 0] == 1
    early = noise_weight(given, replace(LOSSES, velocity_limit=40.0))
    expected = (1 / given.alpha_bar).clamp(max=40)
    torch.testing.assert_close(early.flatten(1)[:, 0], expected)
    assert expected[1] == 40 and expected[0] < 2


def test_the_task_alone_is_the_mean_squared_error_of_the_right_branch() -> None:
    torch.manual_seed(0)
    student = build_student(STUDENT).eval()
    given = batch(unconditional=1)
    loss, figures = Task(LOSSES, STUDENT.num_prompts, "fp32")(student, given)
    noise = student(given.sample, given.timestep, prompt_ids(STUDENT.num_prompts, given.unconditional)).noise
    torch.testing.assert_close(loss, (noise - given.noise).square().mean())
    assert not figures["task"].requires_grad


def distillation(losses: LossRecipe) -> tuple[Any, Any]:
    torch.manual_seed(0)
    student = build_student(STUDENT).eval()
    teacher = build_teacher(TEACHER).eval()
    distance = choose_distance("teacher", teacher) if "perceptual" in losses.terms else None
    return student, Distillation(losses, student, teacher, distance, "fp32", lambda value: value)


@pytest.mark.parametrize("terms", [ALL, ("coarse",), ("coarse", "fine"), ("fine", "task"), ("task", "perceptual")])
def test_the_total_is_the_paper_s_and_terms_that_are_off_leave_no_trace(terms: tuple[str, ...]) -> None:
    student, objective = distillation(replace(LOSSES, terms=terms))
    total, f = objective(student, batch())
    assert set(f) == {*terms, "task", "w_out", "w_perceptual", "w_cross"}  # the task is always measured
    assert not any(value.requires_grad for value in f.values())
    parts = {
        "coarse": 0.01 * f.get("coarse", torch.tensor(0.0)),
        "fine": f["w_cross"] * 0.01 * f["w_out"] * f.get("fine", torch.tensor(0.0)),
        "task": f["w_cross"] * 0.5 * f["task"],
        "perceptual": f["w_cross"] * 0.5 * f["w_perceptual"] * f.get("perceptual", torch.tensor(0.0)),
    }
    torch.testing.assert_close(total.detach(), torch.stack([parts[name] for name in terms]).sum())
    total.backward()
    output = student.output_layer.weight.grad
    assert output is not None and (bool(output.any()) == (terms != ("coarse",)))
    assert all(p.grad is None for p in objective._teacher.parameters())
    assert terms == ("coarse",) or all(p.grad is not None for p in student.parameters())


def test_guidance_is_learnt_by_the_conditional_branch() -> None:
    torch.manual_seed(0)
    frozen = build_student(STUDENT).eval()
    student = build_student(STUDENT).eval()
    student.load_state_dict(frozen.state_dict())
    given = batch(unconditional=1)  # the branch that was drawn plays no part

    def predict(branch: int) -> Tensor:
        return frozen(given.sample, given.timestep, prompt_ids(STUDENT.num_prompts, torch.full((2,), branch))).noise

    target = predict(1) + 3 * (predict(0) - predict(1))
    loss, figures = Guidance(replace(LOSSES, guidance=3.0), frozen, "fp32")(student, given)
    torch.testing.assert_close(loss, (predict(0) - target).square().mean())
    assert loss > 0 and not any(p.requires_grad for p in frozen.parameters())
    loss.backward()
    table = student.embedding_layer.weight.grad
    assert table is not None and table[: STUDENT.num_prompts].any() and not table[STUDENT.num_prompts :].any()


def test_the_rounded_student_learns_its_float_copy() -> None:
    """On one batch by plain gradient steps: the straight-through gradient leads down, in both branches."""
    frozen, student = (fill_golden(build_student(STUDENT)) for _ in range(2))
    assert isinstance(frozen, Student) and isinstance(student, Student)
    blocks = [f"{level}.attentions.0.proj_out" for level in ("down_blocks.0", "down_blocks.1", "up_blocks.2")]
    simulation = simulate(student, ["conv_in", "conv_out", *blocks])
    given = batch(unconditional=1)
    ids = prompt_ids(STUDENT.num_prompts, given.unconditional)
    simulation.calibrate([lambda: student(given.sample, given.timestep, ids)], "minmax")
    objective = QuantisationAware(replace(LOSSES, hole_weight=5.0), frozen, simulation, "fp32", one_branch=False)
    loss, figures = objective(student, given)
    error = student(given.sample, given.timestep, ids).noise - frozen(given.sample, given.timestep, ids).noise
    weight = (1 - given.alpha_bar)[:, None, None, None] * (1 + 4 * given.mask)
    torch.testing.assert_close(loss, (error.square() * weight).mean())
    assert loss > 0 and figures["int8"] == loss and figures["task"] > loss
    losses = []
    for _ in range(12):
        student.zero_grad()
        loss, _ = objective(student, given)
        loss.backward()
        with torch.no_grad():
            for parameter in student.parameters():
                if parameter.grad is not None:
                    parameter -= 1e-3 * parameter.grad
        losses.append(float(loss.detach()))
    assert max(losses[-3:]) < 0.5 * losses[0]
    assert not any(p.requires_grad for p in frozen.parameters())


def test_a_student_with_distilled_guidance_learns_its_one_branch() -> None:
    student, frozen = (build_student(STUDENT).eval() for _ in range(2))
    simulation = simulate(student, ["conv_in"])
    objective = QuantisationAware(LOSSES, frozen, simulation, "fp32", one_branch=True)
    objective(student, batch(unconditional=1))[0].backward()
    table = student.embedding_layer.weight.grad
    assert table is not None and table[: STUDENT.num_prompts].any() and not table[STUDENT.num_prompts :].any()
