"""Train the demonstration model's denoiser on a GPU, in as many minutes as there are.

    python -m examples.train_tiny.gpu --vae runs/sharpened/vae --photos PHOTOS --output runs/denoiser --minutes 7

It is ``denoiser.py`` for one CUDA GPU: the same samples, objective, optimiser and result. Processes draw the samples, a
thread encodes them, and the last ``POOL`` of them stay on the GPU; a step draws from these, so a sample is used several
times, each with its own noise and timestep. A whole step is one CUDA graph: launching its thousands of kernels one by
one would take longer than running them. The learning rate follows the clock, so that the training ends when it should,
and it changes in ``LEVELS`` steps, for a recorded graph has its value in it. Nothing is resumed.
"""

from __future__ import annotations

import argparse
import json
import math
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from functools import partial
from itertools import chain, count
from typing import Any

import cv2
import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from moebius_edge.export.source import open_vae
from moebius_edge.model import build_student
from moebius_edge.spec import LATENT_DOWNSCALE
from moebius_edge.training.latents import encode_batch
from moebius_edge.training.loop import draw_batches, update_average
from moebius_edge.training.losses import autocast
from moebius_edge.training.networks import measure_statistics
from moebius_edge.training.noising import Batch, Noising, prompt_ids
from moebius_edge.training.optimiser import MuonAdamW

from .data import NETWORK_SIDE
from .denoiser import VALIDATION, HoleTask, parser_of, recipe_of, settle_latents, starting_student, write_student
from .objects import BranchSamples
from .training import open_data

POOL = 32768  # encoded samples on the GPU, 66 kB each
GROUP = 64  # samples that are encoded together
LEVELS = 40  # values that the learning rate takes
Encoded = tuple[Tensor, Tensor, Tensor, Tensor]


class Pool:
    """The newest ``POOL`` encoded samples; latents in half precision. ``filled`` is a tensor, so graphs can read it."""

    def __init__(self, channels: int, side: int, device: torch.device) -> None:
        half = {"device": device, "dtype": torch.float16}
        self.clean, self.masked = (torch.zeros(POOL, channels, side, side, **half) for _ in range(2))
        self.mask = torch.zeros(POOL, 1, side, side, **half)
        self.branch = torch.zeros(POOL, device=device, dtype=torch.long)
        self.filled = torch.ones((), device=device)
        self.drawn = 0

    def add(self, encoded: Encoded) -> None:
        place = self.drawn % POOL
        for held, new in zip((self.clean, self.masked, self.mask, self.branch), encoded, strict=True):
            held[place : place + GROUP] = new.to(held.dtype)
        self.drawn += GROUP
        self.filled.fill_(float(min(self.drawn, POOL)))

    def sample(self, number: int) -> Encoded:
        """``number`` samples at random, latents in float32."""
        chosen = (torch.rand(number, device=self.filled.device) * self.filled).long()
        return self.clean[chosen].float(), self.masked[chosen].float(), self.mask[chosen].float(), self.branch[chosen]


class Encoder(threading.Thread):
    """Encodes drawn samples on a stream of its own, ahead of the training; ``take`` returns what is ready."""

    def __init__(self, vae: AutoencoderKL, samples: BranchSamples, workers: int, device: torch.device) -> None:
        super().__init__(daemon=True)
        self.vae, self.samples, self.device = vae, samples, device
        self.ready: queue.Queue[Any] = queue.Queue(4)
        self.batches = draw_batches(self.draw, (range(n, n + GROUP) for n in count(0, GROUP)), workers)
        self.stopped = False
        self.first = next(self.batches)  # starts the processes here, before the process has used the GPU

    def draw(self, number: int) -> tuple[Any, ...]:
        picture, mask, branch = self.samples(number)
        return picture, mask[None], np.int64(branch)

    def run(self) -> None:
        self.vae.to(self.device)
        gpu = self.device.type == "cuda"
        stream = torch.cuda.Stream() if gpu else None
        try:
            with closing(self.batches), torch.cuda.stream(stream):
                for pictures, masks, branches in chain([self.first], self.batches):
                    if self.stopped:
                        break
                    clean, masked, mask = encode_batch(self.vae, pictures, masks)
                    encoded = clean, masked[:, 0], mask, torch.from_numpy(branches).to(self.device)
                    event = torch.cuda.Event() if gpu else None
                    if event:
                        event.record(stream)
                    self.ready.put((encoded, event))
        except Exception as error:
            self.ready.put(error)

    def stop(self) -> None:
        """End the thread and its processes."""
        self.stopped = True
        while self.is_alive():
            with suppress(queue.Empty):
                self.ready.get(timeout=0.1)

    def take(self, block: bool = False) -> Iterator[Encoded]:
        """The groups that are ready; with ``block`` at least one. Raises what ended the thread."""
        while block or not self.ready.empty():
            item = self.ready.get(timeout=300)
            if isinstance(item, Exception):
                raise item
            encoded, event = item
            if event:
                stream = torch.cuda.current_stream()
                stream.wait_event(event)
                for tensor in encoded:
                    tensor.record_stream(stream)
            yield encoded
            block = False


class Step:
    """One step of the training as a CUDA graph, recorded anew where the learning rate changes."""

    def __init__(self, pool: Pool, options: argparse.Namespace, channels: int, device: torch.device) -> None:
        recipe = self.recipe = recipe_of(options, channels)
        self.pool, self.batch_size = pool, options.batch
        self.network = starting_student(recipe, options.weights).to(device).train()
        self.average = build_student(recipe.student).to(device).requires_grad_(False).eval()
        self.average.load_state_dict(self.network.state_dict())
        self.model = torch.compile(self.network) if options.compile else self.network
        of = recipe.optimiser
        self.optimiser = MuonAdamW(self.network, of.learning_rate, of.weight_decay, of.decay, of.muon, of.betas)
        for group in self.optimiser._adamw.param_groups:
            group["capturable"] = device.type == "cuda"  # its step count then lies on the GPU
        self.objective = HoleTask(recipe.losses, recipe.student.num_prompts, of.precision)
        self.noising = Noising(device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.figures: dict[str, Tensor] = {}

    def batch(self) -> Batch:
        """Samples of the pool with noise; the timesteps are spread as in ``draw_noise``."""
        clean, masked, mask, branch = self.pool.sample(self.batch_size)
        place = torch.arange(len(clean), device=clean.device)
        place = (place + torch.rand(len(clean), device=clean.device)) / len(clean)
        noise = torch.randn_like(clean)
        noise = noise + self.recipe.noise.offset * torch.randn_like(clean[:, :, :1, :1])
        timestep = (place * len(self.noising.alpha_bars)).long().clamp(max=len(self.noising.alpha_bars) - 1)
        return self.noising(clean, masked, mask, noise, timestep, branch)

    def __call__(self) -> None:
        """Run it without a graph."""
        total, figures = self.objective(self.model, self.batch())
        total.backward()
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), self.recipe.optimiser.max_grad_norm)
        self.optimiser.step()
        self.optimiser.zero_grad()
        with torch.no_grad():
            update_average(self.average, self.network, self.recipe.optimiser.ema_decay)
        self.figures = {"loss": total.detach(), **figures, "gradient_norm": norm.detach()}

    def record(self, learning_rate: float) -> None:
        """Record the step with this learning rate; ``replay`` runs it."""
        self.optimiser.set_learning_rate(learning_rate)
        if self.pool.filled.device.type == "cpu":
            return
        if self.graph is None:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):
                    self()
            torch.cuda.current_stream().wait_stream(side)
        self.graph = None
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self()
        self.graph = graph

    def replay(self) -> None:
        if self.graph is None:
            self()
        else:
            self.graph.replay()


def learning_rate_share(progress: float, warmup: float = 0.03, final: float = 0.01) -> float:
    """Of the highest learning rate at a share ``progress`` of the time: a rise, then half a cosine down."""
    rise = min(1.0, (progress + 1 / LEVELS) / warmup) if progress < warmup else 1.0
    return rise * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress)))


def train(step: Step, encoder: Encoder, options: argparse.Namespace, save: Callable[[], None]) -> int:
    """Train for ``options.minutes``; the number of steps. Prints figures, and saves, every minute."""
    pool, begun, done, level, printed = step.pool, time.monotonic(), 0, -1, 0
    while (progress := (time.monotonic() - begun) / (60 * options.minutes)) < 1:
        for encoded in encoder.take():
            pool.add(encoded)
        if int(progress * LEVELS) > level:
            level = int(progress * LEVELS)
            step.record(options.learning_rate * learning_rate_share(level / LEVELS))
        for _ in range(options.burst):
            step.replay()
        done += options.burst
        if not math.isfinite(float(step.figures["loss"])):
            raise RuntimeError(f"the loss is not finite at step {done}: lower --learning-rate")
        if int(progress * options.minutes * 6) > printed:
            printed = int(progress * options.minutes * 6)
            figures = {name: round(float(value), 4) for name, value in step.figures.items()}
            elapsed = round(time.monotonic() - begun, 1)
            print(json.dumps({"s": elapsed, "step": done, "drawn": pool.drawn, **figures}), flush=True)
            if printed % 6 == 0:
                save()
    return done


def settle(step: Step, batches: int = 60) -> None:
    """Measure the statistics of the average's batch norms anew."""
    prompts = step.recipe.student.num_prompts

    def forward() -> None:
        batch = step.batch()
        with torch.no_grad(), autocast(batch.sample.device, step.recipe.optimiser.precision):
            step.average(batch.sample, batch.timestep, prompt_ids(prompts, batch.unconditional))

    measure_statistics(step.average, [forward] * batches)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = parser_of(__doc__, batch=128, workers=12)
    parser.add_argument("--compile", action="store_true", help="run the denoiser through torch.compile")
    parser.set_defaults(channels=[64, 128, 256])
    parser.add_argument("--minutes", type=float, default=7)
    parser.add_argument("--prefill", type=int, default=2048, help="encoded samples before the first step")
    parser.add_argument("--burst", type=int, default=20, help="steps between two looks at the clock and the loss")
    options = parser.parse_args(arguments)
    options.steps = 1  # the recipe wants a number; the clock decides
    cv2.setNumThreads(0)
    torch.backends.cudnn.benchmark = True
    options.output.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    mixture, _ = open_data(options, VALIDATION, options.seed)
    vae = open_vae(options.vae)
    settle_latents(vae, mixture)
    encoder = Encoder(vae, BranchSamples(mixture), options.workers, device)
    encoder.start()
    try:
        print(json.dumps(trained(vae, encoder, options, device)))
    finally:
        encoder.stop()


def trained(vae: AutoencoderKL, encoder: Encoder, options: argparse.Namespace, device: torch.device) -> dict[str, int]:
    """Train and write the student; how many steps, samples and drawn samples it took."""
    channels = vae.config["latent_channels"]
    step = Step(Pool(channels, NETWORK_SIDE // LATENT_DOWNSCALE, device), options, channels, device)
    while step.pool.drawn < options.prefill:
        for encoded in encoder.take(block=True):
            step.pool.add(encoded)
    save = partial(write_student, step.average, step.recipe, vae, options.output)
    done = train(step, encoder, options, save)
    settle(step)
    save()
    return {"steps": done, "samples": done * options.batch, "drawn": step.pool.drawn}


if __name__ == "__main__":
    main(sys.argv[1:])
