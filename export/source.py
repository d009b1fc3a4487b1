"""What is exported: finds a checkpoint, its configuration and its VAE, and loads both in float32.

SOURCE is a file of student weights, or the name of the bundled model. Nothing is downloaded, and no pickle
runs code. Module level imports no PyTorch, so that a bad path is reported at once.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..bundle.bundle import ASSETS, BUNDLED
from ..checkpoints.network_names import STUDENT, network_tensors, refuse_other_network
from ..checkpoints.weights_file import open_weights
from ..errors import BundleError, MachineError, UsageError
from ..spec import LATENT_CHANNELS, LATENT_DOWNSCALE
from ..system.files import sha256_file
from .weights_metadata import find_guidance

if TYPE_CHECKING:
    from ..model import Student, StudentConfig

VAE_CONFIG = "config.json"
VAE_WEIGHTS = (  # as diffusers writes them, the first that is there; weights of FP16 alone are read as well
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.bin",
    "diffusion_pytorch_model.fp16.safetensors",
    "diffusion_pytorch_model.fp16.bin",
)
_MOST_CONFIG_BYTES = 1 << 20
# No autoencoder of this layout is larger; a larger number would only take time and memory to build.
_MOST_VAE_LAYERS, _MOST_VAE_NUMBER = 16, 1 << 14
# How diffusers called the parts of the autoencoder's attention before its version 0.13.
_OLDER_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
PUBLISHED_SCALING_FACTOR = 0.13025


@dataclass(frozen=True)
class Source:
    """The files of one model. ``config`` is None where the published configuration holds.

    ``bundled`` is the bundled model's name, None for the user's own file; ``distilled_guidance`` what its student
    predicts by itself, None where it learned none.
    """

    bundled: str | None
    checkpoint: Path
    config: Path | None
    vae: Path
    vae_weights: Path
    scaling_factor: float
    distilled_guidance: float | None = None

    def provenance(self) -> dict[str, Any]:
        """For ``bundle.json``: file names and SHA-256, no paths."""
        return {
            "checkpoint": {"file": self.checkpoint.name, "sha256": sha256_file(self.checkpoint)},
            "vae": {"file": self.vae_weights.name, "sha256": sha256_file(self.vae_weights)},
        }


def find_source(
    source: str | os.PathLike[str],
    vae: str | os.PathLike[str] | None,
    config: str | os.PathLike[str] | None,
    distilled_guidance: float | None = None,
) -> Source:
    """Locate everything before anything large is read.

    The configuration is ``config``, else the first of ``<stem>.json``, ``student.json`` and ``config.json``
    beside the checkpoint (a diffusers configuration there is passed over), else the published one. A bundled
    model brings its own VAE unless ``vae`` names another. ``distilled_guidance`` as in ``weights_metadata``.

    Raises:
        UsageError: SOURCE or the VAE is no such thing, or the checkpoint notes another guidance.
        BundleError: the checkpoint is damaged, or another network. MachineError: a file is missing or cannot be read.
    """
    if isinstance(source, str) and source in BUNDLED:
        folder = ASSETS / source / "checkpoint"
        bundled, checkpoint = source, folder / "student.safetensors"
        if not checkpoint.is_file():
            raise MachineError(
                f"the bundled model's {checkpoint} is missing: pip install --force-reinstall moebius-edge"
            )
        vae_folder = folder / "vae" if vae is None else Path(vae)
    else:
        bundled, checkpoint = None, Path(source)
        if checkpoint.is_dir():
            raise UsageError(f"{checkpoint} is a folder: name the file of student weights in it")
        if not checkpoint.is_file():
            raise MachineError(
                f"there is no checkpoint {checkpoint}: name a file of student weights, or one of "
                f"{', '.join(BUNDLED)}, or run `moebius-edge download places2`"
            )
        tensors = network_tensors(checkpoint, open_weights(checkpoint).content, [])
        refuse_other_network(checkpoint, tensors, STUDENT)
        if vae is None:
            raise UsageError(f"{checkpoint} needs an autoencoder: add --vae DIR, a diffusers VAE folder")
        vae_folder = Path(vae)
    vae_weights, scaling_factor = _find_vae(vae_folder)
    guidance = find_guidance(checkpoint, distilled_guidance)
    config_file = _find_config(checkpoint, config)
    return Source(bundled, checkpoint, config_file, vae_folder, vae_weights, scaling_factor, guidance)


def load_config(source: Source) -> StudentConfig:
    """The student's configuration. Raises UsageError for a file that does not describe one."""
    from ..model import StudentConfig

    if source.config is None:
        return StudentConfig()
    values = _read_object(source.config)
    try:
        return StudentConfig.from_dict(values)
    except (UsageError, BundleError) as error:
        raise type(error)(f"{source.config}: {error}") from None


def load_student(source: Source, config: StudentConfig) -> Student:
    """The student in float32 and evaluation mode, whatever the precision it was stored in.

    Raises as ``moebius_edge.model.load_checkpoint``.
    """
    import torch

    from ..model import build_student, load_checkpoint

    with torch.device("meta"):  # takes no memory before the weights are known to fit
        student = build_student(config)
    load_checkpoint(student, source.checkpoint)
    return student.float().eval().requires_grad_(False)


def open_vae(folder: Path) -> Any:
    """The diffusers ``AutoencoderKL`` in ``folder``, as ``load_vae``. Raises as it, MachineError if it is missing."""
    return _read_vae(folder, _find_vae(folder)[0])


def load_vae(source: Source) -> Any:
    """The diffusers ``AutoencoderKL`` in float32 and evaluation mode.

    Raises:
        UsageError: the folder holds another kind of autoencoder.
        BundleError: its weights are damaged, unsafe, incomplete or not finite.
    """
    return _read_vae(source.vae, source.vae_weights)


def _read_vae(folder: Path, weights: Path) -> Any:
    import torch
    from diffusers import AutoencoderKL

    from ..model import load_checkpoint

    try:
        with torch.device("meta"):  # takes no memory before the weights are known to fit
            vae = AutoencoderKL.from_config(_read_object(folder / VAE_CONFIG))
    except (TypeError, ValueError, LookupError, ArithmeticError, RuntimeError, AttributeError) as error:
        line = " ".join(str(error).split())
        raise UsageError(
            f"{folder / VAE_CONFIG} describes no autoencoder ({line:.200}): copy or download the folder again"
        ) from error
    load_checkpoint(vae, weights, rename=_current_name)
    return vae.float().eval().requires_grad_(False)


def _current_name(name: str) -> str:
    """The name of an autoencoder's tensor as diffusers has it today."""
    parts = name.split(".")
    if "attentions" in parts and parts[-2:-1] and parts[-2] in _OLDER_ATTENTION:
        parts[-2] = _OLDER_ATTENTION[parts[-2]]
    return ".".join(parts)


def _find_vae(folder: Path) -> tuple[Path, float]:
    """The weights' file and the scaling factor of a diffusers VAE folder, having checked what it is."""
    if not folder.is_dir():
        raise MachineError(
            f"there is no VAE folder {folder}: name a diffusers AutoencoderKL folder, "
            "`moebius-edge download places2` fetches the published one"
        )
    if not (folder / VAE_CONFIG).is_file():
        raise UsageError(f"{folder} holds no {VAE_CONFIG}: --vae names a diffusers AutoencoderKL folder")
    config = _read_object(folder / VAE_CONFIG)
    where = folder / VAE_CONFIG
    if config.get("_class_name") != "AutoencoderKL":
        raise UsageError(f"{where} describes {config.get('_class_name')!r}: --vae names a folder of an AutoencoderKL")
    if (channels := config.get("latent_channels")) != LATENT_CHANNELS:
        raise UsageError(f"{where} has {channels} latent channels, the student works on {LATENT_CHANNELS}: use its VAE")
    blocks = config.get("block_out_channels")
    if not isinstance(blocks, list) or 2 ** (len(blocks) - 1) != LATENT_DOWNSCALE:
        raise UsageError(f"{where} does not reduce images {LATENT_DOWNSCALE}-fold, block_out_channels is {blocks}")
    if config.get("shift_factor") is not None:
        raise UsageError(
            f"{where} shifts its latents by {config['shift_factor']}, which this model does not: use its VAE"
        )
    numbers = [config.get(key) for key in ("in_channels", "out_channels", "norm_num_groups")] + blocks
    layers = config.get("layers_per_block", 1)
    if not all(n is None or type(n) is int and 1 <= n <= _MOST_VAE_NUMBER for n in numbers) or (
        type(layers) is not int or not 1 <= layers <= _MOST_VAE_LAYERS
    ):
        raise UsageError(f"{where} has sizes that no autoencoder has: copy or download the folder again")
    factor = config.get("scaling_factor")  # diffusers' own default is another model's, so absence is no answer
    if not isinstance(factor, (int, float)) or isinstance(factor, bool) or not 0 < factor < float("inf"):
        raise UsageError(
            f"{where} has the scaling_factor {factor}: write the one the student was trained with into it "
            f"(the published one is {PUBLISHED_SCALING_FACTOR})"
        )
    for name in VAE_WEIGHTS:
        if (folder / name).is_file():
            return folder / name, float(factor)
    raise MachineError(f"{folder} holds no weights, neither {' nor '.join(VAE_WEIGHTS)}: copy or download it again")


def _find_config(checkpoint: Path, given: str | os.PathLike[str] | None) -> Path | None:
    if given is not None:
        return Path(given)
    beside = (
        checkpoint.with_suffix(".json"),
        checkpoint.with_name("student.json"),
        checkpoint.with_name("config.json"),
    )
    for path in beside:
        if path.is_file() and "_class_name" not in _read_object(path):
            return path
    return None


def _read_object(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MOST_CONFIG_BYTES:
            raise UsageError(f"{path} is too large for a configuration: name another file")
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise MachineError(f"cannot read {path}: {error.strerror}: check it with `ls -l {path}`") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not valid JSON ({error}): mend it or name another file") from error
    if not isinstance(data, dict):
        raise UsageError(f"{path} should hold a JSON object: mend it or name another file")
    return data
