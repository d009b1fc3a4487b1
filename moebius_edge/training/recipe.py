"""What decides the result of a training: a recipe, made from a preset, a TOML file and flags.

pydantic checks what a user writes. The recipe is saved beside the weights as ``recipe.toml``, which ``train --config``
reads again. What does not change the result, such as the device and how often is saved, is ``RunOptions``. This module
needs no PyTorch, so that a mistake is reported at once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from ..bundle.bundle import ASSETS
from ..documents import Count, Flag, Number, Positive, check_document
from ..errors import UsageError
from ..model.config import StudentConfig, TeacherConfig
from ..spec import LATENT_DOWNSCALE, NOISE_OFFSET
from ..toml import parse_toml, read_toml

Term = Literal["coarse", "fine", "task", "perceptual"]
MaskPreset = Literal["lama-medium", "thin", "medium", "thick", "box"]
Share = Annotated[float, Field(strict=True, ge=0, le=1)]
AboveZero = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]


class _Strict:
    """A misspelt name is an error."""

    __pydantic_config__ = ConfigDict(extra="forbid")


@dataclass(frozen=True)
class DataRecipe(_Strict):
    """For ``min_scale``, ``flip``, ``masks``, ``coverage`` and ``widen`` see ``data.samples.Transform``.

    ``posterior`` says what the autoencoder gives as a latent: the mean of its distribution, or a sample of it.
    """

    posterior: Literal["mean", "sample"] = "mean"
    min_scale: Annotated[float, Field(strict=True, ge=0.01, le=1)] = 0.5
    flip: Flag = True
    masks: Annotated[tuple[MaskPreset, ...], Field(min_length=1)] = ("lama-medium",)
    coverage: tuple[Share, Share] = (0.0, 1.0)
    widen: Flag = True


@dataclass(frozen=True)
class NoiseRecipe(_Strict):
    """``timesteps``: Esser et al., arXiv 2403.03206, section 3.1.

    ``prompt_dropout`` is the unconditional share of the samples of which the data do not say the branch.
    """

    timesteps: Literal["logit-normal", "uniform"] = "logit-normal"
    logit_mean: Number = 0.0
    logit_std: AboveZero = 1.0
    offset: Number = NOISE_OFFSET
    prompt_dropout: Share = 0.1


@dataclass(frozen=True)
class LossRecipe(_Strict):
    """The ``terms`` that enter the total, and the paper's fixed coefficients: see ``losses.total_loss``.

    ``distance`` chooses the perceptual term. ``hole_weight`` multiplies the squared noise error in the hole.
    ``velocity_limit``: the noise error is weighted by 1 / alpha-bar up to this limit, as predicting the velocity would
    (Salimans and Ho, arXiv 2202.00512, section 4); 0 weighs all timesteps alike. ``guidance`` is the guidance that
    stage ``guidance`` distils. With ``rescale`` E-LatentLPIPS scales the latents, as upstream has it, a second time;
    with ``local_weights`` each process takes the adaptive weights from its own samples.
    """

    terms: Annotated[tuple[Term, ...], Field(min_length=1)] = ("coarse", "fine", "task", "perceptual")
    distillation: Number = 0.01
    task: Number = 0.5
    perceptual: Number = 0.5
    distance: Literal["auto", "teacher", "elatentlpips"] = "auto"
    hole_weight: AboveZero = 1.0
    velocity_limit: Number = 0.0
    guidance: Number = 2.0
    rescale: Flag = False
    local_weights: Flag = False


@dataclass(frozen=True)
class OptimiserRecipe(_Strict):
    """A step sees ``batch`` samples, over all micro-batches and processes together, or ``per_process`` in each.

    The learning rate rises over ``warmup`` steps and falls by half a cosine to ``final_rate`` of itself. For ``muon``
    and ``decay`` see ``optimiser``; ``betas`` are AdamW's. An ``ema_decay`` of 0 leaves the weights themselves.
    ``batch_norm`` takes statistics over all processes, or ``local`` ones, or with ``running`` uses the stored ones,
    which stay. For ``start`` see ``networks``.
    """

    steps: Positive = 100_000
    batch: Positive = 16
    per_process: Flag = False
    learning_rate: AboveZero = 2e-4
    warmup: Count = 1000
    final_rate: Share = 0.01
    weight_decay: Number = 0.01
    decay: Literal["matrices", "all"] = "matrices"
    muon: Literal["dense", "all"] = "dense"
    betas: tuple[Share, Share] = (0.9, 0.98)
    max_grad_norm: AboveZero = 1.0
    ema_decay: Share = 0.9999
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    batch_norm: Literal["batch", "local", "running"] = "batch"
    start: Literal["plain", "identity", "upstream"] = "plain"


@dataclass(frozen=True)
class Int8Recipe(_Strict):
    """The ``blocks`` that stage ``int8`` rounds; ``ranges`` finds their ranges on ``range_batches`` batches."""

    blocks: tuple[str, ...] = ()
    ranges: Literal["minmax", "percentile", "entropy", "mse"] = "mse"
    range_batches: Positive = 16


@dataclass(frozen=True)
class Recipe(_Strict):
    """All of one stage. Raises UsageError for values that do not suit the stage."""

    stage: Literal["teacher", "student", "guidance", "int8"] = "student"
    seed: Count = 0
    student: StudentConfig = field(default_factory=StudentConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    data: DataRecipe = field(default_factory=DataRecipe)
    noise: NoiseRecipe = field(default_factory=NoiseRecipe)
    losses: LossRecipe = field(default_factory=LossRecipe)
    optimiser: OptimiserRecipe = field(default_factory=OptimiserRecipe)
    int8: Int8Recipe = field(default_factory=Int8Recipe)

    def __post_init__(self) -> None:
        guidance, optimiser = self.losses.guidance, self.optimiser
        if self.stage == "guidance" and not (math.isfinite(guidance) and guidance > 1):
            raise UsageError(f"losses.guidance is {guidance}: there is nothing to distil unless it is above 1")
        if self.stage == "int8" and optimiser.batch_norm != "running":
            problem = f"optimiser.batch_norm is {optimiser.batch_norm!r}: stage int8 trains what export folds"
            raise UsageError(f"{problem}, so use 'running'")
        if self.stage == "int8" and optimiser.precision == "bf16":
            raise UsageError("optimiser.precision is 'bf16', too coarse to tell INT8 steps: use fp32 or fp16")

    @property
    def resolution(self) -> int:
        """The side of the pictures, in pixels."""
        return LATENT_DOWNSCALE * self.student.latent_size


PRESETS = ("moebius", "tiny", "upstream")


def preset_recipe(preset: str, stage: str) -> Recipe:
    """The recipe of ``preset``, one of ``PRESETS``, for ``stage``: see ``presets.toml``.

    Raises UsageError for another stage of ``upstream`` than ``student``.
    """
    if preset == "upstream" and stage != "student":
        raise UsageError(f"--preset upstream has no stage {stage}: it is how upstream trains the student, use moebius")
    values = read_toml(Path(__file__).with_name("presets.toml"))[preset]
    changes = values.pop("stages").get(stage, {})
    return with_values(Recipe(), _merged({**values, "stage": stage}, changes))


def with_values(recipe: Recipe, values: Mapping[str, Any]) -> Recipe:
    """``recipe`` with ``values`` in place of its own: nested mappings, as a TOML file has them.

    Raises UsageError for a name that does not exist, and for a value of another type or out of range.
    """
    remedy = "docs/schemas/recipe.schema.json lists the names and their values"
    checked: Recipe = check_document(_merged(asdict(recipe), values), Recipe, "recipe", UsageError, remedy)
    return checked


def _merged(old: dict[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """``old`` with the values of ``new``; where both have a mapping, these are merged in the same way."""
    merged = dict(old)
    for name, value in new.items():
        both = isinstance(old.get(name), dict) and isinstance(value, Mapping)
        merged[name] = _merged(old[name], value) if both else value
    return merged


def parse_setting(text: str) -> dict[str, Any]:
    """``section.name=value`` as nested mappings; the value is written as in TOML, and a bare word is a text.

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


@dataclass(frozen=True)
class RunOptions:
    """What may change from one start to the next without changing the result beyond rounding.

    ``micro_batch`` samples go through the network at a time in each process; 0 stands for all of them. ``workers``
    processes draw samples. ``keep`` checkpoints are kept. Scalars are means of ``log_every`` steps. 0 for
    ``sample_every`` draws no pictures.
    """

    micro_batch: int = 0
    gradient_checkpointing: bool = False
    save_every: int = 250
    keep: int = 3
    log_every: int = 25
    sample_every: int = 1000
    workers: int = 1
    device: Literal["auto", "cpu", "cuda"] = "auto"


@dataclass(frozen=True)
class Inputs:
    """What a user names: pictures and their masks, an autoencoder's folder, and files of weights.

    ``images`` and ``masks`` are as ``data.sources.open_pictures`` takes them, "" for none.
    """

    images: str = ""
    masks: str = ""
    vae: Path | None = None
    teacher: Path | None = None
    student: Path | None = None

    def with_bundled(self, stage: str) -> Inputs:
        """The same with the bundled model's autoencoder, and for stages that need a student its student as well.

        What is named stays. A student that is named is not given the bundled autoencoder: it has one of its own.
        """
        folder = ASSETS / "tiny" / "checkpoint"
        if self.student is not None or self.vae is not None:
            return self
        student = folder / "student.safetensors" if stage in ("guidance", "int8") else None
        return replace(self, vae=folder / "vae", student=student)
