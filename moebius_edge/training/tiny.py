"""The recipe of the bundled model ``tiny``: autoencoder, decoder, latents, denoiser, then a checkpoint to export.

Every stage that is already on disk is kept, and the one that was cut short goes on where it was last saved,
so the same command continues after an interruption. Its figures are in ``docs/tiny-model.md``.
"""

from __future__ import annotations

import copy
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors.torch import save
from torch import nn

from ..errors import BundleError, MachineError, UsageError
from ..files import atomic_write
from ..spec import LATENT_DOWNSCALE
from .autoencoder import AutoencoderRecipe, finetune_decoder, load_autoencoder, save_autoencoder, train_autoencoder
from .data import MaskedSource, PictureSource
from .denoiser import DenoiserRecipe, DenoiserTrainer
from .encoding import encode_latents
from .loop import atomic_save, make_folder, plain


@dataclass(frozen=True)
class TinyRecipe:
    """All of it; ``pictures`` are encoded once, each with ``masks_per_picture`` masks."""

    autoencoder: AutoencoderRecipe = field(default_factory=AutoencoderRecipe)
    denoiser: DenoiserRecipe = field(default_factory=DenoiserRecipe)
    pictures: int = 4000
    masks_per_picture: int = 3
    photo_share: float = 0.6


def train_tiny(output: Path, recipe: TinyRecipe, device: str = "cpu") -> Path:
    """Trains ``tiny`` and writes ``output/checkpoint``, which ``moebius-edge export`` reads; returns that folder.

    Raises:
        UsageError: ``output`` is a file, or holds a run of another recipe.
        MachineError: no such device, no right to write, or a package with the photographs is missing.
        BundleError: a file of the run is damaged, or a loss became infinite.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise MachineError("PyTorch finds no CUDA GPU here: use --device cpu, or see `moebius-edge doctor`")
    _claim(output, recipe)
    checkpoint, vae_folder = output / "checkpoint", output / "vae"
    if (checkpoint / "training.json").exists():  # the last file to be written
        return checkpoint
    if not vae_folder.exists():
        train_autoencoder(recipe.autoencoder, vae_folder, device)
    finetuned = output / "vae_finetuned"
    if not finetuned.exists():
        finetune_decoder(load_autoencoder(vae_folder), recipe.autoencoder, finetuned, device)
    vae = load_autoencoder(finetuned)  # its encoder is still the first one's
    size, seed = LATENT_DOWNSCALE * recipe.denoiser.student.latent_size, recipe.denoiser.seed
    source, made_from = PictureSource(size, recipe.photo_share), {"photo_share": recipe.photo_share}
    samples = MaskedSource(source, size, seed, made_from)
    cache = encode_latents(vae, samples, output / "latents", recipe.pictures, recipe.masks_per_picture)
    trainer = DenoiserTrainer(recipe.denoiser, cache, output, device)
    trainer.resume()
    student = trainer.run()
    return save_checkpoint(student, vae, recipe, checkpoint)


def _claim(output: Path, recipe: TinyRecipe) -> None:
    """Notes in ``output/recipe.json`` what the run is of, so that no stage of another one is taken for it."""
    path, ours = output / "recipe.json", plain(asdict(recipe))
    try:
        theirs = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        make_folder(output)
        atomic_save(ours, path)
        return
    except (OSError, ValueError) as error:
        raise BundleError(f"{path} cannot be read ({error}): give another output folder") from error
    if theirs != ours:
        raise UsageError(f"{output} holds a run of another recipe, see {path.name} in it: give another output folder")


def save_checkpoint(student: nn.Module, vae: AutoencoderKL, recipe: TinyRecipe, folder: Path) -> Path:
    """``student.safetensors``, ``student.json``, ``vae/`` and ``training.json``; weights rounded to float16, half
    the size. Raises BundleError if a weight is not finite as float16, and then writes nothing."""
    weights = {
        name: tensor.detach().cpu().contiguous().to(torch.float16 if tensor.is_floating_point() else tensor.dtype)
        for name, tensor in student.state_dict().items()
    }
    for name, tensor in weights.items():
        if not tensor.isfinite().all():
            raise BundleError(f"{name} is not finite in float16: lower the recipe's learning rate and train again")
    make_folder(folder)
    with atomic_write(folder / "student.safetensors") as temporary:
        temporary.write_bytes(save(weights))
    atomic_save(recipe.denoiser.student.to_dict(), folder / "student.json")
    save_autoencoder(copy.deepcopy(vae).half(), folder / "vae")
    atomic_save(asdict(recipe), folder / "training.json")
    return folder
