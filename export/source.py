"""What is exported: finds a checkpoint, its configuration and its VAE, and loads both in float32.

SOURCE is a file of student weights, or the name of the bundled model. Nothing is downloaded, and no pickle
runs code. Module level imports no PyTorch, so that a bad path is reported at once.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field
from typing_extensions import NotRequired, TypedDict

from ..bundle.bundle import ASSETS, BUNDLED
from ..checkpoints.network_names import STUDENT, network_tensors, refuse_other_network
from ..checkpoints.weights_file import open_weights
from ..checkpoints.weights_metadata import find_guidance
from ..documents import JsonObject, read_document
from ..errors import BundleError, MachineError, UsageError
from ..spec import MAX_LATENT_CHANNELS
from ..system.files import sha256_file

if TYPE_CHECKING:
    from ..model import Student, StudentConfig

AnyPath = str | os.PathLike[str]

VAE_CONFIG = "config.json"
VAE_WEIGHTS = (  # as diffusers writes them, the first that is there; weights of FP16 alone are read as well
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.bin",
    "diffusion_pytorch_model.fp16.safetensors",
    "diffusion_pytorch_model.fp16.bin",
)
# How diffusers called the parts of the autoencoder's attention before its version 0.13.
_OLDER_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}

_Layers = Annotated[int, Field(strict=True, ge=1, le=16)]
_Channels = Annotated[int, Field(strict=True, ge=1, le=1 << 14)]  # more would only take time and memory to build


class VaeConfig(TypedDict):
    """What a VAE's ``config.json`` must say: an autoencoder that reduces images eightfold.

    diffusers' own default of the scaling factor is another model's, so that its absence is no answer.
    """

    _class_name: Literal["AutoencoderKL"]
    latent_channels: Annotated[int, Field(strict=True, ge=1, le=MAX_LATENT_CHANNELS)]
    block_out_channels: Annotated[list[_Channels], Field(min_length=4, max_length=4)]
    layers_per_block: NotRequired[_Layers]
    in_channels: NotRequired[_Channels]
    out_channels: NotRequired[_Channels]
    norm_num_groups: NotRequired[_Channels]
    shift_factor: NotRequired[None]
    scaling_factor: Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]


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
    latent_channels: int
    distilled_guidance: float | None = None

    def provenance(self) -> dict[str, Any]:
        """For ``bundle.json``: file names and SHA-256, no paths."""
        return {
            "checkpoint": {"file": self.checkpoint.name, "sha256": sha256_file(self.checkpoint)},
            "vae": {"file": self.vae_weights.name, "sha256": sha256_file(self.vae_weights)},
        }


def find_source(
    source: AnyPath, vae: AnyPath | None, config: AnyPath | None, distilled_guidance: float | None = None
) -> Source:
    """Locate everything before anything large is read.

    The configuration is ``config``, else the first of ``<stem>.json``, ``student.json`` and ``config.json``
    beside the checkpoint (a diffusers configuration there is passed over), else the published one. A bundled
    model brings its own VAE unless ``vae`` names another. ``distilled_guidance`` as in ``weights_metadata``.

    Raises:
        UsageError: SOURCE or the VAE is no such thing, or the checkpoint notes another guidance.
        BundleError: the checkpoint is damaged, or another network. MachineError: a file is missing or cannot be read.
    """
    bundled = source if isinstance(source, str) and source in BUNDLED else None
    checkpoint = Path(source)
    if bundled is not None:
        checkpoint = ASSETS / bundled / "checkpoint" / "student.safetensors"
        vae = checkpoint.parent / "vae" if vae is None else vae
    if checkpoint.is_dir():
        raise UsageError(f"{checkpoint} is a folder: name the file of student weights in it")
    if not checkpoint.is_file():
        raise MachineError(
            f"there is no checkpoint {checkpoint}: name a file of student weights, or one of "
            f"{', '.join(BUNDLED)}, or run `moebius-edge download places2`"
        )
    refuse_other_network(checkpoint, network_tensors(checkpoint, open_weights(checkpoint).content, []), STUDENT)
    if vae is None:
        raise UsageError(f"{checkpoint} needs an autoencoder: add --vae DIR, a diffusers VAE folder")
    vae_weights, autoencoder = find_vae(Path(vae))
    guidance = find_guidance(checkpoint, distilled_guidance)
    config = _find_config(checkpoint, config)
    numbers = float(autoencoder["scaling_factor"]), int(autoencoder["latent_channels"])
    return Source(bundled, checkpoint, config, Path(vae), vae_weights, *numbers, guidance)


def load_config(source: Source) -> StudentConfig:
    """The student's configuration. Raises UsageError for a file that does not describe one, or not one for the VAE."""
    from ..model import StudentConfig

    config = StudentConfig()
    if source.config is not None:
        try:
            config = StudentConfig.from_dict(_read_config(source.config))
        except (UsageError, BundleError) as error:
            raise type(error)(f"{source.config}: {error}") from None
    if config.latent_channels != source.latent_channels:
        channels = f"latents of {config.latent_channels} channels, but the autoencoder {source.vae} makes"
        problem = f"the student works on {channels} {source.latent_channels}"
        raise UsageError(problem, "name the autoencoder that it was trained with, --vae DIR")
    return config


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


def load_vae(source: Source) -> Any:
    """``open_vae`` of the source's folder."""
    return open_vae(source.vae)


def open_vae(folder: Path) -> Any:
    """The diffusers ``AutoencoderKL`` in ``folder``, in float32 and evaluation mode.

    Raises:
        MachineError: the folder or its weights are missing.
        UsageError: the folder holds another kind of autoencoder.
        BundleError: its weights are damaged, unsafe, incomplete or not finite.
    """
    import torch
    from diffusers import AutoencoderKL

    from ..model import load_checkpoint

    weights, _ = find_vae(folder)
    try:
        with torch.device("meta"):  # takes no memory before the weights are known to fit
            vae = AutoencoderKL.from_config(_read_config(folder / VAE_CONFIG))
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


def find_vae(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The weights' file and the configuration of a diffusers VAE folder."""
    if not (folder / VAE_CONFIG).is_file():
        remedy = "name a diffusers AutoencoderKL folder, `moebius-edge download places2` fetches the published one"
        raise MachineError(f"there is no VAE in {folder}, which has no {VAE_CONFIG}", remedy)
    remedy = "name the diffusers folder of the student's own VAE (the published scaling_factor is 0.13025)"
    config: dict[str, Any] = read_document(folder / VAE_CONFIG, VaeConfig, UsageError, remedy)
    for name in VAE_WEIGHTS:
        if (folder / name).is_file():
            return folder / name, config
    raise MachineError(f"{folder} holds no weights, neither {' nor '.join(VAE_WEIGHTS)}: copy or download it again")


def _find_config(checkpoint: Path, given: AnyPath | None) -> Path | None:
    if given is not None:
        return Path(given)
    beside = (checkpoint.with_suffix(".json"), *map(checkpoint.with_name, ("student.json", "config.json")))
    return next((path for path in beside if path.is_file() and "_class_name" not in _read_config(path)), None)


def _read_config(path: Path) -> dict[str, Any]:
    config: dict[str, Any] = read_document(path, JsonObject, UsageError, "mend it or name another file")
    return config
