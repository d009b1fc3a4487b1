"""The published networks' size, arithmetic and speed: what ``moebius-edge profile`` shows beside the paper's Table 1.

**Multiplications** are multiply-adds of convolutions, linear layers and matrix products for one row, which is one
latent and one branch of guidance; norms, activations and sums are not counted. They are counted on meta tensors:
nothing is computed and nothing allocated. The student is the plain network, as it was trained; the teacher's gated
linear attention is counted in the chunked form that runs on a CPU.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .config import StudentConfig
from .student import build_student
from .teacher import build_teacher
from .unet import INPUT_CHANNELS

BUILDERS: dict[str, Callable[[], nn.Module]] = {"student": build_student, "teacher": build_teacher}


@dataclass(frozen=True)
class Size:
    """``parameters`` of a network, and ``multiplications`` of one row."""

    parameters: int
    multiplications: int


def measure_size(network: str) -> Size:
    """Of ``student`` or ``teacher``, as published."""
    with torch.device("meta"):
        module = BUILDERS[network]().eval()
        inputs = _inputs(rows=1)
    return Size(sum(p.numel() for p in module.parameters()), multiplications(module, inputs))


def multiplications(module: nn.Module, inputs: tuple[Any, ...], formulas: Mapping[Any, Any] | None = None) -> int:
    """Multiply-adds of ``module(*inputs)``; ``formulas`` give the FLOPs of operators that PyTorch does not know."""
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=dict(formulas or {})) as counter:
        module(*inputs)
    flops: int = counter.get_total_flops()
    return flops // 2  # PyTorch counts a multiply-add as two


def measure_step(network: str, rows: int, runs: int, threads: int, on_run: Callable[[int], None]) -> list[float]:
    """Seconds of ``runs`` calls of ``rows`` rows on the CPU in float32, after one that warms up and is not counted.

    The weights are random, which does not matter to the time. ``on_run`` is told of every call that is done.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        module, inputs = BUILDERS[network]().eval(), _inputs(rows)
        seconds = []
        with torch.inference_mode():
            for done in range(runs + 1):
                started = time.perf_counter()
                module(*inputs)
                seconds.append(time.perf_counter() - started)
                on_run(done)
        del module
    finally:
        torch.set_num_threads(before)
        gc.collect()  # the next network needs the gigabytes
    return seconds[1:]


def _inputs(rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """A sample, timesteps and prompts of the published size."""
    config = StudentConfig()
    sample = torch.randn(rows, INPUT_CHANNELS, config.latent_size, config.latent_size)
    prompts = torch.arange(rows * config.num_prompts).reshape(rows, -1) % (2 * config.num_prompts)
    return sample, torch.full((rows,), 500), prompts
