"""What a training shows: scalars that TensorBoard reads back, and grids of fills."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_toys import STUDENT, small_vae

from moebius_edge.errors import MachineError
from moebius_edge.model import build_student
from moebius_edge.training.monitor import Monitor, SampleGrid

torch.set_num_threads(1)
SPEED = "images_per_s"


def scalars(output: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(output / "tensorboard"))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_scalars_are_means_since_the_last_in_groups(tmp_path: Path) -> None:
    with Monitor(tmp_path, 0) as monitor:
        for step in (1, 2):
            monitor.add({"step": step, "loss": 2.0 * step, "w_out": 1.0, "learning_rate": 0.1 * step, SPEED: 6 / step})
            monitor.write(step)
        assert monitor.means() == {"step": 2, "loss": 3.0, "w_out": 1.0, "learning_rate": 0.2, SPEED: 4.0}
        assert monitor.line() == "loss 3  images_per_s 4"  # two batches of 6 in 1 and in 2 s
        for loss in (1.0, 3.0):
            monitor.add({"loss": loss, SPEED: 2.0})
        monitor.write(4)
    found = scalars(tmp_path)
    assert found["losses/loss"] == [(1, 2.0), (2, 4.0), (4, 2.0)] and found["run/images_per_s"][-1] == (4, 2.0)
    assert found["weights/w_out"][-1] == (2, 1.0)
    assert found["run/learning_rate"][-1] == (2, pytest.approx(0.2))  # as it is, no mean


def test_a_resumed_run_purges_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    for first, last, loss in ((0, 5, 1.0), (3, 5, 2.0)):
        with Monitor(tmp_path, first) as monitor:
            for step in range(first + 1, last + 1):
                monitor.add({"loss": loss})
                monitor.write(step)
    assert scalars(tmp_path)["losses/loss"] == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0), (5, 2.0)]


def test_a_grid_shows_picture_hole_and_fill(tmp_path: Path) -> None:
    vae = small_vae()
    mask = torch.zeros(2, 1, 8, 8)
    mask[:, :, 2:4, 2:4] = 1
    clean = torch.randn(2, 4, 8, 8)
    grid = SampleGrid(vae, clean, clean * (1 - mask), mask, steps=2)
    student = build_student(STUDENT)
    drawn = grid.draw(student)
    assert drawn.shape == (128, 192, 3) and drawn.dtype == np.uint8
    picture, hole, fill = np.split(drawn, 3, axis=1)
    inside = np.zeros((64, 64), bool)
    inside[16:32, 16:32] = True
    both = np.concatenate([inside, inside])
    assert (hole[both] == 255).all() and np.array_equal(hole[~both], picture[~both])
    assert np.array_equal(fill[~both], picture[~both]) and not np.array_equal(fill[both], picture[both])
    assert np.array_equal(grid.draw(student), drawn)  # the same noise every time
    with Monitor(tmp_path, 0) as monitor:
        monitor.picture(7, drawn)
    read = cv2.imread(str(tmp_path / "samples" / "step-000000007.png"))
    assert read is not None and np.array_equal(read[..., ::-1], drawn)


def test_a_missing_tensorboard_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(MachineError, match=r'training needs tensorboard .*: run `pip install "moebius-edge\[train\]"'):
        Monitor(tmp_path, 0)
