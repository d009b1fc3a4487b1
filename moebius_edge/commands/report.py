"""``moebius-edge report``: bundles, runtimes and settings compared on the same pictures and noise.

The grid, the measuring and the page are ``..report``'s. ``report merge`` puts the results of several machines together.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Context, Option

from ..errors import PartialFailure, UsageError
from ..options import PRESETS, SCHEDULERS, STARTS
from ..text import counted
from . import console
from .shared import AsJson, Seed

if TYPE_CHECKING:
    from ..bundle.bundle import Bundle
    from ..report.grid import Choices, Configuration
    from ..report.inputs import Input

MERGE = "merge"
IMAGES = "images"  # as --truth: the images themselves
_SIZES = {"K": 10**3, "M": 10**6, "G": 10**9}
_AXES: dict[str, tuple[str, type]] = {  # of ``Choices``: the option, and what its values are
    "runtimes": ("runtime", str),
    "devices": ("device", str),
    "steps": ("steps", int),
    "schedulers": ("scheduler", str),
    "guidances": ("guidance", float),
    "cache_intervals": ("cache_interval", int),
    "starts": ("start", str),
    "presets": ("preset", str),
}
Several = list[str] | None


def report(
    context: Context,
    bundles: Annotated[list[str], Argument(metavar="BUNDLE...", help="Folders, or 'tiny'; or: merge A.json B.json")],
    output: Annotated[Path, Option("--output", "-o", metavar="DIR", help="Where the report is kept.")],
    images: Annotated[Path | None, Option(metavar="DIR", help="The photographs.")] = None,
    masks: Annotated[Path | None, Option(metavar="DIR", help="Their masks; default photo_mask.png beside.")] = None,
    truth: Annotated[str, Option(metavar="DIR|images", help="True pictures by the same names, or the images.")] = "",
    runtime: Annotated[Several, Option(metavar="NAME,...", help="Runtimes to compare, as of run.")] = None,
    device: Annotated[Several, Option(metavar="NAME,...", help="Devices to compare.")] = None,
    steps: Annotated[Several, Option(metavar="N,...", help="Step counts to compare; default the bundle's.")] = None,
    scheduler: Annotated[Several, Option(metavar="NAME,...", help=f"{', '.join(SCHEDULERS)}.")] = None,
    guidance: Annotated[Several, Option(metavar="X,...", help="Guidance; default the bundle's.")] = None,
    cache_interval: Annotated[Several, Option(metavar="N,...", help="Reuse of deep features; default 1, none.")] = None,
    start: Annotated[Several, Option(metavar="NAME,...", help=f"{', '.join(STARTS)}; default the bundle's.")] = None,
    preset: Annotated[Several, Option(metavar="NAME,...", help=f"Of run, beside them: {', '.join(PRESETS)}.")] = None,
    baseline: Annotated[
        Several, Option(metavar="NAME,...", help="telea, navier-stokes, torch, or a .toml file of an ONNX model.")
    ] = None,
    reference: Annotated[str, Option(metavar="BUNDLE|torch", help="What accuracy is against; default float32.")] = "",
    seed: Seed = 0,
    runs: Annotated[int, Option(min=1, metavar="N", help="Timed passes over all photographs.")] = 5,
    warmup: Annotated[int, Option(min=0, metavar="N", help="Passes before them.")] = 1,
    sustained: Annotated[float, Option(min=0.0, metavar="MINUTES", help="Then go on: cold against soaked.")] = 0,
    max_latency_ms: Annotated[float | None, Option(min=0.0, metavar="MS", help="The recommendation keeps it.")] = None,
    min_psnr: Annotated[float | None, Option(metavar="DB", help="The same, in the hole.")] = None,
    max_memory: Annotated[str, Option(metavar="SIZE", help="The same, such as 2GB.")] = "",
    force: Annotated[bool, Option("--force", help="Measure everything again.")] = False,
    as_json: AsJson = False,
) -> int:
    """Compare bundles, runtimes and settings: latency, memory, energy and accuracy on the same photographs.

    Options with NAME,... take several values, by commas or repeated; every combination is measured, each in a
    process of its own. What was measured is kept: run the same command again to go on after an interruption.
    """
    limits = {"max_latency_ms": max_latency_ms, "min_psnr_db": min_psnr, "max_memory_bytes": _bytes(max_memory)}
    if bundles[0] == MERGE:
        return _merge(bundles[1:], output, limits, force, as_json)
    axes: dict[str, Any] = {
        field: _several(option, context.params[option], kind) for field, (option, kind) in _AXES.items()
    }
    baselines = _several("baseline", baseline, str)
    inputs = _inputs(images, masks, truth, output)
    from ..report.collect import Plan, check_output_dir, collect
    from ..report.grid import Choices
    from ..report.results import save
    from ..text import printable_values

    choices = Choices(**axes, seed=seed)
    configurations = _configurations(bundles, choices, baselines, reference)
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
    from ..report.results import copy_pictures, load, merge, save

    if not files:
        example = "moebius-edge report merge A.json B.json --output DIR"
        raise UsageError("merge needs a results.json or more", example)
    documents = [(name, load(name)) for name in files]
    folders = [path if path.is_dir() else path.parent for path in map(Path, files)]
    if any(output.resolve() == folder.resolve() for folder in folders):
        raise UsageError(f"the output {output} is one of the reports", "name another with --output")
    merged = merge(documents)
    merged["limits"] |= {name: value for name, value in limits.items() if value is not None}
    check_output_dir(output, force)
    output.mkdir(parents=True, exist_ok=True)
    sources = [(folder, document) for folder, (_, document) in zip(folders, documents, strict=True)]
    if missing := copy_pictures(merged, sources, output):
        console.note(f"{counted(len(missing), 'picture')} not found beside their results, such as {missing[0]}")
    save(merged, output)
    return _finish(merged, output, as_json)


def _configurations(
    names: Sequence[str], choices: Choices, baselines: Sequence[str], reference: str
) -> list[Configuration]:
    from ..bundle.bundle import Bundle
    from ..report.baselines import baseline_rows
    from ..report.grid import TORCH, grid, with_references

    bundles = [Bundle.load(name, verify=False) for name in names]  # each process verifies its own
    against: Bundle | str | None = reference or None
    if reference and reference != TORCH:
        against = Bundle.load(reference, verify=False)
        bundles += [against] if against.path not in [bundle.path for bundle in bundles] else []
    rows = [*grid(bundles, choices), *baseline_rows(baselines, bundles, choices)]
    if reference == TORCH and not any(row.kind == TORCH for row in rows):
        rows += baseline_rows([TORCH], bundles, choices)
    return with_references(rows, against)


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


def _several(name: str, given: Sequence[str] | None, kind: type) -> tuple[Any, ...]:
    """The values of an option that was given several times, or with commas; each once."""
    words = [word.strip() for text in given or () for word in text.split(",") if word.strip()]
    try:
        return tuple(dict.fromkeys(map(kind, words)))
    except ValueError:
        what = "whole numbers" if kind is int else "numbers"
        option = "--" + name.replace("_", "-")
        problem = f"{option} {','.join(words)} is no list of {what}"
        raise UsageError(problem, f"write such as {option} 4,8") from None


def _bytes(text: str) -> int | None:
    """Of 2GB or 500M; None for nothing. A bare number might be meant as MB and read as bytes, so it is refused."""
    if not text:
        return None
    size = re.fullmatch(r"(\d+\.?\d*) *([KMG])B?", text, re.IGNORECASE)
    if size is None:
        raise UsageError(f"--max-memory {text} is no size", "write such as 2GB or 500MB")
    return int(float(size[1]) * _SIZES[size[2].upper()])


# --- what is written beside the results, and printed of them --------------------------------------------------------


def _finish(results: dict[str, Any], output: Path, as_json: bool) -> int:
    """Write ``report.md`` and ``report.html``, print the results, and return the exit code."""
    from ..report.html import write_report
    from ..report.results import RESULTS_FILE

    pages, how_to_render = write_report(results, output)
    written = [*pages, output / RESULTS_FILE]
    if how_to_render:
        console.note(how_to_render)
    bad = [row for row in results["configurations"] if row["status"] != "ok"]
    code = PartialFailure.exit_code if bad else 0
    if as_json:
        console.print_json(results, code)
    else:
        console.print_table([_row(row) for row in results["configurations"]])
        print("\nmedian of one picture; peak memory of its process; PSNR in the hole in dB, 200 where equal")
        for row in bad:
            console.note(f"{row['id']}: {row['status']}: {row['reason']}")
        for path in written:
            print(f"saved {path}")
    if bad:
        total = len(results["configurations"])
        console.print_error(PartialFailure(f"{len(bad)} of {total} configurations were not measured"))
    return code


def _row(row: Mapping[str, Any]) -> dict[str, Any]:
    if row["status"] != "ok":
        return {"configuration": row["id"], "status": row["status"]}
    psnrs_db = {}
    for name in ("reference", "truth"):
        figures = row["accuracy"][f"against_{name}"]
        psnrs_db[f"vs {name}"] = None if figures is None else figures["hole_psnr_db"]
    return {
        "configuration": row["id"],
        "status": row["status"],
        "median_ms": row["latency"]["stages"]["total"]["median_ms"],
        "images/s": row["latency"]["images_per_second"],
        "peak_bytes": row["memory"]["peak_host_bytes"],
        **psnrs_db,
    }
