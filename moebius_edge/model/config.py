"""The shapes of the student and of the teacher, as small frozen dataclasses that travel as JSON.

The defaults are the published checkpoints'. Holds no PyTorch and builds nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any

from pydantic import ConfigDict, Field
from typing_extensions import Self

from ..documents import Number, check_document
from ..errors import BundleError, UsageError
from ..spec import LATENT_CHANNELS, MAX_LATENT_CHANNELS, NUM_PROMPTS

GROUPS = 32  # of every group norm; all channel counts are multiples of it

# The bounds are far above any network's: a file with larger values would only take time and memory.
Width = Annotated[int, Field(strict=True, ge=GROUPS, le=1 << 14, multiple_of=GROUPS)]
Widths = Annotated[tuple[Width, ...], Field(min_length=2, max_length=8)]
Size = Annotated[int, Field(strict=True, ge=1, le=1024)]
Embedding = Annotated[int, Field(strict=True, ge=1, le=1 << 16)]


@dataclass(frozen=True)
class NetworkConfig:
    """What student and teacher have in common.

    ``block_out_channels``: channels per level, finest first. ``num_heads``: heads at every level, so the head
    dimension is channels / heads. ``cross_attention_dim``: width of a projected prompt, which ``encoder_hid_proj``
    makes from ``prompt_embedding_dim``. ``num_prompts``: prompts per branch; the embedding has two branches.
    ``layers_per_block``: resnets per down block; an up block has one more. ``latent_channels``: the autoencoder's.

    Raises ValueError where the fields together make no network.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    block_out_channels: Widths = (320, 640, 1280)
    num_heads: Size = 8
    cross_attention_dim: Embedding = 768
    prompt_embedding_dim: Embedding = 3072
    num_prompts: Size = NUM_PROMPTS
    layers_per_block: Annotated[int, Field(strict=True, ge=1, le=16)] = 2
    latent_channels: Annotated[int, Field(strict=True, ge=1, le=MAX_LATENT_CHANNELS)] = LATENT_CHANNELS

    def __post_init__(self) -> None:
        for width in self.block_out_channels:
            if width % self.num_heads:
                raise ValueError(f"{width} channels do not divide into {self.num_heads} heads")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The configuration in ``values``; absent keys are as published. BundleError for what is no such thing."""
        if cls is StudentConfig and "gate_rank" in values:
            problem = "it describes a teacher, and a student is wanted"
            raise UsageError(problem, "teachers are for `moebius-edge train --teacher FILE`")
        remedy = "correct it, or run `pip install --upgrade moebius-edge` if a newer version wrote it"
        config: Self = check_document(dict(values), cls, "model configuration", BundleError, remedy)
        return config

    def to_dict(self) -> dict[str, Any]:
        """What ``from_dict`` reads, with JSON types only."""
        return {**asdict(self), "block_out_channels": list(self.block_out_channels)}


@dataclass(frozen=True)
class StudentConfig(NetworkConfig):
    """The Moebius student. ``StudentConfig()`` is the published one (226 041 531 parameters).

    ``latent_size``: side of the one latent grid that the weights serve. ``mix_ffn_ratio``: the Mix-FFN works on
    2 * ratio * channels. ``window``: side of the Local-lambda kernel, odd.
    """

    latent_size: Size = 64
    mix_ffn_ratio: Annotated[Number, Field(ge=1 / GROUPS, le=64)] = 2.5
    window: Annotated[int, Field(strict=True, ge=1, le=255)] = 15

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window % 2 == 0:
            raise ValueError(f"window {self.window} has no centre, expected an odd number")
        coarsest = 2 ** (len(self.block_out_channels) - 1)
        if self.latent_size % coarsest:
            raise ValueError(f"latent_size {self.latent_size} does not halve per level, expected {coarsest} * n")

    @property
    def deep_channels(self) -> int:
        """Channels of what enters the last up block from below."""
        return self.block_out_channels[1]


@dataclass(frozen=True)
class TeacherConfig(NetworkConfig):
    """The PixelHacker teacher. ``TeacherConfig()`` is the published one (862 251 708 parameters).

    ``gate_rank`` is the width between the two layers of the decay gate. The teacher takes any latent size that halves
    cleanly at each level.
    """

    block_out_channels: Widths = (320, 640, 1280, 1280)
    gate_rank: Size = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        for width in self.block_out_channels:
            if width % (2 * self.num_heads):
                raise ValueError(f"{width} channels do not give {self.num_heads} heads keys of half width")
