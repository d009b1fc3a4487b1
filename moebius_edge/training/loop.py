"""What every training loop shares: samples drawn in processes, states that resume exactly, a running average."""

from __future__ import annotations

import ctypes
import io
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from ..errors import BundleError, MachineError, MoebiusError, UsageError
from ..system.files import atomic_write
from ..system.fingerprint import first_difference

_PR_SET_PDEATHSIG = 1  # of the system call prctl
_PREFETCH = 8  # batches that each process draws ahead: a slow picture then holds nobody up

_ONE_PRESS_S = 2.0  # a launcher passes on the signal that the terminal has sent to its processes already

Arrays = tuple[np.ndarray, ...]


class _Drawn(Dataset[Any]):
    """Samples by their numbers; an error that is the user's is returned, so that it arrives as it was raised."""

    def __init__(self, draw: Callable[[int], tuple[Any, ...]]) -> None:
        self.draw = draw

    def __getitem__(self, number: int) -> tuple[Any, ...] | MoebiusError:
        try:
            return self.draw(number)
        except MoebiusError as error:
            return error


def draw_batches(
    draw: Callable[[int], tuple[Any, ...]], numbers: Iterable[Any], workers: int = 1
) -> Generator[Arrays, None, None]:
    """Yield a batch for each sequence in ``numbers``: the tuples ``draw(number)``, stacked column by column.

    ``workers`` background processes draw them; how many changes nothing. ``numbers`` may be without end. Close the
    generator (``contextlib.closing``) to end the processes at once.

    Raises:
        MoebiusError: as ``draw`` raised it; other errors keep their type and show the traceback of the process.
        MachineError: a process was killed, see ``lost_processes_named``.
    """
    loader = DataLoader(
        _Drawn(draw),
        batch_sampler=numbers,
        num_workers=workers,
        collate_fn=_stacked,
        worker_init_fn=_begin_worker,
        prefetch_factor=_PREFETCH,
        multiprocessing_context="fork",
        generator=torch.Generator(),  # or each start would draw from the one that the losses draw from
    )
    # Ctrl-C goes to every process of a terminal. One that it reached before ``_begin_worker`` would end.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGHUP))
    try:
        batches = iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    with lost_processes_named():
        for batch in batches:
            if isinstance(batch, MoebiusError):
                raise batch
            yield batch


@contextmanager
def lost_processes_named() -> Iterator[None]:
    """Raise MachineError where a drawing process was killed: PyTorch's signal handler may say so at any moment."""
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise MachineError(
            f"a process that draws training pictures was ended, mostly for want of memory ({str(error):.120}): "
            "close other programs and run the same command again"
        ) from None


def _stacked(samples: Sequence[Any]) -> Arrays | MoebiusError:
    """NumPy arrays, which travel through a pipe: tensors would need /dev/shm, which is small in a container."""
    for sample in samples:
        if isinstance(sample, MoebiusError):
            return sample
    return tuple(np.stack(column) for column in zip(*samples, strict=True))


def _begin_worker(_: int) -> None:
    for number in (signal.SIGINT, signal.SIGHUP):  # they reach every process, and the first one ends the others
        signal.signal(number, signal.SIG_IGN)
    # So does SIGTERM under a job scheduler; the first one is let pass, for a checkpoint is made meanwhile.
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
    if sys.platform == "linux":  # end with the parent, even where that is killed and this process waits to write
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    cv2.setNumThreads(0)
    os.nice(5)


@contextmanager
def noticing_stops() -> Iterator[list[int]]:
    """Yield a list that Ctrl-C and SIGTERM add their number to, in place of what they did before; again, they do it.

    In another thread than the main one signals stay as they are.
    """
    received: list[int] = []
    before: dict[int, Any] = {}
    first = 0.0

    def restore() -> None:
        for number, old in before.items():
            signal.signal(number, old)

    def handler(number: int, frame: object) -> None:
        nonlocal first
        if not received:
            first = time.monotonic()
            os.write(2, b"stopping after this step with a checkpoint; once more to stop at once\n")
        elif time.monotonic() - first > _ONE_PRESS_S:
            restore()
            signal.raise_signal(number)
        received.append(number)

    if threading.current_thread() is threading.main_thread():
        asked = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) not in (signal.SIG_IGN, None)]
        before = {number: signal.signal(number, handler) for number in asked}
    try:
        yield received
    finally:
        restore()


def atomic_save(content: Any, path: Path) -> None:
    """Write JSON (``.json``) or a torch pickle, whole or not at all, and make its folder if need be."""
    if path.suffix == ".json":
        data = memoryview((json.dumps(content, indent=2) + "\n").encode())
    else:
        buffer = io.BytesIO()  # torch would write to the file itself, and report a full disk as a bug of its own
        torch.save(content, buffer)
        data = buffer.getbuffer()
    make_folder(path.parent)
    with atomic_write(path) as temporary:
        temporary.write_bytes(data)


def make_folder(folder: Path) -> None:
    """Make ``folder`` with its parents. Raises UsageError for a file, MachineError where there is no right to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UsageError(f"output {folder} is, or lies in, a file: name a folder") from None
    except OSError as error:
        raise MachineError(f"cannot make {folder}: {error.strerror}: name an output elsewhere") from error


def plain(recipe: Any) -> Any:
    """``recipe``, of ``asdict``, as JSON would give it back: two recipes are the same if these are equal."""
    return json.loads(json.dumps(recipe))


def save_state(path: Path, recipe: dict[str, Any], **parts: Any) -> None:
    """Write what ``load_state`` reads: state dicts and counters by name, with the recipe that they belong to."""
    atomic_save({**parts, "recipe": plain(recipe)}, path)


def load_state(path: Path, recipe: dict[str, Any], device: str) -> dict[str, Any] | None:
    """The parts saved at ``path``, or None if there is no such file.

    Raises:
        UsageError: the state belongs to another recipe. BundleError: it is damaged. MachineError: unreadable.
    """
    try:
        with open(path, "rb") as stream:
            state = torch.load(stream, weights_only=True, map_location=device)
        there, here = plain(state.pop("recipe")), plain(recipe)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise MachineError(f"{path} cannot be read: {error.strerror or error}: run `chmod u+r {path}`") from error
    except Exception as error:  # a damaged pickle can raise anything
        raise BundleError(f"{path} is damaged: remove it, and the same command starts from what is left") from error
    if there != here:
        difference = first_difference(there, here)
        raise UsageError(f"{path} was made by another recipe ({difference}): remove it or give another output folder")
    return dict(state)


def checkpoint_files(output: Path) -> list[Path]:
    """The checkpoints in ``output``, oldest first."""
    return sorted((output / "checkpoints").glob("step-*.pt"))


def save_checkpoint(output: Path, recipe: dict[str, Any], step: int, keep: int, **parts: Any) -> None:
    """Write the state after ``step`` and remove all but the newest ``keep`` checkpoints."""
    save_state(output / "checkpoints" / f"step-{step:09d}.pt", recipe, step=step, **parts)
    for old in checkpoint_files(output)[:-keep]:
        with suppress(OSError):  # a file too many does no harm
            old.unlink()


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    """Move the average's parameters towards the model's; buffers are copied."""
    for slow, fast in zip(average.parameters(), model.parameters(), strict=True):
        slow.lerp_(fast, 1 - decay)
    for old, new in zip(average.buffers(), model.buffers(), strict=True):
        old.copy_(new)
