"""Which mask belongs to which image, and where each result goes: decided, and checked, before any work.

It looks at names, rights and the first bytes of files; whether a picture is whole is found out when it is read.
"""

from __future__ import annotations

import os
import shlex
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..errors import MachineError, MoebiusError, UsageError
from . import console
from .folders import Found, Key, find_pictures

MASK_ENDING = "_mask"


@dataclass(frozen=True)
class Job:
    """One image, its mask and its result; ``problem`` says why a pair of a folder cannot be processed.

    ``name`` is what messages call the image: its path below the folder, or its file name.
    """

    image: Path
    mask: Path | None
    output: Path
    name: str
    problem: str = ""


@dataclass(frozen=True)
class Plan:
    """The jobs in their order, every picture that no job may overwrite, and what the user should know."""

    jobs: list[Job]
    inputs: list[Path]
    notes: list[str] = field(default_factory=list)


def plan(
    image: Path, mask: Path, output: Path | None, recursive: bool | None = None, pair_by_order: bool = False
) -> Plan:
    """The jobs for IMAGE and MASK, both files or both folders.

    ``recursive`` and ``pair_by_order`` are for folders, see ``_folders``; ``recursive`` is None where the command has
    no such option.

    Raises:
        UsageError: one is a file and the other a folder, or an output would overwrite an input or another output.
        MachineError: an input is missing, or the output's folder is missing or read-only.
    """
    for what, path in (("image", image), ("mask", mask)):
        if not os.path.exists(path):
            raise MachineError(f"there is no {what} {path}: check the path")
    if os.path.isdir(image) != os.path.isdir(mask):
        first, second = ("folder", "file") if os.path.isdir(image) else ("file", "folder")
        raise UsageError(f"{image} is a {first} but {mask} is a {second}: give two files or two folders")
    if os.path.isdir(image):
        return _folders(image, mask, output, recursive, pair_by_order)
    if recursive or pair_by_order:
        option = "--recursive" if recursive else "--pair-by order"
        raise UsageError(f"{option} is for folders, but {image} is a file: leave it out")
    return Plan([_files(image, mask, output)], [image, mask])


def _files(image: Path, mask: Path, output: Path | None) -> Job:
    default = f"{image.stem}_inpainted.png"
    result = Path(default) if output is None else output
    if os.path.isdir(result):
        result = result / default
    _check_suffix(result)
    check_writable(result)
    for what, path in (("image", image), ("mask", mask)):
        if same_file(result, [path]):
            raise UsageError(f"the output {result} is the {what} itself: name another with --output")
    return Job(image, mask, result, image.name)


def same_file(path: Path, others: Iterable[Path]) -> Path | None:
    """The first of ``others`` that is the file ``path``, under whatever name and through whatever link."""
    wanted = _identity(path)
    return next((other for other in others if _identity(other) == wanted), None)


def _identity(path: Path) -> tuple[int, int] | str:
    """Equal for two paths exactly if they lead to one file; of a file that does not exist, to one place."""
    try:
        found = os.stat(path)
        return found.st_dev, found.st_ino
    except OSError:
        return os.path.realpath(path)


def _check_suffix(path: Path) -> None:
    from ..imaging.pictures import OUTPUT_FORMATS

    if path.suffix.lower() not in OUTPUT_FORMATS:
        what = f"extension {path.suffix}" if path.suffix else "no extension"
        raise UsageError(f"output {path} has {what}: use one of {', '.join(OUTPUT_FORMATS)}")


def check_writable(path: Path) -> None:
    """Fail in milliseconds where writing ``path`` would fail after minutes of work."""
    parent = path.parent
    if not os.path.isdir(parent):
        make = shlex.join(["mkdir", "-p", str(parent)])
        raise MachineError(f"cannot write {path}, there is no folder {parent}: run `{make}`")
    _check_replaceable(path)
    try:  # asking for rights would say yes on a read-only file system, and always to root
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise MachineError(f"cannot write to {parent} ({reason}): name an output elsewhere") from error


def _check_replaceable(path: Path) -> None:
    """Raise where ``path`` has a name that is too long, or is there and cannot be replaced."""
    from ..system.files import check_name

    check_name(path)
    if os.path.exists(path) and not os.path.isfile(path):
        raise UsageError(f"output {path} is no file: name another")
    if os.path.exists(path) and not os.access(path, os.W_OK):
        raise MachineError(f"cannot write {path}, it is write-protected: name another output")


def _folders(images: Path, masks: Path, output: Path | None, recursive: bool | None, by_order: bool) -> Plan:
    """The jobs of two folders, or of one that holds both images and masks.

    With ``recursive`` the folders below them are searched too, and results keep their place below ``output``. With
    ``by_order`` the first image goes with the first mask, and so on, whatever their names.
    """
    if output is None:
        raise UsageError(f"{images} is a folder: name one for the results with --output DIR")
    if os.path.exists(output) and not os.path.isdir(output):
        raise UsageError(f"output {output} is a file: IMAGE is a folder, so name a folder")
    for folder in (images, masks):
        if os.path.exists(output) and os.path.samefile(output, folder):
            raise UsageError(f"the output folder {output} holds the input: name another with --output")
    check_writable(output / "any.png" if os.path.isdir(output) else output)

    shared = os.path.samefile(images, masks)
    found = find_pictures(images, bool(recursive), [output, masks])
    candidates = found if shared else find_pictures(masks, bool(recursive), [output, images])
    hint = "" if recursive is None else "; add --recursive"
    notes = found.notes(hint)
    if not found.pictures:
        because = f" ({'; '.join(notes)})" if notes else ""
        raise UsageError(f"folder {images} holds no images{because}: put PNG, JPEG, TIFF or other pictures into it")
    if not shared:
        notes += candidates.notes(hint)
    if by_order:
        jobs = _by_order(found, candidates, output, shared)
        notes.append(f"paired by order: {jobs[0].name} with {jobs[0].mask}, and so on")
    else:
        jobs = _by_name(found, candidates, output, shared)
        if not shared and (unused := _unused(found, candidates)):
            notes.append(f"{console.counted(len(unused), 'mask')} without an image: {console.listed(unused)}")
    inputs = [*found.pictures, *candidates.pictures]
    _check_outputs(jobs, inputs)
    return Plan([_checked(job) for job in jobs], inputs, notes)


def _by_name(images: Found, masks: Found, output: Path, shared: bool) -> list[Job]:
    """A job for each name of an image: photo.jpg goes with photo.png or photo_mask.png at the same place."""
    found, candidates = images.by_key(), masks.by_key()
    if shared:  # what is another's mask is no image
        found = {
            (place, stem): paths
            for (place, stem), paths in found.items()
            if not (stem.endswith(MASK_ENDING) and (place, stem.removesuffix(MASK_ENDING)) in found)
        }
    return [_named_job(key, paths, candidates, images, masks, output, shared) for key, paths in found.items()]


def _named_job(
    key: Key,
    paths: list[Path],
    candidates: dict[Key, list[Path]],
    images: Found,
    masks: Found,
    output: Path,
    shared: bool,
) -> Job:
    named = candidates.get((key[0], key[1] + MASK_ENDING), [])
    same = [] if shared else candidates.get(key, [])
    fitting = same or named
    image, problem = paths[0], ""
    if len(paths) > 1:
        problem = _share_a_name(paths)
    elif len(fitting) > 1:
        problem = f"{image.name} has {len(fitting)} masks, {' and '.join(p.name for p in fitting)}: keep one"
    elif not fitting:
        wanted = f"{image.stem}{MASK_ENDING}.png"
        wanted = wanted if shared else f"{image.stem}.png or {wanted}"
        folder = masks.folder / image.relative_to(images.folder).parent
        problem = f"{image.name} has no mask: put {wanted} into {folder}"
    return Job(image, fitting[0] if fitting else None, _result(images, image, output), images.name(image), problem)


def _by_order(images: Found, masks: Found, output: Path, shared: bool) -> list[Job]:
    """The first image with the first mask, in the order of their names, and so on."""
    if shared:
        raise UsageError(f"--pair-by order needs two folders, but {images.folder} is both: put the masks into another")
    if len(images.pictures) != len(masks.pictures):
        raise UsageError(
            f"--pair-by order needs as many masks as images, but {images.folder} holds {len(images.pictures)} pictures "
            f"and {masks.folder} {len(masks.pictures)}: add or remove some"
        )
    keys = images.by_key()
    return [
        Job(
            image,
            mask,
            _result(images, image, output),
            images.name(image),
            "" if len(twins := keys[images.key(image)]) == 1 else _share_a_name(twins),
        )
        for image, mask in zip(images.pictures, masks.pictures, strict=True)
    ]


def _result(images: Found, image: Path, output: Path) -> Path:
    return output / image.relative_to(images.folder).with_name(f"{image.stem}.png")


def _share_a_name(paths: list[Path]) -> str:
    return f"{' and '.join(path.name for path in paths)} share a name: rename one"


def _unused(images: Found, masks: Found) -> list[str]:
    """Names of pictures in the mask folder that fit no image: mostly a misspelt name."""
    fitting = {key for place, stem in images.by_key() for key in ((place, stem), (place, stem + MASK_ENDING))}
    return [masks.name(path) for path in masks.pictures if masks.key(path) not in fitting]


def _check_outputs(jobs: list[Job], inputs: list[Path]) -> None:
    """Raise ``UsageError`` where a result would replace a picture of the input folders, or another result."""
    taken = {_identity(path): path for path in inputs}
    results: dict[tuple[int, int] | str, Job] = {}
    for job in jobs:
        identity = _identity(job.output)
        if identity in taken:
            raise UsageError(
                f"the output {job.output} is a link to the input {taken[identity]}, which would be lost: remove the "
                "link, or name another folder with --output"
            )
        other = results.setdefault(identity, job)
        if other is not job and not job.problem:
            raise UsageError(
                f"the results of {other.name} and {job.name} would be one file, {os.path.realpath(job.output)}: "
                "remove the link, or name another folder with --output"
            )
    for folder in sorted({job.output.parent for job in jobs}):
        existing = next(place for place in (folder, *folder.parents) if os.path.lexists(place))
        if not os.path.isdir(existing):
            raise UsageError(f"{existing} is not a folder, no result can be written into it: name another --output")
        check_writable(existing / "any.png")


def _checked(job: Job) -> Job:
    """A result that cannot be written is the problem of that pair alone."""
    try:
        _check_replaceable(job.output)
    except MoebiusError as error:
        return replace(job, problem=job.problem or str(error))
    return job
