"""``moebius-edge run``: fill the hole in one photograph, or in a folder of them.

Names and rights are checked first, then the picture is read, then the model, so that a mistake ends in
milliseconds. The work itself is ``pipeline.Inpainter``'s; what is printed is ``summary``'s.
"""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import BundleError, MoebiusError, PartialFailure, UsageError
from . import console
from .batch import Job, Plan, check_writable, plan, same_file
from .summary import print_entry, print_result

if TYPE_CHECKING:
    from .session import Session


class Start(str, Enum):
    """``pipeline.STARTS``, which is not imported here: that takes numpy and OpenCV."""

    image = "image"
    prefill = "prefill"
    noise = "noise"


class Sampler(str, Enum):
    """``scheduler.SCHEDULERS``."""

    ddim = "ddim"
    dpm = "dpm++2m"


class PairBy(str, Enum):
    """How the images of a folder find their masks."""

    name = "name"
    order = "order"


class Preset(str, Enum):
    """``presets.PRESETS``."""

    fast = "fast"


def _interval(text: str) -> tuple[int, int]:
    try:
        low, high = map(int, text.split(","))
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not two whole numbers such as 200,800") from None
    return low, high


def run(
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="A photograph, or a folder of them.")],
    mask: Annotated[Path, typer.Argument(metavar="MASK", help="Its mask, or a folder: white, or strokes, are filled.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="PATH", help="Result; default IMAGE_inpainted.png here."),
    ] = None,
    recursive: Annotated[
        bool, typer.Option("--recursive", "-r", help="Sub-folders too; results keep their place.")
    ] = False,
    pair_by: Annotated[
        PairBy, typer.Option("--pair-by", help="Masks of a folder by name, or in sorted order.")
    ] = PairBy.name,
    bundle: Annotated[str, typer.Option("--bundle", "-b", metavar="DIR", help="The model.")] = "tiny",
    steps: Annotated[
        int | None, typer.Option(min=1, max=1000, metavar="N", help="Sampling steps; default the bundle's.")
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(min=0.0, metavar="X", help="Guidance, 1 halves the time; default the bundle's."),
    ] = None,
    guidance_interval: Annotated[
        Any,
        typer.Option(parser=_interval, metavar="LOW,HIGH", help="Guidance at timesteps from LOW to below HIGH alone."),
    ] = None,
    cache_interval: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Compute deep features in every Nth call, and reuse them between."),
    ] = None,
    start: Annotated[
        Start | None,
        typer.Option(help="Sample from the image, from a prefill (removes objects), or from noise."),
    ] = None,
    strength: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, metavar="X", help="Share of the steps that is executed.")
    ] = None,
    scheduler: Annotated[Sampler | None, typer.Option(help="dpm++2m needs fewer steps; default ddim.")] = None,
    preset: Annotated[
        Preset | None, typer.Option(help="fast: fewer and cheaper steps; other options override it.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="The same seed gives the same result.")] = 0,
    invert_mask: Annotated[bool, typer.Option("--invert-mask", help="Fill black instead of white.")] = False,
    mask_from: Annotated[
        str | None,
        typer.Option(metavar="alpha|luma|red|green|blue|index:N", help="What of MASK marks the hole."),
    ] = None,
    mask_dilate: Annotated[float, typer.Option(min=0.0, metavar="PX", help="Grow the mask by PX pixels.")] = 0,
    feather: Annotated[
        float | None, typer.Option(min=0.0, metavar="PX", help="Width of the seam round the mask.")
    ] = None,
    match_colours: Annotated[
        bool,
        typer.Option("--match-colours/--raw-colours", help="Match each fill's colours to those round the hole."),
    ] = True,
    runtime: Annotated[
        str,
        typer.Option(metavar="NAME", help="onnxruntime, or with engines tensorrt or tensorrt-rtx; auto: the fastest."),
    ] = "auto",
    device: Annotated[
        str, typer.Option(metavar="NAME", help="cpu, cuda, tensorrt, or auto: the fastest that works.")
    ] = "auto",
    latency_report: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the latencies to FILE as JSON.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> int:
    """Fill what MASK marks in IMAGE, white or painted; the rest stays.

    In folders, photo.jpg goes with photo.png or photo_mask.png, and --output names a folder; one bad pair
    does not stop the others. PNG results keep every pixel outside the mask and its seam.
    """
    if mask_from is not None:
        from ..imaging.mask_files import check_source

        check_source(mask_from)
    planned = plan(image, mask, output, recursive, pair_by is PairBy.order)
    jobs = planned.jobs
    if latency_report is not None:
        _check_report(latency_report, planned)
    chosen = {
        "steps": steps,
        "guidance": guidance,
        "guidance_interval": guidance_interval,
        "cache_interval": cache_interval,
        "start": None if start is None else start.value,
        "strength": strength,
        "scheduler": None if scheduler is None else scheduler.value,
        "seed": seed,
        "feather": feather,
        "match_colours": match_colours,
    }
    from .session import Session

    session = Session(
        bundle,
        runtime,
        device,
        settings={name: value for name, value in chosen.items() if value is not None},
        mask_options={"invert": invert_mask, "dilate": mask_dilate, "source": mask_from},
        preset=None if preset is None else preset.value,
    )
    batch = image.is_dir()
    for text in planned.notes:
        console.note(text)
    entries: list[dict[str, Any]] = []
    try:
        with session:
            for job in jobs:
                label = f"[{len(entries) + 1}/{len(jobs)}] {job.name}" if batch else job.name
                entries.append(_process(session, job, label, batch))
                print_entry(entries[-1], job.name if batch else "", as_json)
    except KeyboardInterrupt:
        what = f"{_done(entries)} of {len(jobs)} done" if batch else "nothing written"
        raise console.Interrupted(f"interrupted, {what}") from None
    return _finish(session, entries, planned.notes, latency_report, batch, as_json)


def _process(session: Session, job: Job, label: str, batch: bool) -> dict[str, Any]:
    """The job's record. In a batch a bad pair becomes one; a bad model is bad for all and ends the run."""
    try:
        if job.problem:
            raise UsageError(job.problem)
        return session.process(job, label)
    except MoebiusError as error:
        if not batch or isinstance(error, BundleError) or session.unusable:
            raise
        mask = None if job.mask is None else str(job.mask)
        return {"image": str(job.image), "mask": mask, "error": str(error), "exit_code": error.exit_code}


def _finish(
    session: Session,
    entries: list[dict[str, Any]],
    notes: list[str],
    report_path: Path | None,
    batch: bool,
    as_json: bool,
) -> int:
    """Write the latency report, print what the whole run has to say, and return its exit code."""
    from ..pipeline.latency import latency_report
    from ..system.files import atomic_write
    from ..text import json_text

    document: dict[str, Any] = {"exit_code": 0, "notes": notes, "results": entries, "latency": None}
    done = [entry["settings"] for entry in entries if "error" not in entry]
    if len(done) < len(entries):
        document["error"] = f"{len(done)} of {len(entries)} done, {len(entries) - len(done)} failed"
        document["exit_code"] = PartialFailure.exit_code
    if done and session.bundle is not None:
        shared = {name: value for name, value in done[0].items() if all(s[name] == value for s in done)}
        settings = {**shared, "pictures": len(done)}
        document["latency"] = latency_report(session.timer, session.runtime_info, session.bundle, settings)
        if report_path is not None:
            with atomic_write(report_path) as temporary:
                temporary.write_text(json_text(document["latency"], indent=2), encoding="utf-8")
    print_result(document, report_path, batch, as_json)
    return int(document["exit_code"])


def _check_report(path: Path, planned: Plan) -> None:
    check_writable(path)
    if same_file(path, [*planned.inputs, *(job.output for job in planned.jobs)]):
        raise UsageError(f"the latency report {path} is one of the pictures: name another file")


def _done(entries: list[dict[str, Any]]) -> int:
    return sum("error" not in entry for entry in entries)
