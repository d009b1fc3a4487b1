"""The networks that a stage trains: from a checkpoint, how fresh ones start, and their batch norms.

The student has some sixty batch norms, and inference uses their running statistics, so those must stay right under
accumulation, several processes and averaging.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..documents import read_document
from ..errors import UsageError
from ..model import Student, Teacher, build_student, build_teacher, load_checkpoint
from ..model.config import StudentConfig, TeacherConfig


def load_teacher(path: Path, device: torch.device | str = "cpu") -> Teacher:
    """The teacher in a checkpoint file, frozen, in float32; ``teacher.json`` beside it has its shape, if not published.

    Raises as ``model.load_checkpoint``, and UsageError where ``teacher.json`` describes no teacher.
    """
    file, remedy = path.with_name("teacher.json"), "mend it, or remove it for the published shape"
    config = read_document(file, TeacherConfig, UsageError, remedy) if file.exists() else TeacherConfig()
    teacher = build_teacher(config)
    load_checkpoint(teacher, path)
    return teacher.to(device).float().eval().requires_grad_(False)


def load_student(path: Path, config: StudentConfig) -> Student:
    """The student in a checkpoint file, in float32. Raises as ``model.load_checkpoint``."""
    student = build_student(config)
    load_checkpoint(student, path)
    return student.float()


@torch.no_grad()
def identity_start(network: nn.Module) -> None:
    """Start every transformer block as the identity, both branches equal, and ``conv_in`` so that it loses nothing.

    The noisy latent passes a student's ``conv_in`` through one 3x3 kernel a channel and a ReLU. A random kernel has
    zeros in its spectrum, and what falls there cannot be recovered: the early steps, which need the noise to a percent,
    end in checkerboards. So the kernels start as the identity, and the batch norm's bias keeps the ReLU open.
    """
    for name, parameter in network.named_parameters():
        if name.endswith(("proj_out.weight", "proj_out.bias")):
            parameter.zero_()
        elif name.endswith("conv_in.conv_dw.weight"):
            parameter.zero_()
            parameter[..., 1, 1] = 1.0
        elif name.endswith("conv_in.bn1.bias"):
            parameter.fill_(3.0)
        elif name == "embedding_layer.weight":
            parameter[len(parameter) // 2 :] = parameter[: len(parameter) // 2]


@torch.no_grad()
def upstream_start(network: nn.Module) -> None:
    """Start as upstream: linear layers by Glorot and Bengio's uniform rule without biases, tables of deviation 1."""
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for name, parameter in network.named_parameters():
        if name.endswith("rel_pos_emb"):
            nn.init.normal_(parameter)


def batch_norms(module: nn.Module) -> list[_BatchNorm]:
    return [m for m in module.modules() if isinstance(m, _BatchNorm)]


def set_training(module: nn.Module, running: bool) -> None:
    """Training mode; with ``running`` the batch norms use their stored statistics, and do not change them."""
    module.train()
    for norm in batch_norms(module):
        norm.train(not running)


def spread_momentum(module: nn.Module, micro_batches: int) -> None:
    """Make ``micro_batches`` updates move the statistics as far as one: 1 - (1 - m)^(1/n) each."""
    for norm in batch_norms(module):
        norm.momentum = 1 - (1 - (0.1 if norm.momentum is None else norm.momentum)) ** (1 / micro_batches)


@torch.no_grad()
def average_statistics(module: nn.Module, mean: Callable[[Tensor], Tensor]) -> None:
    """Set the running statistics to their ``mean`` over the processes, each of which saw its own samples."""
    for norm in batch_norms(module):
        for statistic in (norm.running_mean, norm.running_var):
            if statistic is not None:
                statistic.copy_(mean(statistic))


@torch.no_grad()
def measure_statistics(module: nn.Module, passes: Iterable[Callable[[], object]]) -> None:
    """Measure the statistics anew, as a plain mean over ``passes`` (each a forward pass), and leave them in use.

    Averaged weights have no statistics of their own: those of the last weights do not fit them.
    """
    norms = batch_norms(module)
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over all batches
    module.train()
    for forward in passes:
        forward()
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    module.eval()
