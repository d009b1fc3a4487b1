"""What the export tests export: a small student with golden weights and a random autoencoder. Not a test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import torch
from diffusers import AutoencoderKL
from golden import fill_golden
from onnx import TensorProto, numpy_helper
from torch import Tensor, nn

from moebius_edge.model import Student, StudentConfig, build_student

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


def weight_bytes(model: onnx.ModelProto) -> dict[str, int]:
    """Bytes of the initialisers by element type, such as ``{"FLOAT16": 1234}``."""
    sizes: dict[str, int] = {}
    for tensor in model.graph.initializer:
        kind = TensorProto.DataType.Name(tensor.data_type)
        sizes[kind] = sizes.get(kind, 0) + numpy_helper.to_array(tensor).nbytes
    return sizes


def element_types(model: onnx.ModelProto) -> dict[str, int]:
    inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True).graph
    values = (*inferred.input, *inferred.output, *inferred.value_info)
    return {v.name: v.type.tensor_type.elem_type for v in values}


class PlainDenoiser(nn.Module):
    """The student as it is, with the denoiser's inputs, for comparison with what is exported.

    ``sample`` (N, 9, h, w), ``timestep`` (N,), ``branch`` (N,) -> ``noise`` (N, 4, h, w).

    With M prompts a branch (10), branch 0 is prompt ids 0..M-1 (conditional), 1 is M..2M-1 (unconditional).
    """

    prompts: Tensor

    def __init__(self, student: Student) -> None:
        super().__init__()
        self.student = student
        self.register_buffer("prompts", torch.arange(student.config.num_prompts), persistent=False)

    def forward(self, sample: Tensor, timestep: Tensor, branch: Tensor) -> Tensor:
        ids = self.prompts + len(self.prompts) * branch[:, None]  # (N, M)
        noise: Tensor = self.student(sample, timestep, ids).noise
        return noise
