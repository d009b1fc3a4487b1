"""One network, its average and its optimiser, trained on an objective: the loop of every stage.

The same loop runs in one process or in many (``torchrun``, ``accelerate launch``): Hugging Face's Accelerate gives
each its device and averages gradients. What a sample is depends on its number alone, so the order of data survives
a kill, and N processes see together what one would see with the whole batch. Mixed precision is torch's own, since
Accelerate fixes it once a process.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, nullcontext
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import Tensor, nn

from ..errors import BundleError, MachineError, UsageError
from .batch_norms import average_statistics, set_training, settle, spread_momentum
from .checkpoints import load_newest, save_checkpoint
from .loop import Loader, NumberedLoader, atomic_save, cosine, update_average
from .noising import Batch, Noising, draw_noise, prompt_ids
from .objectives import Figures, Objective, autocast
from .optimiser import MuonAdamW
from .recipe import Recipe, RunOptions
from .sharding import launcher_asks, load_whole, local, request_hidden, shard, whole, whole_state

_SETTLE_BATCHES = 60


class Source(Protocol):
    """Where samples come from. ``draw`` is called in a loading process, ``latents`` on what it drew, stacked."""

    def draw(self, number: int, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
        """Sample ``number``, from it and ``rng`` alone."""

    def latents(self, drawn: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """Clean and masked latents (N, 4, h, w) and the mask (N, 1, h, w), float32."""


def make_accelerator(device: str, fsdp: bool = False) -> Accelerator:
    """Accelerate's engine for ``auto``, ``cpu`` or ``cuda``, in one process or as the launcher says.

    Raises:
        MachineError: CUDA was asked for and is not there. UsageError: a launcher asks for what is not supported, or
            ``fsdp`` or the launcher for shards in one process.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise MachineError("PyTorch finds no CUDA GPU here: use --device cpu, or see `moebius-edge doctor`")
    with request_hidden():
        accelerator = Accelerator(
            cpu=device == "cpu",
            mixed_precision="no",
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],  # batch norms are averaged by us
        )
    kind = str(accelerator.distributed_type.value)
    if kind not in ("NO", "MULTI_CPU", "MULTI_GPU"):
        raise UsageError(f"the launcher asks for {kind}, which is not supported: launch with --multi_gpu or --use_fsdp")
    if (fsdp or launcher_asks()) and accelerator.num_processes == 1:
        raise UsageError(
            "FSDP shards a network over processes, and there is one: leave it out, or start several, such as "
            "torchrun --nproc-per-node 4 -m moebius_edge train --fsdp ..."
        )
    return accelerator


def mean_over_processes(accelerator: Accelerator, value: Tensor) -> Tensor:
    """``value`` itself where there is one process."""
    if accelerator.num_processes == 1:
        return value
    mean: Tensor = accelerator.reduce(value.clone(), "mean")
    return mean


class Trainer:
    """Trains ``network`` on ``objective``; ``average``, of the same shape, follows it slowly and is the result.

    With ``options.fsdp`` or such a launcher both are sharded, in place: ``whole_average`` is for use.
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
        self.micro_batch, self.micro_batches = self._divide()
        if accelerator.num_processes > 1 and self.device.type == "cuda":
            network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
        spread_momentum(network, self.micro_batches)
        self.network = network
        self.sharded = options.fsdp or launcher_asks()
        self.average = average.to("meta" if self.sharded else self.device).requires_grad_(False).eval()
        if self.sharded:
            self._shape = copy.deepcopy(average)
            shard(network, self.device)
            self.model = network
            self.average.load_state_dict({n: t.clone() for n, t in network.state_dict().items()}, assign=True)
        else:
            self.model = accelerator.prepare_model(network)
            self.average.load_state_dict(network.state_dict())
        self.optimiser = MuonAdamW(network, recipe.optimiser.learning_rate, recipe.optimiser.weight_decay)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=recipe.optimiser.precision == "fp16")
        self.noising = Noising(self.device)
        self.mean = partial(mean_over_processes, accelerator)
        self.done = 0

    def _divide(self) -> tuple[int, int]:
        batch, processes = self.recipe.optimiser.batch, self.accelerator.num_processes
        micro = self.options.micro_batch or batch // processes
        if micro == 0 or batch % (micro * processes):
            raise UsageError(
                f"optimiser.batch {batch} does not divide into {processes} processes of micro-batches of {micro}: "
                f"use a batch that is a multiple of {max(micro, 1) * processes}"
            )
        return micro, batch // (micro * processes)

    def draw(self, number: int, seed: int | None = None) -> tuple[Any, ...]:
        """Sample ``number`` with its noise, timestep and branch."""
        rng = np.random.default_rng([self.recipe.seed if seed is None else seed, number])
        drawn = self.source.draw(number, rng)
        side, batch = self.recipe.student.latent_size, self.recipe.optimiser.batch
        return (*drawn, *draw_noise(rng, (4, side, side), number % batch, batch, self.recipe.noise))

    def batch(self, drawn: tuple[np.ndarray, ...]) -> Batch:
        """Samples as ``draw`` made them, stacked, on the device and noised."""
        *sample, noise, timestep, unconditional = (torch.from_numpy(a).to(self.device) for a in drawn)
        return self.noising(*self.source.latents(tuple(sample)), noise, timestep, unconditional)

    def batches(self, first_step: int) -> Generator[tuple[np.ndarray, ...], None, None]:
        """This process's micro-batches from ``first_step`` on, without end."""
        size, here = self.recipe.optimiser.batch, self.accelerator.process_index
        start = first_step * size + here * self.micro_batch
        stride = self.micro_batch * self.accelerator.num_processes
        with closing(iter(NumberedLoader(self.draw, self.micro_batch, start, self.options.workers, stride))) as batches:
            yield from batches

    def step(self, micro_batches: list[tuple[np.ndarray, ...]]) -> dict[str, float]:
        """One optimiser step; its losses, weights, gradient norm and learning rate, averaged over the processes.

        Raises BundleError when a loss is not finite, and writes the step's diagnostics beside the checkpoints.
        """
        recipe = self.recipe.optimiser
        set_training(self.network, recipe.batch_norm == "running")
        torch.manual_seed(self.recipe.seed * 1_000_003 + self.done)  # for perceptual distances that augment
        rate = recipe.learning_rate * min(1.0, (self.done + 1) / max(recipe.warmup, 1))
        rate *= cosine(self.done / recipe.steps, recipe.final_rate)
        self.optimiser.set_learning_rate(rate)
        scale = self.scaler.get_scale()
        sums: Figures = {}
        for number, drawn in enumerate(micro_batches, start=1):
            batch = self.batch(drawn)
            # In shards the gradients of micro-batches are added up in shards: else each process held them whole.
            together = self.sharded or number == len(micro_batches)
            with nullcontext() if together else self.accelerator.no_sync(self.model):
                total, figures = self.objective(self.model, batch, scale)
                if not self._overflowed(figures, scale):
                    self._check(total, figures, batch)
                self.scaler.scale(total / len(micro_batches)).backward()
            for name, value in {"loss": total.detach(), **figures}.items():
                sums[name] = sums.get(name, torch.zeros((), device=self.device)) + value.float() / len(micro_batches)
        self.scaler.unscale_(self.optimiser)  # type: ignore[arg-type]  # it reads the parameter groups alone
        norm = whole(nn.utils.clip_grad_norm_(self.network.parameters(), recipe.max_grad_norm))
        if not self.scaler.is_enabled():  # a scaler skips such a step and lowers its scale
            self._check(norm, {"gradient_norm": norm.detach()}, batch)
        self.scaler.step(self.optimiser)  # type: ignore[arg-type]
        self.scaler.update()
        self.optimiser.zero_grad()
        self.done += 1
        update_average(self.average, self.network, min(recipe.ema_decay, self.done / (self.done + 10)))
        names = sorted(sums)
        values = self.mean(torch.stack([sums[name] for name in names])).tolist()
        told = dict(zip(names, values, strict=True)) | {"learning_rate": rate, "gradient_norm": float(norm)}
        return {name: value for name, value in told.items() if math.isfinite(value)}  # but for a skipped step all are

    def _overflowed(self, figures: Figures, scale: float) -> bool:
        """Whether it is the loss scale of fp16 that takes the adaptive weights' gradients out of range.

        The total is NaN then, and so are its gradients: the scaler skips the step and lowers its scale.
        """
        weights = [v for name, v in figures.items() if name.startswith("w_")]
        losses = [v for name, v in figures.items() if not name.startswith("w_")]
        finite = [all(bool(torch.isfinite(v)) for v in values) for values in (losses, weights)]
        return self.scaler.is_enabled() and scale >= 1 and finite == [True, False]

    def _check(self, value: Tensor, figures: Figures, batch: Batch) -> None:
        if torch.isfinite(value):
            return
        diagnostics = {
            "step": self.done,
            "first_sample": self.done * self.recipe.optimiser.batch,
            "process": self.accelerator.process_index,
            "figures": {name: str(v.item()) for name, v in figures.items()},  # JSON has no NaN
            "timesteps": batch.timestep.tolist(),
            "clean_is_finite": batch.clean.isfinite().flatten(1).all(1).tolist(),
            "weights_are_finite": all(bool(local(p).isfinite().all()) for p in self.network.parameters()),
        }
        path = self.output / f"diagnostics-step-{self.done}.json"
        atomic_save(diagnostics, path)
        bad = ", ".join(n for n, v in figures.items() if not torch.isfinite(v)) or "total"
        raise BundleError(
            f"the loss is {value.item()} at step {self.done} ({bad}; {path} says more): lower optimiser.learning_rate; "
            "the last checkpoint is kept, and --resume starts from it"
        )

    def whole_average(self) -> nn.Module:
        """``average``, gathered if it is sharded: every process has to call it, and has it whole."""
        if not self.sharded:
            return self.average
        average = copy.deepcopy(self._shape)
        average.load_state_dict(whole_state(self.average.state_dict()), assign=True)
        return average.to(self.device)

    def settle_batch_norms(self, batches: int = _SETTLE_BATCHES) -> None:
        """Measures the batch norms' statistics anew with the averaged weights; every process does the same.

        On at most as many batches as it was trained on, and not where the stored statistics were used as they are. The
        end of a training: ``average`` is whole from here on.
        """
        self.average = self.whole_average()
        if self.recipe.optimiser.batch_norm == "batch":
            settle(self.average, self.passes(self.average, min(batches, self.recipe.optimiser.steps)))

    def passes(self, network: nn.Module, batches: int) -> Iterator[Callable[[], object]]:
        """Forward passes of ``network`` on whole batches that no step trains on, the same in every process."""
        prompts = self.recipe.student.num_prompts
        loader = Loader(self._settling, self.recipe.optimiser.batch, self.recipe.seed + 1)
        with closing(iter(loader)) as drawn:
            for arrays in islice(drawn, batches):
                batch = self.batch(arrays)

                def forward(batch: Batch = batch) -> None:
                    with autocast(self.device, self.recipe.optimiser.precision):
                        network(batch.sample, batch.timestep, prompt_ids(prompts, batch.unconditional))

                yield forward

    def _settling(self, rng: np.random.Generator) -> tuple[Any, ...]:
        return self.draw(int(rng.integers(1 << 31)), self.recipe.seed + 1)

    def save(self) -> None:
        """Writes the checkpoint that ``resume`` reads; the batch norms' statistics become the processes' mean.

        Its tensors are whole, so that it resumes on any number of processes, with shards or without.
        """
        if self.accelerator.num_processes > 1:
            average_statistics(self.network, self.mean)
            average_statistics(self.average, self.mean)
        parts = {
            "network": self.network.state_dict(),
            "average": self.average.state_dict(),
            "optimiser": self.optimiser.state_dict(),
        }
        main = self.accelerator.is_main_process
        parts = whole_state(parts, keep=main)
        if main:
            save_checkpoint(
                self.output,
                asdict(self.recipe),
                self.done,
                self.options.keep,
                **parts,
                scaler=self.scaler.state_dict(),
            )
        self.accelerator.wait_for_everyone()

    def resume(self) -> bool:
        """Continues from the newest checkpoint if there is one, exactly; says whether there was.

        Raises as ``loop.load_state``: UsageError if it is of another recipe, BundleError if it is damaged.
        """
        where = "cpu" if self.sharded else str(self.device)  # whole, it need not fit the GPU
        state = load_newest(self.output, asdict(self.recipe), where)
        if state is None:
            return False
        load_whole(self.network, state["network"])
        load_whole(self.average, state["average"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.scaler.load_state_dict(state["scaler"])
        self.done = state["step"]
        return True

    def run(self) -> Generator[dict[str, float], None, None]:
        """Trains to the end, saving on the way; yields each step's figures, with its number and images a second."""
        started, first, steps = time.monotonic(), self.done, self.recipe.optimiser.steps
        with closing(self.batches(first)) as batches:
            while self.done < steps:
                figures = self.step(list(islice(batches, self.micro_batches)))
                if self.done % self.options.save_every == 0 or self.done == steps:
                    self.save()
                speed = (self.done - first) * self.recipe.optimiser.batch / (time.monotonic() - started)
                yield {"step": self.done, **figures, "images_per_s": speed}
