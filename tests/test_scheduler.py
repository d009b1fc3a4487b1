"""The samplers against recorded trajectories, against diffusers, and against their own definitions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from moebius_edge.errors import UsageError
from moebius_edge.sampling.scheduler import DDIM, SCHEDULERS, Array, DPMSolverPP2M, LinearStep, Scheduler
from moebius_edge.spec import BETA_END, BETA_START

SHARED = {
    "num_train_timesteps": 1000,
    "beta_start": BETA_START,
    "beta_end": BETA_END,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
    "steps_offset": 0,
}


def configurations(limit: int) -> list[tuple[int, float, int]]:
    """Twenty-five (steps, strength, seed); short and long schedules and full strength all occur."""
    random = np.random.default_rng(20)
    cases = [(1, 1.0, 0), (2, 1.0, 1), (2, 0.5, 2), (3, 0.7, 3), (14, 1.0, 4), (15, 1.0, 5), (limit, 0.05, 6)]
    while len(cases) < 25:
        steps = int(np.exp(random.uniform(0, np.log(120))))
        strength = 1.0 if random.random() < 0.2 else float(random.uniform(0.05, 1.0))
        if int(steps * strength) >= 1:
            cases.append((steps, strength, len(cases)))
    return cases


def against_diffusers(kind: type[Scheduler], reference: Any, steps: int, strength: float, seed: int) -> float:
    """Both sample with the same predictions; the largest difference at any step, relative to the latent.

    The predictions follow the latent a little, as a network's do, so that an error once made is carried on.
    """
    import torch

    random, scheduler = np.random.default_rng(seed), kind(steps, strength)
    count = len(scheduler.timesteps)
    latent, noise, *predictions = random.standard_normal((count + 2, 2, 4, 8, 8), np.float32)
    reference.set_timesteps(steps)
    begin = steps - int(steps * strength)
    if hasattr(reference, "set_begin_index"):  # what the img2img pipelines do with a strength
        reference.set_begin_index(begin)
    timesteps = reference.timesteps[begin:]
    assert scheduler.timesteps == timesteps.tolist()
    ours = scheduler.add_noise(latent, noise)
    theirs = torch.from_numpy(noise)
    if strength < 1.0:
        theirs = reference.add_noise(torch.from_numpy(latent), theirs, timesteps[:1])
    worst = float(np.abs(ours - theirs.numpy()).max())
    for t, prediction in zip(timesteps, predictions, strict=True):
        ours = scheduler.step(0.5 * prediction + 0.5 * np.tanh(ours), int(t), ours)
        predicted = 0.5 * torch.from_numpy(prediction) + 0.5 * torch.tanh(theirs)
        theirs = reference.step(predicted, t, theirs).prev_sample
        assert ours.dtype == np.float32
        worst = max(worst, float(np.abs(ours - theirs.numpy()).max() / (1 + np.abs(ours).max())))
    return worst


OF_DIFFUSERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": True}),
    "dpm++2m": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "dpmsolver++", "solver_order": 2, "final_sigmas_type": "zero", "lower_order_final": True},
    ),
}


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of diffusers
@pytest.mark.parametrize(
    ("name", "steps", "strength", "seed"),
    [*[("ddim", *case) for case in configurations(1000)], *[("dpm++2m", *case) for case in configurations(999)]],
)
def test_the_samplers_agree_with_diffusers(name: str, steps: int, strength: float, seed: int) -> None:
    diffusers = pytest.importorskip("diffusers", reason="the reference comes with the dev extra")
    kind, options = OF_DIFFUSERS[name]
    reference = getattr(diffusers, kind)(**SHARED, **options)
    assert against_diffusers(SCHEDULERS[name], reference, steps, strength, seed) < 5e-6


@pytest.mark.parametrize("name", sorted(SCHEDULERS))
@pytest.mark.parametrize(("steps", "strength", "seed"), configurations(999))
def test_a_step_is_what_its_numbers_say(name: str, steps: int, strength: float, seed: int) -> None:
    """``step`` and ``linear_step`` are one algorithm: they agree to rounding all along, in float64 and in float32."""
    scheduler = SCHEDULERS[name](steps, strength)
    random = np.random.default_rng(seed)
    latent, *predictions = random.standard_normal((len(scheduler.timesteps) + 1, 1, 4, 4, 4))
    for dtype, tolerance in ((np.float64, 1e-11), (np.float32, 3e-6)):
        x = y = latent.astype(dtype)
        clean = np.zeros_like(x)
        for index, (t, prediction) in enumerate(zip(scheduler.timesteps, predictions, strict=True)):
            x = scheduler.step((0.5 * prediction + 0.5 * np.tanh(x)).astype(dtype), t, x)
            e = (0.5 * prediction + 0.5 * np.tanh(y)).astype(dtype)
            now = LinearStep(*map(dtype, scheduler.linear_step(index)))
            y, clean = (
                now.latent * y + now.noise * e + now.previous * clean,
                now.clean_latent * y + now.clean_noise * e,
            )
            assert np.abs(x - y).max() <= tolerance * (1 + np.abs(x).max())


def test_the_numbers_of_a_step_need_no_order() -> None:
    scheduler = DPMSolverPP2M(10)
    numbers = [scheduler.linear_step(i) for i in range(10)]
    assert [scheduler.linear_step(i) for i in reversed(range(10))] == numbers[::-1]
    assert numbers[0].previous == numbers[-1].previous == 0, "first order"
    assert all(n.previous != 0 for n in numbers[1:-1])


@pytest.fixture(scope="module")
def student() -> Iterator[Any]:
    """The small student with the golden weights, as a function of numpy arrays."""
    torch = pytest.importorskip("torch", reason="the recorded trajectories need the network")
    from golden import PROMPT_IDS, fill_golden

    from moebius_edge.model import StudentConfig, build_student

    network = fill_golden(build_student(StudentConfig((32, 64, 128), 4, 48, 64, latent_size=16)))

    def predict(sample: np.ndarray, t: int, guidance: float) -> np.ndarray:
        rows = len(sample)
        ids = torch.from_numpy(np.repeat(PROMPT_IDS, rows, axis=0))
        both = torch.from_numpy(np.concatenate([sample, sample]))
        with torch.no_grad():
            noise: np.ndarray = network(both, torch.full((2 * rows,), t), ids).noise.numpy()
        unconditional, conditional = noise[:rows], noise[rows:]
        return np.asarray(unconditional + np.float32(guidance) * (conditional - unconditional))

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so small a network only loses by more, much when the machine is busy
    yield predict
    torch.set_num_threads(threads)


@pytest.mark.parametrize(("case", "tolerance"), [("s20", 5e-4), ("s20pure", 5e-3), ("s5", 5e-4), ("s7", 5e-4)])
def test_ddim_reproduces_the_recorded_trajectories(student: Any, case: str, tolerance: float) -> None:
    from golden import golden_input, golden_numbers

    recorded = golden_numbers("sampler")
    steps, strength, guidance = recorded[f"{case}/config"].tolist()
    shape = (2, 4, 16, 16)
    latents, masked, noise = (golden_input(f"{case}:{name}", shape) for name in ("latents", "masked", "noise"))
    mask = np.zeros((2, 1, 16, 16), np.float32)
    mask[0, 0, 4:12, 3:10] = 1
    mask[1, 0, 0:5, :] = 1

    scheduler = DDIM(int(steps), strength)
    assert scheduler.timesteps == recorded[f"{case}/timesteps"].tolist()
    x = scheduler.add_noise(latents, noise)
    np.testing.assert_allclose(x, recorded[f"{case}/x0"], rtol=0, atol=2e-6)
    for i, t in enumerate(scheduler.timesteps):
        x = scheduler.step(student(np.concatenate([x, mask, masked], axis=1), t, guidance), t, x)
        if i == 0:
            np.testing.assert_allclose(x, recorded[f"{case}/after1"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(x, recorded[f"{case}/final"], rtol=0, atol=tolerance)


def test_strength_keeps_the_end_of_the_schedule() -> None:
    assert DDIM(20, 0.99).timesteps == list(range(900, -1, -50))  # upstream's 20 steps are 19 calls
    assert DDIM(20).timesteps == list(range(950, -1, -50))
    assert DDIM(3, 0.7).timesteps == [333, 0]
    assert DDIM(1000).timesteps == list(range(999, -1, -1))
    assert DPMSolverPP2M(20).timesteps == list(range(940, 0, -47))
    assert DPMSolverPP2M(20, 0.5).timesteps == list(range(470, 0, -47))


@pytest.mark.parametrize("scheduler_class", SCHEDULERS.values())
def test_start(scheduler_class: type[Scheduler]) -> None:
    random = np.random.default_rng(3)
    latent, noise = random.standard_normal((2, 1, 4, 8, 8), np.float32)
    assert scheduler_class(20, 1.0).add_noise(latent, noise) is noise
    scheduler = scheduler_class(20, 0.5)
    first = scheduler.timesteps[0]
    started = scheduler.add_noise(latent, noise)
    assert started.dtype == np.float32
    alpha_bar = scheduler.alpha_bar(first)
    np.testing.assert_allclose(started, alpha_bar**0.5 * latent + (1 - alpha_bar) ** 0.5 * noise, rtol=1e-6)
    assert not np.array_equal(scheduler.add_noise(latent, noise, 0), started)


def test_alpha_bar() -> None:
    scheduler = DDIM(20)
    assert scheduler.alpha_bar(-1) == scheduler.alpha_bar(-50) == 1.0
    assert scheduler.alpha_bar(0) == pytest.approx(1 - BETA_START, rel=1e-12)
    assert scheduler.alpha_bar(900) ** 0.5 == pytest.approx(0.119, abs=5e-4)  # what leaks of the start image
    with pytest.raises(ValueError, match="timestep 1000 is beyond the last one, 999"):
        scheduler.alpha_bar(1000)


def test_dpm_solver_takes_timesteps_in_order_and_starts_afresh() -> None:
    random = np.random.default_rng(11)
    x, e, f = random.standard_normal((3, 1, 4, 8, 8), np.float32)
    scheduler = DPMSolverPP2M(10)
    first, second, third, *_ = scheduler.timesteps
    with pytest.raises(ValueError, match=f"timestep {second} is out of order: start at {first}"):
        scheduler.step(e, second, x)
    once = scheduler.step(f, second, scheduler.step(e, first, x))
    with pytest.raises(ValueError, match="out of order"):
        scheduler.step(e, second, x)
    np.testing.assert_array_equal(scheduler.step(f, second, scheduler.step(e, first, x)), once)
    scheduler.step(e, third, once)
    for t in scheduler.timesteps:
        x = scheduler.step(e, t, x)
    with pytest.raises(ValueError, match="out of order"):
        scheduler.step(e, scheduler.timesteps[-1], x)


def test_second_order_beats_first_order_on_a_smooth_problem() -> None:
    """Data N(0, 0.5²): the best prediction is known, and so is where each starting point must pass.

    The last step is left out: it jumps to zero noise, and both take it to first order.
    """
    start = np.linspace(-2, 2, 41, dtype=np.float64)

    def error(scheduler: Scheduler) -> float:
        def deviation(t: int) -> float:
            return float((0.25 * scheduler.alpha_bar(t) + 1 - scheduler.alpha_bar(t)) ** 0.5)

        x: Array = start
        *before, last = scheduler.timesteps
        for t in before:
            x = scheduler.step((1 - scheduler.alpha_bar(t)) ** 0.5 / deviation(t) ** 2 * x, t, x)
        exact = deviation(last) / deviation(before[0]) * start  # the flow keeps x over its deviation
        return float(np.abs(x - exact).max())

    for steps in (10, 20, 40):
        assert error(DPMSolverPP2M(steps)) < 0.2 * error(DDIM(steps))


@pytest.mark.parametrize(("kind", "longest"), [(DDIM, 1000), (DPMSolverPP2M, 999)])
def test_steps_and_strengths_out_of_range(kind: type[Scheduler], longest: int) -> None:
    assert kind(longest).timesteps[0] == 999 and len(kind(longest).timesteps) == longest
    for steps in (0, -3, longest + 1):
        with pytest.raises(UsageError, match=rf"steps is {steps}: give a whole number from 1 to {longest}$"):
            kind(steps)
    for strength in (0.0, -0.1, 1.01, float("nan"), float("inf")):
        with pytest.raises(UsageError, match=f"strength is {strength}: give a number above 0 and at most 1"):
            kind(20, strength)


@pytest.mark.parametrize(("steps", "strength", "least"), [(1, 0.99, "1"), (20, 0.0001, "0.05"), (3, 0.33, "0.334")])
def test_a_strength_that_leaves_no_step_names_one_that_does(steps: int, strength: float, least: str) -> None:
    with pytest.raises(UsageError, match=f"{strength} leaves no step of {steps}: raise it to {least}, or the steps$"):
        DDIM(steps, strength)
    assert len(DDIM(steps, float(least)).timesteps) == 1
