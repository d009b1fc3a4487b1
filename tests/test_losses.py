"""The distillation losses by hand, and the adaptive weights against finite differences on a small pair."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from moebius_edge.errors import UsageError
from moebius_edge.model import Student, StudentConfig, Teacher, TeacherConfig, build_student, build_teacher
from moebius_edge.training.layer_gradient import LayerGradient
from moebius_edge.training.losses import (
    Coefficients,
    Losses,
    Weights,
    adaptive_weights,
    coarse_loss,
    noise_loss,
    predicted_clean,
    total_loss,
)
from moebius_edge.training.perceptual import TeacherFeatures

torch.set_num_threads(1)

STUDENT = StudentConfig(
    block_out_channels=(32, 32),
    num_heads=2,
    cross_attention_dim=16,
    prompt_embedding_dim=16,
    latent_size=8,
    layers_per_block=1,
    window=3,
)
TEACHER = TeacherConfig(
    block_out_channels=(32, 32, 32),
    num_heads=2,
    cross_attention_dim=16,
    prompt_embedding_dim=16,
    layers_per_block=1,
    gate_rank=4,
)


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


def line(weight: Tensor, *gradient: float) -> Tensor:
    """A loss whose gradient at ``weight`` is known."""
    return (weight * weight.new_tensor(gradient)).sum()


def at(weight: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda loss: torch.autograd.grad(loss, weight, retain_graph=True)[0]


@pytest.fixture
def output() -> nn.Parameter:
    return nn.Parameter(torch.ones(2, dtype=torch.double))


@pytest.fixture
def inner() -> nn.Parameter:
    return nn.Parameter(torch.ones(2, dtype=torch.double))


def test_adaptive_weights_by_hand(output: nn.Parameter, inner: nn.Parameter) -> None:
    losses = Losses(
        task=line(output, 3, 4) + line(inner, 8, 6),
        fine=line(output, 0, 2),
        coarse=line(inner, 3, 0),
        perceptual=line(output, 0.6, 0.8),
    )
    weights = adaptive_weights(losses, at(output), at(inner))
    assert weights.out.item() == pytest.approx(5 / (2 + 1e-6), rel=1e-12)
    assert weights.perceptual.item() == pytest.approx(5 / (1 + 1e-6), rel=1e-12)
    assert weights.cross.item() == pytest.approx(3 / (10 + 1e-4), rel=1e-12)
    assert not any(w.requires_grad for w in vars(weights).values())
    assert output.grad is None and inner.grad is None
    total_loss(losses, weights, Coefficients()).backward()  # the graphs are still there
    assert output.grad is not None


def test_adaptive_weights_are_clamped(output: nn.Parameter, inner: nn.Parameter) -> None:
    task = line(output, 3, 4) + line(inner, 0, 0)
    losses = Losses(task, fine=line(output, 0, 0), coarse=line(inner, 30, 40), perceptual=line(output, 1e-7, 0))
    weights = adaptive_weights(losses, at(output), at(inner))
    assert (weights.out.item(), weights.perceptual.item(), weights.cross.item()) == (1e6, 1e6, 1e4)


def test_a_gradient_that_is_not_finite_is_not_clamped_away(output: nn.Parameter, inner: nn.Parameter) -> None:
    losses = Losses(line(output, math.inf, 1) + line(inner, 1, 1), line(output, 1, 1), line(inner, math.inf, 1))
    weights = adaptive_weights(losses, at(output), at(inner))
    assert weights.out.isnan() and weights.cross.isnan()
    losses = dataclasses.replace(losses, task=line(output, 1, 1) + line(inner, 1, 1), fine=line(output, math.inf, 1))
    assert adaptive_weights(losses, at(output), at(inner)).out.isnan()


def test_weights_of_terms_that_are_off(output: nn.Parameter, inner: nn.Parameter) -> None:
    task = line(output, 3, 4) + line(inner, 8, 6)
    weights = adaptive_weights(Losses(task), at(output), at(inner))
    assert [w.item() for w in (weights.out, weights.perceptual, weights.cross)] == [0, 0, 1]
    assert total_loss(Losses(task), weights, Coefficients()).item() == pytest.approx(0.5 * 21)


def test_the_length_is_that_of_the_reduced_gradient(output: nn.Parameter, inner: nn.Parameter) -> None:
    """Two processes whose gradients partly cancel: the mean's length, not the lengths' mean."""
    shards = [
        Losses(line(output, 3, 4) + line(inner, 8, 0), line(output, 2, 0), line(inner, 0, 4)),
        Losses(line(output, 3, -4) + line(inner, 0, 6), line(output, 0, 2), line(inner, 0, -2)),
    ]
    sent: list[list[Tensor]] = [[], []]
    for shard, gradients in zip(shards, sent, strict=True):
        adaptive_weights(shard, at(output), at(inner), reduce=lambda g, to=gradients: to.append(g.clone()) or g)
    pairs = zip(*sent, strict=True)  # both processes ask in the same order
    weights = adaptive_weights(shards[0], at(output), at(inner), reduce=lambda _: torch.stack(next(pairs)).mean(0))
    assert next(pairs, None) is None
    assert weights.out.item() == pytest.approx(3 / (2**0.5 + 1e-6))
    assert weights.cross.item() == pytest.approx(1 / (5 + 1e-4))
    mean = [(shards[0].task + shards[1].task) / 2, (shards[0].fine + shards[1].fine) / 2]
    mean.append((shards[0].coarse + shards[1].coarse) / 2)
    whole = adaptive_weights(Losses(*mean), at(output), at(inner))
    assert (weights.out, weights.cross) == (whole.out, whole.cross)


def test_scaling_saves_what_half_precision_loses() -> None:
    """Autocast's gradients pass through half precision, where 1e-8 is zero."""
    output, inner = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(1))
    noise = output.half().float()
    losses = Losses(1e-8 * noise.sum(), 2e-8 * noise.sum())
    assert adaptive_weights(losses, at(output), at(inner)).out.item() == 0
    scaled = adaptive_weights(losses, at(output), at(inner), scale=2.0**16).out.item()
    assert scaled == pytest.approx(2e-8 / (4e-8 + 1e-6), rel=1e-3)


MEASURED = Losses(*(torch.tensor(x) for x in (2.0, 3.0, 5.0, 7.0)))
FACTORS = Weights(out=torch.tensor(10.0), perceptual=torch.tensor(4.0), cross=torch.tensor(2.0))


@pytest.mark.parametrize(
    ("terms", "expected"),
    [
        (None, 0.01 * 5 + 2 * (0.5 * 2 + 0.01 * 10 * 3 + 0.5 * 4 * 7)),
        ({"coarse"}, 0.01 * 5),
        ({"coarse", "fine"}, 0.01 * 5 + 2 * 0.01 * 10 * 3),
        ({"coarse", "fine", "task"}, 0.01 * 5 + 2 * (0.5 * 2 + 0.01 * 10 * 3)),
        ({"task"}, 2 * 0.5 * 2),
    ],
)
def test_total_by_hand(terms: set[str] | None, expected: float) -> None:
    assert total_loss(MEASURED, FACTORS, Coefficients(), terms).item() == pytest.approx(expected)


def test_total_takes_the_coefficients() -> None:
    total = total_loss(MEASURED, FACTORS, Coefficients(distillation=1, task=2, perceptual=3))
    assert total.item() == pytest.approx(5 + 2 * (2 * 2 + 10 * 3 + 3 * 4 * 7))


def test_total_wants_terms_that_were_measured() -> None:
    some = dataclasses.replace(MEASURED, fine=None, perceptual=None)
    assert total_loss(some, FACTORS, Coefficients()).item() == pytest.approx(0.01 * 5 + 2 * 0.5 * 2)
    for terms in ({"coarse", "fine"}, {"adversarial"}, set()):
        with pytest.raises(ValueError, match=r"are not among the measured \['coarse', 'task'\]"):
            total_loss(some, FACTORS, Coefficients(), terms)


class Pair:
    """A small student and teacher in float64, and all four losses of one batch at the student's current weights."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.student: Student = build_student(STUDENT).double()  # in training mode: batch statistics
        self.teacher: Teacher = build_teacher(TEACHER).double()
        self.at_output = LayerGradient(self.student.output_layer)
        self.at_coarse = LayerGradient(self.student.coarse_layer)
        self.distance = TeacherFeatures(self.teacher)
        self.clean, self.noise, self.masked = torch.randn(3, 2, 4, 8, 8, dtype=torch.double)
        self.mask = (torch.rand(2, 1, 8, 8) > 0.5).double()
        self.alpha_bar = torch.tensor([0.9, 0.3], dtype=torch.double)
        signal, spread = (a.sqrt()[:, None, None, None] for a in (self.alpha_bar, 1 - self.alpha_bar))
        self.noisy = signal * self.clean + spread * self.noise

    def losses(self) -> Losses:
        inputs = torch.cat([self.noisy, self.mask, self.masked], 1), torch.tensor([120, 640]), torch.arange(10)[None]
        inputs = (*inputs[:2], inputs[2].expand(2, -1))
        with self.at_output, self.at_coarse:
            ours = self.student(*inputs)
        with torch.no_grad():
            theirs = self.teacher(*inputs)
        guess = predicted_clean(self.noisy, ours.noise, self.alpha_bar)
        return Losses(
            task=noise_loss(ours.noise, self.noise),
            fine=noise_loss(ours.noise, theirs.noise),
            coarse=coarse_loss(self.student.coarse_feature(ours), self.teacher.coarse_feature(theirs)),
            perceptual=self.distance(guess, self.clean, self.mask, self.masked),
        )


def finite_lengths(losses: Callable[[], Losses], weight: nn.Parameter, names: tuple[str, ...]) -> dict[str, float]:
    """The lengths of the losses' gradients at ``weight``, by central differences.

    Along a gradient's own direction the slope is its length, if it is the gradient: random directions, which see
    what is orthogonal to it too, say whether it is.
    """

    def slope(name: str, direction: Tensor, step: float = 1e-5) -> float:
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                weight.add_(direction, alpha=sign * step)
                values.append(getattr(losses(), name).item())
                weight.sub_(direction, alpha=sign * step)
        return (values[0] - values[1]) / (2 * step)

    lengths = {}
    for name in names:
        (gradient,) = torch.autograd.grad(getattr(losses(), name), weight)
        for _ in range(3):
            direction = nn.functional.normalize(torch.randn_like(gradient).flatten(), dim=0).view_as(gradient)
            expected = (gradient * direction).sum().item()
            assert slope(name, direction) == pytest.approx(expected, rel=1e-5, abs=1e-5 * gradient.norm().item())
        lengths[name] = slope(name, gradient / gradient.norm())
    return lengths


def test_the_weights_are_those_of_finite_differences() -> None:
    pair = Pair()
    output, inner = pair.student.output_layer.weight, pair.student.coarse_layer.weight
    weights = adaptive_weights(pair.losses(), pair.at_output, pair.at_coarse)
    at_output = finite_lengths(pair.losses, output, ("task", "fine", "perceptual"))
    at_inner = finite_lengths(pair.losses, inner, ("task", "coarse"))
    assert weights.out.item() == pytest.approx(at_output["task"] / (at_output["fine"] + 1e-6), rel=1e-6)
    assert weights.perceptual.item() == pytest.approx(at_output["task"] / (at_output["perceptual"] + 1e-6), rel=1e-6)
    assert weights.cross.item() == pytest.approx(at_inner["coarse"] / (at_inner["task"] + 1e-4), rel=1e-6)
    values = [w.item() for w in vars(weights).values()]
    assert len({round(v, 3) for v in [*values, 1.0]}) == 4  # none agrees by accident


def test_the_total_teaches_every_weight_of_the_student_and_none_of_the_teacher() -> None:
    pair = Pair()
    losses = pair.losses()
    weights = adaptive_weights(losses, pair.at_output, pair.at_coarse)
    total_loss(losses, weights, Coefficients()).backward()
    assert [name for name, p in pair.student.named_parameters() if p.grad is None] == []
    assert all(p.grad is None for p in pair.teacher.parameters())
