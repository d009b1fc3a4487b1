"""``moebius-edge report``: bundles, runtimes and settings compared on the same pictures and noise.

The grid, the measuring and the page are ``..report``'s. ``report merge`` puts the results of several machines together.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, BadParameter, Option

from ..errors import PartialFailure, UsageError
from ..options import AUTO, BASELINES, DEVICES, PRESETS, RUNTIMES, SCHEDULERS, STARTS
from ..text import counted
from . import console
from .shared import AsJson, Seed, Verbose

if TYPE_CHECKING:
    from ..report.inputs import Input

MERGE = "merge"
IMAGES = "images"  # as --truth: the images themselves
_SIZES = {"K": 10**3, "M": 10**6, "G": 10**9}


def _several(kind: type, choices: Sequence[str] = ()) -> Callable[[str], tuple[Any, ...]]:
    """The parser of values with commas between them, each of which counts once; ``choices`` are all there are."""

    def parse(text: str) -> tuple[Any, ...]:
        try:
            values = tuple(dict.fromkeys(kind(word.strip()) for word in text.split(",") if word.strip()))
        except ValueError:
            what = "whole numbers" if kind is int else "numbers"
            raise BadParameter(f"{text} is no list of {what} such as 4,8") from None
        if choices and (unknown := [value for value in values if value not in choices]):
            raise BadParameter(f"{unknown[0]!r} is not one of {', '.join(choices)}")
        return values

    return parse


def _bytes(text: str) -> int:
    """Of 2GB or 500M. A bare number might be meant as MB and read as bytes, so it is refused."""
    size = re.fullmatch(r"(\d+\.?\d*) *([KMG])B?", text, re.IGNORECASE)
    if size is None:
        raise BadParameter(f"{text} is no size such as 2GB or 500MB")
    return int(float(size[1]) * _SIZES[size[2].upper()])


_COUNTS: dict[str, Any] = {"parser": _several(int), "metavar": "N,..."}


def _names(choices: Sequence[str]) -> dict[str, Any]:
    return {"parser": _several(str, choices), "metavar": "NAME,..."}


def report(
    bundles: Annotated[list[str], Argument(metavar="BUNDLE...", help="Folders, or 'tiny'; or: merge A.json B.json")],
    output: Annotated[Path, Option("--output", "-o", metavar="DIR", help="Where the report is kept.")],
    images: Annotated[Path | None, Option(metavar="DIR", help="The photographs.")] = None,
    masks: Annotated[Path | None, Option(metavar="DIR", help="Their masks; default photo_mask.png beside.")] = None,
    truth: Annotated[str, Option(metavar="DIR|images", help="True pictures by the same names, or the images.")] = "",
    runtime: Annotated[Any, Option(**_names((AUTO, *RUNTIMES)), help="Runtimes to compare, as of run.")] = "",
    device: Annotated[Any, Option(**_names((AUTO, *DEVICES)), help="Devices to compare.")] = "",
    steps: Annotated[Any, Option(**_COUNTS, help="Step counts to compare; default the bundle's.")] = "",
    scheduler: Annotated[Any, Option(**_names(SCHEDULERS), help=f"Schedulers: {', '.join(SCHEDULERS)}.")] = "",
    guidance: Annotated[Any, Option(parser=_several(float), metavar="X,...", help="Scales of guidance.")] = "",
    cache_interval: Annotated[Any, Option(**_COUNTS, help="Reuse of deep features; default 1, none.")] = "",
    start: Annotated[Any, Option(**_names(STARTS), help=f"Starts to compare: {', '.join(STARTS)}.")] = "",
    preset: Annotated[Any, Option(**_names(PRESETS), help=f"Presets of run as well: {', '.join(PRESETS)}.")] = "",
    baseline: Annotated[Any, Option(**_names(BASELINES), help=f"Without a network: {', '.join(BASELINES)}.")] = "",
    reference: Annotated[str, Option(metavar="BUNDLE", help="Accuracy is against it; default float32.")] = "",
    seed: Seed = 0,
    runs: Annotated[int, Option(min=1, metavar="N", help="Timed passes over all photographs.")] = 5,
    warmup: Annotated[int, Option(min=0, metavar="N", help="Passes before them.")] = 1,
    sustained: Annotated[float, Option(min=0.0, metavar="MINUTES", help="Then go on: cold against hot.")] = 0,
    max_latency_ms: Annotated[float | None, Option(min=0.0, metavar="MS", help="Recommend nothing slower.")] = None,
    min_psnr: Annotated[float | None, Option(metavar="DB", help="Recommend nothing less accurate in the hole.")] = None,
    max_memory: Annotated[Any, Option(parser=_bytes, metavar="SIZE", help="Recommend nothing above 2GB, say.")] = None,
    force: Annotated[bool, Option("--force", help="Measure everything again.")] = False,
    verbose: Verbose = False,
    as_json: AsJson = False,
) -> int:
    """Compare bundles, runtimes and settings: latency, memory, energy and accuracy on the same photographs.

    Options with ,... take several values; every combination is measured, each in a process of its own. What was
    measured is kept: run the same command again to go on after an interruption.
    """
    limits = {"max_latency_ms": max_latency_ms, "min_psnr_db": min_psnr, "max_memory_bytes": max_memory}
    if bundles[0] == MERGE:
        return _merge(bundles[1:], output, limits, force, as_json)
    inputs = _inputs(images, masks, truth, output)
    from ..bundle.bundle import Bundle
    from ..report.collect import Plan, check_output_dir, collect
    from ..report.grid import Choices, baseline_rows, grid, with_references
    from ..report.results import save
    from ..text import printable_values

    choices = Choices(runtime, device, steps, scheduler, guidance, cache_interval, start, preset, seed)
    loaded = [Bundle.load(name, verify=False) for name in bundles]  # each process verifies its own
    against = Bundle.load(reference, verify=False) if reference else None
    if against is not None and against.path not in [bundle.path for bundle in loaded]:
        loaded.append(against)
    configurations = with_references([*grid(loaded, choices), *baseline_rows(baseline)], against)
    check_output_dir(output, force)
    plan = Plan(configurations, inputs, seed, runs, warmup, sustained, limits)
    interrupted = f"interrupted; what was measured is kept in {output}: run the same command to go on"
    with console.interruption(lambda: interrupted), console.progress() as update:

        def on_progress(label: str) -> Callable[[str, int, int], None]:
            return lambda what, done, total: update(f"{label}: {what}", done, total)

        results = printable_values(collect(plan, output, on_progress))
    save(results, output)
    return _finish(results, output, as_json)


def _merge(files: Sequence[str], output: Path, limits: dict[str, Any], force: bool, as_json: bool) -> int:
    from ..report.collect import check_output_dir
    from ..report.merge import copy_pictures, merge
    from ..report.results import load, save

    if not files:
        example = "moebius-edge report merge A.json B.json --output DIR"
        raise UsageError("merge needs a results.json or more", example)
    sources = [(path if path.is_dir() else path.parent, load(path)) for path in map(Path, files)]
    if any(output.resolve() == folder.resolve() for folder, _ in sources):
        raise UsageError(f"the output {output} is one of the reports", "name another with --output")
    merged = merge(sources)
    merged["limits"] |= {name: value for name, value in limits.items() if value is not None}
    check_output_dir(output, force)
    output.mkdir(parents=True, exist_ok=True)
    if missing := copy_pictures(merged, sources, output):
        console.note(f"{counted(missing, 'picture')} not found beside their results")
    save(merged, output)
    return _finish(merged, output, as_json)


def _inputs(images: Path | None, masks: Path | None, truth: str, output: Path) -> list[Input]:
    """The photographs with their masks, paired as ``run`` pairs a folder's; every one must have its mask."""
    from .pairs import find_pictures, name_key, plan

    if images is None:
        raise UsageError("--images DIR is missing", "name a folder of photographs, and their masks with --masks DIR")
    if not images.is_dir():
        raise UsageError(f"--images {images} is no folder", "name one that holds photographs")
    planned = plan(images, masks or images, output)
    if problem := next((job.problem for job in planned.jobs if job.problem), ""):
        raise UsageError(problem + ("" if masks else ", or name the masks' folder with --masks"))
    for text in planned.notes:
        console.note(text)
    from ..report.inputs import Input

    own = truth == IMAGES
    if truth and not own and not Path(truth).is_dir():
        raise UsageError(f"--truth {truth} is no folder", "name one with true pictures, or say `--truth images`")
    true = find_pictures(Path(truth)).by_key() if truth and not own else {}
    inputs = []
    for job in planned.jobs:
        assert job.mask is not None
        right = job.image if own else next(iter(true.get(name_key(Path(job.name)), [])), None)
        if truth and right is None:
            raise UsageError(f"{job.image.name} has no true picture", f"put {job.image.stem}.png into {truth}")
        inputs.append(Input(job.image, job.mask, right))
    return inputs


# --- what is written beside the results, and printed of them --------------------------------------------------------


def _finish(results: dict[str, Any], output: Path, as_json: bool) -> int:
    """Write ``report.html`` and ``report.md``, print the results and what to take, and return the exit code."""
    from ..report import html, tables
    from ..report.recommend import recommend
    from ..report.results import RESULTS_FILE
    from ..system.files import atomic_write

    written = [output / tables.MARKDOWN_FILE, output / RESULTS_FILE]
    with atomic_write(written[0]) as temporary:
        temporary.write_text(tables.markdown(results), encoding="utf-8", newline="\n")
    if problem := html.how_to_render(output):
        console.note(problem)
    else:
        written.insert(0, html.write(results, output))
    bad = [row for row in results["configurations"] if row["status"] != "ok"]
    code = PartialFailure.exit_code if bad else 0
    if as_json:
        console.print_json(results, code)
    else:
        console.print_table([_row(row) for row in results["configurations"]])
        print("\nmedian of one picture; peak memory of its process; PSNR in the hole in dB, 200 where equal\n")
        for row in bad:
            console.note(f"{row['id']}: {row['status']}: {row['reason']}")
        for each in recommend(results):
            print(f"{each.title}:", *each.sentences, sep="\n  ")
        for path in written:
            print(f"saved {path}")
    if bad:
        total = len(results["configurations"])
        console.print_error(PartialFailure(f"{len(bad)} of {total} configurations were not measured"))
    return code


def _row(row: Mapping[str, Any]) -> dict[str, Any]:
    if row["status"] != "ok":
        return {"configuration": row["id"], "status": row["status"]}
    against = {f"vs {name}": row["accuracy"][f"against_{name}"] for name in ("reference", "truth")}
    return {
        "configuration": row["id"],
        "status": row["status"],
        "median_ms": row["latency"]["stages"]["total"]["median_ms"],
        "peak_bytes": row["memory"]["peak_host_bytes"],
        **{name: figures and figures["hole_psnr_db"] for name, figures in against.items()},
    }
