"""Samples drawn in processes, saved states, schedules and averages that the training loops share."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moebius_edge.errors import BundleError, MachineError, UsageError
from moebius_edge.training.loop import (
    atomic_save,
    draw_batches,
    load_state,
    save_state,
    update_average,
)

torch.set_num_threads(1)
RECIPE = {"steps": 3, "channels": (32, 64)}


def draw(number: int) -> tuple[Any, ...]:
    return np.random.default_rng([5, number]).random(3), np.float32(number)


def endless(batch: int, start: int = 0) -> Any:
    return (range(n, n + batch) for n in count(start, batch))


@pytest.mark.parametrize("workers", [1, 3])
def test_batches_hold_the_samples_of_their_numbers_in_order(workers: int) -> None:
    with closing(draw_batches(draw, endless(2, start=4), workers)) as batches:
        samples, numbers = (np.concatenate(column) for column in zip(*islice(batches, 7), strict=True))
    assert np.array_equal(samples, [draw(number)[0] for number in range(4, 18)])
    assert numbers.tolist() == list(range(4, 18)) and numbers.dtype == np.float32
    assert not multiprocessing.active_children()
    batches = draw_batches(draw, [range(3), range(9, 11)], workers)
    assert [numbers.tolist() for _, numbers in batches] == [[0, 1, 2], [9, 10]]


@pytest.mark.parametrize("workers", [1, 3])
def test_a_killed_process_is_an_error_and_no_hang(workers: int) -> None:
    def fatal(number: int) -> tuple[np.ndarray]:
        if number == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return (np.zeros(1 << 16),)

    with (
        closing(draw_batches(fatal, endless(1), workers)) as batches,
        pytest.raises(MachineError, match=r"draws training pictures was ended, .*: close other programs and run the"),
    ):
        list(islice(batches, 50))


def test_errors_in_draw_arrive_as_they_were_raised() -> None:
    def faulty(number: int) -> tuple[np.ndarray]:
        if number:
            raise UsageError("no picture can be read")
        raise ZeroDivisionError("by this draw")

    with closing(draw_batches(faulty, endless(1, start=1))) as batches, pytest.raises(UsageError, match="^no picture"):
        next(batches)
    with (
        closing(draw_batches(faulty, endless(1))) as batches,
        pytest.raises(ZeroDivisionError, match=r"(?s)in faulty.*by this draw"),
    ):
        next(batches)


def test_the_process_outlives_neither_its_parent_nor_ends_by_ctrl_c(tmp_path: Path) -> None:
    code = f"""
import multiprocessing, os, signal
import numpy as np
from itertools import count
from moebius_edge.training.loop import draw_batches
batches = draw_batches(lambda number: (np.zeros(1 << 16),), ([n] for n in count()), 2)
next(batches)
worker = multiprocessing.active_children()[0]
os.kill(worker.pid, signal.SIGINT)
for _ in range(40):
    next(batches)
open({str(tmp_path / "pid")!r}, "w").write(str(worker.pid))
os.kill(os.getpid(), signal.SIGKILL)
"""
    command = [sys.executable, "-W", "ignore", "-c", code]  # PyTorch warns of more processes than cores
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (-9, "")
    pid = int((tmp_path / "pid").read_text())
    for _ in range(1000):
        stat = Path(f"/proc/{pid}/stat")
        if not stat.exists() or stat.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)
    pytest.fail("the loading process went on without its parent")


@pytest.mark.parametrize("name", ["x.json", "x.pt"])
def test_a_full_disk_keeps_the_old_file(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    atomic_save({"old": 1}, tmp_path / name)
    before = (tmp_path / name).read_bytes()

    def full(path: Path, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(MachineError, match=rf"cannot write .*{name}: the disk is full: free space in"):
        atomic_save({"new": 2}, tmp_path / name)
    assert (tmp_path / name).read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_a_state_comes_back_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    assert load_state(path, RECIPE, "cpu") is None
    save_state(path, RECIPE, model={"w": torch.ones(2)}, done=7)
    state = load_state(path, {"steps": 3, "channels": [32, 64]}, "cpu")  # a list is as good as a tuple
    assert state is not None and set(state) == {"model", "done"}
    assert state["done"] == 7 and torch.equal(state["model"]["w"], torch.ones(2))
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(UsageError, match=r"state.pt was made by another recipe \(steps is 3 there, 4 here\): rem"):
        load_state(path, {**RECIPE, "steps": 4}, "cpu")


@pytest.mark.parametrize("damage", ["truncated", "text", "empty", "no recipe", "no state"])
def test_a_damaged_state_is_refused(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    save_state(path, RECIPE, done=7)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "text":
        path.write_text("no torch file")
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        torch.save({"done": 7} if damage == "no recipe" else [1], path)
    with pytest.raises(BundleError, match=r"state.pt is damaged: remove it, and the same command starts"):
        load_state(path, RECIPE, "cpu")


def test_the_average_moves_by_its_decay_and_copies_buffers() -> None:
    slow, fast = torch.nn.BatchNorm1d(1), torch.nn.BatchNorm1d(1)
    torch.nn.init.constant_(slow.weight, 2.0)
    torch.nn.init.constant_(fast.weight, 4.0)
    fast.running_mean.fill_(9.0)
    fast.num_batches_tracked.fill_(3)
    update_average(slow, fast, 0.75)
    assert slow.weight.item() == 2.5 and fast.weight.item() == 4.0
    assert slow.running_mean.item() == 9.0 and slow.num_batches_tracked.item() == 3
