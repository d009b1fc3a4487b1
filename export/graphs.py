"""The three networks as the tensors-only modules that become ONNX files, in the bundle's names and scales.

Each ``forward`` takes and returns exactly the tensors of one component in ``spec.COMPONENTS``, in that order, and the
denoiser its deep feature too: this file is where a checkpoint's conventions (prompt ids, unscaled latents, a posterior)
end. It exports nothing, and the reference back-end does not use it, so that the gate also sees a mistake made here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..model import Student
from ..spec import COMPONENTS, Component
from .specialise import specialise


class Encoder(nn.Module):
    """``image`` (N, 3, H, W) in [-1, 1] -> scaled ``latent`` (N, 4, h, w): the posterior's mean, no draw."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae
        self.scaling_factor = float(vae.config.scaling_factor)

    def forward(self, image: Tensor) -> Tensor:
        mean: Tensor = self.vae.encode(image).latent_dist.mean
        return mean * self.scaling_factor


class PlainDenoiser(nn.Module):
    """The student as it is, for comparison: ``specialise`` makes what is exported.

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


class Decoder(nn.Module):
    """Scaled ``latent`` (N, 4, h, w) -> ``image`` (N, 3, H, W), nominally in [-1, 1] and not clipped."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae
        self.scaling_factor = float(vae.config.scaling_factor)

    def forward(self, latent: Tensor) -> Tensor:
        image: Tensor = self.vae.decode(latent / self.scaling_factor).sample
        return image


def build_graphs(student: Student, vae: Any) -> dict[str, nn.Module]:
    """The modules by component name, in evaluation mode."""
    graphs = {"vae_encoder": Encoder(vae), "denoiser": specialise(student), "vae_decoder": Decoder(vae)}
    if set(graphs) != set(COMPONENTS):
        raise AssertionError(f"graphs {sorted(graphs)} are not the components {sorted(COMPONENTS)}")
    return {name: graphs[name].eval() for name in COMPONENTS}


def example_inputs(component: Component) -> tuple[Tensor, ...]:
    """Inputs to trace ``component`` (sizes filled in) with; batch 2, for a 1 would be taken as fixed."""
    dtypes = {"float32": torch.float32, "int64": torch.int64}
    examples = []
    for tensor in component.inputs:
        shape = [size if isinstance(size, int) else 2 for size in tensor.shape]
        examples.append(torch.zeros(shape, dtype=dtypes[tensor.dtype]))
    return tuple(examples)
