"""The latent perceptual loss: a distance between the latent that a predicted noise implies and the clean one.

There are two. E-LatentLPIPS is the paper's (arXiv 2606.19195), from a package of its own whose licences allow no
commercial use; the teacher's own features need nothing that a distillation does not have.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from pathlib import Path

import torch
from torch import Tensor

from ..errors import MachineError
from ..model import Teacher

TEACHER_TIMESTEP = 10  # ᾱ = 0.99: the teacher expects next to no noise, so that a clean latent is nothing new to it

# Where elatentlpips 0.2 looks for its weights, below the working folder, before it downloads them.
ELATENTLPIPS_FILES = (Path("ckpt/sdxl_latent_vgg16.pth.tar"), Path("ckpt/sdxl_latest_vgg16_tuned.pth"))
_INSTALL = 'pip install elatentlpips "setuptools<81"'  # it imports pkg_resources, which later ones lack
_FETCH = "python -c \"import elatentlpips; elatentlpips.ELatentLPIPS(encoder='sdxl')\""


class TeacherFeatures:
    """The distance of LPIPS (arXiv 1801.03924, equation 1, unit weights) with the teacher's encoder as the network.

    Both latents are given as the noisy one, with the conditional prompts. No noise is added: the same noise on both
    would hide small differences, and its draw would have to be part of a resumed state. All blocks count alike. Runs in
    the caller's autocast. Freezes ``teacher``, in place.
    """

    name = "teacher"

    def __init__(self, teacher: Teacher, timestep: int = TEACHER_TIMESTEP) -> None:
        self.teacher = teacher.eval().requires_grad_(False)
        self.timestep = timestep

    def __call__(self, predicted: Tensor, clean: Tensor, mask: Tensor, masked: Tensor) -> Tensor:
        """Scaled latents (N, 4, h, w), mask (N, 1, h, w) and masked image's latent (N, 4, h, w) -> the batch's mean.

        Gradients reach ``predicted`` alone. Raises UsageError for a latent size that the teacher cannot halve.
        """
        with torch.no_grad():
            references = self._features(clean, mask, masked)
        features = self._features(predicted, mask, masked)
        return torch.stack([unit_distance(*pair) for pair in zip(features, references, strict=True)]).mean()

    def _features(self, latent: Tensor, mask: Tensor, masked: Tensor) -> list[Tensor]:
        """The outputs of the down blocks and of the mid block."""
        dtype = self.teacher.embedding_layer.weight.dtype
        sample = torch.cat([latent.to(dtype), mask.to(dtype), masked.to(dtype)], dim=1)
        ids = torch.arange(self.teacher.config.num_prompts, device=sample.device).expand(len(sample), -1)
        timesteps = torch.full((len(sample),), self.timestep, device=sample.device)
        return self.teacher.encode(sample, timesteps, ids)


def unit_distance(features: Tensor, references: Tensor) -> Tensor:
    """Squared distance of the channel vectors (N, C, h, w), each at unit length, mean over positions; in [0, 4]."""

    def unit(x: Tensor) -> Tensor:
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        return x * (x.square().sum(dim=1, keepdim=True) + 1e-10).rsqrt()

    return (unit(features) - unit(references)).square().sum(dim=1).mean()


class ELatentLPIPS:
    """E-LatentLPIPS (arXiv 2405.05967) for SDXL's latents, whose scale is ours, with augmentation ``bg``, in float32.

    Every call draws an augmentation from PyTorch's global generator. On CUDA the package compiles its resampling when
    first called, so a first call is made here. Nothing is downloaded. ``rescale``, the package's ``normalize``,
    multiplies by 0.13025, which scaled latents have behind them; upstream does so all the same.

    Raises MachineError when the package or its weights are not there, or do not work.
    """

    name = "elatentlpips"

    def __init__(self, device: torch.device, rescale: bool = False) -> None:
        self._rescale = rescale
        if missing := missing_elatentlpips():
            raise MachineError(missing)
        try:
            with contextlib.redirect_stdout(sys.stderr):  # it prints, and stdout is for results
                package = importlib.import_module("elatentlpips")
                network = package.ELatentLPIPS(encoder="sdxl", augment="bg", verbose=False)
                self.network = network.eval().requires_grad_(False).to(device)
                with torch.random.fork_rng([device] if device.type == "cuda" else []):
                    blank = torch.zeros(1, 4, 16, 16, device=device)
                    self(blank, blank, blank, blank)
        except Exception as error:  # a foreign package: damaged weights, no compiler, an older PyTorch's format
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise MachineError(
                f"elatentlpips does not work on {device} ({reason})",
                f"delete ckpt and run {_FETCH}, install it again by {_INSTALL}, or choose the distance teacher",
            ) from error

    def __call__(self, predicted: Tensor, clean: Tensor, mask: Tensor, masked: Tensor) -> Tensor:
        """As ``TeacherFeatures``; mask and masked image play no part."""
        with torch.autocast(predicted.device.type, enabled=False):
            distance: Tensor = self.network(predicted.float(), clean.detach().float(), normalize=self._rescale)
        return distance.mean()


def missing_elatentlpips() -> str:
    """What E-LatentLPIPS lacks here and the command that gets it, or "". Imports and downloads nothing."""
    if importlib.util.find_spec("elatentlpips") is None:
        return f"the package elatentlpips is not installed; run: {_INSTALL}"
    absent = [str(path) for path in ELATENTLPIPS_FILES if not path.is_file()]
    return f"{Path.cwd()} lacks elatentlpips' weights {', '.join(absent)}; run there: {_FETCH}" if absent else ""


LatentDistance = TeacherFeatures | ELatentLPIPS


def choose_distance(name: str, teacher: Teacher, rescale: bool = False) -> LatentDistance:
    """The distance called ``teacher`` or ``elatentlpips``, on the teacher's device.

    ``auto`` is E-LatentLPIPS if its package and weights are there, else the teacher's; the ``name`` of the result says
    which. Raises MachineError as ``ELatentLPIPS``.
    """
    if name == "elatentlpips" or (name == "auto" and not missing_elatentlpips()):
        return ELatentLPIPS(teacher.embedding_layer.weight.device, rescale)
    return TeacherFeatures(teacher)
