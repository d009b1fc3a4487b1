"""``moebius-edge export``: from published weights to a bundle, to INT8, and to engines.

The command finds out which of the three is asked for, and calls ``moebius_edge.export`` and
``moebius_edge.calibration`` for each.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Context, Option

from ..errors import UsageError
from ..options import PRECISIONS, Engine, GateRuntime, LambdaPlugin, Precision, Ranges, Weights
from ..text import counted
from . import console
from .shared import AsJson, Force, Guidance, Verbose

if TYPE_CHECKING:
    from ..bundle.bundle import Bundle
    from ..export import BundleOptions, EngineOptions
    from ..export.engines import Built

# Options by the one thing that they are for.
_OF_CHECKPOINTS = ("vae", "config", "precision", "weights", "distilled_guidance", "gate_runtime")
_OF_INT8 = ("calibration_masks", "int8_recipe", "ranges", "calibration_cache")
_OF_ENGINES = ("max_batch", "workspace", "opt_level", "timing_cache", "compute_capability", "lambda_plugin")
_SHOWN_OF_GATE = ("hole_psnr_db", "mean_hole_psnr_db", "psnr_db", "ssim", "image_max_difference", "min_psnr_db")


def export(
    context: Context,
    source: Annotated[str, Argument(metavar="SOURCE", help="A checkpoint, a bundle's folder for engines, or 'tiny'.")],
    output: Annotated[
        Path | None, Option("--output", "-o", metavar="DIR", help="The bundle's new folder; for engines its copy.")
    ] = None,
    vae: Annotated[Path | None, Option(metavar="DIR", help="A diffusers VAE folder; 'tiny' has its own.")] = None,
    config: Annotated[Path | None, Option(metavar="JSON", help="The network's, if not the published.")] = None,
    steps: Annotated[int, Option(min=2, max=1000, metavar="N", help="Sampling steps of the gate.")] = 20,
    guidance: Guidance = None,
    distilled_guidance: Annotated[
        float | None, Option(metavar="X", help="What the student has learned, if its checkpoint does not note it.")
    ] = None,
    precision: Annotated[Precision | None, Option(help="What the network computes in; default fp32.")] = None,
    weights: Annotated[Weights, Option(help="FP32: what weights are stored in; fp16 halves the files.")] = "fp32",
    min_psnr: Annotated[
        float | None, Option(metavar="DB", help="Below it nothing is saved. Default 60; fp16 40; int8 30.")
    ] = None,
    gate_runtime: Annotated[
        GateRuntime, Option(help="What computes the trajectories that --min-psnr judges: name what will run it.")
    ] = "onnxruntime",
    calibration_data: Annotated[
        Path | None,
        Option(metavar="DIR", help="INT8, FP16: photographs like those to fill, 20 or more; a list, .tar."),
    ] = None,
    calibration_masks: Annotated[Path | None, Option(metavar="DIR", help="INT8: their masks; default drawn.")] = None,
    int8_recipe: Annotated[Path | None, Option(metavar="JSON", help="INT8: which blocks; default a search's.")] = None,
    ranges: Annotated[Ranges, Option(help="INT8: how ranges are set.")] = "mse",
    calibration_cache: Annotated[
        Path | None, Option(metavar="DIR", help="INT8: keeps what was recorded; default OUTPUT.calibration.")
    ] = None,
    engine: Annotated[Engine | None, Option(help="Also build TensorRT engines; SOURCE may be a bundle then.")] = None,
    max_batch: Annotated[int, Option(min=1, metavar="N", help="Engines: pictures at a time, at most.")] = 1,
    workspace: Annotated[int | None, Option(min=1, metavar="MB", help="Engines: GPU memory for trials.")] = None,
    opt_level: Annotated[int | None, Option(min=0, max=5, help="Engines: effort; default TensorRT's own.")] = None,
    timing_cache: Annotated[
        Path | None, Option(metavar="FILE", help="Engines: kernel timings; default in the bundle.")
    ] = None,
    compute_capability: Annotated[
        list[str] | None, Option(metavar="X.Y", help="Engines for RTX: for this GPU generation; may be repeated.")
    ] = None,
    lambda_plugin: Annotated[
        LambdaPlugin, Option(help="Engines for TensorRT, FP16: LocalLambda as one kernel; auto is off: not yet timed.")
    ] = "auto",
    force: Force = False,
    verbose: Verbose = False,
    as_json: AsJson = False,
) -> None:
    """Make a bundle from a checkpoint, and engines from a bundle.

    A bundle holds the network and its autoencoder, and runs without PyTorch. It is saved only if a whole
    sampling trajectory on --gate-runtime agrees with PyTorch's. Exporting it needs:
    pip install "moebius-edge[cpu,export]"

    --precision int8 also takes a float32 bundle as SOURCE ('tiny' means the bundled one then). It records
    activations over --calibration-data, finds the blocks that can be quantised, and is saved only if pictures
    that it has not seen stay above --min-psnr in the hole.

    With --engine, SOURCE may be a bundle's folder: its engines are built from its ONNX files and added to it
    (or to its copy in --output), without PyTorch. The name 'tiny' then means the bundled bundle, copied to
    --output; without --engine it means the bundled checkpoint, exported again. Engines need:
    pip install "moebius-edge[tensorrt]" or "moebius-edge[rtx]", as doctor says it for this machine
    """
    if precision != "int8":
        others = () if precision == "fp16" else ("calibration_data",)
        _refuse(context, (*others, *_OF_INT8), "options of INT8", "add --precision int8")
    if precision not in (None, "fp32"):
        _refuse(context, ("weights",), f"not for {precision}, which stores what it computes in", "leave out")
    if engine is None:
        _refuse(context, _OF_ENGINES, "options of engines", "add --engine")
    engines_alone = _asks_for_engines_alone(source, precision, engine)
    if engines_alone:
        _refuse(context, _OF_CHECKPOINTS, f"not for {source}, which is a bundle, complete as it is", "leave out")
    engine_options = None
    if engine is not None:
        from ..export.engines import EngineOptions, find_engine_key

        workspace_bytes, capabilities = workspace and workspace * 1_000_000, tuple(compute_capability or ())
        engine_options = EngineOptions(
            engine, max_batch, workspace_bytes, opt_level, timing_cache, capabilities, lambda_plugin, force
        )
        find_engine_key(engine_options, "float32")  # the machine is checked before anything long is begun
    notes: list[str] = []
    if engines_alone:
        from ..export.engines import copy_bundle_for_engines

        bundle = copy_bundle_for_engines(source, output, force)
    elif output is None:
        raise UsageError("Missing option '--output' / '-o'", "name the bundle's folder, which is made")
    else:
        from ..export import BundleOptions, export_bundle

        options = BundleOptions(vae, config, steps, guidance, distilled_guidance, force=force)
        if precision == "int8":
            bundle, notes = _quantise(
                source, output, options, calibration_cache, data=calibration_data and str(calibration_data),
                masks=calibration_masks and str(calibration_masks), gate_runtime=gate_runtime, recipe=int8_recipe,
                ranges=ranges, min_psnr_db=min_psnr, steps=steps, guidance=guidance, force=force,
            )  # fmt: skip
        else:
            options = replace(
                options, precision=PRECISIONS[precision or "fp32"], weights=PRECISIONS[weights],
                min_psnr_db=min_psnr, gate_runtime=gate_runtime,
                calibration_data=None if calibration_data is None else str(calibration_data),
            )  # fmt: skip
            with console.progress() as on_progress:
                bundle = export_bundle(source, output, options, on_progress)
    if not engines_alone and not as_json:
        _print_bundle(bundle)
    built = None if engine_options is None else _build(bundle, engine_options)
    notes += [f"{name} stays float32: {p['reason']}" for name, p in bundle.precisions.items() if "reason" in p]
    notes += built.notes if built else ()
    for text in notes:
        console.note(text)
    if as_json:
        console.print_json(_document(bundle, built, notes))
        return
    if built is not None:
        _print_engine(built)
    runtime = "" if engine is None else f" --runtime {engine}"
    print(f"next: moebius-edge run IMAGE MASK --bundle {bundle.path}{runtime}")


def _refuse(context: Context, names: tuple[str, ...], what: str, remedy: str) -> None:
    """Raise ``UsageError`` where the user has chosen one of the options ``names``."""
    chosen = [name for name in names if str(context.get_parameter_source(name)).endswith("COMMANDLINE")]
    if chosen:
        options = ", ".join("--" + name.replace("_", "-") for name in chosen)
        raise UsageError(f"{options}: {what}", remedy)


def _asks_for_engines_alone(source: str, precision: str | None, engine: str | None) -> bool:
    """Whether ``source`` is a bundle of which engines alone are asked for.

    The name of a bundled model means its bundle then, but in another precision its checkpoint, exported again.
    """
    from ..bundle.bundle import BUNDLED
    from ..export.engines import is_bundle

    if precision == "int8" or not is_bundle(source):
        return False
    if engine is None and source not in BUNDLED:
        raise UsageError(f"{source} is a bundle already", "add --engine tensorrt or tensorrt-rtx for its engines")
    return engine is not None and (precision is None or source not in BUNDLED)


# --- the three things that are made ---------------------------------------------------------------------------------


def _quantise(
    source: str, output: Path, bundle_options: BundleOptions, cache: Path | None, **chosen: Any
) -> tuple[Bundle, list[str]]:
    """An INT8 bundle of ``source``, which is exported in float32 first where it is a checkpoint, and notes."""
    from ..export import float32_bundle

    with console.needs("INT8", "export"):
        from ..calibration.int8 import Int8Options, default_folder, quantise_bundle
    folder = cache or default_folder(output)
    given = {name: value for name, value in chosen.items() if value is not None}
    options = Int8Options(folder, **{"data": None, **given})

    def interrupted() -> str:
        kept = f" but {folder}: the same command goes on with it" if folder.is_dir() else ""
        return f"interrupted, nothing written{kept}"

    with (
        console.progress() as on_progress,
        console.interruption(interrupted),
        float32_bundle(source, output, bundle_options, on_progress) as reference,
    ):
        return quantise_bundle(reference, output, options, on_progress)


def _build(bundle: Bundle, options: EngineOptions) -> Built:
    from ..export import build_engines

    message = f"interrupted, no engine written; the bundle is {bundle.path}"
    with console.progress() as on_progress, console.interruption(lambda: message):
        return build_engines(bundle, options, on_progress)


# --- what is printed ------------------------------------------------------------------------------------------------


def _document(bundle: Bundle, built: Built | None, notes: list[str]) -> dict[str, Any]:
    document: dict[str, Any] = {"output": str(bundle.path), "gate": bundle.gate, "notes": notes}
    document["distilled_guidance"] = bundle.distilled_guidance
    if bundle.int8 is not None:
        document["int8"] = bundle.int8
    if built is not None:
        document |= {"engine": str(built.engine.path), "built": built.fresh}
    return document


def _print_bundle(bundle: Bundle) -> None:
    total = console.size(bundle.summary()["total_bytes"])
    print(f"saved {bundle.path} ({bundle.resolution}x{bundle.resolution}, {bundle.precision}, {total})")
    gate = {name: bundle.gate[name] for name in _SHOWN_OF_GATE if name in bundle.gate}  # `inspect` shows all of it
    facts: dict[str, Any] = {"distilled_guidance": bundle.distilled_guidance, "gate": gate}
    facts["int8"] = {name: value for name, value in (bundle.int8 or {}).items() if not isinstance(value, list)}
    console.print_facts(facts)


def _print_engine(built: Built) -> None:
    engine = built.engine
    total = console.size(sum(record["bytes"] for record in engine.plans.values()))
    if not built.fresh:
        print(f"nothing to do: {engine.path} is there, built from these files with these options ({total})")
        print("  --force builds it again")
        return
    print(f"saved {engine.path} ({counted(len(engine.plans), 'plan')}, {total})")
    for name, record in engine.plans.items():
        print(f"  {name} {console.size(record['bytes'])}, built in {record['build_seconds']:.1f} s")
