"""``quantise_bundle``: a float32 bundle and pictures -> an INT8 bundle that has passed its gate, or nothing at all.

Record, find the recipe, write the files, and judge the very files that will run, on pictures that calibration has not
seen. What was recorded and measured on the way lies in a folder of its own, so that an interrupted export goes on, and
one with another floor or recipe does not start anew. Needs no PyTorch.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx
import onnxruntime

from .. import __version__
from ..bundle.bundle import Bundle, write_bundle
from ..data.calibration_pictures import open_calibration
from ..errors import BundleError, UsageError
from ..export.exporter import judge_shallow, shallow_difference
from ..export.precision import FLOAT32_COMPONENTS, to_float16
from ..export.shallow import shallow_part
from ..export.trt_rules import problems
from ..runtimes import create_runtime
from ..spec import DENOISER, SHALLOW
from ..system.files import atomic_directory, refuse_loss
from .blocks import blocks
from .cases import HELD_OUT_CASES, make_cases, part
from .kernels import integer_kernels
from .quantise import check_target, quantised_nodes
from .quantiser import Quantiser
from .ranges import METHODS
from .recipe import Recipe
from .recording import Settings, record
from .search import Sensitivity, choose_recipe, measure_sensitivity
from .speed import advice, fastest_device, measure_speed
from .trials import Trials
from .verdict import block_table, gate_figures, missed

RECIPE_FILE = "recipe.json"
MIN_PSNR_DB = 30.0  # in the hole, of the worst held-out case
SEARCH_CASES, SEARCH_STEPS = 2, 5
_REST = {"tensorrt": "float16", "cpu": "float32"}  # what is not quantised

Tell = Callable[[str, float | None], None]
Note = Callable[[str], None]


@dataclass(frozen=True)
class Int8Options:
    """How to quantise; absent values are the bundle's or a search's.

    ``data`` and ``masks`` as for ``open_calibration``; ``recipe`` is a file that spares the search; ``ranges`` is one
    of ``ranges.METHODS``, ``target`` one of ``quantise.TARGETS``; ``folder`` keeps what was recorded and measured.
    """

    folder: Path
    data: str | None = None
    masks: str | None = None
    target: str = "tensorrt"
    recipe: Path | None = None
    ranges: str = "mse"
    min_psnr_db: float = MIN_PSNR_DB
    steps: int | None = None
    guidance: float | None = None
    seed: int = 0


def quantise_bundle(
    reference: Bundle,
    output: str | os.PathLike[str],
    options: Int8Options,
    *,
    name: str | None = None,
    progress: Tell,
    note: Note,
    force: bool = False,
) -> Bundle:
    """An INT8 bundle of ``reference`` (float32) in the folder ``output``.

    ``progress(stage, fraction)`` as in ``export_bundle``; ``note`` is told what a user should know.

    Raises:
        UsageError: an option or the pictures are unusable, or ``output`` may not be replaced; a recipe names blocks
            that the model does not have, or none that the target computes in INT8; a range is zero or not finite.
        MachineError: a package or a file is missing, or something cannot be written.
        BundleError: the reference is not in float32, or something it computes is not finite.
        QualityError: the gate was missed; nothing was saved.
    """
    if reference.precision != "float32":
        raise UsageError(f"bundle {reference.path} is in {reference.precision}: INT8 is made of a float32 bundle")
    check_target(options.target)
    if options.ranges not in METHODS:
        raise UsageError(f"unknown range method {options.ranges!r}: choose one of {', '.join(METHODS)}")
    refuse_loss(output, (reference.path, options.folder, options.data, options.masks), "which is used or kept")
    given = None if options.recipe is None else _load_recipe(options.recipe, reference)
    pictures, notes = open_calibration(options.data, options.masks)
    recorded, held_out = part(pictures)
    for text in notes:
        note(text)
    steps = reference.defaults["steps"] if options.steps is None else options.steps
    with atomic_directory(output, overwrite=force) as folder:
        settings = Settings(steps=steps, guidance=options.guidance, seed=options.seed, target=options.target)
        statistics = record(reference, recorded, settings, options.folder / "recorded", _bar(progress))
        progress("read the denoiser", None)
        quantiser = Quantiser(reference.component_path("denoiser"), statistics, options.ranges, options.target)
        cases = make_cases(recorded, SEARCH_CASES, reference.resolution, options.seed)

        def sensitivity(names: Sequence[str]) -> Sensitivity:
            key = {"recording": statistics.key, "ranges": options.ranges, "steps": SEARCH_STEPS, "cases": len(cases)}
            with Trials(reference, cases, SEARCH_STEPS, options.guidance) as trials:
                return measure_sensitivity(quantiser, trials, list(names), options.folder, key, _bar(progress))

        known: Sensitivity | None = None
        recipe = given
        if recipe is None:
            known = sensitivity([block.name for block in quantiser.blocks])
            with Trials(reference, cases, steps, options.guidance) as trials:
                recipe = choose_recipe(quantiser, known, trials, options.min_psnr_db, options.folder, _bar(progress))
        recipe.save(options.folder / RECIPE_FILE)
        progress("quantise", None)
        card = _write(folder, reference, quantiser, recipe, options, name)
        write_bundle(folder, gate={}, **card)  # provisional, for the runtime reads a bundle
        candidate = Bundle.load(folder, verify=False)
        cases = make_cases(held_out, max(HELD_OUT_CASES, len(held_out)), reference.resolution, options.seed + 1)
        device = fastest_device(options.target)
        quantised = create_runtime("onnxruntime", candidate, device)
        with Trials(reference, cases, steps, options.guidance) as trials, quantised as runtime:
            figures = trials.runtime(runtime, "gate, held-out pictures", _bar(progress))
            difference = shallow_difference(runtime) if SHALLOW in candidate.components else None
        if not min(f.hole_psnr_db for f in figures) >= options.min_psnr_db:  # a floor that is NaN is missed too
            known = known or sensitivity(sorted(recipe.chosen))
            raise missed(figures, recipe, known, options.min_psnr_db, options.folder / RECIPE_FILE)
        if difference is not None:
            judge_shallow(difference, "int8")
        card["int8"]["blocks"] = block_table(quantiser, recipe, card["int8"]["nodes"], known)
        card["int8"]["cases"] = [{k: v for k, v in asdict(f).items() if k != "latent_rms_drift"} for f in figures]
        card["int8"]["speed"] = measure_speed(reference, candidate, options.target, _bar(progress))
        for text in advice(card["int8"]["speed"], options.target):
            note(text)
        progress("write bundle.json", None)
        run = {"steps": steps, "guidance": settings.resolved(reference).guidance, "device": device}
        gate = gate_figures(figures, options.min_psnr_db, run)
        if difference is not None:
            gate["shallow_difference"] = difference
        write_bundle(folder, gate=gate, **card)
    return Bundle.load(Path(output), verify=False)


def _write(
    folder: Path, reference: Bundle, quantiser: Quantiser, recipe: Recipe, options: Int8Options, name: str | None
) -> dict[str, Any]:
    """The ONNX files and the recipe in ``folder``; what ``bundle.json`` says of them."""
    half = _REST[options.target] == "float16"
    islands: dict[str, Any] = dict.fromkeys(FLOAT32_COMPONENTS, "all") if half else {}
    made: dict[str, onnx.ModelProto] = {}
    for component in reference.components.values():
        file = folder / component.file
        if component.name == DENOISER:
            made[DENOISER], kept = quantiser.make(recipe, half)
            if half:
                islands[DENOISER] = kept
        elif component.name == SHALLOW:
            made[SHALLOW] = shallow_part(made[DENOISER])
        else:
            shutil.copyfile(reference.component_path(component.name), file)
            if half and component.name not in FLOAT32_COMPONENTS:
                islands[component.name] = to_float16(file)
    nodes = {network: quantised_nodes(model) for network, model in made.items()}
    products = nodes[DENOISER]
    if not products:
        raise UsageError(
            f"the recipe leaves nothing in INT8 for {options.target}: set a block to true that it computes in INT8"
        )
    for network, model in made.items():
        file = folder / reference.components[network].file
        onnx.save(model, str(file))
        _check(file, model, options.target)
    recipe.save(folder / RECIPE_FILE)
    share = sum(quantiser.share(b) for b in quantiser.blocks if set(b.nodes) & set(products))
    recorded = quantiser.statistics.key
    return {
        "name": name or f"{reference.name}-int8",
        "description": reference.description,
        "licence": reference.licence,
        "model": reference.model,
        "resolution": reference.resolution,
        "scaling_factor": reference.scaling_factor,
        "precision": "int8",
        "float32_islands": islands,
        "distilled_guidance": reference.distilled_guidance,
        "deep_channels": reference.deep_channels,
        "defaults": reference.defaults,
        "source": reference.source,
        "tools": {**reference.tools, "moebius-edge": __version__, "onnx": onnx.__version__,
                  "onnxruntime": onnxruntime.__version__},
        "int8": {
            "target": options.target,
            "rest": _REST[options.target],
            "quantised_products": len(products),
            "products": sum(len(block.nodes) for block in quantiser.blocks),
            "share_of_multiplications": round(share, 4),
            "ranges": options.ranges,
            "calibration": {"pictures": recorded["pictures"], "steps": recorded["steps"], "seed": recorded["seed"]},
            "nodes": products,
            **({"shallow_nodes": nodes[SHALLOW]} if SHALLOW in nodes else {}),
        },
    }  # fmt: skip


def _load_recipe(path: Path, reference: Bundle) -> Recipe:
    """A recipe that fits the model: told before anything is recorded."""
    recipe = Recipe.load(path)
    recipe.check(block.name for block in blocks(onnx.load(str(reference.component_path("denoiser")))))
    if not recipe.chosen:
        raise UsageError(f"recipe {path} quantises nothing: set a block to true")
    return recipe


def _check(file: Path, model: onnx.ModelProto, target: str) -> None:
    """The target's own rules: TensorRT's, or that every quantised product has a kernel in integers."""
    if target == "cpu":
        integer_kernels(file)
    elif wrong := problems(model):
        raise BundleError(f"{file.name} is not for TensorRT: {wrong[0]}: this is a bug, please report it")


def _bar(progress: Tell) -> Callable[[str, int, int], None]:
    return lambda label, done, total: progress(label, done / total if total else None)


def default_folder(output: str | os.PathLike[str]) -> Path:
    """Beside the output: what was recorded outlives an export that failed."""
    target = Path(output)
    return target.with_name(f"{target.name}.calibration")
