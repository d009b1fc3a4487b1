"""``moebius-edge report``: bundles, runtimes and settings compared on the same pictures and noise.

The grid, the measuring and the page are ``..report``'s. ``report merge`` puts the results of several machines together.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from ..errors import PartialFailure, UsageError
from . import console
from .report_output import present, print_results

if TYPE_CHECKING:
    from ..bundle.bundle import Bundle
    from ..report.grid import Choices, Configuration
    from ..report.inputs import Input

MERGE = "merge"
IMAGES = "images"  # as --truth: the images themselves
_SIZES = {"": 1, "B": 1, "K": 10**3, "M": 10**6, "G": 10**9}
T = TypeVar("T")
Several = list[str] | None


def report(
    bundles: Annotated[
        list[str], typer.Argument(metavar="BUNDLE...", help="Folders, or 'tiny'; or: merge A.json B.json")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Where the report is kept.")],
    images: Annotated[Path | None, typer.Option(metavar="DIR", help="The photographs.")] = None,
    masks: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Their masks; default photo_mask.png beside photo.jpg.")
    ] = None,
    truth: Annotated[
        str, typer.Option(metavar="DIR|images", help="True pictures by the same names; or the images are the truth.")
    ] = "",
    runtime: Annotated[Several, typer.Option(metavar="NAME,...", help="Runtimes to compare, as of run.")] = None,
    device: Annotated[Several, typer.Option(metavar="NAME,...", help="Devices to compare.")] = None,
    steps: Annotated[
        Several, typer.Option(metavar="N,...", help="Step counts to compare; default the bundle's.")
    ] = None,
    scheduler: Annotated[Several, typer.Option(metavar="NAME,...", help="ddim, dpm++2m.")] = None,
    guidance: Annotated[Several, typer.Option(metavar="X,...", help="Guidance; default the bundle's.")] = None,
    cache_interval: Annotated[
        Several, typer.Option(metavar="N,...", help="Reuse of deep features, as of run; default 1, none.")
    ] = None,
    start: Annotated[
        Several, typer.Option(metavar="NAME,...", help="image, prefill, noise; default the bundle's.")
    ] = None,
    preset: Annotated[Several, typer.Option(metavar="NAME,...", help="Presets of run beside them: fast.")] = None,
    baseline: Annotated[
        Several,
        typer.Option(metavar="NAME,...", help="telea, navier-stokes, torch, or a .toml file of an ONNX model."),
    ] = None,
    reference: Annotated[
        str, typer.Option(metavar="BUNDLE|torch", help="What accuracy is measured against; default float32.")
    ] = "",
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Of the noise.")] = 0,
    runs: Annotated[int, typer.Option(min=1, metavar="N", help="Timed passes over all photographs.")] = 5,
    warmup: Annotated[int, typer.Option(min=0, metavar="N", help="Passes before them.")] = 1,
    sustained: Annotated[
        float, typer.Option(min=0.0, metavar="MINUTES", help="Then go on for so long: cold against soaked.")
    ] = 0,
    max_latency_ms: Annotated[
        float | None, typer.Option(min=0.0, metavar="MS", help="What the recommendation must keep.")
    ] = None,
    min_psnr: Annotated[float | None, typer.Option(metavar="DB", help="The same, in the hole.")] = None,
    max_memory: Annotated[str, typer.Option(metavar="SIZE", help="The same, such as 2GB.")] = "",
    force: Annotated[bool, typer.Option("--force", help="Measure everything again.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print results.json.")] = False,
) -> int:
    """Compare bundles, runtimes and settings: latency, memory, energy and accuracy on the same photographs.

    Options with NAME,... take several values, by commas or repeated; every combination is measured, each in a
    process of its own. What was measured is kept: run the same command again to go on after an interruption.
    """
    limits = {"max_latency_ms": max_latency_ms, "min_psnr_db": min_psnr, "max_memory_bytes": _bytes(max_memory)}
    if bundles[0] == MERGE:
        return _merge(bundles[1:], output, limits, force, as_json)
    axes: dict[str, Any] = {
        "runtimes": _several("runtime", runtime, str),
        "devices": _several("device", device, str),
        "steps": _several("steps", steps, int),
        "schedulers": _several("scheduler", scheduler, str),
        "guidances": _several("guidance", guidance, float),
        "cache_intervals": _several("cache-interval", cache_interval, int),
        "starts": _several("start", start, str),
        "presets": _several("preset", preset, str),
    }
    inputs = _inputs(images, masks, truth, output)
    from ..report.collect import Plan, check_output_dir, collect
    from ..report.grid import Choices
    from ..report.results import save
    from ..text import printable_values

    configurations = _configurations(
        bundles, Choices(**axes, seed=seed), _several("baseline", baseline, str), reference
    )
    check_output_dir(output, force)
    plan = Plan(configurations, inputs, seed, runs, warmup, sustained, limits)
    try:
        with console.progress() as update:

            def on_progress(label: str) -> Callable[[str, int, int], None]:
                return lambda what, done, total: update(f"{label}: {what}", done, total)

            results = printable_values(collect(plan, output, on_progress))
    except KeyboardInterrupt:
        raise console.Interrupted(
            f"interrupted; what was measured is kept in {output}: run the same command to go on"
        ) from None
    save(results, output)
    return _finish(results, output, as_json)


def _finish(results: dict[str, Any], output: Path, as_json: bool) -> int:
    """Write what is made from the results, print them, and return the exit code."""
    written = present(results, output)
    bad = [row for row in results["configurations"] if row["status"] != "ok"]
    code = PartialFailure.exit_code if bad else 0
    if as_json:
        console.print_json({**results, "exit_code": code})
    else:
        print_results(results, written)
    if bad:
        total = len(results["configurations"])
        console.error(f"{len(bad)} of {total} configurations were not measured", code, as_json=False)
    return code


def _merge(files: Sequence[str], output: Path, limits: dict[str, Any], force: bool, as_json: bool) -> int:
    from ..report.collect import check_output_dir
    from ..report.results import copy_pictures, load, merge, save

    if not files:
        raise UsageError("merge needs a results.json or more: moebius-edge report merge A.json B.json --output DIR")
    documents = [(name, load(name)) for name in files]
    folders = [path if path.is_dir() else path.parent for path in map(Path, files)]
    if any(output.resolve() == folder.resolve() for folder in folders):
        raise UsageError(f"the output {output} is one of the reports: name another with --output")
    merged = merge(documents)
    merged["limits"] |= {name: value for name, value in limits.items() if value is not None}
    check_output_dir(output, force)
    output.mkdir(parents=True, exist_ok=True)
    sources = [(folder, document) for folder, (_, document) in zip(folders, documents, strict=True)]
    if missing := copy_pictures(merged, sources, output):
        console.note(f"{console.counted(len(missing), 'picture')} not found beside their results, such as {missing[0]}")
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
        bundles += [against] if against.path not in [b.path for b in bundles] else []
    rows = [*grid(bundles, choices), *baseline_rows(baselines, bundles, choices)]
    if reference == TORCH and not any(row.kind == TORCH for row in rows):
        rows += baseline_rows([TORCH], bundles, choices)
    return with_references(rows, against)


def _inputs(images: Path | None, masks: Path | None, truth: str, output: Path) -> list[Input]:
    """The photographs with their masks, paired as ``run`` pairs a folder's; every one must have its mask."""
    if images is None:
        raise UsageError("--images DIR is missing: a folder of photographs, with --masks DIR or photo_mask.png beside")
    from .batch import plan
    from .folders import find_pictures, name_key

    if not images.is_dir():
        raise UsageError(f"--images {images} is no folder: name one that holds photographs")
    planned = plan(images, masks or images, output)
    jobs = planned.jobs
    if problem := next((job.problem for job in jobs if job.problem), ""):
        hint = "" if masks else ", or name the masks' folder with --masks"
        raise UsageError(f"{problem}{hint}")
    for text in planned.notes:
        console.note(text)
    from ..report.inputs import Input

    if truth not in ("", IMAGES) and not Path(truth).is_dir():
        raise UsageError(f"--truth {truth} is no folder: name one with true pictures, or say `--truth images`")
    found = find_pictures(Path(truth)) if truth not in ("", IMAGES) else None
    true = {} if found is None else found.by_key()
    inputs = []
    for job in jobs:
        assert job.mask is not None
        right = job.image if truth == IMAGES else next(iter(true.get(name_key(Path(job.name)), [])), None)
        if truth and right is None:
            raise UsageError(f"{job.image.name} has no true picture: put {job.image.stem}.png into {truth}")
        inputs.append(Input(job.image, job.mask, right))
    return inputs


def _several(name: str, given: Sequence[str] | None, kind: Callable[[str], T]) -> tuple[T, ...]:
    """The values of an option that was given several times, or with commas; each once."""
    words = [word.strip() for text in given or () for word in text.split(",") if word.strip()]
    try:
        return tuple(dict.fromkeys(map(kind, words)))
    except ValueError:
        what = "whole numbers" if kind is int else "numbers"
        raise UsageError(f"--{name} {','.join(words)} is no list of {what}: write such as --{name} 4,8") from None


def _bytes(text: str) -> int | None:
    """Of 2GB or 500M; None for nothing. A bare number might be meant as MB and read as bytes, so it is refused."""
    if not text:
        return None
    found = re.fullmatch(r"([0-9.]+) *([KMG])B?", text, re.IGNORECASE)
    if found is None:
        raise UsageError(f"--max-memory {text} is no size: write such as 2GB or 500MB")
    try:
        return int(float(found[1]) * _SIZES[found[2].upper()])
    except ValueError:
        raise UsageError(f"--max-memory {text} is no size: write such as 2GB or 500MB") from None
