"""Student and teacher counted at their published size; their steps timed."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

from moebius_edge.model import StudentConfig, build_student, profile


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
