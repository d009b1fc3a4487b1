"""What decides a training's result, as small frozen dataclasses: from presets, a TOML file and flags.

Saved beside the weights as ``recipe.toml``, which ``train --config`` reads back. Holds no PyTorch, so that a
mistake is reported at once. What does not change the result (where, how often saved) is ``RunOptions``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from ..calibration.ranges import METHODS
from ..data.masks import PRESETS
from ..errors import UsageError
from ..model.config import StudentConfig, TeacherConfig
from ..options import STAGES
from ..spec import LATENT_DOWNSCALE, NOISE_OFFSET
from ..toml import parse_toml

TERMS = ("coarse", "fine", "task", "perceptual")

_T = TypeVar("_T")


@dataclass(frozen=True)
class DataRecipe:
    """``pictures`` are encoded once with ``masks_per_picture`` masks each; 0 pictures: all there are, once.

    ``cache`` off encodes anew for every sample instead: nothing on disk, other crops and masks each time, slower.
    ``coverage``: least and most of a picture that a drawn mask covers. ``min_scale``: a crop's side is at least this
    share of the picture's shorter side.
    """

    cache: bool = True
    pictures: int = 0
    masks_per_picture: int = 1
    min_scale: float = 0.5
    flip: bool = True
    masks: tuple[str, ...] = tuple(PRESETS)
    coverage: tuple[float, float] = (0.05, 0.5)


@dataclass(frozen=True)
class NoiseRecipe:
    """``timesteps``: ``logit-normal`` (Esser et al., arXiv 2403.03206, section 3.1) or ``uniform``; a batch takes one
    of each equal share of the distribution. ``prompt_dropout``: share of samples on the unconditional branch."""

    timesteps: str = "logit-normal"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    offset: float = NOISE_OFFSET
    prompt_dropout: float = 0.1


@dataclass(frozen=True)
class LossRecipe:
    """``terms`` that enter the total, and the paper's coefficients of ``losses.total_loss``.

    ``distance`` is the perceptual one: ``auto``, ``teacher`` or ``elatentlpips``. ``hole_weight`` multiplies the noise
    error in the hole. ``velocity_limit``: the noise error is weighted by 1 / alpha-bar up to this, as predicting the
    velocity would (Salimans and Ho, arXiv 2202.00512, section 4); 0 weighs all timesteps alike. ``guidance`` is what
    stage ``guidance`` distils.
    """

    terms: tuple[str, ...] = TERMS
    distillation: float = 0.01
    task: float = 0.5
    perceptual: float = 0.5
    distance: str = "auto"
    hole_weight: float = 1.0
    velocity_limit: float = 0.0
    guidance: float = 2.0


@dataclass(frozen=True)
class OptimiserRecipe:
    """``batch`` samples a step, over all processes and micro-batches together. The learning rate rises over
    ``warmup`` steps and falls by half a cosine to ``final_rate`` of itself. ``batch_norm``: ``batch`` normalises by
    the batch's statistics, ``running`` by the stored ones, which then stay as they are. ``identity_start``: a fresh
    student's lambda blocks start as the identity, see ``networks.identity_start``."""

    steps: int = 100_000
    batch: int = 16
    learning_rate: float = 2e-4
    warmup: int = 1000
    final_rate: float = 0.01
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    ema_decay: float = 0.9999
    precision: str = "bf16"
    batch_norm: str = "batch"
    identity_start: bool = False


@dataclass(frozen=True)
class Int8Recipe:
    """Stage ``int8``: the ``blocks`` that are rounded, by the names of ``calibration.blocks``. The ranges of their
    inputs are found by a method of ``calibration.ranges`` on ``range_batches`` batches, before the first step."""

    blocks: tuple[str, ...] = ()
    ranges: str = "mse"
    range_batches: int = 16


@dataclass(frozen=True)
class Recipe:
    """All of one stage. Raises UsageError for values that make no training."""

    stage: str = "student"
    seed: int = 0
    student: StudentConfig = field(default_factory=StudentConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    data: DataRecipe = field(default_factory=DataRecipe)
    noise: NoiseRecipe = field(default_factory=NoiseRecipe)
    losses: LossRecipe = field(default_factory=LossRecipe)
    optimiser: OptimiserRecipe = field(default_factory=OptimiserRecipe)
    int8: Int8Recipe = field(default_factory=Int8Recipe)

    def __post_init__(self) -> None:
        o, n, d, losses = self.optimiser, self.noise, self.data, self.losses
        _among("stage", self.stage, STAGES)
        _among("noise.timesteps", n.timesteps, ("logit-normal", "uniform"))
        _among("optimiser.precision", o.precision, ("fp32", "bf16", "fp16"))
        _among("optimiser.batch_norm", o.batch_norm, ("batch", "running"))
        _among("losses.distance", losses.distance, ("auto", "teacher", "elatentlpips"))
        _among("int8.ranges", self.int8.ranges, tuple(METHODS))
        for term in losses.terms:
            _among("losses.terms", term, TERMS)
        for preset in d.masks:
            _among("data.masks", preset, tuple(PRESETS))
        if not losses.terms or not d.masks:
            raise UsageError("losses.terms and data.masks need at least one name each")
        for name, value, least in (
            ("seed", self.seed, 0),
            ("optimiser.steps", o.steps, 1),
            ("optimiser.batch", o.batch, 1),
            ("optimiser.warmup", o.warmup, 0),
            ("data.pictures", d.pictures, 0),
            ("data.masks_per_picture", d.masks_per_picture, 1),
            ("int8.range_batches", self.int8.range_batches, 1),
        ):
            if value < least:
                raise UsageError(f"{name} is {value}: give {least} or more")
        for name, share, low, high in (
            ("noise.prompt_dropout", n.prompt_dropout, 0.0, 1.0),
            ("optimiser.ema_decay", o.ema_decay, 0.0, 1.0),
            ("optimiser.final_rate", o.final_rate, 0.0, 1.0),
            ("data.min_scale", d.min_scale, 0.01, 1.0),
            ("data.coverage[0]", d.coverage[0], 0.0, d.coverage[1]),
            ("data.coverage[1]", d.coverage[1], d.coverage[0], 1.0),
        ):
            if not low <= share <= high:
                raise UsageError(f"{name} is {share}: give a number from {low} to {high}")
        for name, number in (
            ("optimiser.learning_rate", o.learning_rate),
            ("optimiser.max_grad_norm", o.max_grad_norm),
            ("noise.logit_std", n.logit_std),
            ("losses.hole_weight", losses.hole_weight),
        ):
            if not (math.isfinite(number) and number > 0):
                raise UsageError(f"{name} is {number}: give a number above 0")
        if self.stage == "guidance" and not (math.isfinite(losses.guidance) and losses.guidance > 1):
            raise UsageError(f"losses.guidance is {losses.guidance}: there is nothing to distil unless it is above 1")
        if self.stage == "int8":
            if o.batch_norm != "running":
                raise UsageError(
                    "optimiser.batch_norm is 'batch': stage int8 trains what export folds, so use 'running'"
                )
            if o.precision == "bf16":
                raise UsageError("optimiser.precision is 'bf16', too coarse to tell INT8 steps: use fp32 or fp16")

    @property
    def resolution(self) -> int:
        """Side of the pictures, in pixels."""
        return LATENT_DOWNSCALE * self.student.latent_size


def published_recipe(stage: str) -> Recipe:
    """What a stage of the published network starts from; a trained student needs little to get used to INT8."""
    if stage != "int8":
        return Recipe(stage)
    gentle = OptimiserRecipe(
        steps=2000, learning_rate=2e-5, warmup=100, ema_decay=0.99, precision="fp32", batch_norm="running"
    )
    return Recipe(stage, optimiser=gentle)


@dataclass(frozen=True)
class RunOptions:
    """What may change from one start to the next without changing the result beyond rounding.

    ``micro_batch`` samples go through the network at a time in each process; 0: as many as there are for it.
    ``workers`` processes draw samples. ``keep`` checkpoints are kept. 0 for ``sample_every`` draws no pictures.
    ``device`` ``auto`` is the GPU if there is one. ``fsdp`` shards the network over the processes.
    """

    micro_batch: int = 0
    gradient_checkpointing: bool = False
    save_every: int = 250
    keep: int = 3
    log_every: int = 20
    sample_every: int = 1000
    workers: int = 1
    device: str = "auto"
    fsdp: bool = False

    def __post_init__(self) -> None:
        _among("device", self.device, ("auto", "cpu", "cuda"))
        least = {"micro_batch": 0, "save_every": 1, "keep": 1, "log_every": 1, "sample_every": 0, "workers": 1}
        for name, lowest in least.items():
            if getattr(self, name) < lowest:
                raise UsageError(f"{name} is {getattr(self, name)}: give {lowest} or more")



@dataclass(frozen=True)
class Inputs:
    """What a stage is given: pictures and their masks, a folder of encoded ones, and files of weights.

    ``images`` and ``masks`` as ``sources.open_pictures`` takes them, "" for none.
    """

    images: str = ""
    masks: str = ""
    latents: Path | None = None
    vae: Path | None = None
    teacher: Path | None = None
    student: Path | None = None


def _among(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise UsageError(f"{name} is {value!r}: use {', '.join(known)}")


def with_values(recipe: _T, values: Mapping[str, Any], where: str = "") -> _T:
    """``recipe`` with ``values`` in place of its own: nested mappings, as a TOML file has them.

    Raises UsageError for a name that is not there or a value of another type.
    """
    fields = {f.name: getattr(recipe, f.name) for f in dataclasses.fields(recipe)}  # type: ignore[arg-type]
    changed: dict[str, Any] = {}
    for name, value in values.items():
        shown = f"{where}{name}"
        if name not in fields:
            raise UsageError(f"the recipe has no {shown}: it has {', '.join(where + f for f in fields)}")
        old = fields[name]
        if dataclasses.is_dataclass(old):
            if not isinstance(value, Mapping):
                raise UsageError(f"{shown} is {value!r}: it is a section, such as [{shown}] in a TOML file")
            changed[name] = with_values(old, value, f"{shown}.")
        else:
            changed[name] = _like(shown, old, value)
    return dataclasses.replace(recipe, **changed)  # type: ignore[type-var]


def _like(shown: str, old: Any, value: Any) -> Any:
    if isinstance(old, tuple) and isinstance(value, (list, tuple)):
        return tuple(_like(shown, old[0] if old else "", v) for v in value)  # an empty one is a list of names
    if isinstance(old, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not type(old):
        raise UsageError(f"{shown} is {value!r}: give {_TYPES[type(old)]}, such as {old!r}")
    return value


_TYPES = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", tuple: "a list"}


def parse_setting(text: str) -> dict[str, Any]:
    """``section.name=value`` as nested mappings; the value as in TOML, a bare word being a text.

    Raises UsageError for another form.
    """
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise UsageError(f"--set {text!r} sets nothing: write section.name=value, such as optimiser.steps=2000")
    parsed: Any
    try:
        parsed = parse_toml(f"value = {value}")["value"]
    except ValueError:
        parsed = value.strip()
    for part in reversed(name.strip().split(".")):
        parsed = {part: parsed}
    return dict(parsed)


def recipe_toml(recipe: Recipe) -> str:
    """``recipe`` as the TOML that ``read_toml`` reads."""
    import tomli_w

    return tomli_w.dumps(dataclasses.asdict(recipe))
