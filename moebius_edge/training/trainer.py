"""One network, its average and its optimiser, trained on an objective: the loop of every stage.

The same loop runs in one process or in many (``torchrun``, ``accelerate launch``): Hugging Face's Accelerate gives
each its device and averages gradients. What a sample is depends on its number alone, so the order of data survives
a kill, and N processes see together what one would see with the whole batch. Mixed precision is torch's own, since
Accelerate fixes it once a process.
"""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, nullcontext
from dataclasses import asdict
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import Tensor, nn

from ..errors import BundleError, MachineError, UsageError
from .latents import Source
from .loop import (
    Arrays,
    checkpoint_files,
    draw_batches,
    load_state,
    lost_processes_named,
    noticing_stops,
    save_checkpoint,
    update_average,
)
from .losses import Figures, Objective, autocast
from .networks import average_statistics, batch_norms, measure_statistics, set_training, spread_momentum
from .noising import Batch, Noising, draw_noise, prompt_ids
from .optimiser import MuonAdamW
from .recipe import Recipe, RunOptions

_STATE = ("network", "average", "optimiser", "scaler")  # what of a trainer a checkpoint holds


def make_accelerator(device: str) -> Accelerator:
    """Accelerate's engine for ``auto``, ``cpu`` or ``cuda``, in one process or as the launcher says.

    Raises:
        MachineError: CUDA was asked for and is not there. UsageError: a launcher asks for what is not supported.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise MachineError("PyTorch finds no CUDA GPU here: use --device cpu, or see `moebius-edge doctor`")
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    accelerator = Accelerator(
        # Without this Accelerate takes each of several processes on a machine without GPUs for the only one.
        cpu=device == "cpu" or (launched > 1 and not torch.cuda.is_available()),
        mixed_precision="no",
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],  # batch norms are averaged by us
    )
    kind = str(accelerator.distributed_type.value)
    if kind not in ("NO", "MULTI_CPU", "MULTI_GPU"):
        raise UsageError(f"the launcher asks for {kind}, which is not supported: launch with --multi_gpu")
    if launched != accelerator.num_processes:
        problem = f"the launcher started {launched} processes, of which Accelerate knows {accelerator.num_processes}"
        raise UsageError(problem, "launch with `torchrun --nproc-per-node N` or `accelerate launch --multi_gpu`")
    return accelerator


def mean_over_processes(accelerator: Accelerator, value: Tensor) -> Tensor:
    """The mean of ``value`` over the processes; itself where there is one."""
    mean: Tensor = value if accelerator.num_processes == 1 else accelerator.reduce(value.clone(), "mean")
    return mean


class Trainer:
    """Trains ``network`` on ``objective``; ``average``, of the same shape, follows it slowly and is the result.

    Raises UsageError if the recipe's batch does not divide into processes and micro-batches.
    """

    def __init__(
        self,
        recipe: Recipe,
        network: nn.Module,
        average: nn.Module,
        objective: Objective,
        source: Source,
        output: Path,
        options: RunOptions,
        accelerator: Accelerator,
    ) -> None:
        self.recipe, self.objective, self.source, self.output = recipe, objective, source, output
        self.options, self.accelerator = options, accelerator
        self.device = accelerator.device
        batch, processes = recipe.optimiser.batch, accelerator.num_processes
        self.micro_batch = options.micro_batch or batch // processes
        if self.micro_batch == 0 or batch % (self.micro_batch * processes):
            raise UsageError(
                f"optimiser.batch {batch} does not divide into {processes} processes of micro-batches of "
                f"{self.micro_batch}: use a batch that is a multiple of {max(self.micro_batch, 1) * processes}"
            )
        self.micro_batches = batch // (self.micro_batch * processes)
        if processes > 1 and self.device.type == "cuda" and recipe.optimiser.batch_norm == "batch":
            network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
        spread_momentum(network, self.micro_batches)
        self.network = network
        self.model = accelerator.prepare_model(network)
        self.average = average.to(self.device).requires_grad_(False).eval()
        self.average.load_state_dict(network.state_dict())
        of = recipe.optimiser
        self.optimiser = MuonAdamW(network, of.learning_rate, of.weight_decay, of.decay, of.muon, of.betas)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=recipe.optimiser.precision == "fp16")
        self.noising = Noising(self.device)
        self.mean = partial(mean_over_processes, accelerator)
        self.done = 0

    def draw(self, number: int, seed: int | None = None) -> tuple[Any, ...]:
        """Sample ``number`` with its noise, timestep and branch."""
        rng = np.random.default_rng([self.recipe.seed if seed is None else seed, number])
        drawn = self.source.draw(number, rng)
        student, batch = self.recipe.student, self.recipe.optimiser.batch
        shape = (student.latent_channels, student.latent_size, student.latent_size)
        return (*drawn, *draw_noise(rng, shape, number % batch, batch, self.recipe.noise))

    def batch(self, drawn: Arrays) -> Batch:
        """Samples as ``draw`` made them, stacked, on the device and noised."""
        *sample, noise, timestep, unconditional = (torch.from_numpy(a).to(self.device) for a in drawn)
        clean, masked, mask, *branch = self.source.latents(tuple(sample))
        if branch:  # the data say it of those where it is not negative
            unconditional = torch.where(branch[0] < 0, unconditional, branch[0].long())
        return self.noising(clean, masked, mask, noise, timestep, unconditional)

    def batches(self, first_step: int) -> Generator[Arrays, None, None]:
        """This process's micro-batches from ``first_step`` on, without end."""
        size, here = self.micro_batch, self.accelerator.process_index
        start = first_step * self.recipe.optimiser.batch + here * size
        numbers = (range(n, n + size) for n in count(start, size * self.accelerator.num_processes))
        return draw_batches(self.draw, numbers, self.options.workers)

    def step(self, micro_batches: list[Arrays]) -> dict[str, float]:
        """One optimiser step; its losses, weights, gradient norm and learning rate, averaged over the processes.

        Raises BundleError when a loss is not finite.
        """
        recipe = self.recipe.optimiser
        set_training(self.network, recipe.batch_norm == "running")
        # For perceptual distances that augment, and posteriors of which a sample is taken.
        torch.manual_seed(self.recipe.seed * 1_000_003 + self.done)
        half_cosine = 0.5 * (1 + math.cos(math.pi * (self.done / recipe.steps)))  # 1 at the start, 0 at the end
        rate = recipe.learning_rate * min(1.0, (self.done + 1) / max(recipe.warmup, 1))
        rate *= recipe.final_rate + (1 - recipe.final_rate) * half_cosine
        self.optimiser.set_learning_rate(rate)
        sums: Figures = {}
        for number, drawn in enumerate(micro_batches, start=1):
            batch = self.batch(drawn)
            last = number == len(micro_batches)  # gradients are exchanged once a step
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                figures = self._backward(batch, len(micro_batches))
            for name, value in figures.items():
                sums[name] = sums.get(name, torch.zeros((), device=self.device)) + value.float() / len(micro_batches)
        norm = self._update(batch)
        names = sorted(sums)
        values = self.mean(torch.stack([sums[name] for name in names])).tolist()
        figures_of_step = dict(zip(names, values, strict=True)) | {"learning_rate": rate, "gradient_norm": norm}
        # A step that fp16's scaler skipped has figures that are not finite; all others are.
        return {name: value for name, value in figures_of_step.items() if math.isfinite(value)}

    def _backward(self, batch: Batch, micro_batches: int) -> Figures:
        scale = self.scaler.get_scale()
        total, figures = self.objective(self.model, batch, scale)
        infinite = [name for name, value in figures.items() if not torch.isfinite(value)]
        # Where the loss scale of fp16 takes the adaptive weights' gradients alone out of range, the total is NaN and so
        # are its gradients: the scaler skips the step and lowers its scale.
        overflowed = bool(infinite) and all(name.startswith("w_") for name in infinite)
        if not (overflowed and self.scaler.is_enabled() and scale >= 1):
            self._check(total, figures, batch)
        self.scaler.scale(total / micro_batches).backward()
        return {"loss": total.detach(), **figures}

    def _update(self, batch: Batch) -> float:
        """Move the weights and their average; the gradient's norm before it is clipped."""
        recipe = self.recipe.optimiser
        self.scaler.unscale_(self.optimiser)  # type: ignore[arg-type]  # it reads the parameter groups alone
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), recipe.max_grad_norm)
        if not self.scaler.is_enabled():  # a scaler skips such a step and lowers its scale
            self._check(norm, {"gradient_norm": norm.detach()}, batch)
        self.scaler.step(self.optimiser)  # type: ignore[arg-type]
        self.scaler.update()
        self.optimiser.zero_grad()
        self.done += 1
        update_average(self.average, self.network, min(recipe.ema_decay, self.done / (self.done + 10)))
        return float(norm)

    def _check(self, value: Tensor, figures: Figures, batch: Batch) -> None:
        """Raise BundleError where ``value`` is not finite."""
        if torch.isfinite(value):
            return
        bad = ", ".join(n for n, v in figures.items() if not torch.isfinite(v)) or "total"
        samples = batch.clean.isfinite().flatten(1).all(1).logical_not().nonzero().flatten().tolist()
        raise BundleError(
            f"the loss is {value.item()} at step {self.done} ({bad}; timesteps {batch.timestep.tolist()}, latents not "
            f"finite of samples {samples}): lower optimiser.learning_rate; --resume starts from the last checkpoint"
        )

    def settle_batch_norms(self, batches: int = 60) -> None:
        """Measure the statistics of the average's batch norms anew; every process does the same.

        On at most as many batches as it was trained on. Not where there are none, where the stored statistics were used
        as they are, or where the weights are no average and have their own.
        """
        recipe = self.recipe.optimiser
        if recipe.batch_norm != "running" and recipe.ema_decay and batch_norms(self.average):
            steps = min(batches, self.recipe.optimiser.steps)
            measure_statistics(self.average, self.passes(self.average, steps))

    def passes(self, network: nn.Module, batches: int) -> Iterator[Callable[[], object]]:
        """Forward passes of ``network`` on whole batches that no step trains on, the same in every process."""
        prompts, size, seed = self.recipe.student.num_prompts, self.recipe.optimiser.batch, self.recipe.seed + 1

        torch.manual_seed(seed)

        def draw(number: int) -> tuple[Any, ...]:
            return self.draw(int(np.random.default_rng([seed, number]).integers(1 << 31)), seed)

        def forward(batch: Batch) -> None:
            with autocast(self.device, self.recipe.optimiser.precision):
                network(batch.sample, batch.timestep, prompt_ids(prompts, batch.unconditional))

        with closing(draw_batches(draw, [range(i * size, (i + 1) * size) for i in range(batches)])) as drawn:
            for arrays in drawn:
                yield partial(forward, self.batch(arrays))

    def save(self) -> None:
        """Write the checkpoint that ``resume`` reads; the batch norms' statistics become the processes' mean."""
        if self.accelerator.num_processes > 1:
            average_statistics(self.network, self.mean)
            average_statistics(self.average, self.mean)
        if self.accelerator.is_main_process:
            parts = {name: getattr(self, name).state_dict() for name in _STATE}
            save_checkpoint(self.output, asdict(self.recipe), self.done, self.options.keep, **parts)
        self.accelerator.wait_for_everyone()

    def resume(self) -> bool:
        """Continue exactly from the newest checkpoint if there is one; return whether there was.

        Raises as ``loop.load_state``; where a damaged file is removed, the one before it is the newest.
        """
        files = checkpoint_files(self.output)
        state = load_state(files[-1], asdict(self.recipe), str(self.device)) if files else None
        if state is None:
            return False
        for name in _STATE:
            getattr(self, name).load_state_dict(state[name])
        self.done = state["step"]
        return True

    def run(self) -> Generator[dict[str, float], None, None]:
        """Train to the end, saving on the way; yield each step's figures, with its number and images a second.

        Ctrl-C and SIGTERM, to any of the processes, end it after the step with a checkpoint; then they do what they
        would have done.
        """
        steps = self.recipe.optimiser.steps
        with noticing_stops() as stops, lost_processes_named(), closing(self.batches(self.done)) as batches:
            while self.done < steps:
                started = time.monotonic()
                figures = self.step(list(islice(batches, self.micro_batches)))
                stopped = bool(self.mean(torch.tensor(float(len(stops) > 0), device=self.device)) > 0)
                if self.done % self.options.save_every == 0 or self.done == steps or stopped:
                    self.save()
                if stopped and self.done < steps:
                    break
                speed = self.recipe.optimiser.batch / (time.monotonic() - started)
                yield {"step": self.done, **figures, "images_per_s": speed}
        if self.done < steps:
            for number in stops[:1]:
                signal.raise_signal(number)
            raise KeyboardInterrupt  # another process was stopped, or who handles the signal has done nothing
