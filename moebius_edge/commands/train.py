"""``moebius-edge train``: trains a model. The work is ``moebius_edge.training``'s."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import MachineError, UsageError
from . import console

PRESETS = ("tiny",)


def train(
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Where the run is kept, and resumed.")],
    preset: Annotated[str, typer.Option(metavar="NAME", help="What to train: tiny, the bundled model.")] = "tiny",
    device: Annotated[str, typer.Option(metavar="cpu|cuda", help="Where to train.")] = "cpu",
) -> None:
    """Train a model; the same command resumes an interrupted run.

    Only the recipe of the bundled model is here: autoencoder, latents and denoiser, on photographs that come
    with scikit-image and scikit-learn and on synthetic scenes. Needs: pip install "moebius-edge[train]"
    """
    if preset not in PRESETS:
        raise UsageError(f"there is no preset {preset!r}: use {', '.join(PRESETS)}")
    if device not in ("cpu", "cuda"):
        raise UsageError(f"there is no device {device!r}: use cpu or cuda")
    try:
        from ..training.tiny import TinyRecipe, train_tiny
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("moebius_edge"):  # a fault of ours
            raise
        raise MachineError(f'training needs {error.name}: pip install "moebius-edge[train]"') from error
    try:
        checkpoint = train_tiny(output, TinyRecipe(), device)
    except KeyboardInterrupt:
        raise console.Interrupted(f"interrupted; the same command resumes from what lies in {output}") from None
    print(f"saved {checkpoint}")
    print(f"next: moebius-edge export {checkpoint / 'student.safetensors'} --vae {checkpoint / 'vae'} --output BUNDLE")
