"""What every training loop here shares: a loading process, atomic saves, a progress bar."""

from __future__ import annotations

import contextlib
import json
import math
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn


class Loader:
    """Batches drawn by ``draw(rng)`` in one background process; sample i is seeded by (seed, i) alone.

    Iterating never ends. ``start`` is the first sample's number, so a resumed run sees what it would have seen.
    """

    def __init__(self, draw: Callable[[np.random.Generator], Any], batch: int, seed: int, start: int = 0) -> None:
        self.draw, self.batch, self.seed, self.start = draw, batch, seed, start

    def _work(self, queue: Any) -> None:
        import cv2

        cv2.setNumThreads(0)
        os.nice(5)
        number = self.start
        while True:
            items = []
            for _ in range(self.batch):
                items.append(self.draw(np.random.default_rng([self.seed, number])))
                number += 1
            if isinstance(items[0], tuple):
                queue.put(tuple(np.stack(column) for column in zip(*items, strict=True)))
            else:
                queue.put(np.stack(items))

    def __iter__(self) -> Iterator[Any]:
        context = multiprocessing.get_context("fork")
        queue = context.Queue(maxsize=8)
        worker = context.Process(target=self._work, args=(queue,), daemon=True)
        worker.start()
        try:
            while True:
                yield queue.get()
        finally:
            worker.terminate()
            worker.join()


def atomic_save(content: Any, path: Path) -> None:
    """Writes JSON (``.json``) or a torch pickle under a temporary name, then renames it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    if path.suffix == ".json":
        temporary.write_text(json.dumps(content, indent=2) + "\n")
    else:
        torch.save(content, temporary)
    os.replace(temporary, path)


def cosine(share: float, floor: float) -> float:
    """1 at the start, ``floor`` at the end, half a cosine between."""
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * share))


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    """Moves the average's parameters towards the model's; buffers are copied."""
    for slow, fast in zip(average.parameters(), model.parameters(), strict=True):
        slow.lerp_(fast, 1 - decay)
    for slow, fast in zip(average.buffers(), model.buffers(), strict=True):
        slow.copy_(fast)


@contextlib.contextmanager
def progress_bar(title: str, total: float) -> Iterator[Callable[[float, dict[str, float]], None]]:
    """Yields ``report(done, figures)``: a bar on a terminal, a line now and then elsewhere (stderr)."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

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
    columns = (TextColumn(title), BarColumn(), TextColumn("{task.fields[figures]}"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(title, total=total, figures="")
        yield lambda done, figures: progress.update(task, completed=done, figures=describe(figures))
