"""What a stage works on, opened from what the user names: pictures, encoded pictures, autoencoder, checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.samples import MaskedPictures, Transform
from ..data.sources import open_pictures
from ..errors import MachineError, UsageError
from ..export.source import open_vae
from ..progress import Progress, no_progress
from .encoding import UNREADABLE, EncodedPictures, encode_latents, vae_hash
from .latents import INDEX, LatentCache, Source, read_index
from .loop import plain
from .recipe import Inputs, Recipe
from .trainer import make_accelerator


@dataclass(frozen=True)
class StageInputs:
    """What a stage works on. ``source`` gives samples, ``origin`` says for the record where they come from.

    ``teacher`` and ``student`` are checkpoint files. Stages ``guidance`` and ``int8`` start from the student's; stages
    ``student`` and ``teacher`` start from their own if it is given, else afresh. ``vae`` is the autoencoder that
    samples are shown with, None for no pictures. ``pictures`` lists what could not be read, where any were read.
    """

    source: Source
    origin: dict[str, Any]
    teacher: Path | None = None
    student: Path | None = None
    vae: Any = None
    pictures: MaskedPictures | None = None

    def write_unreadable(self, output: Path) -> int:
        """List the pictures that could not be read in ``output``; return how many there are."""
        return 0 if self.pictures is None else self.pictures.unreadable.write(output / UNREADABLE)


def open_inputs(
    recipe: Recipe, inputs: Inputs, output: Path, device: str, progress: Progress = no_progress
) -> StageInputs:
    """What the user names, opened; pictures are encoded where the recipe caches latents.

    They are encoded into ``inputs.latents``, by default ``output/latents``, by the first process while the others wait;
    a folder of latents that is named without pictures is read as it is.

    Raises:
        UsageError: pictures, latents or the autoencoder are not named, or do not suit. MachineError: something named
            is not there. As ``open_pictures`` and ``encode_latents``, too.
    """
    for path in (inputs.teacher, inputs.student):
        if path is not None and not path.is_file():
            raise MachineError(f"there is no checkpoint {path}: name a file of weights")
    accelerator, side = make_accelerator(device), recipe.student.latent_size
    vae = None if inputs.vae is None else open_vae(inputs.vae).to(accelerator.device)
    files: dict[str, Any] = {"teacher": inputs.teacher, "student": inputs.student, "vae": vae}
    folder = inputs.latents or output / "latents"
    if not inputs.images and (folder / INDEX).is_file():
        return StageInputs(LatentCache.open(folder, side), _origin(folder), **files)
    if not inputs.images:
        raise UsageError("there is nothing to train on: add --images SOURCE, or --latents DIR with encoded pictures")
    if vae is None:
        raise UsageError("pictures are encoded before a network sees them: add --vae DIR, a diffusers VAE folder")
    pictures = open_pictures(inputs.images, inputs.masks or None)
    data = recipe.data
    transform = Transform(recipe.resolution, data.min_scale, data.flip, data.masks, data.coverage)
    samples = MaskedPictures(pictures, transform, recipe.seed)
    origin: dict[str, Any] = {"images": inputs.images, "masks": inputs.masks, "number": len(pictures)}
    if not data.cache:
        origin["made_from"] = plain({**samples.identity(), "vae": vae_hash(vae)})
        return StageInputs(EncodedPictures(vae, samples), origin, **files, pictures=samples)
    with accelerator.main_process_first():
        count = data.pictures or len(pictures)
        encode_latents(vae, samples, folder, count, data.masks_per_picture, progress=progress)
    source = LatentCache.open(folder, side)
    return StageInputs(source, origin | _origin(folder), **files, pictures=samples)


def _origin(folder: Path) -> dict[str, Any]:
    """Where latents lie, and what they were made from: the autoencoder's hash, the transform, the pictures."""
    return {"latents": str(folder), "made_from": read_index(folder)}
