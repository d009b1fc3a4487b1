"""What every training loop here shares: a loading process, states that resume exactly, a progress bar."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import math
import multiprocessing
import os
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Generator, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column
from torch import nn

from ..errors import BundleError, MachineError, MoebiusError, UsageError
from ..system.files import atomic_write, utf8_path

PREFETCH = 8  # batches drawn ahead: a slow picture then holds nobody up


class _Failed(NamedTuple):
    """What the loading process sends instead of a batch when ``draw`` raises."""

    traceback: str


class NumberedLoader:
    """Batches of samples ``draw(number)``, drawn in ``workers`` background processes; how many changes no sample.

    Iterating never ends. ``start`` is the first sample's number, so a resumed run sees what it would have seen; from
    one batch to the next it grows by ``stride``, by default ``batch``: loaders of several trainings take turns.
    Samples are arrays or tuples of them, and are stacked. Close the iterator (``contextlib.closing``) to end
    the processes at once. Iterating raises MachineError if one is killed, and if ``draw`` raises: a
    MoebiusError as it is, RuntimeError with the traceback for anything else.
    """

    def __init__(
        self, draw: Callable[[int], Any], batch: int, start: int = 0, workers: int = 1, stride: int | None = None
    ) -> None:
        self.draw, self.batch, self.start, self.workers = draw, batch, start, workers
        self.stride = batch if stride is None else stride

    def __iter__(self) -> Generator[Any, None, None]:
        context = multiprocessing.get_context("fork")
        receivers: list[Connection] = []
        processes: list[multiprocessing.process.BaseProcess] = []
        try:
            for turn in range(self.workers):
                # A pipe of which each side holds its own end only: whoever dies, the other side notices.
                receiver, sender = context.Pipe(duplex=False)
                receivers.append(receiver)
                processes.append(context.Process(target=self._work, args=(turn, receivers, sender), daemon=True))
                processes[-1].start()
                sender.close()
            for receiver, worker in itertools.cycle(zip(receivers, processes, strict=True)):
                try:
                    batch = receiver.recv()
                except (EOFError, OSError):
                    worker.join()
                    raise MachineError(
                        f"the process that draws training pictures ended with code {worker.exitcode} "
                        "(-9: killed, mostly for want of memory): close other programs and run the same command again"
                    ) from None
                if isinstance(batch, _Failed):
                    raise RuntimeError(f"drawing a training sample failed in its process:\n{batch.traceback}")
                if isinstance(batch, MoebiusError):
                    raise batch
                yield batch
        finally:
            for receiver, worker in zip(receivers, processes, strict=False):
                worker.kill()
                worker.join()
                receiver.close()

    def _work(self, turn: int, receivers: list[Connection], sender: Connection) -> None:
        for number in (signal.SIGINT, signal.SIGHUP):  # they reach every process: the parent ends this one
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        for receiver in receivers:
            receiver.close()
        cv2.setNumThreads(0)
        os.nice(5)
        ready: queue.Queue[Any] = queue.Queue(PREFETCH)
        threading.Thread(target=self._fill, args=(ready, turn), daemon=True).start()
        with contextlib.suppress(BrokenPipeError):  # the parent is gone
            while True:
                sender.send(ready.get())

    def _fill(self, ready: queue.Queue[Any], turn: int) -> None:
        number = self.start + turn * self.stride
        try:
            while True:
                items = [self.draw(number + i) for i in range(self.batch)]
                number += self.stride * self.workers
                if isinstance(items[0], tuple):
                    ready.put(tuple(np.stack(column) for column in zip(*items, strict=True)))
                else:
                    ready.put(np.stack(items))
        except MoebiusError as error:
            ready.put(error)
        except Exception:
            ready.put(_Failed(traceback.format_exc()))


class Loader(NumberedLoader):
    """The same with samples ``draw(rng)``; sample i is seeded by (seed, i) alone."""

    def __init__(
        self, draw: Callable[[np.random.Generator], Any], batch: int, seed: int, start: int = 0, workers: int = 1
    ) -> None:
        super().__init__(lambda number: draw(np.random.default_rng([seed, number])), batch, start, workers)


def atomic_save(content: Any, path: Path) -> None:
    """Writes JSON (``.json``) or a torch pickle, whole or not at all, making the folder if need be.

    Raises MachineError as ``files.atomic_write``.
    """
    if path.suffix == ".json":
        data = memoryview((json.dumps(content, indent=2) + "\n").encode())
    else:
        buffer = io.BytesIO()  # torch writes to files itself, and reports a full disk as a bug of its own
        torch.save(content, buffer)
        data = buffer.getbuffer()
    make_folder(path.parent)
    with atomic_write(path) as temporary:
        temporary.write_bytes(data)


def make_folder(folder: Path) -> None:
    """Makes ``folder`` with its parents. Raises UsageError for a file, MachineError where there is no right to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UsageError(f"output {folder} is, or lies in, a file: name a folder") from None
    except OSError as error:
        raise MachineError(f"cannot make {folder}: {error.strerror}: name an output elsewhere") from error


def plain(recipe: Any) -> Any:
    """``recipe`` (of ``asdict``) as JSON would give it back: two recipes are the same if these are equal."""
    return json.loads(json.dumps(recipe))


def save_state(path: Path, recipe: dict[str, Any], **parts: Any) -> None:
    """Writes what ``load_state`` reads: state dicts and counters by name, with the recipe they belong to."""
    atomic_save({**parts, "recipe": plain(recipe)}, path)


def load_state(path: Path, recipe: dict[str, Any], device: str) -> dict[str, Any] | None:
    """The parts saved at ``path``, or None if there is no such file.

    Raises:
        UsageError: the state belongs to another recipe. BundleError: it is damaged. MachineError: unreadable.
    """
    try:
        with utf8_path(path) as name:
            state = torch.load(name, weights_only=True, map_location=device)
        theirs = plain(state.pop("recipe"))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise MachineError(f"{path} cannot be read: {error.strerror or error}: run `chmod u+r {path}`") from error
    except Exception as error:  # a damaged pickle can raise anything
        raise BundleError(f"{path} is damaged: remove it, and the same command starts this stage again") from error
    if theirs != plain(recipe):
        raise UsageError(f"{path} was made by another recipe: remove it or give another output folder")
    return dict(state)


def check_finite(value: torch.Tensor, what: str, step: int) -> None:
    """Stops a run before it spoils its weights. Raises BundleError if the scalar ``value`` is not finite."""
    if not torch.isfinite(value):
        raise BundleError(
            f"{what} is {value.item()} at step {step}: lower the recipe's learning rate; what was saved before is kept"
        )


def cosine(share: float, floor: float) -> float:
    """1 at the start, ``floor`` at the end, half a cosine between."""
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * share))


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    """Moves the average's parameters towards the model's; buffers are copied."""
    for slow, fast in zip(average.parameters(), model.parameters(), strict=True):
        slow.lerp_(fast, 1 - decay)
    for kept, current in zip(average.buffers(), model.buffers(), strict=True):
        kept.copy_(current)


@contextlib.contextmanager
def progress_bar(title: str, total: float) -> Iterator[Callable[[float, dict[str, float]], None]]:
    """Yields ``report(done, figures)``: a bar on a terminal, elsewhere every third report as a line (stderr)."""

    def describe(figures: dict[str, float]) -> str:
        return "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in figures.items())

    if not sys.stderr.isatty():
        calls = 0

        def line(done: float, figures: dict[str, float]) -> None:
            nonlocal calls
            if calls % 3 == 0:
                print(f"{title}  {100 * done / total:5.1f}%  {describe(figures)}", file=sys.stderr, flush=True)
            calls += 1

        yield line
        return
    # On a narrow terminal it is the last figures that give way, not the bar.
    room = Column(ratio=1, no_wrap=True, overflow="ellipsis")
    figures_column = TextColumn("{task.fields[figures]}", table_column=room)
    heading = TextColumn(title, table_column=Column(no_wrap=True))
    columns = (heading, BarColumn(16), TimeRemainingColumn(), figures_column)
    with Progress(*columns, console=Console(stderr=True), expand=True) as progress:
        task = progress.add_task(title, total=total, figures="")
        yield lambda done, figures: progress.update(task, completed=done, figures=describe(figures))
