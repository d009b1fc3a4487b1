"""``moebius-edge export``: from published weights to a bundle and engines. The work is ``moebius_edge.export``'s."""

from __future__ import annotations

from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import MachineError, UsageError
from . import console
from .engines import EngineName, make_engines, prepare_engines

if TYPE_CHECKING:
    from ..bundle.bundle import Bundle
    from ..bundle.manifest import Int8


_INT8 = "int8"
PRECISIONS = {"fp32": "float32", "fp16": "float16"}  # as the command line says it -> as bundle.json does


class Target(str, Enum):
    """``calibration.quantise.TARGETS``, which is not imported here."""

    tensorrt = "tensorrt"
    cpu = "cpu"


class Ranges(str, Enum):
    """``calibration.ranges.METHODS``, which is not imported here."""

    minmax = "minmax"
    percentile = "percentile"
    entropy = "entropy"
    mse = "mse"


def export(
    source: Annotated[
        str,
        typer.Argument(metavar="SOURCE", help="A checkpoint file, or the name 'tiny'; for engines also a bundle."),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="DIR", help="The bundle's folder, new; engines of a bundle may do without."
        ),
    ] = None,
    vae: Annotated[Path | None, typer.Option(metavar="DIR", help="A diffusers VAE folder; 'tiny' has its own.")] = None,
    config: Annotated[
        Path | None,
        typer.Option(metavar="JSON", help="The network's configuration, if not the published."),
    ] = None,
    steps: Annotated[int, typer.Option(min=2, max=1000, metavar="N", help="Sampling steps of the gate.")] = 20,
    guidance: Annotated[
        float | None,
        typer.Option(min=0.0, metavar="X", help="Guidance of the gate; default 2, or what is distilled."),
    ] = None,
    distilled_guidance: Annotated[
        float | None,
        typer.Option(metavar="X", help="The guidance the student has learned, if its checkpoint does not note it."),
    ] = None,
    precision: Annotated[
        str | None, typer.Option(metavar="fp32|fp16|int8", help="What the network computes in; default fp32.")
    ] = None,
    min_psnr: Annotated[
        float | None,
        typer.Option(
            "--min-psnr", metavar="DB", help="The gate: below it nothing is saved. Default 60; fp16 40; int8 30."
        ),
    ] = None,
    calibration_data: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="INT8, required: 20 or more photographs of the kind to fill."),
    ] = None,
    calibration_masks: Annotated[
        Path | None, typer.Option(metavar="DIR", help="INT8: a mask for each photograph; default drawn holes.")
    ] = None,
    target: Annotated[
        Target | None, typer.Option(help="INT8: what will execute it; default tensorrt, GPUs in general.")
    ] = None,
    int8_recipe: Annotated[
        Path | None, typer.Option(metavar="JSON", help="INT8: which blocks; default those that a search finds.")
    ] = None,
    ranges: Annotated[Ranges | None, typer.Option(help="INT8: how ranges are set; default mse.")] = None,
    calibration_cache: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="INT8: keeps what was recorded; default OUTPUT.calibration."),
    ] = None,
    engine: Annotated[
        EngineName | None, typer.Option(help="Also build TensorRT engines; SOURCE may be a bundle then.")
    ] = None,
    max_batch: Annotated[int, typer.Option(min=1, metavar="N", help="Engines: pictures at a time, at most.")] = 1,
    workspace: Annotated[
        int | None, typer.Option(min=1, metavar="MB", help="Engines: GPU memory TensorRT may try kernels with.")
    ] = None,
    opt_level: Annotated[
        int | None, typer.Option(min=0, max=5, metavar="0-5", help="Engines: TensorRT's effort; default its own.")
    ] = None,
    timing_cache: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Engines: kernel timings; default in the bundle.")
    ] = None,
    compute_capability: Annotated[
        list[str] | None,
        typer.Option(metavar="X.Y", help="Engines for RTX: build for this GPU generation; may be repeated."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a bundle, or engines, already there.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Make a bundle from a checkpoint, and engines from a bundle.

    A bundle holds the network and its autoencoder, and runs without PyTorch. It is saved only if a whole
    sampling trajectory on ONNX Runtime agrees with PyTorch's. Exporting it needs:
    pip install "moebius-edge[export]"

    --precision int8 also takes a float32 bundle as SOURCE ('tiny' means the bundled one then). It records
    activations over the photographs in --calibration-data, which it needs, finds the blocks that can be
    quantised, and is saved only if pictures that it has not seen stay above --min-psnr in the hole.

    With --engine, SOURCE may be a bundle's folder: its engines are built from its ONNX files and added to it
    (or to its copy in --output), without PyTorch. The name 'tiny' then means the bundled bundle, copied to
    --output; without --engine it means the bundled checkpoint, exported again. Engines need:
    pip install "moebius-edge[tensorrt]" or "moebius-edge[rtx]"
    """
    from ..bundle.bundle import BUNDLED
    from ..export import BundleOptions, export_bundle, float32_bundle

    if precision is not None and precision not in (*PRECISIONS, _INT8):
        raise UsageError(f"there is no precision {precision!r}: choose one of {', '.join((*PRECISIONS, _INT8))}")
    int8 = precision == _INT8
    quantising = (calibration_data, calibration_masks, target, int8_recipe, ranges, calibration_cache)
    if not int8 and any(quantising):
        raise UsageError(
            "--calibration-data, --calibration-masks, --target, --int8-recipe, --ranges and --calibration-cache are "
            "for INT8: add --precision int8"
        )
    if int8 and engine is not None and target is Target.cpu:
        raise UsageError("--target cpu is for ONNX Runtime on a CPU, TensorRT cannot build it: leave --engine out")
    job = None
    if engine is not None:
        job = prepare_engines(engine, max_batch, workspace, opt_level, timing_cache, compute_capability, force)
        again = precision is not None and source in BUNDLED  # in another precision it is another bundle
        if job.takes(source) and not again and not int8:
            if any(value is not None for value in (vae, config, precision, distilled_guidance)):
                raise UsageError(
                    f"{source} is a bundle, complete as it is: leave --vae, --config, --precision and "
                    "--distilled-guidance out"
                )
            make_engines(job.placed(source, output, force), job, as_json)
            return
    elif max_batch != 1 or any((workspace, opt_level is not None, timing_cache, compute_capability)):
        raise UsageError(
            "--max-batch, --workspace, --opt-level, --timing-cache and --compute-capability are for engines: "
            "add --engine"
        )
    elif not int8 and (Path(source) / "bundle.json").is_file():
        raise UsageError(f"{source} is a bundle already: add --engine tensorrt or tensorrt-rtx for its engines")
    if output is None:
        raise UsageError("Missing option '--output' / '-o': name the bundle's folder, which is made")

    notes: list[str] = []
    cache: Path | None = None  # what INT8 keeps of its work
    with console.progress() as update:

        def tell(stage: str, fraction: float | None) -> None:
            update(stage, round((fraction or 0.0) * 100), 0 if fraction is None else 100)

        try:
            bundle_options = BundleOptions(vae, config, steps, guidance, distilled_guidance, force=force)
            if not int8:
                precision_name = PRECISIONS[precision or "fp32"]
                bundle_options = replace(bundle_options, precision=precision_name, min_psnr_db=min_psnr)
                bundle = export_bundle(source, output, bundle_options, update)
            else:
                try:
                    from ..calibration.int8 import MIN_PSNR_DB, Int8Options, default_folder, quantise_bundle
                except ModuleNotFoundError as error:
                    install = 'run `pip install "moebius-edge[export]"`'
                    raise MachineError(f"INT8 needs the package {error.name}: {install}") from None
                cache = calibration_cache or default_folder(output)
                options = Int8Options(
                    folder=cache,
                    data=None if calibration_data is None else str(calibration_data),
                    masks=None if calibration_masks is None else str(calibration_masks),
                    target=(target or Target.tensorrt).value,
                    recipe=int8_recipe,
                    ranges=(ranges or Ranges.mse).value,
                    min_psnr_db=MIN_PSNR_DB if min_psnr is None else min_psnr,
                    steps=steps,
                    guidance=guidance,
                    force=force,
                )
                with float32_bundle(source, output, bundle_options, update) as reference:
                    bundle, notes = quantise_bundle(reference, output, options, update)
        except KeyboardInterrupt:
            kept = f" but {cache}: the same command goes on with it" if cache is not None and cache.is_dir() else ""
            raise console.Interrupted(f"interrupted, nothing written{kept}") from None
    for text in notes:
        console.note(text)
    if as_json and job is None:
        facts: dict[str, Any] = {"output": str(bundle.path), "gate": bundle.gate}
        facts["distilled_guidance"] = bundle.distilled_guidance
        facts |= {} if bundle.int8 is None else {"int8": bundle.int8}
        console.print_json({**facts, "exit_code": 0})
    if not as_json:
        _print_bundle(bundle)
    if job is not None:
        make_engines(bundle, job, as_json)
    elif not as_json:
        print(f"next: moebius-edge run IMAGE MASK --bundle {bundle.path}")


def _print_bundle(bundle: Bundle) -> None:
    total = console.size(bundle.summary()["total_bytes"])
    print(f"saved {bundle.path} ({bundle.resolution}x{bundle.resolution}, {bundle.precision}, {total})")
    if bundle.distilled_guidance is not None:
        print(f"  guidance {bundle.distilled_guidance:g} distilled, one call a step")
    if bundle.int8 is not None:
        _print_int8(bundle.int8)
    for name, value in bundle.gate.items():
        if isinstance(value, float):
            print(f"  {name} {value:.4g}")


def _print_int8(int8: Int8) -> None:
    """What was quantised, what costs most, and the two speeds."""
    from .inspect import describe_int8

    speed: dict[str, Any] = {**int8["speed"]}
    print(f"  {describe_int8(int8)}")
    measured = [(row["psnr_db"], row) for row in int8["blocks"] if row["quantised"] and row["psnr_db"] is not None]
    for psnr_db, row in sorted(measured, key=lambda pair: pair[0])[:3]:
        print(f"  costs most: {row['name']}, {psnr_db:.1f} dB alone, {row['share']:.2%} of the multiplications")
    print(
        f"  a call on {speed['device']} ({speed['runtime']}): INT8 {speed['int8_ms']:g} ms, {speed['other']} "
        f"{speed['other_ms']:g} ms, {speed['speedup']:.2f} times as fast"
    )
