"""PyTorch: the reference back-end, in float32, where the modules are. Every conversion is measured against it.

It is built from the networks themselves, not from a bundle, and needs the `export` extra. It states the
components' conventions (prompt ids, latent scale, posterior mean) on its own and shares nothing with the
modules that export traces: a mistake there shows as a difference here. It is not tuned for speed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..spec import DENOISER, SHALLOW, Component
from .base import Arrays, Runtime


class TorchRuntime(Runtime):
    """Runs a student and a diffusers ``AutoencoderKL`` as the components of a bundle.

    ``student`` is what ``moebius_edge.model.build_student`` makes. Both modules are used as they are, but for
    being put into evaluation mode; their weights must be float32. ``components`` as in ``Runtime``.
    """

    def __init__(self, student: Any, vae: Any, components: Mapping[str, Component]) -> None:
        super().__init__(components)
        self._student, self._vae = student, vae
        self._methods: dict[str, Callable[..., tuple[Tensor, ...]]] = {
            "vae_encoder": self._encode,
            DENOISER: self._denoise,
            SHALLOW: self._denoise_shallow,
            "vae_decoder": self._decode,
        }

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
        declared = [t.name for t in self.components[component].outputs]
        with torch.inference_mode():
            tensors = {name: torch.from_numpy(array).to(self._device) for name, array in feeds.items()}
            results = self._methods[component](**tensors)
        # A bundle whose denoiser gives no deep feature has one output fewer.
        made = dict(zip(declared, results, strict=False))
        return {name: np.ascontiguousarray(made[name].cpu().numpy()) for name in outputs}

    @property
    def _device(self) -> torch.device:
        device: torch.device = next(self._student.parameters()).device
        return device

    def _encode(self, image: Tensor) -> tuple[Tensor]:
        moments = self._vae.encode(image).latent_dist
        scaled: Tensor = self._vae.config.scaling_factor * moments.mean
        return (scaled,)

    def _denoise(self, sample: Tensor, timestep: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
        denoised = self._student(sample, timestep, self._prompts(branch))
        return denoised.noise, denoised.blocks[-2]

    def _denoise_shallow(self, sample: Tensor, timestep: Tensor, branch: Tensor, deep: Tensor) -> tuple[Tensor]:
        return (self._student.shallow(sample, timestep, self._prompts(branch), deep),)

    def _prompts(self, branch: Tensor) -> Tensor:
        prompts = torch.arange(self._student.embedding_layer.num_embeddings, device=self._device)
        return prompts.reshape(2, -1)[branch]  # row 0 conditions, row 1 does not

    def _decode(self, latent: Tensor) -> tuple[Tensor]:
        image: Tensor = self._vae.decode(latent / self._vae.config.scaling_factor).sample
        return (image,)
