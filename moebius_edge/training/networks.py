"""The networks a stage trains: built fresh or from a checkpoint, and how fresh ones start."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from ..errors import BundleError, MachineError, UsageError
from ..model import Student, Teacher, build_student, build_teacher, load_checkpoint
from ..model.config import StudentConfig, TeacherConfig

_Config = TypeVar("_Config", StudentConfig, TeacherConfig)


def load_teacher(path: Path, device: torch.device | str = "cpu") -> Teacher:
    """The teacher in a checkpoint file, frozen, in float32; its shape is ``teacher.json``'s beside it, else as
    published. Raises as ``model.load_checkpoint``."""
    teacher = build_teacher(config_beside(path, "teacher.json", TeacherConfig()))
    load_checkpoint(teacher, path)
    return teacher.to(device).float().eval().requires_grad_(False)


def load_student(path: Path, config: StudentConfig) -> Student:
    """The student in a checkpoint file, in float32. Raises as ``model.load_checkpoint``."""
    student = build_student(config)
    load_checkpoint(student, path)
    return student.float()


def config_beside(path: Path, name: str, default: _Config) -> _Config:
    """The configuration in ``name`` beside a checkpoint, or ``default``. Raises UsageError if it is none."""
    file = path.with_name(name)
    try:
        values = json.loads(file.read_text("utf-8"))
        return type(default).from_dict(values)
    except FileNotFoundError:
        return default
    except OSError as error:
        raise MachineError(f"{file} cannot be read: {error.strerror}: run `chmod u+r {file}`") from error
    except (ValueError, TypeError, UsageError, BundleError) as error:
        raise UsageError(f"{file} describes no network: {error}") from error


def identity_start(network: nn.Module) -> None:
    """Starts every transformer block as the identity, both branches equal, and a student's ``conv_in`` as one that
    loses nothing.

    The noisy latent passes ``conv_in`` through one 3x3 kernel a channel and a ReLU. A random kernel has zeros in
    its spectrum, and what falls there cannot be recovered: the early steps, which need the noise to a percent,
    end in checkerboards. So the kernels start as the identity, and the batch norm's bias keeps the ReLU open.
    """
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith("proj_out.weight") or name.endswith("proj_out.bias"):
                parameter.zero_()
            elif name.endswith("conv_in.conv_dw.weight"):
                parameter.zero_()
                parameter[..., 1, 1] = 1.0
            elif name.endswith("conv_in.bn1.bias"):
                parameter.fill_(3.0)
            elif name == "embedding_layer.weight":
                parameter[len(parameter) // 2 :] = parameter[: len(parameter) // 2]
