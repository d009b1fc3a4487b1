"""The training loop: losses fall, a killed run ends as an uninterrupted one, and what goes wrong is named."""

from __future__ import annotations

import copy
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from training_toys import OPTIONS, RECIPE, TEACHER, FlatLatents, material, trained_teacher

from moebius_edge.errors import BundleError, MachineError, UsageError
from moebius_edge.model import build_student, build_teacher
from moebius_edge.training import checkpoints
from moebius_edge.training.checkpoints import checkpoint_files
from moebius_edge.training.networks import identity_start
from moebius_edge.training.noising import Batch
from moebius_edge.training.objectives import Distillation, Task
from moebius_edge.training.recipe import Recipe, RunOptions
from moebius_edge.training.stage import train_stage
from moebius_edge.training.trainer import Trainer, make_accelerator

torch.set_num_threads(1)
TASK = replace(RECIPE, losses=replace(RECIPE.losses, terms=("task",)))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained_teacher(tmp_path_factory.mktemp("teacher"))


def trainer(recipe: Recipe, output: Path, options: RunOptions = OPTIONS) -> Trainer:
    torch.manual_seed(recipe.seed)
    student, average = build_student(recipe.student), build_student(recipe.student)
    identity_start(student)
    objective = Task(recipe.losses, recipe.student.num_prompts, recipe.optimiser.precision)
    return Trainer(recipe, student, average, objective, FlatLatents(), output, options, make_accelerator("cpu"))  # type: ignore[arg-type]


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_the_loss_falls(tmp_path: Path) -> None:
    optimiser = replace(TASK.optimiser, steps=40, warmup=5, learning_rate=1e-2)
    ours = trainer(replace(TASK, optimiser=optimiser), tmp_path, replace(OPTIONS, save_every=40))
    losses = [figures["loss"] for figures in ours.run()]
    assert len(losses) == 40 and np.mean(losses[-10:]) < 0.7 * np.mean(losses[:10])
    assert not same(ours.network, ours.average)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_gives_nearly_the_same_loss(precision: str, tmp_path: Path) -> None:
    exact = next(trainer(TASK, tmp_path / "fp32").run())
    recipe = replace(TASK, optimiser=replace(TASK.optimiser, precision=precision))
    ours = trainer(recipe, tmp_path / precision)
    assert ours.scaler.is_enabled() == (precision == "fp16")
    figures = list(ours.run())
    assert figures[0]["loss"] == pytest.approx(exact["loss"], rel=0.05) and figures[0]["loss"] != exact["loss"]
    assert all(np.isfinite(list(step.values())).all() for step in figures)
    if precision == "fp16":  # its first scale is too large on purpose: such steps are skipped
        assert "gradient_norm" not in figures[0] and "gradient_norm" in figures[-1]
        assert 0 < ours.scaler.get_scale() < 65536


def distilling_in_fp16(output: Path, first_scale: float) -> Trainer:
    recipe = replace(RECIPE, optimiser=replace(RECIPE.optimiser, precision="fp16", steps=30))
    recipe = replace(recipe, losses=replace(recipe.losses, terms=("task", "fine", "coarse")))
    torch.manual_seed(0)
    student, average = build_student(recipe.student), build_student(recipe.student)
    objective = Distillation(recipe.losses, student, build_teacher(TEACHER), None, "fp16", lambda tensor: tensor)
    ours = Trainer(recipe, student, average, objective, FlatLatents(), output, OPTIONS, make_accelerator("cpu"))  # type: ignore[arg-type]
    ours.scaler = torch.amp.GradScaler("cpu", init_scale=first_scale)
    return ours


def test_adaptive_weights_that_overflow_at_a_loss_scale_lower_it(tmp_path: Path) -> None:
    """Such a step is skipped, as one is whose gradients overflow: nothing is changed but the scale."""
    ours = distilling_in_fp16(tmp_path, 2.0**26)
    before = copy.deepcopy(ours.network)
    steps = ours.run()
    first = next(steps)
    assert "w_out" not in first and "gradient_norm" not in first and np.isfinite(first["task"]) and "loss" not in first
    assert ours.scaler.get_scale() == 2.0**25
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), ours.network.parameters(), strict=True))
    last = list(steps)[-1]
    assert ours.scaler.get_scale() < 2.0**25 and np.isfinite(list(last.values())).all() and last["w_out"] > 0
    assert not same(before, ours.network) and not list(tmp_path.glob("diagnostics*"))


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
    for _ in range(3):  # the checkpoint is of step 2
        next(steps)
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


def test_micro_batches_give_the_gradient_of_the_whole_batch(tmp_path: Path) -> None:
    """Their first step alone: later ones differ by AdamW's answer to gradients that are rounding and nothing else."""
    running = replace(TASK, optimiser=replace(TASK.optimiser, batch_norm="running"))
    whole = next(trainer(running, tmp_path / "whole").run())
    ours = trainer(running, tmp_path / "parts", replace(OPTIONS, micro_batch=1))
    assert (ours.micro_batch, ours.micro_batches) == (1, 4)
    parts = next(ours.run())
    for name in ("loss", "gradient_norm"):
        assert parts[name] == pytest.approx(whole[name], rel=1e-5)


def test_a_batch_that_does_not_divide_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"optimiser.batch 4 does not divide into 1 processes of micro-batches of 3"):
        trainer(TASK, tmp_path, replace(OPTIONS, micro_batch=3))


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    list(trainer(TASK, tmp_path, replace(OPTIONS, save_every=1, keep=2)).run())
    assert [p.name for p in checkpoint_files(tmp_path)] == ["step-000000005.pt", "step-000000006.pt"]


def test_what_a_killed_process_left_half_written_is_removed(tmp_path: Path) -> None:
    list(trainer(TASK, tmp_path).run())
    half = tmp_path / checkpoints.FOLDER / ".moebius-0123456789ab.pt"
    half.write_bytes(b"half")
    resumed = trainer(TASK, tmp_path)
    assert resumed.resume() and resumed.done == 6 and not half.exists()


def test_a_loss_that_is_not_finite_stops_with_diagnostics_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    ours = trainer(TASK, tmp_path)

    class Broken(FlatLatents):
        def latents(self, drawn: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            if ours.done == 3:
                drawn[0][1] = torch.nan
            return drawn

    ours.source = Broken()  # type: ignore[assignment]
    with pytest.raises(BundleError, match=r"the loss is nan at step 3 \(task; .*diagnostics-step-3.json says more\)"):
        list(ours.run())
    assert [p.name for p in checkpoint_files(tmp_path)] == ["step-000000002.pt"]
    told = json.loads((tmp_path / "diagnostics-step-3.json").read_text())
    assert told["clean_is_finite"] == [True, False, True, True] and told["weights_are_finite"]
    assert told["first_sample"] == 12 and len(told["timesteps"]) == 4
    resumed = trainer(TASK, tmp_path)
    assert resumed.resume() and len(list(resumed.run())) == 4


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = trainer(TASK, tmp_path)
    write = Path.write_bytes

    def full(self: Path, data: Any) -> int:
        if ours.done == 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))
        return write(self, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(MachineError, match=r"cannot write .*step-000000004.pt: the disk is full: free space"):
        list(ours.run())
    assert [p.name for p in (tmp_path / checkpoints.FOLDER).iterdir()] == ["step-000000002.pt"]


def start(call: dict[str, Any]) -> subprocess.Popen[bytes]:
    script = Path(__file__).with_name("training_process.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, str(script), json.dumps(call)], stderr=subprocess.PIPE, env=environment, start_new_session=True
    )


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_bit_for_bit_as_one_that_was_not(teacher: Path, tmp_path: Path) -> None:
    recipe = {"optimiser": {"steps": 40}}
    options = {"save_every": 3}
    expected = tmp_path / "whole"
    whole = start({"output": str(expected), "teacher": str(teacher), "recipe": recipe, "options": options})
    assert whole.wait() == 0
    rng, output, kills = random.Random(0), tmp_path / "killed", 0
    call = {"output": str(output), "teacher": str(teacher), "recipe": recipe, "options": options, "resume": True}
    for _ in range(60):
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
    assert (output / "student.safetensors").exists() and kills >= 3
    whole_weights, ours = load_file(expected / "student.safetensors"), load_file(output / "student.safetensors")
    assert all(torch.equal(tensor, ours[name]) for name, tensor in whole_weights.items())


TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2")
ACCELERATE = ("accelerate.commands.launch", "--use_fsdp", "--num_processes", "2", "--num_machines", "1")
ACCELERATE += ("--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no")


def launch(call: dict[str, Any], launcher: tuple[str, ...] = TORCHRUN) -> None:
    """The training of ``call`` on two CPU processes."""
    script = Path(__file__).with_name("training_process.py")
    command = [sys.executable, "-m", *launcher, str(script), json.dumps(call)]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    two = subprocess.run(command, capture_output=True, env=variables)
    assert two.returncode == 0, two.stderr.decode()[-3000:]


def assert_same_training(one: Path, two: Path) -> None:
    figures = [json.loads((path / "train.json").read_text())["result"]["last_figures"] for path in (one, two)]
    for name in ("loss", "task", "fine", "coarse", "perceptual", "w_out", "w_perceptual", "w_cross"):
        assert figures[1][name] == pytest.approx(figures[0][name], rel=1e-5), name
    assert_same_weights(one, two)


def assert_same_weights(one: Path, two: Path) -> None:
    ours = load_file(two / "student.safetensors")
    for name, tensor in load_file(one / "student.safetensors").items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-5, msg=name)


@pytest.fixture(scope="module")
def call(teacher: Path) -> dict[str, Any]:
    """All loss terms with their adaptive weights; batch norms by their running statistics.

    In double precision: in single, AdamW makes whole steps of gradients that are zero but for rounding.
    """
    return {"teacher": str(teacher), "recipe": {"optimiser": {"batch_norm": "running", "steps": 4}}, "double": True}


@pytest.fixture(scope="module")
def alone(call: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("alone")
    assert start({**call, "output": str(output)}).wait() == 0
    return output


@pytest.fixture(scope="module")
def sharded(call: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("sharded")
    launch({**call, "output": str(output), "options": {"fsdp": True}})
    return output


@pytest.mark.slow
def test_two_processes_train_as_one_with_the_whole_batch(call: dict[str, Any], alone: Path, tmp_path: Path) -> None:
    launch({**call, "output": str(tmp_path)})
    for path, layout in ((alone, (1, 4, False)), (tmp_path, (2, 2, False))):
        record = json.loads((path / "train.json").read_text())
        assert (record["processes"], record["micro_batch"], record["sharded"]) == layout
    assert_same_training(alone, tmp_path)


@pytest.mark.slow
def test_two_processes_with_shards_train_as_one(alone: Path, sharded: Path) -> None:
    assert json.loads((sharded / "train.json").read_text())["sharded"]
    assert_same_training(alone, sharded)
    states = [torch.load(checkpoint_files(path)[-1], weights_only=True) for path in (alone, sharded)]
    for part in ("network", "average"):
        assert states[0][part].keys() == states[1][part].keys()
    for kind in ("muon", "adamw"):
        one, two = (state["optimiser"][kind] for state in states)
        assert one["param_groups"] == two["param_groups"] and one["state"].keys() == two["state"].keys()
        for number, values in one["state"].items():
            for name, tensor in values.items():
                torch.testing.assert_close(two["state"][number][name], tensor, rtol=0, atol=1e-8)


@pytest.mark.slow
def test_a_checkpoint_of_shards_goes_on_with_shards_and_in_one_process(
    call: dict[str, Any], alone: Path, sharded: Path, tmp_path: Path
) -> None:
    for name in ("two", "one"):
        shutil.copytree(sharded, tmp_path / name)
        checkpoint_files(tmp_path / name)[-1].unlink()
        (tmp_path / name / "student.safetensors").unlink()
        assert checkpoint_files(tmp_path / name)[-1].name == "step-000000002.pt"
    launch({**call, "output": str(tmp_path / "two"), "options": {"fsdp": True}, "resume": True})
    weights, resumed = (load_file(path / "student.safetensors") for path in (sharded, tmp_path / "two"))
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in weights.items())
    assert start({**call, "output": str(tmp_path / "one"), "resume": True}).wait() == 0
    assert_same_weights(alone, tmp_path / "one")


@pytest.mark.slow
def test_shards_as_accelerate_s_launcher_asks_with_micro_batches_and_checkpointing(
    call: dict[str, Any], tmp_path: Path
) -> None:
    """Without ``fsdp`` among the options."""
    call = {**call, "recipe": {"optimiser": {"batch_norm": "running", "steps": 3, "batch": 8}}}
    one = start({**call, "output": str(tmp_path / "one"), "options": {"micro_batch": 4}})
    assert one.wait() == 0
    options = {"micro_batch": 2, "gradient_checkpointing": True}
    launch({**call, "output": str(tmp_path / "two"), "options": options}, ACCELERATE)
    assert json.loads((tmp_path / "two" / "train.json").read_text())["sharded"]
    assert_same_training(tmp_path / "one", tmp_path / "two")


def test_a_finished_run_is_returned_at_once_and_another_is_refused(teacher: Path, tmp_path: Path) -> None:
    result = train_stage(RECIPE, material(teacher=teacher), tmp_path, OPTIONS)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "checkpoints", "recipe.toml", "student.json", "student.safetensors", "tensorboard", "train.json",
    ]  # fmt: skip
    before = result.stat().st_mtime_ns
    assert train_stage(RECIPE, material(teacher=teacher), tmp_path, OPTIONS, resume=True) == result
    assert result.stat().st_mtime_ns == before
    with pytest.raises(UsageError, match=r"holds a run already: add --resume to go on with it"):
        train_stage(RECIPE, material(teacher=teacher), tmp_path, OPTIONS)
    other = replace(RECIPE, losses=replace(RECIPE.losses, hole_weight=2.0))
    with pytest.raises(UsageError, match=r"another recipe \(losses.hole_weight is 1.0 there, 2.0 here\)"):
        train_stage(other, material(teacher=teacher), tmp_path, OPTIONS, resume=True)


def test_cuda_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(MachineError, match="PyTorch finds no CUDA GPU here"):
        make_accelerator("cuda")


def test_shards_in_one_process_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "FSDP shards a network over processes, and there is one: leave it out, or start several"
    with pytest.raises(UsageError, match=text):
        make_accelerator("cpu", fsdp=True)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UsageError, match=text):
        make_accelerator("cpu")
    monkeypatch.setenv("FSDP_OFFLOAD_PARAMS", "true")
    with pytest.raises(UsageError, match="fsdp_offload_params, which is not supported: set it to false"):
        make_accelerator("cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_gpu_starts_as_the_cpu_does(precision: str, teacher: Path, tmp_path: Path) -> None:
    recipe = replace(RECIPE, optimiser=replace(RECIPE.optimiser, precision=precision, steps=2))
    figures = []
    for device in ("cpu", "cuda"):
        output = tmp_path / device
        train_stage(recipe, material(teacher=teacher), output, replace(OPTIONS, device=device))
        record = json.loads((output / "train.json").read_text())
        figures.append(record["result"]["last_figures"])
    for name in ("task", "fine", "coarse", "perceptual", "w_out", "w_cross"):
        assert figures[1][name] == pytest.approx(figures[0][name], rel=0.02 if precision == "fp32" else 0.2), name
