"""Finds the training pictures: in a folder, by a JSON-lines list, or in WebDataset shards.

It looks at names only; whether a file is a picture is found out when it is read, and ``samples`` passes over
those that are not.
"""

from __future__ import annotations

import json
import os
import posixpath
from pathlib import Path

from ..errors import BundleError, MachineError, UsageError
from ..imaging.decoding import SUFFIXES
from ..system.files import safe_join
from .pictures import Pictures, Place
from .shards import expand, index_shard

Pair = tuple[Place, Place | None]
_SPECIAL = frozenset("\0\\:")  # to this system or to another; ``safe_join`` knows what they may be


def open_pictures(source: str | os.PathLike[str], masks: str | os.PathLike[str] | None = None) -> Pictures:
    """The pictures of ``source`` in an order that depends on the names alone.

    Args:
        source: a folder, searched with its sub-folders, hidden ones left out; a ``.jsonl`` list; a ``.tar`` shard, a
            pattern of shards such as ``shards-{000..009}.tar``, or a folder whose only pictures are in shards.
        masks: a folder with masks for a folder of pictures: ``a/b.png`` there belongs to ``a/b.jpg`` here.

    Raises:
        UsageError: the source is of none of these kinds, holds no picture, or is wrong in itself (a line of the list
            that is no JSON or leaves the list's folder, a damaged shard); ``masks`` does not go with it.
        MachineError: something is missing, or may not be read.
    """
    source, shown = os.fspath(source), Path(source)
    files = expand(source) if source.endswith(".tar") and not shown.exists() else [source]
    if masks is not None and not shown.is_dir():
        raise UsageError(f"a folder of masks goes with a folder of pictures only: {source} names its masks itself")
    if shown.is_dir():
        pairs = _folder(shown, None if masks is None else Path(masks))
    elif len(files) == 1 and not shown.exists():
        raise MachineError(f"there is no {source}: name a folder, a .jsonl list or .tar shards")
    elif source.endswith(".jsonl"):
        pairs = _list(shown)
    elif source.endswith(".tar"):
        pairs = [pair for file in files for pair in index_shard(file)]
    else:
        raise UsageError(f"{source} is neither a folder, a .jsonl list nor .tar shards: name one of these")
    if not pairs:
        raise UsageError(f"{source} holds no picture: they end in {', '.join(SUFFIXES)}")
    return Pictures(source, [picture for picture, _ in pairs], [mask for _, mask in pairs])


def _folder(root: Path, masks: Path | None) -> list[Pair]:
    if masks is not None and not masks.is_dir():
        raise MachineError(f"there is no folder of masks {masks}: check the path")
    if masks is not None and masks.samefile(root):
        raise UsageError(f"{masks} holds the pictures themselves: put the masks into a folder of their own")
    names = _search(root, (*SUFFIXES, ".tar"), masks)
    shards = [name for name in names if name.lower().endswith(".tar")]
    if shards and len(shards) < len(names):
        raise UsageError(f"{root} holds pictures and .tar shards: name one kind, as in {root / shards[0]}")
    if shards and masks is not None:
        raise UsageError(f"{root} holds shards, which hold their masks (KEY.mask.png): leave out the folder of masks")
    if shards:
        return [pair for name in shards for pair in index_shard(os.path.join(root, name))]
    by_stem: dict[str, str] = {}
    for name in [] if masks is None else _search(masks, SUFFIXES, None):
        stem = os.path.splitext(name)[0]
        if stem in by_stem:
            raise UsageError(f"{masks} holds {by_stem[stem]} and {name}, two masks of one name: remove one")
        by_stem[stem] = name
    found = [by_stem.get(os.path.splitext(name)[0]) for name in names]
    if masks is not None and names and not any(found):
        raise UsageError(f"no mask in {masks} has the name of a picture in {root}: a/b.png belongs to a/b.jpg")
    return [(_file(root, name), _mask(masks, mask)) for name, mask in zip(names, found, strict=True)]


def _search(root: Path, suffixes: tuple[str, ...], left_out: Path | None) -> list[str]:
    """Files below ``root`` by their ending, relative to it, sorted; links to folders are not followed."""

    def unreadable(error: OSError) -> None:
        raise MachineError(f"cannot read folder {error.filename} ({error.strerror}): check its rights") from error

    skipped = None if left_out is None else os.path.realpath(left_out)
    names = []
    for folder, folders, files in os.walk(root, onerror=unreadable):
        inner = [f for f in folders if not f.startswith(".")]
        folders[:] = [f for f in inner if os.path.realpath(os.path.join(folder, f)) != skipped]
        inside = os.path.relpath(folder, root)
        for file in files:
            if os.path.splitext(file)[1].lower() in suffixes and not file.startswith("."):
                names.append(file if inside == "." else f"{inside}/{file}")
    return sorted(names)


def _list(path: Path) -> list[Pair]:
    """Lines of JSON, each with "image" and maybe "mask"; other keys are nobody's business here."""
    pairs: list[Pair] = []
    inside: set[str] = set()
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    pairs.append(_line(line, path.parent, inside, f"{path}:{number}"))
    except OSError as error:
        raise MachineError(f"cannot read {path}: {error.strerror}: check it with `ls -l {path}`") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text ({error.reason}): write one JSON object a line") from error
    return pairs


def _line(line: str, root: Path, inside: set[str], where: str) -> Pair:
    example = '{"image": "a.jpg", "mask": "a.png"}'
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where}: no JSON ({error}): write a line as {example}") from None
    names = [entry.get("image"), entry.get("mask")] if isinstance(entry, dict) else []
    if not names or not isinstance(names[0], str) or not isinstance(names[1], str | None):
        raise UsageError(f'{where}: "image" must be a path, and "mask" one or left out: write a line as {example}')
    try:
        for name in names:
            if name is not None:
                _check_inside(root, name, inside)
    except BundleError:
        raise UsageError(
            f"{where}: {name!r} leaves the list's folder {root}: give paths relative to it, of files inside it"
        ) from None
    return _file(root, names[0]), _mask(root, names[1])


def _check_inside(root: Path, name: str, inside: set[str]) -> None:
    """``safe_join``, but every folder is followed once and then in ``inside``: a list may have a million lines."""
    folder, last = posixpath.split(name)
    if folder and folder not in inside:
        safe_join(root, folder)
        inside.add(folder)
    if last in ("", ".", "..") or not _SPECIAL.isdisjoint(last) or os.path.islink(os.path.join(root, name)):
        safe_join(root, name)


def _file(root: Path, name: str) -> Place:
    return Place(name, os.path.join(root, name))


def _mask(root: Path | None, name: str | None) -> Place | None:
    return None if root is None or name is None else _file(root, name)
