"""``quantise_bundle``: a float32 bundle and pictures -> an INT8 bundle that has passed its gate, or nothing at all.

Record, find the recipe, write the files, and judge the very files that will run, on pictures that calibration has not
seen. What was recorded and measured on the way lies in a folder of its own, so that an interrupted export goes on, and
one with another floor or recipe does not start anew. Needs no PyTorch.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx
import onnxruntime

from .. import __version__
from ..bundle import Bundle, write_bundle
from ..errors import BundleError, QualityError, UsageError
from ..export.precision import FLOAT32_COMPONENTS, to_float16
from ..export.trt_rules import problems
from ..files import atomic_directory
from ..runtimes.ort import OrtRuntime
from .cases import HELD_OUT_CASES, make_cases, part
from .kernels import integer_kernels
from .pictures import open_calibration
from .quantise import check_target, quantised_nodes
from .quantiser import Quantiser
from .ranges import METHODS
from .recipe import Recipe
from .recording import Settings, record
from .search import Sensitivity, choose_recipe, measure_sensitivity
from .speed import DenoiserRuntime, compare_speed, fastest_device
from .trials import Figures, Trials, mean_hole_psnr_db

RECIPE_FILE = "recipe.json"
MIN_PSNR_DB = 30.0  # in the hole, of the worst held-out case
SEARCH_CASES, SEARCH_STEPS = 2, 5
_REST = {"tensorrt": "float16", "cpu": "float32"}  # what is not quantised

Tell = Callable[[str, float | None], None]
Note = Callable[[str], None]


@dataclass(frozen=True)
class Int8Options:
    """How to quantise; absent values are the bundle's or a search's.

    ``data`` and ``masks`` as for ``open_calibration``; ``recipe`` is a file that spares the search; ``ranges`` is one of
    ``ranges.METHODS``, ``target`` one of ``quantise.TARGETS``; ``folder`` keeps what was recorded and measured.
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
        UsageError: an option or the pictures are unusable, or ``output`` may not be replaced; a recipe names blocks that
            the model does not have; a range is zero or not finite.
        MachineError: a package or a file is missing, or something cannot be written.
        BundleError: the reference is not in float32, or something it computes is not finite.
        QualityError: the gate was missed; nothing was saved.
    """
    if reference.precision != "float32":
        raise UsageError(f"bundle {reference.path} is in {reference.precision}: INT8 is made of a float32 bundle")
    check_target(options.target)
    if options.ranges not in METHODS:
        raise UsageError(f"unknown range method {options.ranges!r}: choose one of {', '.join(METHODS)}")
    given = None if options.recipe is None else Recipe.load(options.recipe)
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
        if given is not None:
            given.check(block.name for block in quantiser.blocks)
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
                recipe = choose_recipe(
                    quantiser, known, trials, options.min_psnr_db, options.folder, _bar(progress)
                )
        recipe.save(options.folder / RECIPE_FILE)
        progress("quantise", None)
        card = _write(folder, reference, quantiser, recipe, options, name)
        write_bundle(folder, gate={}, **card)  # provisional, for the runtime reads a bundle
        candidate = Bundle.load(folder, verify=False)
        cases = make_cases(held_out, max(HELD_OUT_CASES, len(held_out)), reference.resolution, options.seed + 1)
        with Trials(reference, cases, steps, options.guidance) as trials, OrtRuntime(candidate) as runtime:
            figures = trials.runtime(runtime, "gate, held-out pictures", _bar(progress))
        if min(f.hole_psnr_db for f in figures) < options.min_psnr_db:
            known = known or sensitivity(sorted(recipe.chosen))
            raise _missed(figures, recipe, known, options)
        card["int8"]["blocks"] = _table(quantiser, recipe, known)
        card["int8"]["speed"] = _speed(reference, candidate, options.target, progress)
        for text in _advice(card["int8"]):
            note(text)
        progress("write bundle.json", None)
        gate = _gate(figures, options.min_psnr_db, {"steps": steps, "guidance": settings.resolved(reference).guidance})
        write_bundle(folder, gate=gate, **card)
    return Bundle.load(Path(output), verify=False)


def _write(
    folder: Path, reference: Bundle, quantiser: Quantiser, recipe: Recipe, options: Int8Options, name: str | None
) -> dict[str, Any]:
    """The ONNX files and the recipe in ``folder``; what ``bundle.json`` says of them."""
    half = _REST[options.target] == "float16"
    islands: dict[str, Any] = dict.fromkeys(FLOAT32_COMPONENTS, "all") if half else {}
    for component in reference.components.values():
        file = folder / component.file
        if component.name == "denoiser":
            model, kept = quantiser.make(recipe, half)
            onnx.save(model, str(file))
            if half:
                islands["denoiser"] = kept
        else:
            shutil.copyfile(reference.component_path(component.name), file)
            if half and component.name not in FLOAT32_COMPONENTS:
                islands[component.name] = to_float16(file)
    products = quantised_nodes(model)
    _check(folder / reference.components["denoiser"].file, model, options.target)
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
        },
    }  # fmt: skip


def _check(file: Path, model: onnx.ModelProto, target: str) -> None:
    """The target's own rules: TensorRT's, or that every quantised product has a kernel in integers."""
    if target == "cpu":
        integer_kernels(file)
    elif wrong := problems(model):
        raise BundleError(f"{file.name} is not for TensorRT: {wrong[0]}: this is a bug, please report it")


def _gate(figures: Sequence[Figures], floor: float, settings: dict[str, Any]) -> dict[str, Any]:
    """The worst case's figures, the mean in the hole, and every case's."""
    worst = min(figures, key=lambda f: f.hole_psnr_db)
    drift = [max(values) for values in zip(*(f.latent_rms_drift for f in figures), strict=True)]
    return {
        "hole_psnr_db": worst.hole_psnr_db,
        "hole_ssim": min(f.hole_ssim for f in figures),
        "mean_hole_psnr_db": mean_hole_psnr_db(figures),
        "psnr_db": min(f.psnr_db for f in figures),
        "ssim": min(f.ssim for f in figures),
        "latent_rms_drift": drift,
        "min_psnr_db": floor,
        "cases": [{key: value for key, value in asdict(f).items() if key != "latent_rms_drift"} for f in figures],
        "start": "image",
        **settings,
    }


def _missed(
    figures: Sequence[Figures], recipe: Recipe, sensitivity: Sensitivity, options: Int8Options
) -> QualityError:
    worst = min(figures, key=lambda f: f.hole_psnr_db)
    blocks = sorted(recipe.chosen, key=sensitivity.best)[:3]
    named = ", ".join(f"{block} ({sensitivity.best(block):.1f} dB alone)" for block in blocks)
    return QualityError(
        f"quality gate missed: in the hole of {worst.name} INT8 is {worst.hole_psnr_db:.2f} dB from float32, "
        f"{options.min_psnr_db:g} dB is the floor (mean of {len(figures)} held-out cases "
        f"{mean_hole_psnr_db(figures):.2f} dB); the blocks that cost most: {named}; nothing was saved: set them to false "
        f"in {options.folder / RECIPE_FILE} and pass it with --int8-recipe, give more calibration pictures, or lower "
        "--min-psnr"
    )


def _table(quantiser: Quantiser, recipe: Recipe, known: Sensitivity | None) -> list[dict[str, Any]]:
    """Each block: PSNR alone (None where it was not measured), share of the multiplications, whether quantised."""
    rows = []
    for block in quantiser.blocks:
        row: dict[str, Any] = {"name": block.name, "psnr_db": None, "share": round(quantiser.share(block), 5)}
        if known is not None and block.name in known.plain:
            row["psnr_db"] = known.plain[block.name]
            if block.name in known.smoothed:
                row["smoothed_psnr_db"] = known.smoothed[block.name]
        row["quantised"] = block.name in recipe.chosen
        if row["quantised"] and block.name in recipe.smoothed:
            row["smoothed"] = True
        rows.append(row)
    return rows


def _speed(reference: Bundle, candidate: Bundle, target: str, progress: Tell) -> dict[str, Any]:
    """INT8 beside what one would run instead: FP16 on a GPU, float32 on a CPU."""
    device = fastest_device(target)
    rows = 1 if reference.distilled_guidance is not None else 2
    with _alternative(reference, candidate.path.parent, device) as other:
        with DenoiserRuntime(candidate, device) as quantised, DenoiserRuntime(other, device) as plain:
            figures = compare_speed(quantised, plain, rows, lambda i, n: progress("speed beside INT8", i / n))
            info = quantised.info
    return {
        "other": other.precision,
        "device": device,
        "runtime": f"onnxruntime {info['version']}",
        "threads": info["threads"],
        **figures,
    }


@contextmanager
def _alternative(reference: Bundle, beside: Path, device: str) -> Iterator[Bundle]:
    """The float32 bundle, or for a GPU one in FP16 that is gone afterwards."""
    if device == "cpu":
        yield reference
        return
    folder = beside / f".{reference.name}-fp16"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir()
        for component in reference.components.values():
            shutil.copyfile(reference.component_path(component.name), folder / component.file)
        to_float16(folder / reference.components["denoiser"].file)
        write_bundle(
            folder,
            **{key: getattr(reference, key) for key in ("name", "description", "licence", "model", "resolution")},
            **{key: getattr(reference, key) for key in ("scaling_factor", "source", "tools", "defaults")},
            distilled_guidance=reference.distilled_guidance,
            precision="float16",
            gate={},
        )
        yield Bundle.load(folder, verify=False)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _advice(int8: dict[str, Any]) -> list[str]:
    """What the measured speed means for this machine."""
    speed = int8["speed"]
    other = {"float32": "fp32", "float16": "fp16"}[speed["other"]]
    if speed["speedup"] > 1:
        return []
    said = f"INT8 does not pay on this machine's {speed['device']}: {speed['int8_ms']:g} ms a call, {speed['other']} "
    said += f"{speed['other_ms']:g} ms; use --precision {other} here"
    if speed["device"] == "cpu" and int8["target"] == "tensorrt":
        said += ", or --target cpu; this file is for TensorRT and GPUs, and must be measured there"
    return [said]


def _bar(progress: Tell) -> Callable[[str, int, int], None]:
    return lambda label, done, total: progress(label, done / total if total else None)


def default_folder(output: str | os.PathLike[str]) -> Path:
    """Beside the output: what was recorded outlives an export that failed."""
    target = Path(output)
    return target.with_name(f"{target.name}.calibration")

