"""The loading process, saved states, schedules and averages that the training loops share."""

from __future__ import annotations

import errno
import io
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from moebius_edge.errors import BundleError, MachineError, UsageError
from moebius_edge.training import loop
from moebius_edge.training.loop import (
    Loader,
    NumberedLoader,
    atomic_save,
    check_finite,
    cosine,
    load_state,
    make_folder,
    plain,
    progress_bar,
    save_state,
    update_average,
)

torch.set_num_threads(1)
RECIPE = {"steps": 3, "channels": (32, 64)}


def draw(rng: np.random.Generator) -> np.ndarray:
    return rng.random(3)


def take(loader: NumberedLoader, count: int) -> list[np.ndarray]:
    with closing(iter(loader)) as batches:
        return list(islice(batches, count))


def test_a_sample_depends_on_its_seed_and_number_alone() -> None:
    batches = take(Loader(draw, 2, seed=5), 3)
    expected = [np.random.default_rng([5, i]).random(3) for i in range(6)]
    assert np.array_equal(np.concatenate(batches), expected)
    assert np.array_equal(np.concatenate(take(Loader(draw, 3, seed=5), 2)), expected)
    assert not np.array_equal(take(Loader(draw, 2, seed=6), 1)[0], batches[0])


def test_a_resumed_loader_goes_on_where_it_stopped() -> None:
    whole = take(Loader(draw, 4, seed=1), 4)
    assert np.array_equal(take(Loader(draw, 4, seed=1, start=8), 2), whole[2:])


def test_tuples_are_stacked_by_column() -> None:
    first, second = take(Loader(lambda rng: (np.zeros(2, np.float32), rng.random()), 3, seed=0), 1)[0]
    assert first.shape == (3, 2) and first.dtype == np.float32
    assert second.tolist() == [np.random.default_rng([0, i]).random() for i in range(3)]


def test_closing_ends_the_process_even_when_it_waits() -> None:
    batches = iter(Loader(lambda rng: np.zeros(1 << 20), 1, seed=0))  # more than a pipe holds
    next(batches)
    (worker,) = multiprocessing.active_children()
    batches.close()
    assert not worker.is_alive() and not multiprocessing.active_children()


def test_a_killed_process_is_an_error_and_no_hang() -> None:
    def fatal(rng: np.random.Generator) -> np.ndarray:
        if rng.random() == np.random.default_rng([0, 2]).random():
            os.kill(os.getpid(), signal.SIGKILL)
        return np.zeros(1 << 16)

    with (
        closing(iter(Loader(fatal, 1, seed=0))) as batches,
        pytest.raises(MachineError, match=r"draws training pictures ended with code -9 .* run the same command again"),
    ):
        list(islice(batches, 10))


def test_an_error_in_draw_arrives_with_its_traceback() -> None:
    def faulty(rng: np.random.Generator) -> np.ndarray:
        raise ZeroDivisionError("by this draw")

    with (
        closing(iter(Loader(faulty, 1, seed=0))) as batches,
        pytest.raises(RuntimeError, match=r"(?s)failed in its process:.*in faulty.*ZeroDivisionError: by this draw"),
    ):
        next(batches)


def test_several_processes_draw_the_same_samples_in_the_same_order() -> None:
    expected = take(Loader(draw, 2, seed=5, start=4), 7)
    assert np.array_equal(take(Loader(draw, 2, seed=5, start=4, workers=3), 7), expected)
    batches = iter(NumberedLoader(lambda number: np.array(os.getpid()), 1, workers=3))
    assert len({int(next(batches)[0]) for _ in range(6)}) == 3 == len(multiprocessing.active_children())
    batches.close()
    assert not multiprocessing.active_children()


def test_one_of_several_processes_that_is_killed_is_an_error() -> None:
    def fatal(number: int) -> np.ndarray:
        if number == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return np.zeros(1 << 16)

    with (
        closing(iter(NumberedLoader(fatal, 1, workers=3))) as batches,
        pytest.raises(MachineError, match=r"draws training pictures ended with code -9"),
    ):
        list(islice(batches, 10))


def test_a_users_mistake_in_draw_arrives_as_it_is() -> None:
    def mistaken(rng: np.random.Generator) -> np.ndarray:
        raise UsageError("no picture can be read")

    with closing(iter(Loader(mistaken, 1, seed=0))) as batches, pytest.raises(UsageError, match="^no picture can be"):
        next(batches)


def test_loaders_of_several_trainings_take_turns() -> None:
    def numbers(start: int) -> list[list[int]]:
        batches = take(NumberedLoader(lambda number: np.array(number), 3, start, stride=6), 2)
        return [batch.tolist() for batch in batches]

    assert [numbers(0), numbers(3)] == [[[0, 1, 2], [6, 7, 8]], [[3, 4, 5], [9, 10, 11]]]


def test_samples_can_be_drawn_by_number() -> None:
    batches = take(NumberedLoader(lambda number: (np.array(number), np.array(-number)), 2, start=3), 2)
    assert [[column.tolist() for column in batch] for batch in batches] == [[[3, 4], [-3, -4]], [[5, 6], [-5, -6]]]


@pytest.mark.parametrize("workers", [1, 3])
def test_the_process_outlives_neither_its_parent_nor_ends_by_ctrl_c(workers: int, tmp_path: Path) -> None:
    code = f"""
import multiprocessing, os, signal, time
import numpy as np
from moebius_edge.training.loop import Loader
batches = iter(Loader(lambda rng: np.zeros(1 << 20), 1, seed=0, workers={workers}))
next(batches)
(worker, *others) = sorted(multiprocessing.active_children(), key=lambda process: process.pid)
os.kill(worker.pid, signal.SIGINT)
for _ in range(12):
    next(batches)
open({str(tmp_path / "pid")!r}, "w").write(str(worker.pid))
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (-9, "")
    pid = int((tmp_path / "pid").read_text())
    for _ in range(500):
        stat = Path(f"/proc/{pid}/stat")
        if not stat.exists() or stat.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)
    pytest.fail("the loading process went on without its parent")


def test_saved_files_read_back_and_leave_nothing_beside(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    atomic_save({"a": [1, 2]}, folder / "x.json")
    atomic_save({"w": torch.arange(3)}, folder / "x.pt")
    assert json.loads((folder / "x.json").read_text()) == {"a": [1, 2]}
    assert torch.equal(torch.load(folder / "x.pt", weights_only=True)["w"], torch.arange(3))
    assert sorted(p.name for p in folder.iterdir()) == ["x.json", "x.pt"]


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


def test_a_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for folder in (tmp_path / "file", tmp_path / "file" / "in"):
        with pytest.raises(UsageError, match=r"output .*file.* is, or lies in, a file: name a folder"):
            make_folder(folder)


def test_a_state_comes_back_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    assert load_state(path, RECIPE, "cpu") is None
    save_state(path, RECIPE, model={"w": torch.ones(2)}, done=7)
    state = load_state(path, {"steps": 3, "channels": [32, 64]}, "cpu")  # a list is as good as a tuple
    assert state is not None and set(state) == {"model", "done"}
    assert state["done"] == 7 and torch.equal(state["model"]["w"], torch.ones(2))


def test_a_state_of_another_recipe_is_refused(tmp_path: Path) -> None:
    save_state(tmp_path / "state.pt", RECIPE, done=7)
    with pytest.raises(UsageError, match=r"state.pt was made by another recipe: remove it or give another output"):
        load_state(tmp_path / "state.pt", {**RECIPE, "steps": 4}, "cpu")


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


def test_recipes_are_compared_as_json() -> None:
    assert plain({"a": (1, (2, 3)), "b": 0.1}) == {"a": [1, [2, 3]], "b": 0.1}


def test_only_finite_values_pass() -> None:
    check_finite(torch.tensor(3.0), "the loss", 1)
    for value in (float("nan"), float("inf")):
        with pytest.raises(BundleError, match=rf"the loss is {value} at step 9: lower the recipe's learning rate"):
            check_finite(torch.tensor(value), "the loss", 9)


def test_the_cosine_falls_from_one_to_its_floor() -> None:
    assert cosine(0, 0.1) == 1 and cosine(1, 0.1) == pytest.approx(0.1)
    assert cosine(0.5, 0.1) == pytest.approx(0.55) and cosine(0.25, 0) == pytest.approx((1 + 0.5**0.5) / 2)


def test_the_average_moves_by_its_decay_and_copies_buffers() -> None:
    slow, fast = torch.nn.BatchNorm1d(1), torch.nn.BatchNorm1d(1)
    torch.nn.init.constant_(slow.weight, 2.0)
    torch.nn.init.constant_(fast.weight, 4.0)
    fast.running_mean.fill_(9.0)
    fast.num_batches_tracked.fill_(3)
    update_average(slow, fast, 0.75)
    assert slow.weight.item() == 2.5 and fast.weight.item() == 4.0
    assert slow.running_mean.item() == 9.0 and slow.num_batches_tracked.item() == 3


def test_progress_off_a_terminal_is_every_third_line(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("denoiser", 200) as report:
        for done in (20, 40, 60, 80):
            report(done, {"step": done, "loss": 0.123456})
    assert capsys.readouterr().err.splitlines() == [
        "denoiser   10.0%  step 20  loss 0.1235",
        "denoiser   40.0%  step 80  loss 0.1235",
    ]


def test_progress_on_a_terminal_is_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    monkeypatch.setattr(loop.sys, "stderr", screen)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERM", "xterm")
    with progress_bar("decoder", 4) as report:
        report(4, {"loss": 0.5})
    assert "decoder" in screen.getvalue() and "loss 0.5" in screen.getvalue()
