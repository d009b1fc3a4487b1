"""``moebius-edge run``: fill the hole in one photograph, or in a folder of them.

Names and rights are checked first, then the picture is read, then the model, so that a mistake ends in
milliseconds. The work itself is ``session.Session``'s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, BadParameter, Context, Option

from ..errors import MoebiusError, PartialFailure, UsageError
from ..options import AUTO, Device, PairBy, Preset, Runtime, Scheduler, Start
from . import console
from .pairs import check_writable, plan, same_file
from .session import LOG, Session
from .shared import AsJson, CacheInterval, Guidance, MaskFrom, Seed, Verbose

DEMONSTRATION = "tiny"
_SETTINGS = ("steps", "guidance", "guidance_interval", "cache_interval", "start", "strength", "scheduler", "seed",
             "feather", "match_colours", "match_depth")  # fmt: skip


def _interval(text: str) -> tuple[int, int]:
    try:
        low, high = map(int, text.split(","))
    except ValueError:
        raise BadParameter(f"{text!r} is not two whole numbers such as 200,800") from None
    return low, high


def run(
    context: Context,
    image: Annotated[Path, Argument(metavar="IMAGE", help="A photograph, or a folder of them.")],
    mask: Annotated[Path, Argument(metavar="MASK", help="Its mask, or a folder: white, or strokes, are filled.")],
    output: Annotated[
        Path | None, Option("--output", "-o", metavar="PATH", help="Result; default IMAGE_inpainted.png here.")
    ] = None,
    recursive: Annotated[bool, Option("-r", "--recursive", help="Sub-folders too; results keep their place.")] = False,
    pair_by: Annotated[PairBy, Option(help="Masks of a folder by name, or in sorted order.")] = "name",
    bundle: Annotated[str, Option("--bundle", "-b", metavar="DIR", help="The model, or 'tiny'.")] = DEMONSTRATION,
    steps: Annotated[int | None, Option(min=1, max=1000, metavar="N", help="Steps; default the model's.")] = None,
    guidance: Guidance = None,
    guidance_interval: Annotated[
        Any, Option(parser=_interval, metavar="LOW,HIGH", help="Guidance at timesteps from LOW to below HIGH alone.")
    ] = None,
    cache_interval: CacheInterval = None,
    start: Annotated[Start | None, Option(help="From the image, a prefill (removes objects), or noise.")] = None,
    strength: Annotated[float | None, Option(min=0.0, max=1.0, metavar="X", help="Share of steps to execute.")] = None,
    scheduler: Annotated[Scheduler | None, Option(help="dpm++2m needs fewer steps; default ddim.")] = None,
    preset: Annotated[Preset | None, Option(help="fast: fewer and cheaper steps; other options override it.")] = None,
    seed: Seed = 0,
    invert_mask: Annotated[bool, Option("--invert-mask", help="Fill black instead of white.")] = False,
    mask_from: MaskFrom = None,
    mask_dilate: Annotated[float, Option(min=0.0, metavar="PX", help="Grow the mask by PX pixels.")] = 0,
    feather: Annotated[float | None, Option(min=0.0, metavar="PX", help="Width of the seam round the mask.")] = None,
    match_colours: Annotated[
        bool, Option("--match-colours/--raw-colours", help="Match each fill's colours to those round the hole.")
    ] = True,
    match_depth: Annotated[
        float | None,
        Option(
            min=0.0, metavar="PX", help="Depth in the hole to which colours follow a smooth fill; default the model's."
        ),
    ] = None,
    runtime: Annotated[Runtime, Option(help="tensorrt needs engines; auto: the fastest that works.")] = AUTO,
    device: Annotated[Device, Option(help="Where to execute; auto: the fastest that works.")] = AUTO,
    jobs: Annotated[int, Option("--jobs", "-j", min=1, metavar="N", help="Folders: pictures in work at a time.")] = 3,
    force: Annotated[bool, Option("--force", help="Folders: fill again what is done already.")] = False,
    latency_report: Annotated[Path | None, Option(metavar="FILE", help="Write the latencies to FILE as JSON.")] = None,
    verbose: Verbose = False,
    as_json: AsJson = False,
) -> int:
    """Fill what MASK marks in IMAGE, white or painted; the rest stays.

    In folders, photo.jpg goes with photo.png or photo_mask.png, and --output names a folder; one bad pair
    does not stop the others. PNG results keep every pixel outside the mask and its seam.

    A folder of results holds run.jsonl, a line of JSON for each picture. When the same command is given again, after
    a kill or with new pictures, it goes on with what is not done; other settings, another model or a changed picture
    count as not done.
    """
    if mask_from is not None:
        from ..imaging.mask_files import check_source

        check_source(mask_from)
    planned = plan(image, mask, output, recursive, pair_by)
    if latency_report is not None:
        check_writable(latency_report)
        if same_file(latency_report, [*planned.inputs, *(job.output for job in planned.jobs)]):
            raise UsageError(f"the latency report {latency_report} is one of the pictures", "name another file")
    if output is not None and image.is_dir() and (picture := same_file(output / LOG, planned.inputs)):
        raise UsageError(f"{output / LOG} leads to {picture}, which would be lost", "remove the link")
    session = Session(
        model=(bundle, runtime, device),
        settings={name: context.params[name] for name in _SETTINGS if context.params[name] is not None},
        mask_options={"invert": invert_mask, "dilate": mask_dilate, "source": mask_from},
        preset=preset,
        results=output if image.is_dir() else None,
        threads=jobs,
        force=force,
    )
    for text in planned.notes:
        console.note(text)
    with console.interruption(lambda: f"interrupted, {session.state(len(planned.jobs))}"), session:
        for job, record in session.process(planned.jobs):
            _print_record(record, f"{job.name}: " if session.batch else "", as_json)
    return _finish(session, planned.notes, latency_report, as_json)


# --- what is printed: each result as soon as it is there, then how it was made, then where the time went ------------


def _print_record(record: Mapping[str, Any], prefix: str, as_json: bool) -> None:
    """What was saved on stdout, unless JSON goes there; the rest on stderr."""
    if "error" in record:
        console.print_error(MoebiusError(f"{prefix}{record['error']}"))
        return
    for text in record["notes"]:
        console.note(f"{prefix}{text}")
    if not as_json:
        print(f"saved {record['output']}", flush=True)


def _finish(session: Session, notes: list[str], report_path: Path | None, as_json: bool) -> int:
    """Write the latency report, print what the whole run has to say, and return its exit code."""
    from ..pipeline.latency import latency_report
    from ..system.files import atomic_write
    from ..text import json_text

    done, total = session.done(), len(session.records)
    fresh = [record["settings"] for record in done if "done_before" not in record]
    failure = f"{len(done)} of {total} done, {total - len(done)} failed" if len(done) < total else None
    code, report = PartialFailure.exit_code if failure else 0, None
    if fresh and session.bundle is not None:
        shared = {name: value for name, value in fresh[0].items() if all(other[name] == value for other in fresh)}
        shared["pictures"] = len(fresh)
        report = latency_report(session.timer, session.runtime_info, session.bundle, shared)
        if session.batch:
            report["throughput"] = _throughput(report, len(fresh), session.span)
        if report_path is not None:
            with atomic_write(report_path) as temporary:
                temporary.write_text(json_text(report, indent=2), encoding="utf-8")
    elif report_path is not None:
        console.note(f"no latency report was written to {report_path}: no picture was processed")
    if as_json:
        document = {"notes": notes, "results": session.records, "latency": report}
        console.print_json({**document, **({"error": failure} if failure else {})}, code)
    elif report is not None:
        _print_latency(report)
        if report_path is not None:
            print(f"latency report {report_path}")
    if failure:
        console.print_error(PartialFailure(failure))
    elif session.batch and not as_json:
        print(f"{total} of {total} done")
    if report is not None and report["bundle"]["name"] == DEMONSTRATION and not as_json:
        console.note(
            f"{DEMONSTRATION} is a small demonstration model; for the published weights run "
            "`moebius-edge download places2`, then the `moebius-edge export` command it prints"
        )
    return code


def _throughput(report: Mapping[str, Any], pictures: int, span: Sequence[float]) -> dict[str, float]:
    """How fast a folder was, from the model's being open to the last result's being saved.

    The device is busy while one of the three networks executes; the rest of the time it waits for this program.
    """
    elapsed_ms = (span[1] - span[0]) * 1e3
    networks = ("vae_encode", "denoise", "vae_decode")
    busy_ms = sum(report["stages"][name]["total_ms"] for name in networks if name in report["stages"])
    rates = {"pictures_per_second": pictures / elapsed_ms * 1e3, "device_busy_percent": busy_ms / elapsed_ms * 100}
    return {"elapsed_ms": elapsed_ms, **rates}


def _print_latency(report: Mapping[str, Any]) -> None:
    """All that must be known to make the same picture again, the latencies, and the most memory the process has held.

    In a batch the settings leave out what differs from picture to picture.
    """
    bundle, runtime = report["bundle"], report["runtime"]
    where = f"{runtime['name']} {runtime['version']} on {runtime['device']}"
    facts = {"settings": report["settings"], "bundle": f"{bundle['name']} ({bundle['precision']})", "runtime": where}
    facts |= {"peak_memory_bytes": report["peak_memory_bytes"], "throughput": report.get("throughput")}
    console.print_facts(facts)
    print()
    console.print_table([{"stage": stage, **row} for stage, row in report["stages"].items()])
    print("\ntotal is one picture in memory, without load, read and write")
