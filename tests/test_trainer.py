"""The training loop: losses fall, a killed run ends as an uninterrupted one, and what goes wrong is named."""

from __future__ import annotations

import copy
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_monitor import scalars
from torch import nn
from training_toys import OPTIONS, RECIPE, STUDENT, TEACHER, FlatLatents, stage_inputs, trained_teacher

from moebius_edge.checkpoints.weights_metadata import find_guidance, guidance_metadata
from moebius_edge.errors import BundleError, UsageError
from moebius_edge.model import build_student, build_teacher, load_checkpoint
from moebius_edge.training import stage as stage_module
from moebius_edge.training import trainer as trainer_module
from moebius_edge.training.loop import checkpoint_files
from moebius_edge.training.losses import Distillation, Task
from moebius_edge.training.networks import batch_norms, identity_start
from moebius_edge.training.noising import Batch
from moebius_edge.training.recipe import Int8Recipe, Recipe, RunOptions
from moebius_edge.training.stage import train_stage
from moebius_edge.training.trainer import Trainer, make_accelerator

torch.set_num_threads(1)
TASK = replace(RECIPE, losses=replace(RECIPE.losses, terms=("task",)))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained_teacher(tmp_path_factory.mktemp("teacher"))


def trainer(recipe: Recipe, output: Path, options: RunOptions = OPTIONS) -> Trainer:
    """A trainer of the task alone, or of a distillation from a teacher of random weights."""
    torch.manual_seed(recipe.seed)
    student, average = build_student(recipe.student), build_student(recipe.student)
    precision = recipe.optimiser.precision
    objective: Any = Task(recipe.losses, recipe.student.num_prompts, precision)
    if recipe.losses.terms != ("task",):
        objective = Distillation(recipe.losses, student, build_teacher(TEACHER), None, precision, lambda tensor: tensor)
    identity_start(student)
    return Trainer(recipe, student, average, objective, FlatLatents(), output, options, make_accelerator("cpu"))  # type: ignore[arg-type]


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_the_loss_falls(tmp_path: Path) -> None:
    optimiser = replace(TASK.optimiser, steps=24, warmup=3, learning_rate=1e-2)
    ours = trainer(replace(TASK, optimiser=optimiser), tmp_path, replace(OPTIONS, save_every=8, keep=2))
    losses = [figures["loss"] for figures in ours.run()]
    assert [p.name for p in checkpoint_files(tmp_path)] == ["step-000000016.pt", "step-000000024.pt"]
    assert len(losses) == 24 and np.mean(losses[-8:]) < 0.7 * np.mean(losses[:8])
    assert not same(ours.network, ours.average)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_gives_nearly_the_same_loss(precision: str, tmp_path: Path) -> None:
    exact = next(trainer(TASK, tmp_path / "fp32").run())
    recipe = replace(TASK, optimiser=replace(TASK.optimiser, precision=precision))
    ours = trainer(recipe, tmp_path / precision, replace(OPTIONS, save_every=100))
    assert ours.scaler.is_enabled() == (precision == "fp16")
    figures = list(islice(ours.run(), 6 if precision == "fp16" else 1))
    assert figures[0]["loss"] == pytest.approx(exact["loss"], rel=0.05) and figures[0]["loss"] != exact["loss"]
    assert all(np.isfinite(list(step.values())).all() for step in figures)
    if precision == "fp16":  # its first scale is too large on purpose: such steps are skipped
        assert "gradient_norm" not in figures[0] and "gradient_norm" in figures[-1]
        assert 0 < ours.scaler.get_scale() < 65536


def distilling_in_fp16(output: Path, first_scale: float) -> Trainer:
    optimiser = replace(RECIPE.optimiser, precision="fp16", steps=5)
    losses = replace(RECIPE.losses, terms=("task", "fine", "coarse"))
    ours = trainer(replace(RECIPE, optimiser=optimiser, losses=losses), output, replace(OPTIONS, save_every=100))
    ours.scaler = torch.amp.GradScaler("cpu", init_scale=first_scale, backoff_factor=2.0**-8)
    return ours


def test_adaptive_weights_that_overflow_at_a_loss_scale_lower_it(tmp_path: Path) -> None:
    """Such a step is skipped, as one is whose gradients overflow: nothing is changed but the scale."""
    ours = distilling_in_fp16(tmp_path, 2.0**26)
    before = copy.deepcopy(ours.network)
    steps = ours.run()
    first = next(steps)
    assert "w_out" not in first and "gradient_norm" not in first and np.isfinite(first["task"]) and "loss" not in first
    assert ours.scaler.get_scale() == 2.0**18
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), ours.network.parameters(), strict=True))
    last = list(steps)[-1]
    assert np.isfinite(list(last.values())).all() and last["w_out"] > 0
    assert not same(before, ours.network)


def test_adaptive_weights_that_are_not_finite_at_any_scale_stop_the_run(tmp_path: Path) -> None:
    ours = distilling_in_fp16(tmp_path, 0.5)
    objective = ours.objective

    def spoilt(model: nn.Module, batch: Batch, scale: float = 1.0) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        total, figures = objective(model, batch, scale)
        return total * torch.nan, figures | {"w_out": torch.tensor(torch.nan)}

    ours.objective = spoilt
    with pytest.raises(BundleError, match=r"the loss is nan at step 0 \(w_out; "):
        next(ours.run())


def test_a_stopped_run_goes_on_exactly(tmp_path: Path) -> None:
    whole = trainer(TASK, tmp_path / "whole")
    expected = list(whole.run())
    cut = trainer(TASK, tmp_path / "cut")
    steps = cut.run()
    assert len(list(islice(steps, 3))) == 3  # the checkpoint is of step 2
    steps.close()
    torch.manual_seed(99)  # as another process would have it
    resumed = trainer(TASK, tmp_path / "cut")
    assert resumed.resume() and resumed.done == 2
    figures = list(resumed.run())
    assert [f["loss"] for f in figures] == [f["loss"] for f in expected[2:]]
    assert same(resumed.network, whole.network) and same(resumed.average, whole.average)
    resumed.settle_batch_norms(2)
    whole.settle_batch_norms(2)
    assert same(resumed.average, whole.average)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_after_the_step_with_a_checkpoint(number: int, tmp_path: Path) -> None:
    class Told(Exception):
        """What the handler of before raises."""

    def handler(*_: object) -> None:
        raise Told

    recipe, options = replace(TASK, optimiser=replace(TASK.optimiser, steps=3)), replace(OPTIONS, save_every=100)
    whole = trainer(recipe, tmp_path / "whole", options)
    list(whole.run())
    before = signal.signal(number, handler)
    try:
        stopped = trainer(recipe, tmp_path / "cut", options)
        steps = stopped.run()
        next(steps)
        signal.raise_signal(number)  # as good as in the middle of the next step
        with pytest.raises(Told):
            next(steps)
        assert signal.getsignal(number) is handler
    finally:
        signal.signal(number, before)
    assert [p.name for p in checkpoint_files(tmp_path / "cut")] == ["step-000000002.pt"]
    resumed = trainer(recipe, tmp_path / "cut", options)
    assert resumed.resume() and len(list(resumed.run())) == 1
    assert same(resumed.network, whole.network) and same(resumed.average, whole.average)


def test_what_the_data_say_of_a_branch_is_heard(tmp_path: Path) -> None:
    class Branches(FlatLatents):
        def latents(self, drawn: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            return *drawn, torch.tensor([0, 1, -1, -1])

    ours = trainer(replace(TASK, noise=replace(TASK.noise, prompt_dropout=1.0)), tmp_path)
    ours.source = Branches()  # type: ignore[assignment]
    drawn = next(ours.batches(0))
    assert ours.batch(drawn).unconditional.tolist() == [0, 1, 1, 1]  # the others by the share of the drop-out


def test_scalars_of_a_resumed_run_are_those_of_one_that_was_not_stopped(tmp_path: Path) -> None:
    class Cut(FlatLatents):
        drawn = 0

        def latents(self, drawn: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            self.drawn += 1
            if self.drawn > 5:
                raise KeyboardInterrupt
            return drawn

    ours, options = stage_inputs(), replace(OPTIONS, log_every=4)
    train_stage(TASK, ours, tmp_path / "whole", options)
    with pytest.raises(KeyboardInterrupt):
        train_stage(TASK, replace(ours, source=Cut()), tmp_path / "cut", options)
    train_stage(TASK, ours, tmp_path / "cut", options, resume=True)
    whole, cut = (scalars(tmp_path / name)["losses/loss"] for name in ("whole", "cut"))
    assert [step for step, _ in whole] == [2, 4, 6] and cut == whole


@pytest.mark.parametrize("local", [False, True])
def test_adaptive_weights_are_of_all_processes_or_of_each(
    local: bool, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    averaged = []
    monkeypatch.setattr(stage_module, "mean_over_processes", lambda _, value: averaged.append(value) or value)
    losses = replace(RECIPE.losses, terms=("task", "fine"), local_weights=local)
    recipe = replace(RECIPE, losses=losses, optimiser=replace(RECIPE.optimiser, steps=1))
    train_stage(recipe, stage_inputs(teacher=teacher), tmp_path, OPTIONS)
    assert bool(averaged) is not local


def test_only_averages_have_their_batch_norms_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []
    monkeypatch.setattr(trainer_module, "measure_statistics", lambda network, passes: measured.append(network))
    for optimiser in (replace(TASK.optimiser, ema_decay=0.0), replace(TASK.optimiser, batch_norm="running")):
        ours = trainer(replace(TASK, optimiser=optimiser), tmp_path)
        ours.settle_batch_norms()
    ours = trainer(TASK, tmp_path)
    ours.average = nn.Linear(2, 2)  # a network without batch norms, as the teacher is
    ours.settle_batch_norms()
    assert measured == []
    trainer(TASK, tmp_path).settle_batch_norms()
    assert len(measured) == 1


def test_without_an_average_the_result_is_the_network(tmp_path: Path) -> None:
    ours = trainer(replace(TASK, optimiser=replace(TASK.optimiser, ema_decay=0.0)), tmp_path)
    list(ours.run())
    assert same(ours.network, ours.average)


def test_a_launcher_that_accelerate_does_not_see_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match=r"started 2 processes, of which Accelerate knows 1: launch with `torchrun"):
        make_accelerator("cpu")


def test_micro_batches_give_the_gradient_of_the_whole_batch(tmp_path: Path) -> None:
    """Their first step alone: later ones differ by AdamW's answer to gradients that are rounding and nothing else."""
    running = replace(TASK, optimiser=replace(TASK.optimiser, batch_norm="running"))
    whole = next(trainer(running, tmp_path / "whole").run())
    ours = trainer(running, tmp_path / "parts", replace(OPTIONS, micro_batch=1))
    assert (ours.micro_batch, ours.micro_batches) == (1, 4)
    parts = next(ours.run())
    for name in ("loss", "gradient_norm"):
        assert parts[name] == pytest.approx(whole[name], rel=1e-5)
    with pytest.raises(UsageError, match=r"optimiser.batch 4 does not divide into 1 processes of micro-batches of 3"):
        trainer(TASK, tmp_path, replace(OPTIONS, micro_batch=3))


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    ours = trainer(TASK, tmp_path)

    class Broken(FlatLatents):
        def latents(self, drawn: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            if ours.done == 3:
                drawn[0][1] = torch.nan
            return drawn

    ours.source = Broken()  # type: ignore[assignment]
    with pytest.raises(BundleError, match=r"the loss is nan at step 3 \(task; .* not finite of samples \[1\]\): lower"):
        list(ours.run())
    assert [p.name for p in checkpoint_files(tmp_path)] == ["step-000000002.pt"]
    resumed = trainer(TASK, tmp_path)
    assert resumed.resume() and len(list(resumed.run())) == 4


def start(call: dict[str, Any]) -> subprocess.Popen[bytes]:
    script = Path(__file__).with_name("training_process.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, str(script), json.dumps(call)], stderr=subprocess.PIPE, env=environment, start_new_session=True
    )


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_bit_for_bit_as_one_that_was_not(teacher: Path, tmp_path: Path) -> None:
    expected, output = tmp_path / "whole", tmp_path / "killed"
    call = {"teacher": str(teacher), "recipe": {"optimiser": {"steps": 15}}, "options": {"save_every": 3}}
    assert start({**call, "output": str(expected)}).wait() == 0
    call |= {"output": str(output), "resume": True}
    rng, kills = random.Random(0), 0
    for _ in range(20):
        before = checkpoint_files(output)[-1:]
        process = start(call)
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline and checkpoint_files(output)[-1:] == before:
            time.sleep(0.01)
        if process.poll() is None:
            time.sleep(rng.uniform(0, 0.7))
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            kills += process.wait() == -signal.SIGKILL
        else:
            assert process.wait() == 0, process.stderr and process.stderr.read().decode()[-2000:]
            break
    assert (output / "student.safetensors").exists() and kills >= 2
    whole_weights, ours = load_file(expected / "student.safetensors"), load_file(output / "student.safetensors")
    assert all(torch.equal(tensor, ours[name]) for name, tensor in whole_weights.items())


@pytest.mark.slow
def test_two_processes_train_as_one_with_the_whole_batch(teacher: Path, tmp_path: Path) -> None:
    """All loss terms with their adaptive weights; batch norms by their running statistics.

    In double precision: in single, AdamW makes whole steps of gradients that are zero but for rounding.
    """
    recipe = {"optimiser": {"batch_norm": "running", "steps": 2}}
    call = {"teacher": str(teacher), "recipe": recipe, "double": True, "options": {"device": "auto"}}
    alone, two = tmp_path / "alone", tmp_path / "two"
    assert start({**call, "output": str(alone)}).wait() == 0
    script = Path(__file__).with_name("training_process.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    each = {"optimiser": {**recipe["optimiser"], "batch": 2, "per_process": True}}  # the same whole batch
    command.append(json.dumps({**call, "recipe": each, "output": str(two)}))
    done = subprocess.run(command, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    assert done.stderr.decode().count("training on cpu, 2 processes\n") == 1
    records = [json.loads((path / "train.json").read_text()) for path in (alone, two)]
    assert [(r["processes"], r["micro_batch"]) for r in records] == [(1, 4), (2, 2)]
    figures = [record["result"]["last_figures"] for record in records]
    for name in ("loss", "task", "fine", "coarse", "perceptual", "w_out", "w_perceptual", "w_cross"):
        assert figures[1][name] == pytest.approx(figures[0][name], rel=1e-5), name
    ours = load_file(two / "student.safetensors")
    for name, tensor in load_file(alone / "student.safetensors").items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-5, msg=name)


def test_a_finished_run_is_returned_at_once_and_another_is_refused(teacher: Path, tmp_path: Path) -> None:
    recipe = replace(RECIPE, optimiser=replace(RECIPE.optimiser, steps=2))
    result = train_stage(recipe, stage_inputs(teacher=teacher), tmp_path, OPTIONS)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "checkpoints", "recipe.toml", "student.json", "student.safetensors", "tensorboard", "train.json",
    ]  # fmt: skip
    before = result.stat().st_mtime_ns
    assert train_stage(recipe, stage_inputs(teacher=teacher), tmp_path, OPTIONS, resume=True) == result
    assert result.stat().st_mtime_ns == before
    with pytest.raises(UsageError, match=r"holds a run already: add --resume to go on with it"):
        train_stage(recipe, stage_inputs(teacher=teacher), tmp_path, OPTIONS)
    other = replace(recipe, losses=replace(recipe.losses, hole_weight=2.0))
    with pytest.raises(UsageError, match=r"another recipe \(losses.hole_weight is 1.0 there, 2.0 here\)"):
        train_stage(other, stage_inputs(teacher=teacher), tmp_path, OPTIONS, resume=True)


LAMBDA = "up_blocks.0.attentions.0.attn1.lambda"
BLOCKS = ("conv_in", "down_blocks.0.attentions.0.ff", "up_blocks.0.attentions.0.proj_in", LAMBDA)
INT8 = replace(
    RECIPE,
    stage="int8",
    optimiser=replace(RECIPE.optimiser, batch_norm="running", steps=4),
    int8=Int8Recipe(blocks=BLOCKS, range_batches=2),
)


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student of random weights that notes a distilled guidance."""
    torch.manual_seed(3)
    network = build_student(STUDENT)
    for norm in batch_norms(network):
        assert norm.running_mean is not None and norm.running_var is not None
        norm.running_mean.normal_(0, 0.1)
        norm.running_var.uniform_(0.5, 1.5)
    path = tmp_path_factory.mktemp("student") / "student.safetensors"
    save_file(network.state_dict(), path, guidance_metadata(3.0))
    return path


def test_stage_int8_from_file_to_file(student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = train_stage(INT8, stage_inputs(student=student), tmp_path, OPTIONS)
    assert (
        f"1 blocks of the recipe train in floating point, for training does not simulate the products inside "
        f"lambda operators: {LAMBDA}\n" in capsys.readouterr().err
    )
    before, after = load_file(student), load_file(result)
    load_checkpoint(build_student(STUDENT), result)
    moved = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert not any("running_" in name or "num_batches" in name for name in moved)
    assert {n for n, _ in build_student(STUDENT).named_parameters() if n.endswith("weight")} - moved == set()
    assert find_guidance(result, None) == 3.0  # it still needs one branch

    record = json.loads((tmp_path / "train.json").read_text())
    assert record["int8"]["left_in_floating_point"] == [LAMBDA]
    ff = "down_blocks.0.attentions.0.transformer_blocks.0.ff"
    assert list(record["int8"]["scales"]) == [
        "conv_in.conv_pw",
        f"{ff}.inverted_conv.conv",
        f"{ff}.point_conv.conv",
        "up_blocks.0.attentions.0.proj_in",
    ]
    assert all(scale > 0 for scale in record["int8"]["scales"].values())
    assert {"loss", "int8", "task"} <= record["result"]["last_figures"].keys()


def test_a_stopped_int8_run_goes_on_exactly(student: Path, tmp_path: Path) -> None:
    ours = stage_inputs(student=student)
    whole = load_file(train_stage(INT8, ours, tmp_path / "whole", OPTIONS))

    class Stopped(FlatLatents):
        drawn = 0

        def latents(self, drawn: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            self.drawn += 1
            if self.drawn > INT8.int8.range_batches + 3:
                raise KeyboardInterrupt
            return drawn

    with pytest.raises(KeyboardInterrupt):
        train_stage(INT8, replace(ours, source=Stopped()), tmp_path / "cut", OPTIONS)
    assert [p.name for p in checkpoint_files(tmp_path / "cut")] == ["step-000000002.pt"]
    resumed = load_file(train_stage(INT8, ours, tmp_path / "cut", OPTIONS, resume=True))
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())


def test_int8_needs_a_student(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="stage int8 starts from a trained student: add --student FILE"):
        train_stage(INT8, stage_inputs(), tmp_path / "none", OPTIONS)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_gpu_starts_as_the_cpu_does(precision: str, teacher: Path, tmp_path: Path) -> None:
    recipe = replace(RECIPE, optimiser=replace(RECIPE.optimiser, precision=precision, steps=2))
    figures = []
    for device in ("cpu", "cuda"):
        output = tmp_path / device
        train_stage(recipe, stage_inputs(teacher=teacher), output, replace(OPTIONS, device=device))
        record = json.loads((output / "train.json").read_text())
        figures.append(record["result"]["last_figures"])
    for name in ("task", "fine", "coarse", "perceptual", "w_out", "w_cross"):
        assert figures[1][name] == pytest.approx(figures[0][name], rel=0.02 if precision == "fp32" else 0.2), name
