"""What the export tests export: a small student with golden weights and a random autoencoder. Not a test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from golden import fill_golden

from moebius_edge.model import StudentConfig, build_student

CONFIG = StudentConfig(
    block_out_channels=(32, 64),
    num_heads=4,
    cross_attention_dim=48,
    prompt_embedding_dim=64,
    latent_size=8,
    layers_per_block=1,
    window=5,
)


def save_vae(folder: Path, **changes: Any) -> Path:
    """A random autoencoder of the published layout, narrow."""
    torch.manual_seed(7)
    settings: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (8, 16, 16, 16),
        "norm_num_groups": 4,
        "scaling_factor": 0.13025,
    }
    AutoencoderKL(**{**settings, **changes}).save_pretrained(folder)
    return folder


def save_student(path: Path, config: StudentConfig = CONFIG) -> Path:
    torch.save(fill_golden(build_student(config)).state_dict(), path)
    path.with_suffix(".json").write_text(json.dumps(config.to_dict()))
    return path
