"""The shapes of the student and of the teacher, as small frozen dataclasses that travel as JSON.

The defaults are the published checkpoints'. Holds no PyTorch and builds nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any, TypeVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from ..documents import Number, first_problem
from ..errors import BundleError, UsageError
from ..spec import NUM_PROMPTS

GROUPS = 32  # of every group norm; all channel counts are multiples of it

# The largest values that are taken, far above any network's: a file with larger ones would only take time and memory.
_MOST = {
    **{"num_heads": 1024, "cross_attention_dim": 1 << 16, "prompt_embedding_dim": 1 << 16, "num_prompts": 1024},
    **{"latent_size": 1024, "layers_per_block": 16, "window": 255, "gate_rank": 1024},
}
_MOST_LEVELS, _MOST_CHANNELS, _MOST_RATIO = 8, 1 << 14, 64

Whole = Annotated[int, Field(strict=True)]  # in a file; ``_check`` holds the bounds

_Config = TypeVar("_Config", "StudentConfig", "TeacherConfig")


@dataclass(frozen=True)
class StudentConfig:
    """The Moebius student. ``StudentConfig()`` is the published one (226 041 531 parameters).

    ``block_out_channels``: channels per level, finest first. ``num_heads``: heads at every level, so the
    head dimension is channels / heads. ``cross_attention_dim``: width of a projected prompt, which
    ``encoder_hid_proj`` makes from ``prompt_embedding_dim``. ``num_prompts``: prompts per branch; the
    embedding has two branches. ``latent_size``: side of the one latent grid the weights serve.
    ``mix_ffn_ratio``: the Mix-FFN works on 2 * ratio * channels. ``layers_per_block``: resnets per down
    block; an up block has one more. ``window``: side of the Local-lambda kernel, odd.

    Raises UsageError for values that make no network.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    block_out_channels: tuple[Whole, ...] = (320, 640, 1280)
    num_heads: Whole = 8
    cross_attention_dim: Whole = 768
    prompt_embedding_dim: Whole = 3072
    num_prompts: Whole = NUM_PROMPTS
    latent_size: Whole = 64
    mix_ffn_ratio: Number = 2.5
    layers_per_block: Whole = 2
    window: Whole = 15

    def __post_init__(self) -> None:
        _check(self)
        if self.window % 2 == 0:
            raise UsageError(f"window {self.window} has no centre; choose an odd number")
        coarsest = 2 ** (len(self.block_out_channels) - 1)
        if self.latent_size % coarsest:
            raise UsageError(f"latent_size {self.latent_size} does not halve per level; use a multiple of {coarsest}")
        ratio = self.mix_ffn_ratio
        possible = type(ratio) in (int, float) and 0 < ratio <= _MOST_RATIO
        if not possible or int(ratio * self.block_out_channels[0]) < 1:
            raise UsageError(f"mix_ffn_ratio {str(ratio)[:40]} leaves no channels or too many; the published is 2.5")

    @property
    def deep_channels(self) -> int:
        """Channels of what enters the last up block from below."""
        return self.block_out_channels[1]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> StudentConfig:
        """The configuration in ``values``; absent keys are as published. BundleError on unknown keys and types."""
        return _from_dict(cls, values)

    def to_dict(self) -> dict[str, Any]:
        """What ``from_dict`` reads, with JSON types only."""
        return {**asdict(self), "block_out_channels": list(self.block_out_channels)}


@dataclass(frozen=True)
class TeacherConfig:
    """The PixelHacker teacher. ``TeacherConfig()`` is the published one (862 251 708 parameters).

    Fields as in ``StudentConfig``; ``gate_rank`` is the width between the two layers of the decay gate.
    The teacher takes any latent size that halves cleanly at each level. Raises UsageError likewise.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    block_out_channels: tuple[Whole, ...] = (320, 640, 1280, 1280)
    num_heads: Whole = 8
    cross_attention_dim: Whole = 768
    prompt_embedding_dim: Whole = 3072
    num_prompts: Whole = NUM_PROMPTS
    layers_per_block: Whole = 2
    gate_rank: Whole = 16

    def __post_init__(self) -> None:
        _check(self)
        for channels in self.block_out_channels:
            if channels % (2 * self.num_heads):
                raise UsageError(
                    f"{channels} channels do not give {self.num_heads} heads keys of half width; "
                    f"use a multiple of {2 * self.num_heads}"
                )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TeacherConfig:
        """The configuration in ``values``; absent keys are as published. BundleError on unknown keys and types."""
        return _from_dict(cls, values)

    def to_dict(self) -> dict[str, Any]:
        """What ``from_dict`` reads, with JSON types only."""
        return {**asdict(self), "block_out_channels": list(self.block_out_channels)}


def _check(config: StudentConfig | TeacherConfig) -> None:
    channels = config.block_out_channels
    if not 2 <= len(channels) <= _MOST_LEVELS:
        raise UsageError(f"block_out_channels {channels[: _MOST_LEVELS + 1]} needs 2 to {_MOST_LEVELS} levels")
    numbers = {"block_out_channels": (channels, _MOST_CHANNELS)}
    numbers |= {name: ((getattr(config, name),), most) for name, most in _MOST.items() if hasattr(config, name)}
    for name, (values, most) in numbers.items():
        for value in values:
            if type(value) is not int or not 1 <= value <= most:
                raise UsageError(f"{name} is {str(value)[:40]}; it must be a whole number of 1 to {most}")
    for width in channels:
        if width % GROUPS:
            raise UsageError(f"{width} channels do not divide into {GROUPS} groups; use a multiple")
        if width % config.num_heads:
            raise UsageError(f"{width} channels do not divide into {config.num_heads} heads")


def _from_dict(cls: type[_Config], values: Mapping[str, Any]) -> _Config:
    if cls is StudentConfig and "gate_rank" in values:
        raise UsageError(
            "it describes a teacher, and a student is wanted: teachers are for `moebius-edge train --teacher FILE`"
        )
    try:
        return TypeAdapter(cls).validate_python(dict(values))
    except ValidationError as error:
        remedy = "correct it, or run `pip install --upgrade moebius-edge` if a newer version wrote it"
        raise BundleError(f"model configuration: {first_problem(error)[1]}: {remedy}") from None
