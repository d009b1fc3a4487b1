"""PyTorch: the reference in float32 that every conversion is measured against. It is not tuned for speed.

It is built from the networks themselves, not from a bundle, and needs the `export` extra. It states the
components' conventions (prompt ids, latent scale, posterior mean) on its own and shares nothing with the
modules that export traces: a mistake there shows as a difference here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..spec import Component
from .base import Arrays, Runtime


class TorchRuntime(Runtime):
    """Runs a student and a diffusers ``AutoencoderKL`` as the components of a bundle.

    ``student`` is what ``moebius_edge.model.build_student`` makes. Both modules are used as they are, but for
    being put into evaluation mode; their weights must be float32. ``components`` as in ``Runtime``.
    """

    def __init__(self, student: Any, vae: Any, components: Mapping[str, Component]) -> None:
        super().__init__(components)
        self._student, self._vae = student, vae

    @property
    def info(self) -> dict[str, Any]:
        return {
            "name": "torch",
            "version": torch.__version__,
            "device": str(self._device),
            "provider": "eager",
            "threads": torch.get_num_threads(),
        }

    def activate(self) -> None:
        for module in (self._student, self._vae):
            module.eval()
            if wrong := next((k for k, p in module.named_parameters() if p.dtype != torch.float32), None):
                raise TypeError(f"the reference runs in float32, and {type(module).__name__}.{wrong} is not")

    def deactivate(self) -> None:
        """Nothing was taken: the modules belong to the caller."""

    def _run(self, component: str, feeds: Arrays, outputs: Sequence[str]) -> Arrays:
        with torch.inference_mode():
            tensors = {name: torch.from_numpy(array).to(self._device) for name, array in feeds.items()}
            results = self._compute(component, **tensors)
        return {name: np.ascontiguousarray(results[name].cpu().numpy()) for name in outputs}

    @property
    def _device(self) -> torch.device:
        device: torch.device = next(self._student.parameters()).device
        return device

    def _compute(self, component: str, **inputs: Tensor) -> dict[str, Tensor]:
        factor = self._vae.config.scaling_factor
        if component == "vae_encoder":
            return {"latent": factor * self._vae.encode(inputs["image"]).latent_dist.mean}
        if component == "vae_decoder":
            return {"image": self._vae.decode(inputs["latent"] / factor).sample}
        return self._denoise(**inputs)

    def _denoise(
        self, sample: Tensor, timestep: Tensor, branch: Tensor, deep: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The denoiser, or with a deep feature its shallow part."""
        prompts = torch.arange(self._student.embedding_layer.num_embeddings, device=self._device)
        ids = prompts.reshape(2, -1)[branch]  # row 0 conditions, row 1 does not
        if deep is not None:
            return {"noise": self._student.shallow(sample, timestep, ids, deep)}
        denoised = self._student(sample, timestep, ids)
        return {"noise": denoised.noise, "deep": denoised.blocks[-2]}
