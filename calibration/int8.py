"""``quantise_bundle``: from a float32 bundle and photographs to an INT8 bundle that has passed its gate.

It records, finds the recipe, writes the files, and judges the very files that will run on pictures that calibration
has not seen. What was recorded and measured on the way is kept in a folder of its own, so that an interrupted export
goes on, and one with another floor or recipe records nothing again. Needs no PyTorch.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx
import onnxruntime

from .. import __version__
from ..bundle.bundle import Bundle, write_bundle
from ..data.calibration_pictures import ADVISED, HELD_OUT_CASES, open_calibration
from ..errors import BundleError, QualityError, UsageError
from ..export.autoencoder import AUTOENCODER, half_autoencoder, range_images
from ..export.exporter import MIN_PSNR_DB as FLOAT_MIN_PSNR_DB
from ..export.exporter import check_gate_runtime, judge_shallow, shallow_difference
from ..export.precision import read_model
from ..export.shallow import shallow_part
from ..export.trt_rules import problems
from ..progress import Progress, no_progress
from ..runtimes import create_runtime
from ..spec import DENOISER, SHALLOW
from ..system.files import atomic_directory, refuse_loss
from ..system.fingerprint import ResultCache
from .blocks import Recipe, blocks
from .evaluate import CandidateEvaluator, Metrics, gate_device, make_cases, mean_hole_psnr_db, measure_speed
from .quantise import Quantiser, quantised_nodes
from .record import record
from .search import MARGIN_DB, Search

RECIPE_FILE = "recipe.json"
MIN_PSNR_DB = 30.0  # in the hole, of the worst held-out case
SEARCH_CASES = 2
SEARCHES = 3  # all but the first after a gate that was missed
REST = "float16"  # what is not quantised
_INHERITED = (  # what an INT8 bundle has in common with the one that it was made from
    *("description", "licence", "model", "resolution", "scaling_factor"),
    *("distilled_guidance", "deep_channels", "latent_channels", "defaults", "source"),
)


@dataclass(frozen=True)
class Int8Options:
    """How to quantise; ``folder`` keeps what was recorded and measured, with ``force`` an older output is replaced.

    ``guidance`` is by default the bundle's own. ``data`` and ``masks`` are as for ``open_calibration``, ``recipe`` is
    a file that spares the search, ``ranges`` is one of ``int8_ranges.METHODS``, and ``gate_runtime`` what judges and
    times the files. Raises UsageError without ``data``.
    """

    folder: Path
    data: str | None
    masks: str | None = None
    recipe: Path | None = None
    ranges: str = "mse"
    min_psnr_db: float = MIN_PSNR_DB
    steps: int = 20
    guidance: float | None = None
    seed: int = 0
    force: bool = False
    gate_runtime: str = "onnxruntime"

    def __post_init__(self) -> None:
        if self.data is None:
            raise UsageError(
                f"INT8 is calibrated on photographs, {ADVISED} or more of the kind to fill, and none are named",
                "name their folder, such as `moebius-edge export tiny --precision int8 --calibration-data photos "
                "-o tiny-int8`",
            )


def default_folder(output: str | os.PathLike[str]) -> Path:
    """The cache beside the output, where it outlives an export that failed."""
    return Path(output).with_name(f"{Path(output).name}.calibration")


def quantise_bundle(
    reference: Bundle, output: str | os.PathLike[str], options: Int8Options, progress: Progress = no_progress
) -> tuple[Bundle, list[str]]:
    """An INT8 bundle of ``reference`` (float32) in the folder ``output``, and notes for the user.

    Raises:
        UsageError: an option, the pictures, the recipe or a range is unusable, or ``output`` may not be replaced.
        MachineError: a package or a file is missing, or something cannot be written.
        BundleError: the reference is not in float32, or something it computes is not finite.
        QualityError: the gate was missed; nothing was saved.
    """
    check_gate_runtime(options.gate_runtime)
    if reference.precision != "float32":
        raise UsageError(f"bundle {reference.path} is in {reference.precision}: INT8 is made of a float32 bundle")
    if options.guidance is None:
        options = replace(options, guidance=reference.defaults["guidance"])
    refuse_loss(output, (reference.path, options.folder, options.data, options.masks), "which is used or kept")
    given = None if options.recipe is None else Recipe.load(options.recipe)
    if given is not None:
        given.check(block.name for block in blocks(read_model(reference.component_path(DENOISER))))
        if not given.chosen:
            raise UsageError(f"recipe {options.recipe} quantises nothing", "set a block to true")
    recorded, held_out, notes = open_calibration(str(options.data), options.masks)
    settings = {"steps": options.steps, "guidance": options.guidance, "seed": options.seed}
    with atomic_directory(output, overwrite=options.force) as folder:
        cache = ResultCache(options.folder)
        statistics = record(reference, recorded, cache, progress, **settings)
        progress("read the denoiser", 0, 0)
        quantiser = Quantiser(reference.component_path(DENOISER), statistics, options.ranges)
        cases = make_cases(recorded, SEARCH_CASES, reference.resolution, options.seed)
        evaluator = CandidateEvaluator(reference, cases, options.guidance, options.steps)
        search = Search(quantiser, evaluator, cache, progress)
        floor = options.min_psnr_db
        gate_cases = make_cases(held_out, max(HELD_OUT_CASES, len(held_out)), reference.resolution, options.seed + 1)
        judge = CandidateEvaluator(reference, gate_cases, options.guidance, options.steps)
        autoencoder: tuple[dict[str, Any], dict[str, Any]] | None = None
        for _ in range(SEARCHES):
            recipe = given or search.find_recipe(floor)
            recipe.save(options.folder / RECIPE_FILE)
            progress("quantise", 0, 0)
            card = _write_denoiser(folder, reference, quantiser, recipe)
            autoencoder = autoencoder or _write_autoencoder(folder, reference, progress)
            card["precisions"] |= autoencoder[0]
            card["float32_islands"] |= autoencoder[1]
            card["name"], int8 = Path(output).resolve().name, card["int8"]
            int8["calibration"] = {key: statistics.facts[key] for key in ("pictures", "steps", "seed")}
            write_bundle(folder, gate={}, **card)  # provisional, so that a runtime can be made of it
            candidate = Bundle.load(folder, verify=False)
            metrics, gate = _measure(candidate, judge, options, progress)
            missing = options.min_psnr_db - gate["hole_psnr_db"]
            if given or not missing > 0:
                break
            # The pictures that were searched are easier than the worst held-out one, by so much.
            floor = search.reached_db + missing - MARGIN_DB
        if not gate["hole_psnr_db"] >= options.min_psnr_db:  # a floor that is NaN is missed too
            raise gate_error(metrics, recipe, search, options)
        int8["blocks"] = block_table(quantiser, recipe, int8["nodes"], search.sensitivity())
        int8["cases"] = [{k: v for k, v in m.items() if k != "latent_rms_drift"} for m in metrics]
        int8["speed"] = measure_speed(reference, candidate, options.gate_runtime, progress)
        write_bundle(folder, gate=gate, **card)
    return Bundle.load(Path(output), verify=False), notes + advice(int8["speed"])


def _write_autoencoder(folder: Path, reference: Bundle, progress: Progress) -> tuple[dict[str, Any], dict[str, Any]]:
    """Write the autoencoder in FP16 into ``folder``; return its ``precisions`` and ``float32_islands``."""
    files = {name: folder / reference.components[name].file for name in AUTOENCODER}
    for name, file in files.items():
        shutil.copyfile(reference.component_path(name), file)
    return half_autoencoder(files, range_images(reference.resolution), FLOAT_MIN_PSNR_DB["float16"], progress)


def _write_denoiser(folder: Path, reference: Bundle, quantiser: Quantiser, recipe: Recipe) -> dict[str, Any]:
    """Write the denoiser's ONNX files and the recipe into ``folder``; return what ``bundle.json`` says of them.

    They keep TensorRT's rules, which are the strictest.
    """
    denoiser, float32_nodes = quantiser.quantise(recipe, half=True)
    float32: dict[str, Any] = {DENOISER: float32_nodes}
    networks = {DENOISER: denoiser}
    if SHALLOW in reference.components:
        networks[SHALLOW] = shallow_part(denoiser)
    nodes = {name: quantised_nodes(network) for name, network in networks.items()}
    if not nodes[DENOISER]:
        raise UsageError("the recipe leaves nothing in INT8", "set a block to true that has a product")
    for name, network in networks.items():
        file = folder / reference.components[name].file
        onnx.save(network, str(file))
        if wrong := problems(network):
            raise BundleError(f"{file.name} is not for TensorRT: {wrong[0]}", "this is a bug, please report it")
    recipe.save(folder / RECIPE_FILE)
    tools = {"moebius-edge": __version__, "onnx": onnx.__version__, "onnxruntime": onnxruntime.__version__}
    int8 = {
        "rest": REST,
        "quantised_products": len(nodes[DENOISER]),
        "products": sum(len(block.nodes) for block in quantiser.blocks),
        "share_of_multiplications": round(
            sum(quantiser.share(b) for b in quantiser.blocks if not set(b.nodes).isdisjoint(nodes[DENOISER])), 4
        ),
        "ranges": quantiser.method,
        "nodes": nodes[DENOISER],
        **({"shallow_nodes": nodes[SHALLOW]} if SHALLOW in nodes else {}),
    }
    card: dict[str, Any] = {field: getattr(reference, field) for field in _INHERITED}
    card |= {"precision": "int8", "float32_islands": float32, "tools": {**reference.tools, **tools}, "int8": int8}
    card["precisions"] = dict.fromkeys(networks, {"type": "int8"})
    return card


def _measure(
    candidate: Bundle, evaluator: CandidateEvaluator, options: Int8Options, progress: Progress
) -> tuple[list[Metrics], dict[str, Any]]:
    """The metrics of the files of ``candidate`` on each held-out case, and of them the worst, which the gate keeps.

    Raises QualityError if the shallow part differs from the whole denoiser.
    """
    name, device = options.gate_runtime, gate_device(options.gate_runtime)
    with create_runtime(name, candidate, device) as runtime:
        metrics = evaluator.evaluate(runtime, "gate, held-out pictures", progress)
        gate: dict[str, Any] = {
            **{key: min(m[key] for m in metrics) for key in ("hole_psnr_db", "hole_ssim", "psnr_db", "ssim")},
            "mean_hole_psnr_db": mean_hole_psnr_db(metrics),
            "latent_rms_drift": [max(values) for values in zip(*(m["latent_rms_drift"] for m in metrics), strict=True)],
            **{
                "min_psnr_db": options.min_psnr_db,
                "cases": len(metrics),
                "start": "image",
                "runtime": name,
                "device": device,
            },
            **{"steps": options.steps, "guidance": evaluator.guidance.scale},
        }
        if SHALLOW in candidate.components:
            gate["shallow_difference"] = shallow_difference(runtime)
            judge_shallow(gate["shallow_difference"], "int8")
    return metrics, gate


def gate_error(metrics: Sequence[Metrics], recipe: Recipe, search: Search, options: Int8Options) -> QualityError:
    """The error for a gate that was missed: the worst case, and the three blocks that cost most alone."""
    worst = min(metrics, key=lambda m: m["hole_psnr_db"])
    search.measure(sorted(recipe.chosen))
    total = sum(map(search.error, recipe.chosen))
    costly = sorted(recipe.chosen, key=search.error, reverse=True)[:3]
    shares = ", ".join(f"{name} ({search.error(name) / total:.0%} of the error)" for name in costly)
    return QualityError(
        f"quality gate missed: in the hole of {worst['name']} INT8 is {worst['hole_psnr_db']:.2f} dB from float32, "
        f"{options.min_psnr_db:g} dB is the floor (mean of {len(metrics)} held-out cases "
        f"{mean_hole_psnr_db(metrics):.2f} dB); the blocks that cost most: {shares}; nothing was saved",
        f"set them to false in {options.folder / RECIPE_FILE} and pass it with --int8-recipe, give more calibration "
        "pictures, or lower --min-psnr",
    )


def block_table(
    quantiser: Quantiser, recipe: Recipe, nodes: Sequence[str], sensitivity: dict[str, dict[str, float]]
) -> list[dict[str, Any]]:
    """Each block: its PSNR alone (None where it was not measured), its share of the multiply-adds, whether quantised.

    ``nodes`` are those that really are quantised: a recipe may name blocks that have no product.
    """
    rows = []
    for block in quantiser.blocks:
        quantised = not set(nodes).isdisjoint(block.nodes)
        smoothed = {"smoothed": True} if quantised and block.name in recipe.smoothed else {}
        row: dict[str, Any] = {"name": block.name, "share": round(quantiser.share(block), 5), "psnr_db": None}
        rows.append(row | sensitivity.get(block.name, {}) | {"quantised": quantised} | smoothed)
    return rows


def advice(speed: dict[str, Any]) -> list[str]:
    """What a measured speed means for this machine; nothing if INT8 pays."""
    if speed["speedup"] > 1:
        return []
    option, name = {"float32": "fp32", "float16": "fp16"}[speed["other"]], speed["runtime"].partition(" ")[0]
    text = f"INT8 does not pay in {name} on this machine's {speed['device']}: {speed['int8_ms']:g} ms a call, "
    text += f"{speed['other']} {speed['other_ms']:g} ms; use --precision {option} here"
    if name == "onnxruntime":
        text += ", or measure it in what computes INT8: engines, or on a CPU OpenVINO, with --gate-runtime openvino"
    return [text]
