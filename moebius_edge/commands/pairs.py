"""Which mask belongs to which image, and where each result goes: decided by names, and checked, before any work."""

from __future__ import annotations

import os
import shlex
import tempfile
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from ..errors import MachineError, UsageError
from ..text import counted
from . import console

MASK_ENDING = "_mask"

# A picture's place below its folder and its name without the suffix, both in Unicode's composed form: the same name
# may be written with other code points on another system.
Key = tuple[str, str]


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


@dataclass(frozen=True)
class PictureFolder:
    """The pictures of ``path`` in order, and a sentence each on the files and on the folders that were left out."""

    path: Path
    pictures: list[Path]
    notes: list[str]

    def key(self, picture: Path) -> Key:
        return name_key(picture.relative_to(self.path))

    def by_key(self) -> dict[Key, list[Path]]:
        keys: dict[Key, list[Path]] = {}
        for picture in self.pictures:
            keys.setdefault(self.key(picture), []).append(picture)
        return keys


def plan(image: Path, mask: Path, output: Path | None, recursive: bool = False, pair_by: str = "name") -> Plan:
    """The jobs for IMAGE and MASK, both files or both folders.

    With ``recursive`` the folders below a folder are searched too, and results keep their place below ``output``. With
    ``pair_by`` "order" the first image of a folder goes with the first mask, and so on, whatever their names.

    Raises:
        UsageError: one is a file and the other a folder, or an output would overwrite an input or another output.
        MachineError: an input is missing, or the output's folder is missing or read-only.
    """
    for what, path in (("image", image), ("mask", mask)):
        if not os.path.exists(path):
            raise MachineError(f"there is no {what} {path}", "check the path")
    kinds = ["folder" if os.path.isdir(path) else "file" for path in (image, mask)]
    if kinds[0] != kinds[1]:
        raise UsageError(f"{image} is a {kinds[0]} but {mask} is a {kinds[1]}", "give two files or two folders")
    if kinds[0] == "folder":
        return _plan_folders(image, mask, output, recursive, pair_by)
    if recursive or pair_by == "order":
        option = "--recursive" if recursive else "--pair-by order"
        raise UsageError(f"{option} is for folders, but {image} is a file", "leave it out")
    return Plan([_plan_files(image, mask, output)], [image, mask])


def _plan_files(image: Path, mask: Path, output: Path | None) -> Job:
    from ..imaging.pictures import OUTPUT_FORMATS

    default = Path(f"{image.stem}_inpainted.png")
    result = default if output is None else output / default if os.path.isdir(output) else output
    if result.suffix.lower() not in OUTPUT_FORMATS:
        what = f"extension {result.suffix}" if result.suffix else "no extension"
        raise UsageError(f"output {result} has {what}", f"use one of {', '.join(OUTPUT_FORMATS)}")
    check_writable(result)
    for what, path in (("image", image), ("mask", mask)):
        if same_file(result, [path]):
            raise UsageError(f"the output {result} is the {what} itself", "name another with --output")
    return Job(image, mask, result, image.name)


def same_file(path: Path, others: Iterable[Path]) -> Path | None:
    """The first of ``others`` that is the file ``path``, under whatever name and through whatever link."""
    identity = _identity(path)
    return next((other for other in others if _identity(other) == identity), None)


def _identity(path: Path) -> tuple[int, int] | str:
    """Equal for two paths exactly if they lead to one file; of a file that does not exist, to one place."""
    try:
        status = os.stat(path)
        return status.st_dev, status.st_ino
    except OSError:
        return os.path.realpath(path)


def check_writable(path: Path) -> None:
    """Fail in milliseconds where writing ``path`` would fail after minutes of work."""
    if not os.path.isdir(path.parent):
        make = shlex.join(["mkdir", "-p", str(path.parent)])
        raise MachineError(f"cannot write {path}, there is no folder {path.parent}", f"run `{make}`")
    check_replaceable(path)
    try:  # asking for rights would say yes on a read-only file system, and always to root
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise MachineError(f"cannot write to {path.parent} ({reason})", "name an output elsewhere") from error


def check_replaceable(path: Path) -> None:
    """Raise where ``path`` has a name that is too long, or is there and cannot be replaced."""
    from ..system.files import check_name

    check_name(path)
    if os.path.exists(path) and not os.path.isfile(path):
        raise UsageError(f"output {path} is no file", "name another")
    if os.path.exists(path) and not os.access(path, os.W_OK):
        raise MachineError(f"cannot write {path}, it is write-protected", "name another output")


def _plan_folders(images: Path, masks: Path, output: Path | None, recursive: bool, pair_by: str) -> Plan:
    """The jobs of two folders, or of one that holds both images and masks."""
    if output is None:
        raise UsageError(f"{images} is a folder", "name one for the results with --output DIR")
    if os.path.exists(output) and not os.path.isdir(output):
        raise UsageError(f"output {output} is a file", "IMAGE is a folder, so name a folder")
    if same_file(output, (images, masks)):
        raise UsageError(f"the output folder {output} holds the input", "name another with --output")
    check_writable(output / "any.png" if os.path.isdir(output) else output)
    photos = find_pictures(images, recursive, [output, masks])
    candidates = None if os.path.samefile(images, masks) else find_pictures(masks, recursive, [output, images])
    if not photos.pictures:
        because = f" ({'; '.join(photos.notes)})" if photos.notes else ""
        raise UsageError(f"folder {images} holds no images{because}", "put PNG, JPEG, TIFF or other pictures into it")
    notes = photos.notes + (candidates.notes if candidates else [])
    pairs = (_by_order if pair_by == "order" else _by_name)(photos, candidates, notes)
    jobs, keys = [], photos.by_key()
    for image, mask, problem in pairs:
        if len(shared := keys[photos.key(image)]) > 1:  # they would have one result
            problem = f"{' and '.join(path.name for path in shared)} share a name: rename one"
        inside = image.relative_to(images)
        jobs.append(Job(image, mask, output / inside.with_suffix(".png"), str(inside), problem))
    inputs = photos.pictures + (candidates.pictures if candidates else [])
    taken = {_identity(path): path for path in inputs}
    for job in jobs:
        other = None if job.problem else taken.setdefault(_identity(job.output), job.output)
        if other not in (None, job.output):
            problem = f"the output {job.output} leads to {other}, which would be lost"
            raise UsageError(problem, "remove the link, or name another folder with --output")
    return Plan(jobs, inputs, notes)


Pair = tuple[Path, Path | None, str]  # image, mask, and why it has none


def _by_name(images: PictureFolder, masks: PictureFolder | None, notes: list[str]) -> list[Pair]:
    """Each image with the mask of its own name, or of its name and ``_mask``, at the same place.

    ``masks`` is None where they lie beside the images; ``notes`` gets one on masks without an image.
    """
    folder = masks or images
    photos, candidates = images.by_key(), folder.by_key()
    pairs: list[Pair] = []
    fitting: set[Key] = set()
    for image in images.pictures:
        place, stem = images.key(image)
        if masks is None and stem.endswith(MASK_ENDING) and (place, stem.removesuffix(MASK_ENDING)) in photos:
            continue  # it is the mask of another
        keys = [(place, stem)] if masks is not None else []
        keys.append((place, stem + MASK_ENDING))
        fitting.update(keys)
        found, problem = next((candidates[key] for key in keys if key in candidates), []), ""
        if len(found) > 1:
            problem = f"{image.name} has {len(found)} masks, {' and '.join(path.name for path in found)}: keep one"
        elif not found:
            names = " or ".join(f"{image.stem}{key[1][len(stem) :]}.png" for key in keys)
            where = folder.path / image.relative_to(images.path).parent
            problem = f"{image.name} has no mask: put {names} into {where}"
        pairs.append((image, found[0] if found else None, problem))
    unused = [path for key, paths in candidates.items() if key not in fitting for path in paths]
    if masks is not None and unused:
        names = console.listed([str(path.relative_to(masks.path)) for path in unused])
        notes.append(f"{counted(len(unused), 'mask')} without an image: {names}")
    return pairs


def _by_order(images: PictureFolder, masks: PictureFolder | None, notes: list[str]) -> list[Pair]:
    """The first image with the first mask, in the order of their names, and so on."""
    if masks is None:
        problem = f"--pair-by order needs two folders, but {images.path} is both"
        raise UsageError(problem, "put the masks into another")
    counts = len(images.pictures), len(masks.pictures)
    if counts[0] != counts[1]:
        held = f"{images.path} holds {counts[0]} pictures and {masks.path} {counts[1]}"
        raise UsageError(f"--pair-by order needs as many masks as images, but {held}", "add or remove some")
    notes.append(f"paired by order: {images.pictures[0].name} with {masks.pictures[0]}, and so on")
    return [(image, mask, "") for image, mask in zip(images.pictures, masks.pictures, strict=True)]


def name_key(path: Path) -> Key:
    """The key of a picture by its path below its folder."""
    return unicodedata.normalize("NFC", path.parent.as_posix()), unicodedata.normalize("NFC", path.stem)


def find_pictures(folder: Path, recursive: bool = False, leave_out: Sequence[Path] = ()) -> PictureFolder:
    """The pictures in ``folder``, known by their suffix; hidden ones do not count.

    With ``recursive`` folders and links to them are followed, each once; those in ``leave_out`` are neither searched
    nor named.
    """
    from ..imaging.decoding import SUFFIXES

    pictures: list[Path] = []
    skipped: dict[str, list[str]] = {"file": [], "sub-folder": []}
    seen = {os.path.realpath(path) for path in (folder, *leave_out)}
    for current, below, files in os.walk(folder, onerror=_raise_unreadable, followlinks=True):
        new = {os.path.realpath(os.path.join(current, name)): name for name in sorted(below) if name[0] != "."}
        below[:] = [name for path, name in new.items() if path not in seen]
        seen.update(new)
        if not recursive:
            skipped["sub-folder"] += below
            below.clear()
        for path in (Path(current, name) for name in sorted(files) if name[0] != "."):
            if path.suffix.lower() in SUFFIXES and path.is_file():  # no broken link, no pipe
                pictures.append(path)
            else:
                skipped["file"].append(str(path.relative_to(folder)))
    notes = [
        f"{counted(len(names), what)} of {folder} skipped: {console.listed(names)}"
        for what, names in skipped.items()
        if names
    ]
    return PictureFolder(folder, sorted(pictures, key=lambda path: path.relative_to(folder).parts), notes)


def _raise_unreadable(error: OSError) -> NoReturn:
    raise MachineError(f"cannot read folder {error.filename} ({error.strerror})", "check its rights") from error
