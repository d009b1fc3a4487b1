"""What a stage works on, opened from what the user names: pictures, encoded pictures, autoencoder, checkpoints."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.samples import MaskedPictures, Samples, Transform
from ..data.sources import open_pictures
from ..data.unreadable import Unreadable
from ..errors import MachineError, UsageError
from ..export.source import open_vae
from .data import PICTURES, bundled_samples
from .encoding import UNREADABLE, encode_latents, vae_hash
from .latent_sources import CachedLatents, EncodedPictures
from .latents import INDEX, LatentCache
from .loop import plain
from .recipe import DataRecipe, Inputs, Recipe
from .trainer import Source, make_accelerator


@dataclass(frozen=True)
class Material:
    """What a stage works on. ``source`` gives samples, ``origin`` says for the record where they come from.

    ``teacher`` and ``student`` are checkpoint files. Stages ``guidance`` and ``int8`` start from the student's; stages
    ``student`` and ``teacher`` start from their own if it is given, else afresh. ``vae`` is the autoencoder that
    samples are shown with, None for no pictures. ``unreadable`` lists the pictures that were passed over.
    """

    source: Source
    origin: dict[str, Any]
    teacher: Path | None = None
    student: Path | None = None
    vae: Any = None
    unreadable: Unreadable | None = None

    def note_unreadable(self, output: Path) -> int:
        """Lists them in ``output``; returns how many there are."""
        return 0 if self.unreadable is None else self.unreadable.write(output / UNREADABLE)


def open_material(recipe: Recipe, preset: str, inputs: Inputs, output: Path, device: str) -> Material:
    """The material of a stage. Preset ``tiny`` has pictures of its own where none are named.

    Pictures are encoded into ``inputs.latents``, by default ``output/latents``, by the first process while the others
    wait; a folder of latents that is named without pictures is read as it is.

    Raises:
        UsageError: pictures, latents or the autoencoder are not named, or do not suit. MachineError: something named
            is not there. As ``open_pictures`` and ``encode_latents``, too.
    """
    for path in (inputs.teacher, inputs.student):
        if path is not None and not path.is_file():
            raise MachineError(f"there is no checkpoint {path}: name a file of weights")
    vae = None if inputs.vae is None else open_vae(inputs.vae).to(make_accelerator(device).device)

    def made(source: Source, origin: dict[str, Any], unreadable: Unreadable | None = None) -> Material:
        return Material(source, origin, inputs.teacher, inputs.student, vae, unreadable)

    folder = inputs.latents or output / "latents"
    side, resolution = recipe.student.latent_size, recipe.resolution
    if not inputs.images and (folder / INDEX).is_file() or folder.is_file():
        return made(CachedLatents(LatentCache.open(folder), side), describe_latents(folder))
    if not inputs.images and preset != "tiny":
        raise UsageError("there is nothing to train on: add --images SOURCE, or --latents DIR with encoded pictures")
    if vae is None:
        raise UsageError("pictures are encoded before a network sees them: add --vae DIR, a diffusers VAE folder")
    samples: Samples
    if inputs.images:
        pictures = open_pictures(inputs.images, inputs.masks or None)
        samples = MaskedPictures(pictures, _transform(recipe.data, resolution), recipe.seed)
        origin: dict[str, Any] = {"images": inputs.images, "masks": inputs.masks, "number": len(pictures)}
        count = recipe.data.pictures or len(pictures)
        if not recipe.data.cache:
            described = plain({**samples.identity(), "vae": vae_hash(vae)})
            return made(EncodedPictures(vae, samples), origin | {"made_from": described}, samples.unreadable)
    else:
        samples = bundled_samples(resolution, recipe.seed)
        origin, count = {"images": "the bundled model's own"}, recipe.data.pictures or PICTURES
    with make_accelerator(device).main_process_first():
        cache = encode_latents(vae, samples, folder, count, recipe.data.masks_per_picture)
    return made(CachedLatents(cache, side), origin | describe_latents(folder), samples.unreadable)


def describe_latents(folder: Path) -> dict[str, Any]:
    """Where latents lie, and what they were made from: the autoencoder's hash, the transform, the pictures."""
    index = folder / INDEX
    made_from = json.loads(index.read_text("utf-8")) if index.is_file() else None
    return {"latents": str(folder), "made_from": made_from}


def _transform(recipe: DataRecipe, resolution: int) -> Transform:
    return Transform(resolution, recipe.min_scale, recipe.flip, recipe.masks, recipe.coverage)
