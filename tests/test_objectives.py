"""What a step minimises: the weights of the noise error, the ablation's rows, and guidance as a target."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from golden import fill_golden
from torch import Tensor
from training_toys import RECIPE, STUDENT, TEACHER

from moebius_edge.model import Student, build_student, build_teacher
from moebius_edge.training.fake_quantise import simulate
from moebius_edge.training.noising import Batch, Noising, prompt_ids
from moebius_edge.training.objectives import Distillation, Guidance, QuantisationAware, Task, noise_weight
from moebius_edge.training.perceptual import choose_distance
from moebius_edge.training.recipe import LossRecipe

torch.set_num_threads(1)
LOSSES = LossRecipe(distance="teacher")


def batch(unconditional: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(2, 4, 8, 8, generator=generator) for _ in range(2))
    mask = torch.zeros(2, 1, 8, 8)
    mask[:, :, 2:5, 2:5] = 1
    branch = torch.full((2,), unconditional)
    return Noising("cpu")(clean, clean * (1 - mask), mask, noise, torch.tensor([100, 900]), branch)


def test_the_noise_error_s_weights_by_hand() -> None:
    given = batch()
    assert noise_weight(given, LOSSES) is None
    hole = noise_weight(given, replace(LOSSES, hole_weight=5.0))
    assert hole is not None and hole[0, 0, 2, 2] == 5 and hole[0, 0, 0, 0] == 1
    early = noise_weight(given, replace(LOSSES, velocity_limit=40.0))
    assert early is not None
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
    student, teacher = build_student(STUDENT).eval(), build_teacher(TEACHER).eval()
    distance = choose_distance("teacher", teacher) if "perceptual" in losses.terms else None
    return student, Distillation(losses, student, teacher, distance, "fp32", lambda value: value)


def test_the_total_is_the_paper_s() -> None:
    student, objective = distillation(LOSSES)
    total, f = objective(student, batch())
    expected = 0.01 * f["coarse"] + f["w_cross"] * (
        0.5 * f["task"] + 0.01 * f["w_out"] * f["fine"] + 0.5 * f["w_perceptual"] * f["perceptual"]
    )
    torch.testing.assert_close(total.detach(), expected)
    assert all(value > 0 and not value.requires_grad for value in f.values())
    total.backward()
    assert all(p.grad is not None for p in student.parameters())


@pytest.mark.parametrize(
    "terms", [("coarse",), ("coarse", "fine"), ("coarse", "fine", "task"), ("fine", "task"), ("task", "perceptual")]
)
def test_terms_that_are_off_leave_no_trace(terms: tuple[str, ...]) -> None:
    student, objective = distillation(replace(LOSSES, terms=terms))
    total, f = objective(student, batch())
    assert set(f) == {*terms, "task", "w_out", "w_perceptual", "w_cross"}  # the task is always measured
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
    assert RECIPE.losses.guidance == 2.0


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
    losses = [float(loss.detach())]
    for _ in range(12):
        student.zero_grad()
        objective(student, given)[0].backward()
        with torch.no_grad():
            for parameter in student.parameters():
                if parameter.grad is not None:
                    parameter -= 1e-3 * parameter.grad
        losses.append(float(objective(student, given)[0].detach()))
    assert max(losses[-3:]) < 0.5 * losses[0]
    assert not any(p.requires_grad for p in frozen.parameters())


def test_a_student_with_distilled_guidance_learns_its_one_branch() -> None:
    student, frozen = (build_student(STUDENT).eval() for _ in range(2))
    simulation = simulate(student, ["conv_in"])
    objective = QuantisationAware(LOSSES, frozen, simulation, "fp32", one_branch=True)
    objective(student, batch(unconditional=1))[0].backward()
    table = student.embedding_layer.weight.grad
    assert table is not None and table[: STUDENT.num_prompts].any() and not table[STUDENT.num_prompts :].any()
