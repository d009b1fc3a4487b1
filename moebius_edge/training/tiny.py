"""The recipe of the bundled model ``tiny``: autoencoder, latents, denoiser, then a checkpoint to export.

Every stage that is already on disk is kept, and the denoiser resumes where it stopped, so the same
command continues after an interruption. Its figures are in ``docs/tiny-model.md``.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from torch import nn

from ..errors import MachineError
from .autoencoder import AutoencoderRecipe, finetune_decoder, train_autoencoder
from .denoiser import DenoiserRecipe, DenoiserTrainer
from .latents import LatentCache, encode_pairs
from .loop import atomic_save


@dataclass(frozen=True)
class TinyRecipe:
    """All of it; ``pictures`` are encoded once, each with ``masks_per_picture`` masks."""

    autoencoder: AutoencoderRecipe = field(default_factory=AutoencoderRecipe)
    denoiser: DenoiserRecipe = field(default_factory=DenoiserRecipe)
    pictures: int = 4000
    masks_per_picture: int = 2
    photo_share: float = 0.6


def train_tiny(output: Path, recipe: TinyRecipe, device: str = "cpu") -> Path:
    """Trains ``tiny`` and writes ``output/checkpoint``, which ``moebius-edge export`` reads; returns that folder."""
    if device == "cuda" and not torch.cuda.is_available():
        raise MachineError("PyTorch finds no CUDA GPU here: use --device cpu, or see `moebius-edge doctor`")
    output.mkdir(parents=True, exist_ok=True)
    resolution = 8 * recipe.denoiser.student.latent_size
    vae_folder, cache_file = output / "vae", output / "latents.npz"
    if not (vae_folder / "config.json").exists():
        train_autoencoder(recipe.autoencoder, vae_folder, device)
    vae = AutoencoderKL.from_pretrained(vae_folder).eval()
    if not cache_file.exists():
        encode_pairs(
            vae, cache_file, recipe.pictures, recipe.masks_per_picture, resolution, recipe.photo_share,
            recipe.denoiser.seed,
        )
    trainer = DenoiserTrainer(recipe.denoiser, LatentCache.load(cache_file), output, device)
    trainer.resume()
    student = trainer.run()
    vae = finetune_decoder(vae, recipe.autoencoder, output / "vae_finetuned", device)
    return save_checkpoint(student, vae, recipe, output / "checkpoint")


def save_checkpoint(student: nn.Module, vae: AutoencoderKL, recipe: TinyRecipe, folder: Path) -> Path:
    """``student.safetensors``, ``student.json`` and ``vae/``; weights rounded to float16, half the size."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        name: tensor.detach().cpu().contiguous().to(torch.float16 if tensor.is_floating_point() else tensor.dtype)
        for name, tensor in student.state_dict().items()
    }
    save_file(weights, folder / "student.safetensors")
    atomic_save(recipe.denoiser.student.to_dict(), folder / "student.json")
    atomic_save(asdict(recipe), folder / "training.json")
    vae.half().save_pretrained(folder / "vae")
    return folder
