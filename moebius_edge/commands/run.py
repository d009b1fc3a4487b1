"""``moebius-edge run``: fill the hole in one photograph, or in a folder of them.

Names and rights are checked first, then the picture is read, then the model, so that a mistake ends in
milliseconds. The work itself is ``pipeline.Inpainter``'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, BadParameter, Context, Option

from ..errors import BundleError, MachineError, MoebiusError, PartialFailure, UsageError
from ..options import AUTO, Device, PairBy, Preset, Runtime, Scheduler, Start
from . import console
from .pairs import Job, check_replaceable, check_writable, plan, same_file
from .shared import AsJson, CacheInterval, Guidance, MaskFrom, Seed

if TYPE_CHECKING:
    from ..bundle.bundle import Bundle
    from ..pipeline.inpainter import Inpainter, Step

DEMONSTRATION = "tiny"
_SETTINGS = ("steps", "guidance", "guidance_interval", "cache_interval", "start", "strength", "scheduler", "seed",
             "feather", "match_colours")  # fmt: skip


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
    bundle: Annotated[str, Option("--bundle", "-b", metavar="DIR", help="The model.")] = DEMONSTRATION,
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
    runtime: Annotated[Runtime, Option(help="tensorrt needs engines; auto: the fastest that works.")] = AUTO,
    device: Annotated[Device, Option(help="Where to execute; auto: the fastest that works.")] = AUTO,
    latency_report: Annotated[Path | None, Option(metavar="FILE", help="Write the latencies to FILE as JSON.")] = None,
    as_json: AsJson = False,
) -> int:
    """Fill what MASK marks in IMAGE, white or painted; the rest stays.

    In folders, photo.jpg goes with photo.png or photo_mask.png, and --output names a folder; one bad pair
    does not stop the others. PNG results keep every pixel outside the mask and its seam.
    """
    if mask_from is not None:
        from ..imaging.mask_files import check_source

        check_source(mask_from)
    planned = plan(image, mask, output, recursive, pair_by)
    if latency_report is not None:
        check_writable(latency_report)
        if same_file(latency_report, [*planned.inputs, *(job.output for job in planned.jobs)]):
            raise UsageError(f"the latency report {latency_report} is one of the pictures", "name another file")
    session = Session(
        model=(bundle, runtime, device),
        settings={name: context.params[name] for name in _SETTINGS if context.params[name] is not None},
        mask_options={"invert": invert_mask, "dilate": mask_dilate, "source": mask_from},
        preset=preset,
        batch=image.is_dir(),
    )
    for text in planned.notes:
        console.note(text)
    with console.interruption(lambda: f"interrupted, {session.state(len(planned.jobs))}"), session:
        for number, job in enumerate(planned.jobs, start=1):
            record = session.process(job, f"[{number}/{len(planned.jobs)}] " if session.batch else "")
            _print_record(record, f"{job.name}: " if session.batch else "", as_json)
    return _finish(session, planned.notes, latency_report, as_json)


@dataclass
class Session:
    """A model that is opened once, and one picture after another through it. Use as a context manager.

    ``settings`` go to ``Inpainter.inpaint``; what is not among them is the ``preset``'s, and what is not in that the
    bundle's. ``mask_options`` go to ``read_mask``. ``timer`` collects the latencies of all pictures. ``bundle`` and
    ``runtime_info`` are known once the first picture was read.
    """

    model: tuple[str, str, str]
    settings: dict[str, Any]
    mask_options: dict[str, Any]
    preset: str | None
    batch: bool
    records: list[dict[str, Any]] = field(default_factory=list)
    bundle: Bundle | None = None
    runtime_info: dict[str, Any] = field(default_factory=dict)
    _inpainter: Inpainter | None = None
    _opening: bool = False  # and if that fails, no picture is to blame

    def __enter__(self) -> Session:
        from ..pipeline.latency import StageTimer

        self.timer = StageTimer()
        return self

    def __exit__(self, *error: object) -> None:
        if self._inpainter is not None:
            self._inpainter.close()

    def process(self, job: Job, position: str) -> dict[str, Any]:
        """Read, inpaint and write one job, and return its JSON-ready record.

        In a batch a bad pair becomes a record with its error; a bad model is bad for all and ends the run. The picture
        is read before the model is opened: of two mistakes the cheap one is reported first.
        """
        from ..imaging.mask_files import read_mask
        from ..imaging.pictures import check_output, read_picture, write_picture

        record: dict[str, Any] = {"image": str(job.image), "mask": None if job.mask is None else str(job.mask)}
        try:
            if job.problem or job.mask is None:
                raise UsageError(job.problem)
            check_replaceable(job.output)
            with console.progress() as on_progress:

                def on_step(step: Step) -> None:
                    on_progress(f"{position}{job.name}", step.index, step.total)

                on_progress(f"{position}{job.name}", 0, 0)
                with self.timer.measure("read"):
                    picture = read_picture(job.image)
                    hole, mask_notes = read_mask(job.mask, picture, **self.mask_options)
                    check_output(job.output, picture.opaque_in(hole))
                inpainter = self._inpainter or self._open()
                result = inpainter.inpaint(picture, hole, on_step=on_step, timer=self.timer, **self.settings)
                self.runtime_info = inpainter.runtime.report()  # a runtime may learn about itself while it runs
                with self.timer.measure("write"):
                    _make_folder(job.output.parent)
                    written = write_picture(job.output, result.picture)
        except MoebiusError as error:
            if not self.batch or self._opening or isinstance(error, BundleError):
                raise
            record |= {"error": str(error), "exit_code": error.exit_code}
        else:
            record |= {"output": str(job.output), "settings": {"preset": self.preset, **result.settings}}
            record |= {"notes": [*mask_notes, *result.notes, *written]}
        self.records.append(record)
        return record

    def _open(self) -> Inpainter:
        from ..bundle.bundle import Bundle
        from ..pipeline.inpainter import Inpainter
        from ..pipeline.loop import check_cache_interval
        from ..pipeline.presets import preset_notes, preset_settings
        from ..sampling.guidance import check_interval, choose_guidance

        name, runtime, device = self.model
        self._opening = True
        with self.timer.measure("load"):
            self.bundle = bundle = Bundle.load(name, verify=False)  # of a gigabyte, which an engine does not read
            choose_guidance(self.settings.get("guidance"), bundle.distilled_guidance)  # before a long loading
            check_interval(self.settings.get("guidance_interval"), bundle.distilled_guidance)
            check_cache_interval(self.settings.get("cache_interval", 1), bundle)
            inpainter = Inpainter(bundle, runtime, device)
            if inpainter.runtime.executes_onnx:
                bundle.verify()
            notes = list(inpainter.runtime.notes)
            for text in notes:  # before it is opened: an engine may have to be built, for minutes
                console.note(text)
            self._inpainter = inpainter.__enter__()
            for text in inpainter.runtime.notes[len(notes) :]:
                console.note(text)
        self._opening = False
        if self.preset is not None:
            for text in preset_notes(self.preset, self.settings, bundle):
                console.note(text)
            self.settings |= preset_settings(self.preset, self.settings, bundle)
        self.settings = bundle.settings(**self.settings)
        return inpainter

    def done(self) -> list[dict[str, Any]]:
        """The settings of every picture that was filled."""
        return [record["settings"] for record in self.records if "error" not in record]

    def state(self, jobs: int) -> str:
        """What an interrupted run has done."""
        return f"{len(self.done())} of {jobs} done" if self.batch else "nothing written"


def _make_folder(folder: Path) -> None:
    """The results' folder, made for the first of them so that a run without results leaves none."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MachineError(f"cannot make folder {folder} ({error.strerror})", "name another output") from error


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
    failure = f"{len(done)} of {total} done, {total - len(done)} failed" if len(done) < total else None
    code, report = PartialFailure.exit_code if failure else 0, None
    if done and session.bundle is not None:
        shared = {name: value for name, value in done[0].items() if all(other[name] == value for other in done)}
        shared["pictures"] = len(done)
        report = latency_report(session.timer, session.runtime_info, session.bundle, shared)
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


def _print_latency(report: Mapping[str, Any]) -> None:
    """All that must be known to make the same picture again, the latencies, and the most memory the process has held.

    In a batch the settings leave out what differs from picture to picture.
    """
    bundle, runtime = report["bundle"], report["runtime"]
    where = f"{runtime['name']} {runtime['version']} on {runtime['device']}"
    facts = {"settings": report["settings"], "bundle": f"{bundle['name']} ({bundle['precision']})", "runtime": where}
    console.print_facts({**facts, "peak_memory_bytes": report["peak_memory_bytes"]})
    print()
    console.print_table([{"stage": stage, **row} for stage, row in report["stages"].items()])
    print("\ntotal is one picture in memory, without load, read and write")
