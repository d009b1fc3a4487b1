"""Student and teacher counted at their published size; their steps timed."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

from moebius_edge.model import StudentConfig, TeacherConfig, build_student, build_teacher, profile
from moebius_edge.model.gla import GatedLinearAttention


@pytest.mark.parametrize(
    ("network", "parameters", "multiplications"),
    [("student", 226_041_531, 154_873_901_056), ("teacher", 862_251_708, 338_993_807_360)],
)
def test_the_published_sizes_are_exact(network: str, parameters: int, multiplications: int) -> None:
    """Of the student the convolutions and linear layers are the paper's 0.154 T; the lambda operators are the rest.

    A shallow call of it is 27.0% of a whole one: docs/profile.md has it.
    """
    assert profile.measure_size(network) == profile.Size(parameters, multiplications)
    assert network == "teacher" or profile.measure_shallow() == 41_768_349_696


def test_multiplications_counted_by_hand() -> None:
    module = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 64, 10))
    assert profile.multiplications(module, (torch.zeros(2, 4, 8, 8),)) == 2 * (6 * 64 * 4 * 9 + 384 * 10)


def test_gated_linear_attention_counts_on_meta_tensors() -> None:
    """Its chunks are counted there as where they are computed."""
    config = TeacherConfig(block_out_channels=(32, 64), num_heads=4, cross_attention_dim=48, prompt_embedding_dim=64)
    counts = []
    for device in ("cpu", "meta"):
        with torch.device(device):
            modules = build_teacher(config).modules()
            attention = next(m for m in modules if isinstance(m, GatedLinearAttention))
            counts.append(profile.multiplications(attention, (torch.zeros(2, 64, 32),)))
    projections = 2 * 64 * (2 * 32 * 16 + 3 * 32 * 32 + 32 * 16 + 16 * 16)
    assert counts[0] == counts[1] > projections


@pytest.mark.parametrize("shallow", [False, True])
def test_steps_are_timed(shallow: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    small = dataclasses.replace(StudentConfig(), block_out_channels=(32, 64), num_heads=4, layers_per_block=1)
    student, threads, done, shapes = build_student(small), torch.get_num_threads(), [], []
    name = "shallow" if shallow else "forward"
    original = getattr(student, name)

    def call(*inputs: torch.Tensor) -> Any:
        shapes.append([tuple(tensor.shape) for tensor in inputs])
        return original(*inputs)

    monkeypatch.setattr(student, name, call)
    monkeypatch.setitem(profile.BUILDERS, "student", lambda: student)
    seconds = profile.measure_step("student", 2, 2, 1, done.append, shallow=shallow)
    deep = [(2, 64, 64, 64)] if shallow else []
    assert shapes == [[(2, 9, 64, 64), (2,), (2, 10), *deep]] * 3
    assert len(seconds) == 2 and all(s > 0 for s in seconds) and done == [0, 1, 2]
    assert not student.training and torch.get_num_threads() == threads
