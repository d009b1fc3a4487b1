"""The published networks' size, arithmetic and speed: what ``moebius-edge profile`` shows beside the paper's Table 1.

**Multiplications** are multiply-adds of convolutions, linear layers and matrix products for one row, which is one
latent and one branch of guidance; norms, activations and sums are not counted. They are counted on meta tensors:
nothing is computed and nothing allocated. The student is the plain network, as it was trained; the teacher's gated
linear attention is counted in the chunked form that runs on a CPU.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..spec import sample_channels
from .config import StudentConfig
from .student import Student, build_student
from .teacher import build_teacher

BUILDERS: dict[str, Callable[[], nn.Module]] = {"student": build_student, "teacher": build_teacher}


@dataclass(frozen=True)
class Size:
    """``parameters`` of a network, and ``multiplications`` of one row."""

    parameters: int
    multiplications: int


def measure_size(network: str) -> Size:
    """The size of ``student`` or ``teacher``, as published."""
    with torch.device("meta"):
        module = BUILDERS[network]().eval()
        inputs = _inputs(rows=1)
    return Size(sum(p.numel() for p in module.parameters()), multiplications(module, inputs))


def measure_shallow() -> int:
    """Multiplications of one row of the student's finest level alone, its deep feature given: ``UNet.shallow``."""
    with torch.device("meta"):
        call, inputs = _shallow(build_student().eval(), rows=1)
    return multiplications(call, inputs)


def multiplications(module: Callable[..., Any], inputs: tuple[Any, ...]) -> int:
    """Multiply-adds of ``module(*inputs)``."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(*inputs)
    flops: int = counter.get_total_flops()
    return flops // 2  # PyTorch counts a multiply-add as two


def measure_step(
    network: str, rows: int, runs: int, threads: int, on_run: Callable[[int], None], shallow: bool = False
) -> list[float]:
    """Seconds of ``runs`` calls of ``rows`` rows on the CPU in float32, after one that warms up and is not counted.

    The weights are random, which does not matter to the time. ``on_run`` is given the number of calls that are done.
    With ``shallow`` a call computes the student's finest level alone.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        module = BUILDERS[network]().eval()
        call, inputs = _shallow(module, rows) if shallow else (module, _inputs(rows))
        seconds = []
        with torch.inference_mode():
            for done in range(runs + 1):
                started = time.perf_counter()
                call(*inputs)
                seconds.append(time.perf_counter() - started)
                on_run(done)
        del module, call
    finally:
        torch.set_num_threads(before)
        gc.collect()  # the next network needs the gigabytes
    return seconds[1:]


def _inputs(rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """A sample, timesteps and prompts of the published size."""
    config = StudentConfig()
    sample = torch.randn(rows, sample_channels(config.latent_channels), config.latent_size, config.latent_size)
    prompts = torch.arange(rows * config.num_prompts).reshape(rows, -1) % (2 * config.num_prompts)
    return sample, torch.full((rows,), 500), prompts


def _shallow(module: nn.Module, rows: int) -> tuple[Callable[..., Any], tuple[Tensor, ...]]:
    """The student's finest level, and its inputs."""
    student = cast(Student, module)
    size = student.config.latent_size
    return student.shallow, (*_inputs(rows), torch.randn(rows, student.config.deep_channels, size, size))
