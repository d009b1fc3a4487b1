"""A run's checkpoints: one file each, whole or absent, the last few kept. ``--resume`` reads the newest."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from .loop import load_state, save_state

FOLDER = "checkpoints"


def checkpoint_files(output: Path) -> list[Path]:
    """The checkpoints in ``output``, oldest first."""
    return sorted((output / FOLDER).glob("step-*.pt"))


def save_checkpoint(output: Path, recipe: dict[str, Any], step: int, keep: int, **parts: Any) -> Path:
    """Writes the state after ``step`` and removes all but the newest ``keep``. Raises as ``files.atomic_write``."""
    path = output / FOLDER / f"step-{step:09d}.pt"
    save_state(path, recipe, step=step, **parts)
    for old in checkpoint_files(output)[:-keep]:
        with suppress(OSError):  # it is only in the way
            old.unlink()
    return path


def load_newest(output: Path, recipe: dict[str, Any], device: str) -> dict[str, Any] | None:
    """The parts of the newest checkpoint, or None where there is none.

    What a killed process left half written is removed. Raises as ``loop.load_state``; a damaged file is named, and
    removing it makes the one before it the newest.
    """
    for left in (output / FOLDER).glob(".moebius-*"):
        with suppress(OSError):
            left.unlink()
    files = checkpoint_files(output)
    return load_state(files[-1], recipe, device) if files else None
