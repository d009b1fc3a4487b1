"""``quantise_bundle``: from a float32 bundle and photographs to an INT8 bundle that has passed its gate.

It records, finds the recipe, writes the files, and judges the very files that will run on pictures that calibration
has not seen. What was recorded and measured on the way is kept in a folder of its own, so that an interrupted export
goes on, and one with another floor or recipe records nothing again. Needs no PyTorch.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx
import onnxruntime

from .. import __version__
from ..bundle.bundle import Bundle, write_bundle
from ..data.calibration_pictures import ADVISED, HELD_OUT_CASES, open_calibration
from ..data.pictures import Pictures
from ..errors import BundleError, QualityError, UsageError
from ..export.gate import judge_shallow, shallow_difference
from ..export.precision import FLOAT32_COMPONENTS, to_float16
from ..export.shallow import shallow_part
from ..export.trt_rules import problems
from ..progress import Progress, no_progress
from ..runtimes.ort import OrtRuntime
from ..spec import DENOISER, SHALLOW
from ..system.files import atomic_directory, refuse_loss
from ..system.fingerprint import ResultCache
from .blocks import Recipe, blocks
from .evaluate import CandidateEvaluator, CaseMetrics, make_cases, mean_hole_psnr_db
from .quantise import Quantiser, integer_kernels, quantised_nodes
from .record import record
from .search import Sensitivity, best_psnr_db, choose_recipe, measure_sensitivity
from .speed import advice, fastest_device, measure_speed

RECIPE_FILE = "recipe.json"
MIN_PSNR_DB = 30.0  # in the hole, of the worst held-out case
SEARCH_CASES, SEARCH_STEPS = 2, 5
_REST = {"tensorrt": "float16", "cpu": "float32"}  # what is not quantised
_INHERITED = (  # what an INT8 bundle has in common with the one that it was made from
    *("description", "licence", "model", "resolution", "scaling_factor"),
    *("distilled_guidance", "deep_channels", "defaults", "source"),
)


@dataclass(frozen=True)
class Int8Options:
    """How to quantise.

    ``data`` and ``masks`` are as for ``open_calibration``; ``recipe`` is a file that spares the search; ``ranges`` is
    one of ``ranges.METHODS``, ``target`` one of ``quantise.TARGETS``; ``cache`` is the folder that keeps what was
    recorded and measured; ``name`` is the new bundle's, and with ``force`` it replaces one that is there already.

    Raises:
        UsageError: there is no ``data``.
    """

    cache: Path
    data: str | None
    masks: str | None = None
    target: str = "tensorrt"
    recipe: Path | None = None
    ranges: str = "mse"
    min_psnr_db: float = MIN_PSNR_DB
    steps: int = 20
    guidance: float | None = None
    seed: int = 0
    name: str | None = None
    force: bool = False

    def __post_init__(self) -> None:
        if self.data is None:
            raise UsageError(
                f"INT8 is calibrated on photographs, {ADVISED} or more of the kind to fill, and none are given",
                "name their folder, as in `moebius-edge export tiny --precision int8 --calibration-data photos "
                "--output tiny-int8`",
            )


def default_cache(output: str | os.PathLike[str]) -> Path:
    """The cache beside the output, where it outlives an export that failed."""
    target = Path(output)
    return target.with_name(f"{target.name}.calibration")


def quantise_bundle(
    reference: Bundle, output: str | os.PathLike[str], options: Int8Options, progress: Progress = no_progress
) -> tuple[Bundle, list[str]]:
    """An INT8 bundle of ``reference`` (float32) in the folder ``output``, and notes for the user.

    Raises:
        UsageError: an option or the pictures are unusable, or ``output`` may not be replaced; a recipe names blocks
            that the model does not have, or none that the target computes in INT8; a range is zero or not finite.
        MachineError: a package or a file is missing, or something cannot be written.
        BundleError: the reference is not in float32, or something it computes is not finite.
        QualityError: the gate was missed; nothing was saved.
    """
    if reference.precision != "float32":
        raise UsageError(f"bundle {reference.path} is in {reference.precision}: INT8 is made of a float32 bundle")
    refuse_loss(output, (reference.path, options.cache, options.data, options.masks), "which is used or kept")
    recipe = None if options.recipe is None else _load_recipe(options.recipe, reference)
    recorded, held_out, notes = open_calibration(str(options.data), options.masks)
    with atomic_directory(output, overwrite=options.force) as folder:
        job = _Job(reference, recorded, options, progress)
        if recipe is None:
            recipe = job.find_recipe()
        recipe.save(options.cache / RECIPE_FILE)
        facts = job.write_files(folder, recipe)
        write_bundle(folder, gate={}, **facts)  # provisional, for the runtime reads a bundle
        candidate = Bundle.load(folder, verify=False)
        gate = job.judge(candidate, recipe, held_out, facts["int8"])
        facts["int8"]["speed"] = measure_speed(reference, candidate, options.target, progress)
        notes += advice(facts["int8"]["speed"], options.target)
        write_bundle(folder, gate=gate, **facts)
    return Bundle.load(Path(output), verify=False), notes


def _load_recipe(path: Path, reference: Bundle) -> Recipe:
    """The recipe in the file ``path``, which is checked before anything is recorded."""
    recipe = Recipe.load(path)
    recipe.check(block.name for block in blocks(onnx.load(str(reference.component_path(DENOISER)))))
    if not recipe.chosen:
        raise UsageError(f"recipe {path} quantises nothing", "set a block to true")
    return recipe


class _Job:
    """The steps of one quantisation: building it records, or takes up what was recorded."""

    def __init__(self, reference: Bundle, recorded: Pictures, options: Int8Options, progress: Progress) -> None:
        self.reference, self.options, self.progress = reference, options, progress
        self.cache = ResultCache(options.cache)
        settings = {"steps": options.steps, "guidance": options.guidance, "seed": options.seed}
        self.statistics = record(reference, recorded, options.target, self.cache, progress, **settings)
        progress("read the denoiser", 0, 0)
        self.quantiser = Quantiser(reference.component_path(DENOISER), self.statistics, options.ranges, options.target)
        self.cases = make_cases(recorded, SEARCH_CASES, reference.resolution, options.seed)
        self.sensitivity: Sensitivity = {}  # of the blocks that were measured

    def find_recipe(self) -> Recipe:
        """The recipe with the most multiply-adds in INT8 that stays above the floor."""
        self.measure([block.name for block in self.quantiser.blocks])
        options = self.options
        with CandidateEvaluator(self.reference, self.cases, options.steps, options.guidance) as evaluator:
            return choose_recipe(
                self.quantiser, self.sensitivity, evaluator, options.min_psnr_db, self.cache, self.progress
            )

    def measure(self, names: list[str]) -> None:
        """Measure the sensitivity of the blocks ``names``."""
        facts: dict[str, Any] = {"recording": self.statistics.facts, "ranges": self.options.ranges}
        facts |= {"steps": SEARCH_STEPS, "cases": len(self.cases)}
        with CandidateEvaluator(self.reference, self.cases, SEARCH_STEPS, self.options.guidance) as evaluator:
            search = (self.quantiser, evaluator, names, self.cache, facts, self.progress)
            self.sensitivity = measure_sensitivity(*search)

    def write_files(self, folder: Path, recipe: Recipe) -> dict[str, Any]:
        """Write the ONNX files and the recipe into ``folder``; return what ``bundle.json`` says of them."""
        self.progress("quantise", 0, 0)
        target, reference = self.options.target, self.reference
        half = _REST[target] == "float16"
        float32_operators: dict[str, Any] = dict.fromkeys(FLOAT32_COMPONENTS, "all") if half else {}
        model, kept_float32 = self.quantiser.quantise(recipe, half)
        networks = {DENOISER: model}
        if SHALLOW in reference.components:
            networks[SHALLOW] = shallow_part(model)
        for component in reference.components.values():
            file = folder / component.file
            if component.name in networks:
                onnx.save(networks[component.name], str(file))
                _check_operators(file, networks[component.name], target)
                continue
            shutil.copyfile(reference.component_path(component.name), file)
            if half and component.name not in FLOAT32_COMPONENTS:
                float32_operators[component.name] = to_float16(file)
        if half:
            float32_operators[DENOISER] = kept_float32
        recipe.save(folder / RECIPE_FILE)
        tools = {"moebius-edge": __version__, "onnx": onnx.__version__, "onnxruntime": onnxruntime.__version__}
        return {
            **{field: getattr(reference, field) for field in _INHERITED},
            "name": self.options.name or f"{reference.name}-int8",
            "precision": "int8",
            "float32_islands": float32_operators,
            "tools": {**reference.tools, **tools},
            "int8": self._int8_facts({name: quantised_nodes(network) for name, network in networks.items()}),
        }

    def _int8_facts(self, nodes: dict[str, list[str]]) -> dict[str, Any]:
        """``int8`` of ``bundle.json`` as far as the files decide it; ``nodes`` are the quantised ones by component."""
        target, quantiser, quantised = self.options.target, self.quantiser, nodes[DENOISER]
        if not quantised:
            raise UsageError(
                f"the recipe leaves nothing in INT8 for {target}", "set a block to true that it computes in INT8"
            )
        return {
            "target": target,
            "rest": _REST[target],
            "quantised_products": len(quantised),
            "products": sum(len(block.nodes) for block in quantiser.blocks),
            "share_of_multiplications": round(
                sum(quantiser.share(b) for b in quantiser.blocks if not set(quantised).isdisjoint(b.nodes)), 4
            ),
            "ranges": self.options.ranges,
            "calibration": {key: self.statistics.facts[key] for key in ("pictures", "steps", "seed")},
            "nodes": quantised,
            **({"shallow_nodes": nodes[SHALLOW]} if SHALLOW in nodes else {}),
        }

    def judge(self, candidate: Bundle, recipe: Recipe, held_out: Pictures, int8: dict[str, Any]) -> dict[str, Any]:
        """The gate's metrics of ``candidate``; adds its cases and blocks to ``int8``.

        Raises:
            QualityError: the worst case is below the floor, or the shallow part differs from the whole denoiser.
        """
        options, reference = self.options, self.reference
        number = max(HELD_OUT_CASES, len(held_out))
        cases = make_cases(held_out, number, reference.resolution, options.seed + 1)
        device = fastest_device(options.target)
        evaluator = CandidateEvaluator(reference, cases, options.steps, options.guidance)
        with evaluator, OrtRuntime(candidate, device) as runtime:
            metrics = evaluator.evaluate(runtime, "gate, held-out pictures", self.progress)
            difference = shallow_difference(runtime) if SHALLOW in candidate.components else None
        if not min(m.hole_psnr_db for m in metrics) >= options.min_psnr_db:  # a floor that is NaN is missed too
            if not self.sensitivity:
                self.measure(sorted(recipe.chosen))
            raise gate_error(metrics, recipe, self.sensitivity, options.min_psnr_db, options.cache / RECIPE_FILE)
        gate = gate_report(metrics, options.min_psnr_db)
        gate |= {"steps": options.steps, "guidance": self.statistics.facts["guidance"], "device": device}
        if difference is not None:
            judge_shallow(difference, "int8")
            gate["shallow_difference"] = difference
        int8["cases"] = [{k: v for k, v in asdict(m).items() if k != "latent_rms_drift"} for m in metrics]
        int8["blocks"] = block_table(self.quantiser, recipe, int8["nodes"], self.sensitivity)
        return gate


def _check_operators(file: Path, model: onnx.ModelProto, target: str) -> None:
    """Check TensorRT's rules, or that every quantised operator has a kernel in integers on the CPU."""
    if target == "cpu":
        integer_kernels(file)
    elif wrong := problems(model):
        raise BundleError(f"{file.name} is not for TensorRT: {wrong[0]}: this is a bug, please report it")


def gate_report(metrics: Sequence[CaseMetrics], floor: float) -> dict[str, Any]:
    """The worst metrics of all cases, and the mean in the hole."""
    return {
        **{name: min(getattr(m, name) for m in metrics) for name in ("hole_psnr_db", "hole_ssim", "psnr_db", "ssim")},
        "mean_hole_psnr_db": mean_hole_psnr_db(metrics),
        "latent_rms_drift": [max(values) for values in zip(*(m.latent_rms_drift for m in metrics), strict=True)],
        "min_psnr_db": floor,
        "cases": len(metrics),
        "start": "image",
    }


def gate_error(
    metrics: Sequence[CaseMetrics], recipe: Recipe, sensitivity: Sensitivity, floor: float, recipe_file: Path
) -> QualityError:
    """The error for a gate that was missed: the worst case, and the three blocks that cost most alone."""
    worst = min(metrics, key=lambda m: m.hole_psnr_db)
    alone = {name: best_psnr_db(sensitivity[name]) for name in recipe.chosen}
    blocks = ", ".join(f"{name} ({alone[name]:.1f} dB alone)" for name in sorted(alone, key=alone.__getitem__)[:3])
    return QualityError(
        f"quality gate missed: in the hole of {worst.name} INT8 is {worst.hole_psnr_db:.2f} dB from float32, {floor:g} "
        f"dB is the floor (mean of {len(metrics)} held-out cases {mean_hole_psnr_db(metrics):.2f} dB); the blocks that "
        f"cost most: {blocks}; nothing was saved",
        f"set them to false in {recipe_file} and pass it with --int8-recipe, give more calibration pictures, or lower "
        "--min-psnr",
    )


def block_table(
    quantiser: Quantiser, recipe: Recipe, nodes: Sequence[str], sensitivity: Sensitivity
) -> list[dict[str, Any]]:
    """Each block: its PSNR alone (None where it was not measured), its share of the multiply-adds, whether quantised.

    ``nodes`` are those that really are quantised: a recipe may name blocks that the target computes in floating point.
    """
    rows = []
    for block in quantiser.blocks:
        quantised = not set(nodes).isdisjoint(block.nodes)
        smoothed = {"smoothed": True} if quantised and block.name in recipe.smoothed else {}
        row: dict[str, Any] = {"name": block.name, "share": round(quantiser.share(block), 5), "psnr_db": None}
        rows.append(row | sensitivity.get(block.name, {}) | {"quantised": quantised} | smoothed)
    return rows
