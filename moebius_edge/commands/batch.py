"""Which mask belongs to which image, and where each result goes: decided, and checked, before any work.

It looks at names and rights only; whether a file is a picture is found out when it is read.
"""

from __future__ import annotations

import os
import shlex
import tempfile
from dataclasses import dataclass
from pathlib import Path

from ..errors import MachineError, UsageError

MASK_ENDING = "_mask"


@dataclass(frozen=True)
class Job:
    """One image, its mask and its result; ``problem`` says why a pair of a folder cannot be processed."""

    image: Path
    mask: Path | None
    output: Path
    problem: str = ""


def plan(image: Path, mask: Path, output: Path | None) -> list[Job]:
    """The jobs for IMAGE and MASK, both files or both folders.

    Raises:
        UsageError: one is a file and the other a folder, or the output would overwrite an input.
        MachineError: an input is missing, or the output's folder is missing or read-only.
    """
    for what, path in (("image", image), ("mask", mask)):
        if not os.path.exists(path):
            raise MachineError(f"there is no {what} {path}: check the path")
    if os.path.isdir(image) != os.path.isdir(mask):
        first, second = ("folder", "file") if os.path.isdir(image) else ("file", "folder")
        raise UsageError(f"{image} is a {first} but {mask} is a {second}: give two files or two folders")
    return _folders(image, mask, output) if os.path.isdir(image) else [_files(image, mask, output)]


def _files(image: Path, mask: Path, output: Path | None) -> Job:
    default = f"{image.stem}_inpainted.png"
    result = Path(default) if output is None else output
    if os.path.isdir(result):
        result = result / default
    _check_suffix(result)
    check_writable(result)
    for what, path in (("image", image), ("mask", mask)):
        if os.path.exists(result) and os.path.samefile(result, path):
            raise UsageError(f"the output {result} is the {what} itself: name another with --output")
    return Job(image, mask, result)


def _check_suffix(path: Path) -> None:
    from ..imaging import OUTPUT_FORMATS

    if path.suffix.lower() not in OUTPUT_FORMATS:
        what = f"extension {path.suffix}" if path.suffix else "no extension"
        raise UsageError(f"output {path} has {what}: use one of {', '.join(OUTPUT_FORMATS)}")


def check_writable(path: Path) -> None:
    """Fail in milliseconds where writing ``path`` would fail after minutes of work."""
    parent = path.parent
    if not os.path.isdir(parent):
        make = shlex.join(["mkdir", "-p", str(parent)])
        raise MachineError(f"cannot write {path}, there is no folder {parent}: run `{make}`")
    if os.path.exists(path) and not os.path.isfile(path):
        raise UsageError(f"output {path} is no file: name another")
    if os.path.exists(path) and not os.access(path, os.W_OK):
        raise MachineError(f"cannot write {path}, it is write-protected: name another output")
    try:  # asking for rights would say yes on a read-only file system, and always to root
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise MachineError(f"cannot write to {parent} ({reason}): name an output elsewhere") from error


def _folders(images: Path, masks: Path, output: Path | None) -> list[Job]:
    from ..decoding import SUFFIXES

    if output is None:
        raise UsageError(f"{images} is a folder: name one for the results with --output DIR")
    if os.path.exists(output) and not os.path.isdir(output):
        raise UsageError(f"output {output} is a file: IMAGE is a folder, so name a folder")
    for folder in (images, masks):
        if os.path.exists(output) and os.path.samefile(output, folder):
            raise UsageError(f"the output folder {output} holds the input: name another with --output")
    check_writable(output / "any.png" if os.path.isdir(output) else output)

    shared = os.path.samefile(images, masks)
    found = by_stem(images, masks_too=not shared)
    candidates = by_stem(masks, masks_too=True)
    if not found:
        raise UsageError(f"folder {images} holds no images: they end in {', '.join(SUFFIXES)}")
    return [_job(stem, files, candidates, masks, output, shared) for stem, files in sorted(found.items())]


def by_stem(folder: Path, masks_too: bool) -> dict[str, list[Path]]:
    """The pictures in ``folder`` itself by stem; without ``masks_too`` none that is another's mask."""
    from ..decoding import SUFFIXES  # a single file is read whatever its name

    found: dict[str, list[Path]] = {}
    try:
        paths = sorted(folder.iterdir())
    except OSError as error:
        raise MachineError(f"cannot read folder {folder} ({error.strerror}): check its rights") from error
    for path in paths:
        if path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file():
            found.setdefault(path.stem, []).append(path)
    if masks_too:
        return found
    return {
        s: f
        for s, f in found.items()
        if not (s.endswith(MASK_ENDING) and s.removesuffix(MASK_ENDING) in found)
    }


def _job(
    stem: str, images: list[Path], masks: dict[str, list[Path]], folder: Path, output: Path, shared: bool
) -> Job:
    named = masks.get(stem + MASK_ENDING, [])
    same = [] if shared else masks.get(stem, [])
    fitting = same or named
    problem = ""
    if len(images) > 1:
        problem = f"{' and '.join(p.name for p in images)} share a name: rename one"
    elif len(fitting) > 1:
        problem = (
            f"{images[0].name} has {len(fitting)} masks, {' and '.join(p.name for p in fitting)}: keep one"
        )
    elif not fitting:
        wanted = f"{stem}{MASK_ENDING}.png" if shared else f"{stem}.png or {stem}{MASK_ENDING}.png"
        problem = f"{images[0].name} has no mask: put {wanted} into {folder}"
    return Job(images[0], fitting[0] if fitting else None, output / f"{stem}.png", problem)


def unused_masks(jobs: list[Job], masks: Path) -> list[str]:
    """Names of pictures in the mask folder that fit no image: mostly a misspelt name."""
    if all(job.image.parent == masks for job in jobs):  # one folder for both: the rest are images
        return []
    fitting = {stem for job in jobs for stem in (job.image.stem, job.image.stem + MASK_ENDING)}
    return [
        path.name for stem, paths in by_stem(masks, True).items() if stem not in fitting for path in paths
    ]
